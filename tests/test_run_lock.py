"""One run at a time: a second one is told who was first, and death releases the lock."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import run_lock
from tests.push_client import ROOT

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
# Says so when it has the lock, and keeps it until its stdin ends; refused, it ends as an entry point does.
HOLDER = f"""
import os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from charseq2seq.console import run
from charseq2seq.files import run_lock

def main(argv):
    with run_lock(Path(sys.argv[1])):
        if len(sys.argv) > 2:
            subprocess.Popen(sys.argv[2:], stdin=sys.stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print("locked", flush=True)
        sys.stdin.read()
    return 0

sys.exit(run(main))
"""


def start(path: Path, *command: str) -> subprocess.Popen[str]:
    """A run that wants the lock of `path`, and once it has it starts a command that outlives it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def locked(path: Path, *command: str) -> subprocess.Popen[str]:
    """A run that has the lock."""
    process = start(path, *command)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a model is to be written."""
    return tmp_path / "model.pth"


def test_a_second_run_is_told_who_was_first_and_since_when(path: Path) -> None:
    first = locked(path)
    for _ in range(2):  # asking does not erase who holds it
        second = start(path)
        output, log = second.communicate()
        assert (second.returncode, output) == (75, "")
        said = rf"another run is writing {path} \(process {first.pid} since {TIME}\); wait for it"
        assert re.search(said, log), log
        assert "Traceback" not in log
    first.communicate()
    assert first.returncode == 0
    with run_lock(path):
        pass


def test_a_kill_releases_the_lock(path: Path) -> None:
    first = locked(path)
    with pytest.raises(SuiteError), run_lock(path):
        pass
    first.kill()
    first.communicate()
    second = locked(path)
    second.communicate()
    assert second.returncode == 0


def test_a_child_of_the_first_run_does_not_keep_the_lock(path: Path) -> None:
    first = locked(path, sys.executable, "-c", "import sys; sys.stdin.read()")
    first.kill()
    first.wait()
    with run_lock(path):
        pass
    first.communicate()  # ends the child


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
        with pytest.raises(SuiteError, match=r"its holder (is not recorded|cannot be read)") as refusal, run_lock(path):
            pass
    assert refusal.value.exit_code == ExitCode.LOCKED


def test_a_path_that_cannot_be_is_refused_and_not_made(path: Path) -> None:
    path.write_bytes(b"")
    for name, said in {
        "missing/model.pth": "the folder does not exist; create it",
        "missing/deeper/model.pth": "the folder does not exist; create it",
        "model.pth/model.pth": "a part of the path is a file",
        "x" * 300: "the file name is too long",
    }.items():
        with pytest.raises(SuiteError, match=said) as refusal, run_lock(path.parent / name):
            pass
        assert refusal.value.exit_code == ExitCode.CANNOT_CREATE
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pth"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else(path: Path) -> None:
    path.parent.chmod(0o755)
    become_nobody = f"import filelock; os.chdir({str(path.parent)!r}); os.setuid(65534)\n"
    script = HOLDER.replace("sys.exit", become_nobody + "sys.exit")
    command = [sys.executable, "-c", script, "model.pth"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 73, "not 75: nobody holds it"
    assert "permission is denied" in done.stderr
