"""push_to_huggingface.py as a program: help, wrong arguments, terminals, signals, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.errors import ExitCode
from tests.hub.server import WRITE, HubServer
from tests.push_client import REPO, ROOT, Publisher, start_and_signal

PROGRAM = [sys.executable, str(ROOT / "push_to_huggingface.py")]


def test_help_and_wrong_arguments_import_neither_torch_nor_the_hubs_client() -> None:
    script = """
import sys
import push_to_huggingface
for argv in (["--help"], ["--bogus"], ["--timeout", "-1"], ["--create_pr", "--tag", "v1"]):
    try:
        push_to_huggingface.main(argv, {})
    except SystemExit as end:
        print(end.code, sorted({"torch", "huggingface_hub", "numpy", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["0 []", "2 []", "2 []", "2 []"]


def test_all_that_is_wrong_with_a_command_line_is_told_at_once(alice: Publisher) -> None:
    wrong = ["--timeout", "0", "--only_if_better", "nan", "--token", "a", "--token_file", "b"]
    done = alice.push(*wrong, "--check", "--dry_run", "--create_pr", "--tag", "v1")
    assert done.code == ExitCode.USAGE and "5 problems:" in done.log
    for flag in ("--timeout must", "--only_if_better must", "--token and", "--check and", "--tag"):
        assert flag in done.log
    (alice.home / "nightly.args").write_text("--check --username alice  # may I?\n")
    assert alice.push("@nightly.args").code == ExitCode.OK


def test_libraries_that_are_missing_or_too_old_are_named(alice: Publisher) -> None:
    bare = subprocess.run([sys.executable, "-S", *PROGRAM[1:], "--check"], capture_output=True, text=True, check=False)
    assert bare.returncode == ExitCode.UNAVAILABLE and "Traceback" not in bare.stderr
    assert "needs torch, numpy, safetensors, matplotlib, yaml, jinja2, huggingface_hub" in bare.stderr
    assert "pip install -r requirements_transformer.txt" in bare.stderr
    old = alice.home / "old" / "huggingface_hub-0.36.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: huggingface_hub\nVersion: 0.36.0\n")
    done = alice.push("--check", PYTHONPATH=str(old.parent))
    assert done.code == ExitCode.UNAVAILABLE and "huggingface_hub 1.0 or newer, and this one is 0.36.0" in done.log


def test_a_terminal_gets_a_progress_bar_with_bytes(alice: Publisher, hub: HubServer, folder: Path) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": terminal, "text": True, "cwd": alice.home}
    process = subprocess.Popen([*PROGRAM, "--no_verify"], env=hub.environment(alice.home, WRITE), **options)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
        while piece := os.read(controller, 65536):
            shown += piece
    os.close(controller)
    out, _ = process.communicate()
    assert process.returncode == 0, shown
    assert out == f"{hub.endpoint}/{REPO}\n", "the result alone is on stdout"
    text = shown.decode()
    assert "100%|" in text and "B/s" in text
    assert text.startswith("token: "), "nobody at a terminal needs the date before each line"
    assert text.endswith(f"verified: the repository is public\r\npushed: {hub.endpoint}/{REPO}\r\n")


@pytest.mark.parametrize(
    ("method", "path", "number", "code"),
    [
        ("GET", "whoami", signal.SIGINT, ExitCode.INTERRUPTED),
        ("POST", "/commit/", signal.SIGTERM, ExitCode.TERMINATED),
    ],
)
def test_a_signal_ends_a_push_without_a_traceback_or_a_folder(
    method: str, path: str, number: signal.Signals, code: ExitCode, alice: Publisher, hub: HubServer, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start_and_signal(hub, method, path, number, lambda: alice.start(TMPDIR=str(temporary)))
    _, log = process.communicate()
    assert process.returncode == code and "Traceback" not in log, log
    assert not list(temporary.iterdir()) and (alice.home / "transformer_model.pth").exists()


def test_a_reader_of_stdout_that_went_away_ends_it(alice: Publisher) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = alice.hub.environment(alice.home, WRITE)
    done = subprocess.run([*PROGRAM, "--check"], stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert done.returncode == ExitCode.OUTPUT_CLOSED and b"Traceback" not in done.stderr


def test_folders_and_disks_that_cannot_be_written_are_told(alice: Publisher, hub: HubServer) -> None:
    (alice.home / "thesis").mkdir()
    (alice.home / "thesis" / "thesis.txt").write_text("mine")
    done = alice.push("--output_dir", "thesis")
    assert done.code == ExitCode.CANNOT_CREATE and "thesis holds other files (thesis.txt" in done.log
    environment = hub.environment(alice.home, WRITE) | {"PYTHONDONTWRITEBYTECODE": "1"}
    for blocks, flags, code, said in (  # files of at most 8 blocks, or none: as on a full disk
        (8, ["--output_dir", "out"], ExitCode.IO_ERROR, "cannot write out/"),
        (0, [], ExitCode.CANNOT_CREATE, "No usable temporary directory found .* set TMPDIR"),
    ):
        limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$0" "$@"', *PROGRAM, *flags]
        full = subprocess.run(limited, cwd=alice.home, env=environment, capture_output=True, text=True, check=False)
        assert full.returncode == code and re.search(said, full.stderr), full.stderr
    assert not hub.repos
