"""The trainer in this process: its steps, its budget, when it stops and when it saves."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from charseq2seq.errors import ExitCode
from charseq2seq.options import Settings
from charseq2seq.training import optimization
from charseq2seq.training import trainer as module
from charseq2seq.training.cuda_graph import captured_where_possible
from charseq2seq.training.optimization import ADAMW_RATIO, WARMUP_FRACTION, learning_rate_factor
from charseq2seq.training.processes import Group
from charseq2seq.training.progress import Progress
from charseq2seq.training.trainer import Trainer
from tests.train_client import Trainee, contents, tiny_text, tiny_trainer

CHARACTERS = int(len(tiny_text()) * 0.9)
PER_STEP = 4 * 16  # target characters


# --- steps


def test_the_training_loss_is_the_same_however_often_it_is_read(user: Trainee) -> None:
    curves = []
    for interval in (1, 5):  # on a GPU it is read now and then
        training = tiny_trainer(user, "--max_steps", "12", "--eval_interval", "4")
        training.reading_interval = interval
        training.train()
        curves.append([point["train_nats_per_char"] for point in training.state.history])
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_a_step_s_loss_is_the_mean_over_the_batch_of_windows_that_come_next(user: Trainee) -> None:
    """And the step is that of the optimizers by its gradient: a second trainer, by hand."""
    training, by_hand = (tiny_trainer(user, "--max_steps", "12", "--precision", "fp32") for _ in range(2))
    text, mean = by_hand.corpus.ids.astype("int64"), math.nan
    for step in range(12):
        starts, source_length = by_hand.sampler.next_batch()
        source = torch.tensor([text[start - source_length : start].tolist() for start in starts.tolist()]).long()
        source = source.reshape(4, source_length)
        target = torch.tensor([text[start : start + 16].tolist() for start in starts.tolist()])
        loss = F.cross_entropy(by_hand.master(source, target).flatten(0, 1), target.flatten())
        torch.autograd.backward(loss)
        for optimizer, full in zip(by_hand.optimizers, (0.04, 0.04 * ADAMW_RATIO), strict=True):
            for options in optimizer.param_groups:
                options["lr"].fill_(full * learning_rate_factor((step + 0.5) / 12))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        training.train_step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        assert training.state.train_loss == pytest.approx(mean, abs=2e-5)
    for ours, theirs in zip(training.master.parameters(), by_hand.master.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_long_history_forgets_every_second_evaluation(user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charseq2seq.training.trainer._LONGEST_HISTORY", 4)
    training = tiny_trainer(user, "--max_steps", "9", "--eval_interval", "1")
    training.train()
    assert [point["step"] for point in training.state.history] == [1, 7, 9]


def test_a_loss_that_is_not_known_yet_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for loss, shown in ((1.5, "loss 1.5000 nats/char, 10 chars/s"), (math.nan, "(50%): 10 chars/s")):
        Progress(1).show(1, loss, 10.0, 1.0, 0.5)
        assert shown in capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "parts"), [(4, 3), (9, 8)])
def test_a_batch_has_the_parts_that_were_asked_for(batch_size: int, parts: int, user: Trainee) -> None:
    flags = ["--batch_size", str(batch_size), "--accumulation_steps", str(parts), "--max_steps", "1"]
    training, computed = tiny_trainer(user, *flags), []
    model = training.model

    def count(source: Tensor, target: Tensor) -> Tensor:
        computed.append(len(source))
        logits: Tensor = model(source, target)
        return logits

    training.model = count  # type: ignore[assignment]
    training.train_step()
    assert len(computed) == parts and sum(computed) == batch_size


@pytest.mark.parametrize(
    ("options", "processes", "says"),
    [
        ({"device": "mps"}, 1, ""),
        ({"precision": "fp16"}, 1, "loss scaling"),
        ({"gradient_checkpointing": True}, 1, "gradient checkpointing"),
        ({}, 2, "several processes"),
    ],
)
def test_why_the_steps_of_a_gpu_are_not_captured(
    options: dict[str, Any], processes: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(starts: Tensor, source_length: int) -> Tensor:
        return starts

    settings = Settings(**{"device": "cuda", "precision": "bf16"} | options)
    assert captured_where_possible(step, settings, processes) is step
    logged = capsys.readouterr().err
    assert says in logged and bool(says) == ("not captured as a CUDA graph" in logged)


# --- the budget


def test_as_many_steps_are_made_and_the_learning_rate_comes_down_to_zero(
    user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []
    ordinary = optimization.set_learning_rates

    def note(optimizers: list[Any], progress: float, scale: float) -> None:
        factors.append(learning_rate_factor(progress) * scale)
        ordinary(optimizers, progress, scale)

    monkeypatch.setattr(module, "set_learning_rates", note)
    training = tiny_trainer(user, "--max_epochs", "1.5")
    steps = math.ceil(1.5 * CHARACTERS / PER_STEP)
    outcome = training.train()
    assert outcome.complete and outcome.steps == len(factors) == steps == training.max_steps
    assert training.state.epoch == 1, "the text was read one and a half times"
    assert factors == pytest.approx([learning_rate_factor((step + 0.5) / steps) for step in range(steps)])
    assert factors[-1] == pytest.approx(0.5 / steps / (1 - WARMUP_FRACTION)) and max(factors) > 0.95
    assert learning_rate_factor(training.spent_fraction()) == 0.0


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ("--max_epochs 0.2 --max_steps 1000", math.ceil(0.2 * CHARACTERS / PER_STEP)),
        ("--max_steps 7 --max_minutes 100 --max_epochs 9", 7),
    ],
)
def test_the_first_limit_reached_ends_a_run(limits: str, steps: int, user: Trainee) -> None:
    outcome = tiny_trainer(user, *limits.split()).train()
    assert outcome.complete and outcome.steps == steps


def test_the_clock_too_ends_a_run_of_many_epochs(user: Trainee) -> None:
    training = tiny_trainer(user, "--max_epochs", "100000", "--max_minutes", "0.01")
    outcome = training.train()
    assert training.max_steps and outcome.complete
    assert 0 < outcome.steps < training.max_steps and outcome.seconds >= 0.6


# --- when it stops


def test_a_signal_ends_a_run_only_when_all_processes_know_of_it(user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one would go on to the next step, and wait for the others for ever."""
    heard: list[signal.Signals | None] = []

    def synchronize(_: Group, stopped_by: signal.Signals | None, *figures: float) -> tuple[Any, list[float]]:
        heard.append(stopped_by)  # the others do not know of it yet
        return stopped_by if len(heard) > 8 else None, list(figures)

    monkeypatch.setattr(Group, "synchronize", synchronize)
    training = tiny_trainer(user, "--max_steps", "1000", "--eval_interval", "1")
    ordinary = training._evaluate

    def evaluate(progress: Progress) -> None:
        ordinary(progress)
        if training.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "_evaluate", evaluate)
    outcome = training.train()
    assert outcome.steps == 8 and outcome.stopped_by == ExitCode.TERMINATED and not outcome.complete
    assert heard == [None] * 4 + [signal.SIGTERM] * 5, "and it is not forgotten meanwhile"
    assert contents(user.resume)["step"] == 8


