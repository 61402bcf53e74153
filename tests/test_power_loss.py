"""What a power cut may leave of real saves: the old file or the new one, and what was saved stays saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaigns.disk_after_power_cut import Call, Disk, File, Files, Versions, read_record
from benchmarks.campaigns.watched_program import compile_library, read_folder
from tests.train_client import ROOT

watchable = sys.platform == "linux" and shutil.which("cc") is not None
pytestmark = pytest.mark.skipif(not watchable, reason="calls are watched on Linux, with a C compiler")

OLD = {"model.pth": b"old" * 5000}
# Runs in a folder; argv are another file, for the record, and which call fails.
SAVES = f"""
import ctypes, os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from charseq2seq.files import atomic_write_bytes, make_folder
record = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
ctypes.CDLL(None).watch_folder(os.fsencode(os.getcwd()), record, int(sys.argv[2]), {{errno}}, 0)
for letter in b"abc":
    atomic_write_bytes("model.pth", bytes([letter]) * 20_000)
make_folder(Path("in/side"))
atomic_write_bytes("in/side/file", b"last")
"""
Recording = tuple[list[Call], Files, int]  # calls, the folder that they left, its inode


def save(home: Path, nth: int = 0, errno: int = 0) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Make the saves over an old file, one call failing; returns how that ended, and the record."""
    folder, record = home / "folder", home / "record"
    folder.mkdir()
    (folder / "model.pth").write_bytes(OLD["model.pth"])
    command = [sys.executable, "-c", SAVES.format(errno=errno), str(record), str(nth)]
    environment = os.environ | {"LD_PRELOAD": str(compile_library(home))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False), record


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One file saved three times, and another in a new folder."""
    home = tmp_path_factory.mktemp("saves")
    (_, record), folder = save(home), home / "folder"
    calls = [*read_record(record.read_bytes(), folder), Call("end")]
    return calls, read_folder(folder), folder.stat().st_ino


def problems(recording: Recording, without: str = "", of_folders: bool = False) -> tuple[set[str], int, Files]:
    """What a cut may do, were the fsyncs of files or of folders left out; the number of disks; the last files."""
    calls, _, inode = recording
    disk, versions, found, count = Disk(OLD, inode), Versions(OLD), set(), 0
    for call in calls:
        if call.name != without or (call.inode in disk.folders) != of_folders:
            disk.apply(call)
        versions.note(call, disk)
        for files in disk.after_cut():
            found |= set(versions.problems(files))
            count += 1
    return found, count, disk.visible()


def test_no_power_cut_loses_what_was_saved(recording: Recording) -> None:
    found, count, visible = problems(recording)
    assert visible == recording[1] == {"model.pth": b"c" * 20_000, "in/side/file": b"last"}, "all is recorded"
    assert not found and count > 100


def test_a_save_without_fsync_is_found_out(recording: Recording) -> None:
    assert "model.pth is damaged" in problems(recording, "fsync")[0]
    lost = {"model.pth is an older version", "in/side/file has gone"}
    assert problems(recording, "fsync", of_folders=True)[0] == lost


def test_a_torn_file_in_all_its_forms() -> None:
    file = File(b"old", b"newer!", [Call("write", 0, 0, b"newe"), Call("write", 0, 4, b"r!")])
    torn = set(file.torn())
    assert torn >= {b"old", b"old\0\0\0", b"ned", b"newe", b"newe\0\0", b"newer", b"\0\0\0\0r!", b"newer!"}


@pytest.mark.parametrize("nth", [1, 4, 5])
def test_a_call_that_fails_leaves_the_old_file_or_the_new_one(nth: int, tmp_path: Path) -> None:
    done, _ = save(tmp_path, nth, errno=28)
    assert "No space left on device; check the disk" in done.stderr.splitlines()[-1]
    assert read_folder(tmp_path / "folder") == (OLD if nth <= 4 else {"model.pth": b"a" * 20_000})


@pytest.mark.slow
def test_the_campaign_finds_no_damage() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "campaigns" / "power_loss.py"), "--every", "150"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| a repository folder |") == 4 and "Machine: " in done.stdout
