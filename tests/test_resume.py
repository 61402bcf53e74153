"""A run that is stopped and resumed ends as the run that was never stopped, bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from charseq2seq.device import use_threads
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.options import SIZES, read_settings, resolve_settings
from charseq2seq.training.mixed_precision import WorkingCopy
from charseq2seq.training.processes import Group
from charseq2seq.training.resume import new_state
from charseq2seq.training.run import train
from charseq2seq.training.trainer import Outcome, Trainer
from charseq2seq.windows import WindowSampler
from tests.train_client import TINY, Done, Trainee, assert_same, contents, see, strike_at, tiny_trainer
from tests.warm_client import WarmClient
from train_transformer import main, what_is_left

STEPS = "60"
RUN = ["--max_steps", STEPS, "--eval_interval", "10", "--log_interval", "1", "--dropout", "0.1", "--device", "cpu"]


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def straight(
    client: WarmClient, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Trainee]:
    """A run that was never stopped, and its precision."""
    trainee = Trainee(tmp_path_factory.mktemp(request.param))
    done = client.train(trainee, *RUN, "--precision", request.param)
    assert done.code == 0, done.log
    return request.param, trainee


class InProcess:
    """The training command line in this process, where a signal comes after an exact step."""

    def __init__(self, user: Trainee, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._user, self._monkeypatch, self._capsys = user, monkeypatch, capsys

    def train(self, *flags: str, sizes: Sequence[str] = TINY, stop_at: int = 0) -> Done:
        """Train on text.txt; its last line of output is the report."""
        ordinary, report = Trainer.train_step, {}  # type: ignore[var-annotated]

        def step(trainer: Trainer) -> None:
            ordinary(trainer)
            if trainer.state.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        with self._monkeypatch.context() as patched:
            patched.chdir(self._user.home)
            patched.setattr(Trainer, "train_step", step)
            use_threads(1)  # as many as the warm client's
            code = main(["--mode", "train", "--data_path", "text.txt", *sizes, *flags], report)
        return Done(code, json.dumps(report), self._capsys.readouterr().err)


@pytest.fixture
def here(user: Trainee, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    """The command line of `user`."""
    return InProcess(user, monkeypatch, capsys)


def test_a_stopped_run_ends_as_the_one_never_stopped(
    here: InProcess, user: Trainee, straight: tuple[str, Trainee]
) -> None:
    precision, expected = straight
    for step in (4, 10, 33, 59):
        stopped = here.train(*RUN, "--precision", precision, stop_at=step)
        assert stopped.code == 143, stopped.log
        assert "the same command continues this run" in stopped.log and stopped.report["outcome"] == "stopped"
        assert contents(user.resume)["step"] == step
    assert "continuing the unfinished run at step 59" in here.train(*RUN, "--precision", precision).log
    assert_same(contents(expected.model), contents(user.model))
    assert_same(contents(expected.resume), contents(user.resume))


def test_a_killed_run_ends_as_the_one_never_stopped(
    client: WarmClient, user: Trainee, straight: tuple[str, Trainee]
) -> None:
    precision, expected = straight
    command = ["--mode", "train", "--data_path", "text.txt", *TINY, *RUN, "--precision", precision]
    assert strike_at(user.start(*command), 33, signal.SIGKILL).code == -9
    assert not user.model.exists(), "an unfinished run has no model yet"
    done = client.run(user.home, *command)
    assert done.code == 0 and "resume: continuing the unfinished run" in done.log, done.log
    assert_same(contents(expected.model), contents(user.model))
    assert_same(contents(expected.resume), contents(user.resume))


SHORT = ["--max_steps", "8", "--eval_interval", "4"]


def test_a_finished_run_is_followed_by_a_new_one_or_extended(client: WarmClient, user: Trainee) -> None:
    assert client.train(user, *SHORT).code == 0
    again = client.train(user, *SHORT)
    assert "the last run here finished; starting a new one" in again.log and again.report["steps"] == 8
    extended = client.train(user, "--max_epochs", "0.2", "--eval_interval", "4", "--resume", user.resume.name)
    assert extended.code == 0 and "continuing the finished run at step 8" in extended.log, extended.log
    steps = math.ceil(0.2 * int(0.9 * user.text.stat().st_size) / (4 * 16))
    assert extended.report["steps"] == steps and f"run: 0.2 epochs ({steps} steps)" in extended.log
    assert [point["step"] for point in contents(user.model)["metrics"]["history"]][:3] == [4, 8, 12]
    assert (contents(user.resume)["epoch"], contents(user.resume)["position"]) == (0, 4 * steps)
    other = client.train(user, *SHORT, "--seed", "5", "--resume", user.resume.name)
    assert other.code == 2 and "seed was 1337, is 5" in other.log and "--resume never" in other.log
    assert client.train(user, *SHORT, "--resume", "absent.pth").code == 66


def test_an_unfinished_run_that_differs_is_kept_and_the_advice_continues_it(here: InProcess, user: Trainee) -> None:
    assert here.train(*RUN, "--seed", "7", "--batch_size", "8", stop_at=12).code == 143
    done = here.train(*SHORT)
    assert done.code == 0 and "max_steps was 60, is 8" in done.log, done.log
    assert contents(user.home / "transformer_model.resume.earlier.pth")["step"] == 12
    user.resume.write_bytes(user.resume.read_bytes()[:1000])
    damaged = here.train(*SHORT)
    assert damaged.report["steps"] == 8 and "cannot be used" in damaged.log and "Starting a new run" in damaged.log
    assert (user.home / "transformer_model.resume.earlier2.pth").stat().st_size == 1000
    advised = re.findall(r"[^\s,]+", done.log.split("continue it with ")[1].split("\n", maxsplit=1)[0].rstrip("."))
    assert {"--seed", "--batch_size", "--dropout", "--max_steps", "--resume"} <= set(advised)
    done = here.train(*SHORT, *advised)
    assert done.code == 0 and done.report["steps"] == 60, done.log
    assert "continuing the unfinished run at step 12" in done.log


def test_of_the_states_that_were_set_aside_the_newest_stay(
    here: InProcess, user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("charseq2seq.training.resume.flush_folder", flushed.append)
    mine = user.home / "transformer_model.resume.earlier-mine.pth"
    mine.write_text("a file of the user's own")
    for seed in range(5):
        log = here.train(*RUN, "--seed", str(seed), stop_at=seed + 1).log
    assert flushed == [Path()] * 4, "or a power cut brings an old name back"
    kept = sorted(contents(path)["step"] for path in user.home.glob("*.earlier*.pth") if path != mine)
    assert kept == [2, 3, 4] and mine.exists()
    assert "is removed: of such states the newest 3 stay" in log
    oldest = next(path for path in user.home.glob("*.earlier*.pth") if path != mine and contents(path)["step"] == 2)
    its_seed = str(contents(oldest)["identity"]["seed"])
    here.train(*RUN, "--seed", its_seed, "--resume", oldest.name, stop_at=3)
    assert oldest.exists(), "it was continued, and until the first save it is all there is of that run"


def test_a_run_moves_to_another_machine(here: InProcess, user: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had by default it keeps; the precision is that of the machine."""
    command = ["--max_epochs", "1", "--eval_interval", "4", "--source_length", "8", "--target_length", "16"]
    machines = (((32, 2, 2, 1, 1, 48), "fp32"), ((16, 2, 1, 1, 1, 32), "bf16"))
    for stop_at, (sizes, precision) in zip((6, 9), machines, strict=True):
        for size in ("nano", "tiny"):
            monkeypatch.setitem(SIZES, size, dict(zip(SIZES[size], sizes, strict=True)))
        monkeypatch.setattr("charseq2seq.options.choose_precision", lambda *_, of=precision: (of, "as here"))
        stopped = here.train(*command, sizes=(), stop_at=stop_at)
        assert stopped.code == 143, stopped.log
    assert "continuing the unfinished run at step 6" in stopped.log, stopped.log
    assert "kept from the run to continue: d_ff 48, d_model 32, num_kv_heads 2" in stopped.log
    assert "the run to continue had precision fp32; rounding differs from now on" in stopped.log
    assert contents(user.resume)["step"] == 9 and contents(user.model)["config"]["d_model"] == 32
    other = here.train(*command, "--d_model", "64", sizes=())
    assert other.code == 0 and "d_model was 32, is 64" in other.log, "what is asked for is not taken from elsewhere"