# --- when it saves


class SlowSaving:
    """What stands in for a trainer's clock and for writing its state: a step takes a second, saving `cost`."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.now = 0.0
        self.saves: list[int] = []  # the step of each
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr("charseq2seq.training.progress._LONGEST_TICK", math.inf)

        def save(path: Path, state: dict[str, Any]) -> None:
            self.saves.append(state["step"])
            self.now += cost

        def compute(starts: Tensor, source_length: int) -> Tensor:
            self.now += 1.0
            return torch.tensor(1.0)

        monkeypatch.setattr(module, "save_resume_state", save)
        trainer.step = compute


def test_saving_takes_at_most_a_twentieth_of_the_time(user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    training = tiny_trainer(user, "--max_steps", "200", "--eval_interval", "1")
    clock = SlowSaving(training, monkeypatch, cost=2.0)
    training.train()
    regular = clock.saves[:-2]  # the last two are those of a run that ends
    assert regular[0] == 1, "the first evaluation is saved at once"
    assert 2 * len(regular) <= 0.05 * clock.now + 2
    assert len(regular) >= 0.8 * 0.05 * clock.now / 2, "and as often as that allows"
    assert clock.saves[-2:] == [200, 200]


@pytest.mark.parametrize(
    ("cost", "interval", "steps", "saves"),
    [
        (0.01, "10", "60", [10, 20, 30, 40, 50, 60, 60]),  # cheap saving is done at every evaluation and only then
        (1.0, "100000", "1000", [300, 599, 898, 1000, 1000]),  # else every five minutes, with what saving took
    ],
)
def test_when_a_run_saves(
    cost: float, interval: str, steps: str, saves: list[int], user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny_trainer(user, "--max_steps", steps, "--eval_interval", interval)
    clock = SlowSaving(training, monkeypatch, cost=cost)
    training.train()
    assert clock.saves == pytest.approx(saves, abs=3 * (cost == 1))
