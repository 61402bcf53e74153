"""A run that can be watched: rows of figures, TensorBoard's events, a sample at each evaluation, and the picture."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.options import read_settings, resolve_settings
from charseq2seq.training import plot
from charseq2seq.training.metrics import Metrics
from charseq2seq.training.trainer import Trainer
from tests.train_client import TINY, Trainee, assert_same, contents, see, see_refused, tiny_trainer
from tests.warm_client import WarmClient
from train_transformer import main

RUN = ["--max_steps", "12", "--eval_interval", "3", "--device", "cpu"]
FIGURES = {"characters", "characters_per_second", "epoch", "gradient_norm", "learning_rate", "nats_per_char"}
FIGURES |= {"seconds", "step", "train_nats_per_char"}


def metrics_of(trainee: Trainee) -> Path:
    return trainee.home / "transformer_model.metrics.jsonl"


def rows_of(trainee: Trainee) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics_of(trainee).read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(client: WarmClient, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainee, str]:
    """A run that was never stopped, and its log."""
    trainee = Trainee(tmp_path_factory.mktemp("watched"))
    done = client.train(trainee, *RUN)
    assert done.code == 0, done.log
    return trainee, done.log


def test_a_row_an_evaluation_says_how_the_run_goes(watched: tuple[Trainee, str]) -> None:
    rows = rows_of(watched[0])
    assert [row["step"] for row in rows] == [3, 6, 9, 12] and all(row.keys() == FIGURES for row in rows)
    assert rows == contents(watched[0].model)["metrics"]["history"], "the model holds the same"
    for row in rows:
        assert row["characters"] == row["step"] * 4 * 16
        assert row["characters_per_second"] == pytest.approx(row["characters"] / row["seconds"])
        assert 0 < row["epoch"] < 1 and row["gradient_norm"] > 0
    assert 0.04 > rows[0]["learning_rate"] > rows[3]["learning_rate"] > 0


def test_the_log_shows_what_the_model_writes_at_each_evaluation(watched: tuple[Trainee, str]) -> None:
    samples = [line for line in watched[1].splitlines() if "sample: FIRST CITIZEN:" in line]
    assert len(samples) == len(set(samples)) == 4


def test_the_gradient_norm_is_that_of_the_gradient(user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of plain gradient descent, of which the difference of the weights tells."""
    trainer = tiny_trainer(user, "--max_steps", "5", "--precision", "fp32")
    trainer.optimizers = [torch.optim.SGD(trainer.master.parameters(), lr=1.0)]
    monkeypatch.setattr("charseq2seq.training.trainer.set_learning_rates", lambda *_: None)
    before = trainer.working.weights()
    trainer.train_step()
    after = trainer.working.weights()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(trainer.working.gradient_norm) == pytest.approx(float(moved.norm()), rel=1e-3)


@pytest.mark.parametrize("stop_at", [2, 6, 11])
def test_a_stopped_run_has_each_row_once(
    stop_at: int, watched: tuple[Trainee, str], user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = user.home / "events"
    command = ["--data_path", "text.txt", *TINY, *RUN, "--num_threads", "1", "--tensorboard", str(events)]
    ordinary = Trainer.train_step

    def step(trainer: Trainer) -> None:
        ordinary(trainer)
        if trainer.state.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(user.home)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", step)
        assert main(command) == ExitCode.TERMINATED
    with metrics_of(user).open("a") as file:  # as if it had been killed, and not stopped, a while later
        file.write('{"step": 12, "nats_per_char": 1.5}\n{"step": 15, "na')
    late = Metrics(user.home / "other.jsonl", [{"step": stop_at}], events)
    late.add({"step": 12, "nats_per_char": 99.0, "train_nats_per_char": math.nan})
    late.close()
    assert (user.home / "other.jsonl").read_text().endswith('"nats_per_char": 99.0, "train_nats_per_char": null}\n')
    assert main(command) == 0
    assert_same(rows_of(watched[0]), rows_of(user))
    reader = EventAccumulator(str(events))
    reader.Reload()
    for name in FIGURES - {"step"}:
        points = reader.Scalars(name)
        assert [point.step for point in points] == [3, 6, 9, 12]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows_of(user)])


def test_a_new_run_begins_its_own_file(client: WarmClient, owner: Trainee) -> None:
    metrics_of(owner).write_text('{"step": 99}\n')
    assert client.train(owner, *RUN, "--max_steps", "3").code == 0
    assert [row["step"] for row in rows_of(owner)] == [3]


def test_figures_that_cannot_be_written_are_refused_before_training(client: WarmClient, user: Trainee) -> None:
    (user.home / "taken").write_text("")
    see_refused(client.train(user, *RUN, "--tensorboard", "taken/in"), ExitCode.CANNOT_CREATE, "taken/in: .*; choose")
    metrics_of(user).unlink()
    metrics_of(user).mkdir()
    see_refused(client.train(user, *RUN), ExitCode.CANNOT_CREATE, r"transformer_model\.metrics\.jsonl: .*; choose")


def test_figures_that_cannot_be_written_later_do_not_end_a_run(
    user: Trainee, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinary = Metrics.add

    def in_the_way(metrics: Metrics, row: dict[str, float]) -> None:
        if metrics_of(user).is_file():
            metrics_of(user).unlink()
            metrics_of(user).mkdir()
        ordinary(metrics, row)

    monkeypatch.setattr(Metrics, "add", in_the_way)
    assert tiny_trainer(user, "--max_steps", "3", "--eval_interval", "1").train().complete
    assert capsys.readouterr().err.count("The run goes on.") == 3


def test_without_tensorboard_the_option_is_refused_at_once(user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SuiteError, match=r"--tensorboard needs tensorboard; run `pip install tensorboard`") as refused:
        resolve_settings(read_settings(["--tensorboard", "events"]), user.home / "text.txt")
    assert refused.value.exit_code == ExitCode.UNAVAILABLE


# --- the picture


def test_several_runs_are_drawn_in_one_picture(
    watched: tuple[Trainee, str], user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user.home)
    path = metrics_of(watched[0])
    # A run that an earlier version began, in a file of an awkward name, and killed while it wrote a line.
    rows = '{"step": 1, "nats_per_char": 4.0}\n' + path.read_text().replace('"seconds": ', '"seconds": 1')
    Path("o$t^$.metrics.jsonl").write_text(rows + '{"step": 9')
    assert plot.main([str(path), "o$t^$.metrics.jsonl", "--output", "both.png"]) == 0
    assert plot.main([str(path)]) == 0
    both, one = Path("both.png").read_bytes(), Path("training.png").read_bytes()
    assert both[:8] == one[:8] == b"\x89PNG\r\n\x1a\n" and both != one


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, ExitCode.NO_INPUT, r"m\.jsonl cannot be read .*; name the"),
        ("", ExitCode.BAD_DATA, r"m\.jsonl holds no rows .*; name the"),
        ("[1]\n", ExitCode.BAD_DATA, "holds no rows"),
        ("not JSON\n", ExitCode.BAD_DATA, "holds no rows"),
        ('{"step": 3}\n', ExitCode.BAD_DATA, "holds no rows"),
    ],
)
def test_what_is_no_course_of_a_run_is_not_drawn(
    content: str | None, code: ExitCode, says: str, user: Trainee, client: WarmClient
) -> None:
    path = user.home / "m.jsonl"
    if content is not None:
        path.write_text(content)
    see(client.run(user.home, "m.jsonl", program="charseq2seq/training/plot.py"), code, says)