def test_what_a_stopped_run_has_learnt_becomes_a_model_on_demand(
    here: InProcess, client: WarmClient, user: Trainee
) -> None:
    assert here.train(*SHORT).code == 0
    finished = user.model.read_bytes()
    stopped = here.train(*RUN, stop_at=12)
    assert "replaced when the run ends: the model of text.txt in transformer_model.pth (" in stopped.log
    flags = stopped.log.split("the same command with ")[1].split(" writes a model")[0].split()
    assert here.train(*RUN, *flags).code == 0
    assert contents(user.home / "transformer_model_stopped.pth")["metrics"]["steps"] == 12
    assert user.model.read_bytes() == finished
    refused = client.run(user.home, "--mode", "generate", "--model_path", user.resume.name)
    see(refused, ExitCode.BAD_DATA, r"state of a run, not a model; .* --max_steps 12 --model_path NEW\.pth")
    assert "continuing the unfinished run at step 12" in here.train(*RUN).log


def test_a_run_continued_from_a_file_loses_nothing(here: InProcess, user: Trainee) -> None:
    assert here.train(*RUN, stop_at=12).code == 143
    user.resume.rename(user.home / "old.pth")
    from_file = [*RUN, "--resume", str(user.home / "old.pth")]
    stopped = here.train(*from_file, stop_at=33)
    assert stopped.code == 143 and "the same command, with --resume auto, continues this run" in stopped.log
    assert not list(user.home.glob("*.earlier*"))
    done = here.train(*from_file)
    assert done.code == 0 and "another run lies where this one goes" in done.log, done.log
    assert contents(user.home / "transformer_model.resume.earlier.pth")["step"] == 33


