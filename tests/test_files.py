"""A file is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.errors import ExitCode, SuiteError, TerminatedError
from charseq2seq.files import (
    atomic_write,
    atomic_write_bytes,
    atomic_write_text,
    sweep_stale_temporaries,
    write_error,
)
from tests.push_client import ROOT

OLD = b"what stood there before"

as_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can mount, or become another user")

# Runs in a process of its own: argv is the path to write to; what was refused goes to stdout.
HEAD = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from charseq2seq.files import *
from charseq2seq.errors import SuiteError
path = Path(sys.argv[1])
"""
REFUSED = """
except SuiteError as error:
    print(int(error.exit_code), error)
"""
LARGE = "try: atomic_write_bytes(path, bytes(10_000_000))"


def child(script: str, path: Path, *prefix: str) -> subprocess.Popen[str]:
    """A process that runs a script on a path."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", HEAD + script, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(script: str, path: Path, *prefix: str) -> str:
    """What a script prints; it must not fail."""
    process = child(script, path, *prefix)
    output, log = process.communicate()
    assert process.returncode == 0, log
    return output


def only(path: Path, content: bytes = OLD) -> None:
    """Assert that a folder holds one file of this content, and nothing else."""
    assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == {path.name: content}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that must not be lost."""
    (tmp_path / "model.pth").write_bytes(OLD)
    return tmp_path / "model.pth"


@given(content=st.binary(max_size=2000))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_there(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("written") / "file.bin"
    for _ in range(2):  # a new file, and one that is replaced
        atomic_write_bytes(str(path), content)
        only(path, content)


def test_text_is_utf8_with_lf(path: Path) -> None:
    atomic_write_text(path, "a\n莎🎭\r\n")
    only(path, "a\n莎🎭\r\n".encode())
    atomic_write_text(path, "caf\udce9.txt")  # how Python names a file that is not UTF-8
    only(path, b"caf?.txt")


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), SuiteError("no", ExitCode.BAD_DATA)])
def test_a_failure_while_writing_leaves_the_old_file(failure: BaseException, path: Path) -> None:
    with pytest.raises(type(failure)) as raised, atomic_write(path) as file:
        file.write(b"half of the new")
        raise failure
    assert raised.value is failure
    only(path)


def test_nothing_is_seen_before_all_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_replace(source: Any, target: Any, **options: Any) -> None:
        assert Path(source).read_bytes() == b"new"
        assert Path(target).read_bytes() == OLD
        events.append("replace")
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic_write_bytes(path, b"new")
    assert events == [f"fsync model.pth.{os.getpid()}.tmp", "replace", f"fsync {path.parent.name}"]


# --- death


