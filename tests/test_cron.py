"""Started by nobody, watched by nobody: locks, logs, closed and full streams, full disks, signals, exit codes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest

from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.errors import ExitCode
from tests.train_client import ROOT, TINY, Trainee, finish, read_until, see, see_refused
from tests.warm_client import WITHOUT_POWERS, WarmClient

SHORT = ["--max_steps", "4", "--eval_interval", "2"]
LONG = ["--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "1000000", "--eval_interval", "50"]
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


# --- one run at a time


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_goes(client: WarmClient, user: Trainee) -> None:
    first = user.start(*LONG)
    read_until(first, " step ")
    second = client.train(user, *SHORT)
    says = rf"another run is writing transformer_model\.pth \(process {first.pid} since {TIME}\); wait for it or choose"
    see_refused(second, ExitCode.LOCKED, says)
    assert client.train(user, *SHORT, "--model_path", "other.pth").code == 0, "another model is another matter"
    assert client.run(user.home, "--mode", "evaluate", "--data_path", "text.txt").code == ExitCode.NO_INPUT
    first.kill()
    first.wait()
    assert client.train(user, *SHORT).code == 0, "the lock dies with its holder"


# --- the log and the results


def test_without_a_terminal_every_line_is_timed_and_plain(client: WarmClient, user: Trainee) -> None:
    for arguments in (["--log_interval", "1"], ["--resume", "absent.pth"]):
        done = client.train(user, *SHORT, *arguments)
        lines = done.log.removesuffix("\n").split("\n")
        assert len(lines) > 5 or done.code == ExitCode.NO_INPUT
        for line in lines:
            assert re.fullmatch(rf"{TIME}( .*\S)?", line) and line.isprintable(), line


def test_on_a_terminal_there_is_a_progress_bar(user: Trainee) -> None:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = user.start("--data_path", "text.txt", *TINY, *SHORT, redirected=f"2>{os.ttyname(terminal)}", TERM="xterm")
    shown = os.read(master, 4096)
    os.close(terminal)  # the program has it open
    with contextlib.suppress(OSError):  # the terminal is gone
        while chunk := os.read(master, 4096):
            shown += chunk
    os.close(master)
    done, seen = finish(process), shown.decode()
    assert done.code == 0, seen
    assert re.search(r"\rstep \d .*█.* 100%, loss \d\.\d+ nats/char, [\d,]+ chars/s, 0s left", seen), seen
    assert "step 4: validation" in seen and not re.search(r"\d\d:\d\d:\d\d", seen), "a person needs no clock"
    assert "\r" not in done.out and "\x1b" not in done.out


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("<&- >&- 2>&-", ExitCode.OK), pytest.param(">/dev/full", ExitCode.IO_ERROR, marks=pytest.mark.slow)],
)
def test_training_ends_well_with_streams_closed_or_full(redirected: str, code: ExitCode, user: Trainee) -> None:
    done = finish(user.start("--data_path", "text.txt", *TINY, *SHORT, redirected=redirected))
    assert done.code == code, done.log
    assert load_checkpoint(user.model).metrics["steps"] == 4 and load_resume_state(user.resume)["finished"] is True


@pytest.mark.skipif(WITHOUT_POWERS is None, reason="root without setpriv may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_before_training(client: WarmClient, user: Trainee) -> None:
    (user.home / "theirs").mkdir(mode=0o555)
    for flag in ("--model_path", "--log_file"):
        done = client.train(user, *SHORT, flag, "theirs/x")
        see(done, ExitCode.CANNOT_CREATE, r"cannot write theirs/x\S*: Permission denied; choose a path")
        assert "step" not in done.log and not list((user.home / "theirs").iterdir())


# --- signals


def test_a_second_ctrl_c_leaves_at_once_without_damage(client: WarmClient, user: Trainee) -> None:
    assert client.train(user, *SHORT).code == 0
    model, resume = user.model.read_bytes(), user.resume.read_bytes()
    wide = ["--d_model", "256", "--d_ff", "1024", "--num_decoder_layers", "8", "--batch_size", "256"]
    process = user.start(*LONG, *wide, "--precision", "fp32", "--log_interval", "1")  # many seconds a step
    read_until(process, " step ")
    time.sleep(0.5)  # between two steps one signal would be enough
    process.send_signal(signal.SIGINT)
    read_until(process, "SIGINT: finishing this step and saving; Ctrl-C again leaves at once.")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == ExitCode.INTERRUPTED and "interrupted." in done.log
    assert (user.model.read_bytes(), user.resume.read_bytes()) == (model, resume)
    assert not list(user.home.glob("*.tmp"))


# --- all of it at once


@pytest.mark.slow
def test_a_little_chaos_does_no_damage(user: Trainee) -> None:
    little = ["--kills", "3", "--full_disk", "1", "--pushes", "0", "--steps", "60"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "campaigns" / "chaos.py"), *little],
        env=user.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = {row.split(" | ")[0].strip("| "): row for row in done.stdout.splitlines() if row.startswith("| ")}
    assert table["kills"].startswith("| kills | 3 | ") and "0 files unreadable" in table["kills"]
    assert table["jobs ended after kills"].endswith("| 0 files differ from the straight run's |")
    assert table["full disks"].endswith("| 0 losses |") and table["outputs searched for tokens"].endswith("| 0 finds |")


# --- exit codes


def test_every_exit_code_is_expected_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    compared = re.compile(r"code\w* == (?:ExitCode\.)?(\w+)|see\w*\(.+, ExitCode\.(\w+)")
    expected = {name for found in compared.findall(tests) for name in found}
    assert {code for code in ExitCode if not {code.name, str(int(code))} & expected} == set()
