"""A file is there whole or not at all, and one run at a time writes a model: a second one is told who was first."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.errors import ExitCode, SuiteError, TerminatedError
from charseq2seq.files import atomic_write, atomic_write_bytes, atomic_write_text, leftovers, resume_path, run_lock
from tests.push_client import ROOT

Nobody = Callable[[], AbstractContextManager[None]]
OLD = b"what stood there before"

as_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can mount, or become another user")

# Runs in a process of its own: argv is the path to write to; what was refused goes to stdout.
HEAD = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from charseq2seq.console import run
from charseq2seq.errors import SuiteError
from charseq2seq.files import *
path = Path(sys.argv[1])
"""


def child(script: str, path: Path, *prefix: str) -> subprocess.Popen[str]:
    """A process that runs a script on a path."""
    pipe = subprocess.PIPE
    command = [*prefix, sys.executable, "-c", HEAD + script, str(path)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


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


@pytest.mark.parametrize(
    "failure", [ValueError("no"), RuntimeError("no"), KeyboardInterrupt(), SuiteError("no", ExitCode.BAD_DATA)]
)
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
    assert re.fullmatch(rf"fsync model\.pth\.[0-9a-f]{{8}}\.tmp replace fsync {path.parent.name}", " ".join(events))


# --- death


def test_death_while_writing_leaves_the_old_file_and_a_leftover(path: Path) -> None:
    script = (
        "with atomic_write(path) as file:\n file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child(script, path).communicate()
    assert path.read_bytes() == OLD
    assert [left.read_bytes() for left in leftovers(path.parent)] == [b"half"]
    with run_lock(path):
        assert not leftovers(path.parent) and path.read_bytes() == OLD


def test_a_run_removes_what_a_killed_one_left_and_nothing_else(path: Path) -> None:
    stale = {"model.pth.0123abcd.tmp", "model.resume.pth.ffffffff.tmp"}
    kept = {"model.pth", "other.pth.0123abcd.tmp", "old.model.pth.0123abcd.tmp", "model.pth.tmp", "model.pth.mine.tmp"}
    for name in stale | kept:
        path.with_name(name).write_bytes(OLD)
    with run_lock(path):
        assert {entry.name for entry in path.parent.iterdir()} == kept | {"model.pth.lock"}


# --- a disk that refuses


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
    said = child(ON_A_FULL_DISK, path, "unshare", "--mount").communicate()[0].splitlines()
    kept = f"kept 74 cannot write {path}: No space left on device; check the disk and its free space, and run again"
    kept += " (any earlier file there is untouched)."
    assert set(said) == {"written", kept}
    assert [line == kept for line in said[::2]] == [True] * 5 + [False] * 4, "20,000 bytes are five pages"
    assert said[1] == kept
    assert said[-1] == "written"
    only(path)


def test_a_folder_of_somebody_else(path: Path, nobody: Nobody) -> None:
    said = r"cannot write model\.pth: Permission denied; choose a path that you may write to"
    with nobody(), pytest.raises(SuiteError, match=said) as refusal:
        atomic_write_bytes(path.name, b"new")
    assert refusal.value.exit_code == ExitCode.CANNOT_CREATE
    with nobody(), pytest.raises(SuiteError, match="Permission denied") as refusal, run_lock(Path(path.name)):
        pass
    assert refusal.value.exit_code == ExitCode.CANNOT_CREATE, "another run does not hold it"
    only(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/deeper/model.pth", "No such file or directory; choose a path"),
        ("model.pth/model.pth", "Not a directory; choose a path"),
        ("folder", "Is a directory; choose a path"),
        ("x" * 300, "File name too long; choose a path"),
    ],
)
def test_a_path_that_cannot_be_is_refused_and_nothing_is_made(name: str, said: str, path: Path) -> None:
    (path.parent / "folder").mkdir()
    for refused in (lambda: atomic_write_bytes(path.parent / name, b"new"), run_lock(path.parent / name).__enter__):
        with pytest.raises(SuiteError, match=said) as refusal:
            refused()
        assert refusal.value.exit_code == ExitCode.CANNOT_CREATE
    (path.parent / "folder").rmdir()
    only(path)


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


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_stays_a_link_and_the_file_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "model.pth", tmp_path / "elsewhere" / "model.pth"
    link.symlink_to(file)
    for content in (b"the first", b"the second"):  # the file is not there yet, or is
        atomic_write_bytes(link, content)
        assert link.is_symlink() and file.read_bytes() == link.read_bytes() == content
    stale = file.with_name("model.pth.01234567.tmp")
    stale.touch()
    with run_lock(link):
        assert list(file.parent.iterdir()) == [file]


# --- a file system that cannot flush or lock


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_a_file_is_written_where_nothing_can_be_flushed(code: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(code, os.strerror(code))))
    atomic_write_bytes(path, b"new")
    only(path, b"new")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(SuiteError, match=r"Input/output error; check the disk"):  # a disk that fails is told
        atomic_write_bytes(path, b"newer")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_locked_a_run_goes_on_and_says_so(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(code, os.strerror(code))))
    temporary = path.with_name("model.pth.01234567.tmp")
    temporary.touch()
    with run_lock(path) as warning:
        assert re.search(r"pth\.lock cannot be locked \(.*\): .* no other run writes \S*model\.pth\.$", warning)
        assert temporary.exists(), "another run may be writing it"


# --- the lock


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
# Says so when it has the lock, and keeps it until its stdin ends; refused, it ends as an entry point does.
HOLDER = """
def main(argv):
    with run_lock(path):
        print("locked", flush=True)
        sys.stdin.read()
    return 0

sys.exit(run(main))
"""


def test_a_second_run_is_told_who_was_first_and_since_when(path: Path) -> None:
    first = child(HOLDER, path)
    assert first.stdout is not None and first.stdout.readline() == "locked\n"
    for _ in range(2):  # asking does not erase who holds it
        second = child(HOLDER, path)
        output, log = second.communicate()
        assert (second.returncode, output) == (75, "")
        said = rf"another run is writing {path} \(process {first.pid} since {TIME}\); wait for it"
        assert re.search(said, log), log
        assert "Traceback" not in log
    first.communicate()
    assert first.returncode == 0
    with run_lock(path):
        pass


def test_the_lock_is_this_models_only_and_is_given_back(path: Path) -> None:
    with run_lock(path), run_lock(path.with_name("another.pth")), pytest.raises(SuiteError) as refusal, run_lock(path):
        pass
    assert refusal.value.exit_code == ExitCode.LOCKED
    with pytest.raises(ValueError, match="a defect"), run_lock(path):
        raise ValueError("a defect")
    with run_lock(path):
        pass
    said = path.with_name("model.pth.lock").read_text()
    assert re.fullmatch(rf"process {os.getpid()} since {TIME}", said), "the last holder"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_holder_that_is_not_recorded_is_still_a_holder(content: bytes, path: Path) -> None:
    with run_lock(path):
        path.with_name("model.pth.lock").write_bytes(content)
        with pytest.raises(SuiteError, match="its holder is not recorded") as refusal, run_lock(path):
            pass
    assert refusal.value.exit_code == ExitCode.LOCKED


@pytest.mark.parametrize(
    ("model", "resume"),
    [
        ("transformer_model.pth", "transformer_model.resume.pth"),
        ("folder/a.b.pt", "folder/a.b.resume.pt"),
        ("model", "model.resume.pth"),
    ],
)
def test_where_the_resume_state_lies(model: str, resume: str) -> None:
    assert resume_path(Path(model)) == Path(resume)