def test_a_complete_run_that_was_stopped_says_that_it_is_not_pushed() -> None:
    outcome = Outcome(evaluation=None, best_step=8, steps=8, seconds=1.0, complete=True, stopped_by=ExitCode.TERMINATED)
    pushing = read_settings(["--push_to_hf", "--hf_repo_name", "plays", "--hf_private", "--model_path", "a m.pth"])
    assert "the run itself was complete; push_to_huggingface.py pushes the model later" in what_is_left(
        pushing, outcome
    )
    assert what_is_left(read_settings([]), outcome) == "the run itself was complete"


def test_patience_ends_a_run_well(client: WarmClient, user: Trainee) -> None:
    done = client.train(user, "--max_steps", "400", "--eval_interval", "1", "--learning_rate", "3", "--patience", "2")
    assert done.code == 0 and done.report["outcome"] == "finished", done.log
    metrics = contents(user.model)["metrics"]
    assert metrics["steps"] == metrics["step"] + 2 < 400
    assert min(point["nats_per_char"] for point in metrics["history"]) == metrics["history"][-3]["nats_per_char"]
    best, last = contents(user.model)["model_state_dict"], contents(user.resume)["weights"]
    assert not torch.equal(best["head.weight"], last["head.weight"]), "the last ones go on where it is extended"


def test_a_run_that_diverges_goes_on_more_carefully(client: WarmClient, user: Trainee) -> None:
    # Far too high: the squares inside a normalisation overflow in the seventh step, and just not at half of it.
    done = client.train(user, *SHORT, "--learning_rate", "1e6", "--precision", "fp32")
    assert done.code == 0 and done.report["outcome"] == "finished", done.log
    assert "learning rate (1e+06) is too high" in done.log
    assert "Going on from step 4 with 0.5 of the learning rate" in done.log
    assert contents(user.resume)["learning_rate_scale"] == 0.5