@pytest.mark.parametrize("moment", ["os._exit(9)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_death_while_writing_leaves_the_old_file_and_a_stale_one_that_is_swept(moment: str, path: Path) -> None:
    process = child(f"with atomic_write(path) as file:\n    file.write(b'half'); file.flush(); {moment}", path)
    process.communicate()
    temporary = path.with_name(f"model.pth.{process.pid}.tmp")
    assert path.read_bytes() == OLD
    assert temporary.read_bytes() == b"half"
    assert sweep_stale_temporaries(path) == [temporary]
    only(path)


def test_kill_at_any_moment_leaves_a_whole_file(path: Path) -> None:
    script = "import itertools\nfor i in itertools.count(): atomic_write_bytes(path, bytes([i % 251]) * 300_000)"
    for _ in range(8):
        process = child(f"print('begun', flush=True)\n{script}", path)
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(30):  # a reader meanwhile sees one version or another, never a part
            content = path.read_bytes()
            assert content == OLD or content == content[:1] * 300_000
        process.kill()
        process.communicate()
        content = path.read_bytes()
        assert content == OLD or content == content[:1] * 300_000
        sweep_stale_temporaries(path)
        only(path, content)


def test_only_stale_temporaries_of_this_file_are_swept(path: Path) -> None:
    living = child("print('here', flush=True); sys.stdin.read()", path)
    dead = child("", path)
    dead.communicate()
    stale = [f"model.pth.{pid}.tmp" for pid in (dead.pid, os.getpid(), 10**30)]
    kept = [
        f"model.pth.{living.pid}.tmp",
        f"model.pth.{os.getppid()}.tmp",
        f"another.pth.{dead.pid}.tmp",
        f"old.model.pth.{dead.pid}.tmp",
        f"model.pth.{dead.pid}.tmp.txt",
        "model.pth.tmp",
        "model.pth.12x.tmp",
        "model.pth",
    ]
    for name in stale + kept:
        path.with_name(name).write_bytes(OLD)
    try:
        assert {swept.name for swept in sweep_stale_temporaries(str(path))} == set(stale)
    finally:
        living.kill()
        living.communicate()
    assert {entry.name for entry in path.parent.iterdir()} == set(kept)
    assert sweep_stale_temporaries(path.parent / "missing" / "model.pth") == []


# --- a disk that refuses


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_be_so_large(path: Path) -> None:
    with (
        file_size_limit(100_000),
        pytest.raises(SuiteError, match=r"larger than this system allows.*ulimit") as refusal,
    ):
        atomic_write_bytes(path, bytes(200_000))
    assert refusal.value.exit_code == ExitCode.IO_ERROR
    assert str(path) in str(refusal.value)
    only(path)


ON_A_FULL_DISK = f"""
import torch
from charseq2seq.checkpoint import load_resume_state, save_resume_state
os.system(f"mount -t tmpfs -o size=40k tmpfs {{path.parent}}")
for free in range(0, 36_864, 4096):  # tmpfs counts in pages; page 0 is the old file's
    path.write_bytes({OLD!r})
    path.with_name("filler").write_bytes(bytes(36_864 - free))
    for torch_writes in (False, True):
        try:
            if torch_writes: save_resume_state(path, {{"w": torch.ones(5000)}})
            else: atomic_write_bytes(path, bytes(20_000))
            whole = path.read_bytes() == bytes(20_000) or load_resume_state(path)["w"].sum() == 5000
            print("written" if whole else "torn")
        except SuiteError as error:
            print("kept" if path.read_bytes() == {OLD!r} else "lost", int(error.exit_code), error)
        path.write_bytes({OLD!r})
        assert len(list(path.parent.iterdir())) == 2
"""


@as_root
def test_a_full_disk(path: Path) -> None:
    said = output_of(ON_A_FULL_DISK, path, "unshare", "--mount").splitlines()
    kept = f"kept 74 cannot write {path}: the disk is full; free some space and run again"
    kept += " (any earlier file there is untouched)."
    assert set(said) == {"written", kept}
    assert [line == kept for line in said[::2]] == [True] * 5 + [False] * 4, "20,000 bytes are five pages"
    assert said[1] == kept
    assert said[-1] == "written"
    only(path)


@as_root
def test_a_read_only_disk(path: Path) -> None:
    mount = f"os.system('mount --bind {path.parent} {path.parent}; mount -o remount,ro,bind {path.parent}')\n"
    said = output_of(mount + LARGE + REFUSED, path, "unshare", "--mount")
    assert said.startswith(f"73 cannot write {path}: the file system is read-only; choose a folder")
    only(path)


@as_root
def test_a_folder_of_somebody_else(path: Path) -> None:
    path.parent.chmod(0o755)
    said = output_of("os.chdir(path.parent); os.setuid(65534); path = Path('model.pth')\n" + LARGE + REFUSED, path)
    assert said.startswith("73 cannot write model.pth: permission is denied; choose a folder you may write to")
    only(path)


def test_paths_that_cannot_be(path: Path) -> None:
    (path.parent / "folder").mkdir()
    for name, said in {
        "missing/model.pth": "the folder does not exist; create it",
        "model.pth/model.pth": "a part of the path is a file; choose another path",
        "folder": "a folder of that name is in the way; choose another path",
        "x" * 300: "the file name is too long; choose a shorter one",
    }.items():
        with pytest.raises(SuiteError, match=said) as refusal:
            atomic_write_bytes(path.parent / name, b"new")
        assert refusal.value.exit_code == ExitCode.CANNOT_CREATE
    (path.parent / "folder").rmdir()
    only(path)


def test_every_error_is_one_sentence() -> None:
    for number in [*errno.errorcode, 0, 99_999]:
        refusal = write_error(Path("/folder/model.pth"), OSError(number, "what the system said"))
        assert str(refusal).startswith("cannot write /folder/model.pth: ")
        assert "\n" not in str(refusal)
        assert refusal.exit_code in (ExitCode.IO_ERROR, ExitCode.CANNOT_CREATE)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TerminatedError])
def test_an_interrupted_archive_is_an_interruption(stop: type[KeyboardInterrupt], path: Path) -> None:
    """torch.save, which cannot close it, says that the position is unexpected."""

    class Interrupted(io.BytesIO):
        def write(self, content: Any) -> int:
            if self.tell() > 1000:
                raise stop
            return super().write(content)

    with pytest.raises(stop), atomic_write(path):
        torch.save({"weights": torch.zeros(10_000)}, Interrupted())
    only(path)


def test_other_runtime_errors_are_not_taken_for_the_disk(path: Path) -> None:
    with pytest.raises(RuntimeError, match="a defect"), atomic_write(path):
        raise RuntimeError("a defect")
    only(path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_stays_a_link_and_the_file_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "model.pth", tmp_path / "elsewhere" / "model.pth"
    link.symlink_to(file)
    for content in (b"the first", b"the second"):  # the file is not there yet, or is
        atomic_write_bytes(link, content)
        assert link.is_symlink() and file.read_bytes() == link.read_bytes() == content
    stale = file.with_name(f"model.pth.{2**22 + 1}.tmp")
    stale.touch()
    assert sweep_stale_temporaries(link) == [stale] and list(file.parent.iterdir()) == [file]
