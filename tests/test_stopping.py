"""What ends a run early: a signal in every phase of the program, and a pause that is no training time."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import pkgutil
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.console import STOP_SIGNALS, run_with_report
from charseq2seq.errors import ExitCode
from charseq2seq.training import progress
from charseq2seq.training.optimization import learning_rate_factor
from tests.train_client import ROOT, TINY, Trainee, assert_same, contents, finish, read_until
from tests.warm_client import WarmClient
from train_transformer import main

TRAIN = ["--data_path", "text.txt", *TINY, "--max_steps", "8", "--eval_interval", "4", "--device", "cpu"]
EVALUATE, GENERATE = ["--mode", "evaluate", "--data_path", "text.txt"], ["--mode", "generate"]
UNTOUCHED, UNFINISHED, FINISHED = "nothing", "a resume state", "a model"

# Each phase of a command: the function in which it is, the calls of it that come before, and what is left behind.
PHASES: dict[str, tuple[list[str], str, int, str]] = {
    "preparing the default text": (["--max_steps", "8"], "data.prepare:prepare", 0, UNTOUCHED),
    "reading the text": (TRAIN, "charseq2seq.training.run:load_corpus", 0, UNTOUCHED),
    "building the model": (TRAIN, "charseq2seq.training.trainer:build_optimizers", 0, UNTOUCHED),
    "the first step": (TRAIN, "charseq2seq.training.trainer:summed_loss", 0, UNFINISHED),
    "a step": (TRAIN, "charseq2seq.training.trainer:summed_loss", 3, UNFINISHED),
    "an evaluation": (TRAIN, "charseq2seq.training.trainer:evaluate", 0, UNFINISHED),
    "the last evaluation": (TRAIN, "charseq2seq.training.trainer:evaluate", 2, UNFINISHED),
    "the sample": (TRAIN, "charseq2seq.generation:TextGenerator.stream", 2, FINISHED),
    "reading the model": (EVALUATE, "charseq2seq.checkpoint:load_checkpoint", 0, FINISHED),
    "evaluating": (EVALUATE, "charseq2seq.training.evaluation:evaluate", 0, FINISHED),
    "generating": (GENERATE, "charseq2seq.generation:TextGenerator.stream", 0, FINISHED),
}


@pytest.fixture(scope="module")
def straight(client: WarmClient, tmp_path_factory: pytest.TempPathFactory) -> Trainee:
    """A user with a run that was never stopped."""
    trainee = Trainee(tmp_path_factory.mktemp("straight"))
    assert client.run(trainee.home, *TRAIN).code == 0
    return trainee


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """A program in this process sets the process's handlers."""
    earlier = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n == signal.SIGTERM else pytest.mark.slow) for n in STOP_SIGNALS]
)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_every_phase_before_it_is_over(
    phase: str, number: signal.Signals, user: Trainee, straight: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, where, before, left = PHASES[phase]
    ordinary, calls = pkgutil.resolve_name(where), []

    def endless(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= before:
            return ordinary(*arguments, **options)
        os.kill(os.getpid(), number)
        for _ in range(100_000):
            time.sleep(0.001)
        raise AssertionError("the phase came to its end")

    if command in (EVALUATE, GENERATE):
        user.model.write_bytes(straight.model.read_bytes())
    with handlers_kept(), monkeypatch.context() as patched:
        patched.chdir(user.home)
        patched.setattr(sys, "argv", ["train_transformer.py", *command])
        patched.setattr(progress, "_PATIENCE", 0.05)
        patched.setattr(where.replace(":", "."), endless)
        code = run_with_report(main)
    assert code == (ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
    assert user.model.exists() == (left == FINISHED)
    assert user.resume.exists() == (left == UNFINISHED or (command, left) == (TRAIN, FINISHED))
    assert not list(user.home.glob("*.tmp"))
    if left == UNFINISHED:
        monkeypatch.chdir(user.home)
        assert main(TRAIN) == 0
        both = [[contents(of.model), contents(of.resume)] for of in (straight, user)]
        if phase == "an evaluation":  # it is made anew in a session that has made no step yet
            rows = [row for model, state in both for row in (model["metrics"]["history"][0], state["history"][0])]
            assert [math.isnan(row.pop("gradient_norm")) for row in rows] == [False, False, True, True]
            rates = [0.04 * learning_rate_factor(step / 8) for step in (3.5, 3.5, 4, 4)]
            assert [row.pop("learning_rate") for row in rows] == pytest.approx(rates)
        assert_same(both[0], both[1])


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(user: Trainee) -> None:
    child, terminal = pty.fork()  # as the leader of the terminal's session
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or tests begun with nohup would wait here for ever
        os.chdir(user.home)
        steps = ["--max_steps", "1000000", "--eval_interval", "10"]
        words = [sys.executable, str(ROOT / "train_transformer.py"), "--data_path", "text.txt", *TINY, *steps]
        os.execve(sys.executable, words, user.environment(TERM="xterm"))
    seen = b""
    with contextlib.suppress(OSError):
        while b"step 20: validation" not in seen:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == ExitCode.TERMINATED, seen.decode()
    assert contents(user.resume)["step"] >= 20 and user.model.exists()


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize("then", [contextlib.nullcontext, lambda: progress.stop_signals(True)], ids=["", "training"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_an_import_is_waited_for(
    number: signal.Signals, then: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the middle of importing torch aborts the process; the signal counts once training has begun."""
    lines = ["import os, time", f"os.kill(os.getpid(), {int(number)})", "time.sleep(0.25)", "over = True"]
    (tmp_path / "import_that_takes_a_while.py").write_text("\n".join(lines))

    def program(argv: Sequence[str] | None, report: dict[str, Any]) -> int:
        importlib.import_module("import_that_takes_a_while")
        with then():
            for _ in range(100_000):
                time.sleep(0.001)
        raise AssertionError("the program came to its end")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "import_that_takes_a_while", raising=False)
    with handlers_kept():
        code = run_with_report(program)
    assert code == (ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
    assert sys.modules["import_that_takes_a_while"].over


# --- pauses


def test_seconds_in_which_the_process_stood_still_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(progress, "_TICK", 1e6)  # nothing but this test asks for the time
    with contextlib.closing(progress.Stopwatch(5.0)) as stopwatch:
        for passed, expected in ((1.5, 6.5), (1.0, 7.5), (3600.0, 7.5), (0.25, 7.75)):
            now += passed
            assert stopwatch.seconds() == expected


@pytest.mark.slow
def test_a_paused_run_makes_the_steps_of_its_minutes(user: Trainee) -> None:
    process = user.start("--data_path", "text.txt", *TINY, "--max_minutes", "0.1", "--log_interval", "1")
    read_until(process, " step 20 (")
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # longer than the run itself
    process.send_signal(signal.SIGCONT)
    done = finish(process)
    assert done.code == 0 and done.report["training_seconds"] >= 6.0, done.log
    assert done.report["duration_seconds"] >= done.report["training_seconds"] + 6
    assert done.report["steps"] > 40, "it went on learning after the pause"