def test_a_continued_run_that_diverges_goes_on_from_what_it_read(
    client: WarmClient, user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the very momenta, too: the step that diverged must not have changed them."""
    assert client.train(user, *SHORT).code == 0
    ordinary_step, ordinary_train_step = WorkingCopy.step, Trainer.train_step
    steps: list[int] = []
    momenta: list[list[torch.Tensor]] = []

    def note(trainer: Trainer) -> None:
        steps.append(trainer.state.step)
        if trainer.state.step == 8:
            momenta.append([state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()])
        ordinary_train_step(trainer)

    def once_not_a_number(working: WorkingCopy, optimizers: list[torch.optim.Optimizer]) -> None:
        for weight in working.model.parameters() if len(steps) == 1 else []:
            if weight.grad is not None:
                weight.grad.fill_(math.nan)
        ordinary_step(working, optimizers)

    monkeypatch.setattr(Trainer, "train_step", note)
    monkeypatch.setattr(WorkingCopy, "step", once_not_a_number)
    monkeypatch.chdir(user.home)
    longer = [*TINY, *SHORT, "--max_steps", "12", "--device", "cpu", "--resume", user.resume.name]
    outcome = train(resolve_settings(read_settings(longer), user.text))
    assert outcome.complete and steps == [8, 9, 8, 9, 10, 11]
    assert_same(momenta[0], momenta[1])
    assert [point["step"] for point in contents(user.model)["metrics"]["history"]] == [4, 8, 12]


@pytest.mark.parametrize(
    "damage",
    [
        {"history": [{"step": 4, "nats_per_char": "1.5"}]},
        {"history": [{"step": 4, "nats_per_char": 1.5}]},
        {"epoch": -1},
        {"best_loss": -math.inf},
        {"seconds": math.nan},
        {"learning_rate_scale": 2.0},
        {"best_step": True},
        {"best_weights": {}},
    ],
)
def test_figures_that_no_run_has_left_are_refused(damage: dict[str, Any], straight: tuple[str, Trainee]) -> None:
    saved = contents(straight[1].resume)
    new_state({}, saved)
    with pytest.raises(SuiteError, match=r"does not fit this version of the suite \(its .* not .*\); .* start anew"):
        new_state({}, saved | damage)


def test_a_state_without_one_of_its_fields_or_of_other_types_is_refused(straight: tuple[str, Trainee]) -> None:
    saved = contents(straight[1].resume)
    for name in saved.keys() - {"format", "format_version", "identity", "learning_rate", "gradient_norm"}:
        for value in (None, "x", torch.ones(3), (1,)):
            with pytest.raises(SuiteError, match="does not fit this version of the suite"):
                new_state({}, saved | {name: value})
        with pytest.raises(SuiteError, match=f"it has or lacks {name}"):
            new_state({}, {other: saved[other] for other in saved if other != name})


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"head.weight": torch.ones(1)}},
        {"best_weights": {"head.weight": torch.ones(1)}},
        {"optimizers": [{}, {0: {"step": torch.ones(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}]},
        {"optimizers": [{0: {"momentum_buffer": torch.ones(3)}}, {}]},
    ],
)
def test_a_state_of_another_version_is_refused_in_one_sentence(
    change: dict[str, Any], client: WarmClient, owner: Trainee
) -> None:
    torch.save(contents(owner.resume) | change, owner.home / "other.pth")
    before = owner.model.read_bytes()
    done = client.train(owner, "--max_steps", "12", "--resume", "other.pth")
    assert done.code == ExitCode.BAD_DATA, done.log
    assert "does not fit this version of the suite" in done.log and "start anew with --resume never" in done.log
    assert owner.model.read_bytes() == before


def test_a_run_that_diverges_when_it_was_asked_to_stop_does_not_try_again(
    user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = WindowSampler.next_batch
    calls: list[int] = []

    def next_batch(sampler: WindowSampler, rank: int = 0, size: int = 1) -> tuple[torch.Tensor, int]:
        calls.append(rank)
        os.kill(os.getpid(), signal.SIGTERM)
        return ordinary(sampler, rank, size)

    monkeypatch.setattr(WindowSampler, "next_batch", next_batch)
    monkeypatch.chdir(user.home)
    asked = read_settings([*TINY, *SHORT, "--precision", "fp32", "--device", "cpu"])
    settings = replace(resolve_settings(asked, user.text), learning_rate=math.inf)
    with pytest.raises(SuiteError, match="the size of the weights became nan at step 1:") as raised:
        train(settings)
    assert raised.value.exit_code == ExitCode.DIVERGED
    assert len(calls) == 1 and not user.resume.exists()


def test_a_run_that_diverges_twice_says_why_and_leaves_the_model(client: WarmClient, user: Trainee) -> None:
    assert client.train(user, *SHORT).code == 0
    finished = user.model.read_bytes()
    done = client.train(user, *SHORT, "--learning_rate", "1e30", "--precision", "fp32")
    assert done.code == 3 and done.report["exit_code"] == 3, done.log
    assert "It was the second try" in done.report["message"]
    assert "at step 3" in done.report["message"] and "learning rate (5e+29) is too high" in done.report["message"]
    assert user.model.read_bytes() == finished


# --- what a step draws


def test_the_features_that_a_step_drops_depend_on_seed_step_and_rank(user: Trainee) -> None:
    drawn: list[tuple[float, ...]] = []

    def compute(starts: torch.Tensor, source_length: int) -> torch.Tensor:
        drawn.append(tuple(torch.rand(4).tolist()))  # as the features to drop are chosen by
        return torch.tensor(1.0)

    for seed in ("1", "1", "2"):
        trainer = tiny_trainer(user, "--dropout", "0.1", "--max_steps", "50", "--seed", seed)
        trainer.step, trainer.reading_interval = compute, 10**9  # no other process is there to add its losses
        for step, rank in itertools.product(range(6), (0, 1)):
            trainer.state.step, trainer.group = step, Group(rank, 2)
            torch.rand(len(drawn))  # whatever was drawn before
            trainer.train_step()
    assert drawn[:12] == drawn[12:24], "a resumed run drops the same"
    assert len(set(drawn)) == 24, "no two others are alike"
