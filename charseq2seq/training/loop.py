"""The training loop: steps, evaluations, saving, stopping.

The loop's body runs N + 1 times for N steps: it evaluates and saves *before* a step, so that the last evaluation and
the last save are the same lines as every other (the idea is nanochat's).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charseq2seq.checkpoint import Checkpoint, library_versions, resume_path, save_checkpoint, save_resume_state
from charseq2seq.corpus import Corpus, WindowSampler
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.evaluation import Evaluation, evaluate
from charseq2seq.training.optimization import build_optimizers, learning_rate_factor, set_learning_rates
from charseq2seq.training.progress import Progress, format_duration
from charseq2seq.training.resume import random_states, restore_random_states
from charseq2seq.training.settings import Settings, describe_hardware
from charseq2seq.training.stopping import StopRequest, stop_signals
from charseq2seq.training.working_copy import WorkingCopy
from encoder_decoder_transformer import Transformer

# Progress is measured on the first half of the validation split, and on no more than this many characters; the final
# figure on all of it. So choosing the best weights does not eat the split, and evaluating stays cheap.
_SELECTION_CHARACTERS = 65_536


class TrainingDiverged(SuiteError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        evaluation: of the weights that were kept, on the whole validation split; None where the run was stopped
            and no model was written.
        stopped_by: the exit code of the signal that stopped the run; None where its budget ended it.
    """

    evaluation: Evaluation | None
    model: Transformer
    best_step: int
    steps: int
    seconds: float
    stopped_by: ExitCode | None


class Trainer:
    """One training run: everything that changes while it goes on.

    Args:
        settings: what to do.
        corpus: what to learn from.
        state: a resume state to continue from, or None.
    """

    def __init__(self, settings: Settings, corpus: Corpus, state: dict[str, Any] | None = None) -> None:
        self.settings = settings
        self.corpus = corpus
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
        torch.set_flush_denormal(True)  # numbers too small to matter cost a CPU a hundredfold
        self.config = {"vocab_size": len(corpus.vocabulary), **settings.model}
        self.master = Transformer(**self.config).to(settings.device)
        self.optimizers = build_optimizers(self.master, settings.learning_rate, settings.weight_decay)
        self.sampler = WindowSampler(
            corpus.train_ids,
            self.master.source_length,
            self.master.target_length,
            settings.batch_size,
            settings.seed,
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all the sittings of this run
        self.train_loss = math.nan  # running mean over about the last 50 steps
        self.best_loss = math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        if state is not None:
            self._restore(state)
        self.working = WorkingCopy(self.master, settings.precision)
        if state is not None:
            self.working.scaler.load_state_dict(state["scaler"])
        self.forward = torch.compile(self.working.model) if settings.compile else self.working.model

    def identity(self) -> dict[str, Any]:
        """What makes this run this run; see `resume.find_resume_state`."""
        return run_identity(self.settings, self.corpus)

    def train(self) -> Outcome:
        """Run to the end of the budget, or until a signal; write the model.

        Raises:
            SuiteError: the loss is no longer finite (exit code 3), or a file cannot be written.
        """
        self._check_evaluation_works()
        with stop_signals() as stop, Progress(self.settings.log_interval) as progress:
            started = time.perf_counter() - self.seconds
            evaluated_at = self.step
            while True:
                self.seconds = time.perf_counter() - started
                last = self.spent_share() >= 1 or stop.signal is not None
                if last or (self.step % self.settings.eval_interval == 0 and self.step > evaluated_at):
                    evaluated_at = self.step
                    self._evaluate_and_save(progress)
                if last:
                    break
                self._train_step()
                progress.show(
                    self.step, self.train_loss, self._speed(), time.perf_counter() - started, self.spent_share()
                )
        return self._finish(stop)

    def spent_share(self) -> float:
        """How much of the budget is spent, 0 to 1: of the steps or of the minutes, whichever is further."""
        steps, minutes = self.settings.max_steps, self.settings.max_minutes
        shares = [self.step / steps if steps else 0.0, self.seconds / (60 * minutes) if minutes else 0.0]
        return min(1.0, max(shares))

    def _speed(self) -> float:
        """Target characters per second."""
        return self.step * self.settings.batch_size * self.master.target_length / max(self.seconds, 1e-9)

    def _train_step(self) -> None:
        source, target = (self._to_device(ids) for ids in self.sampler.next_batch())
        # The middle of the step: with its beginning the first step would be lost to warm-up.
        half_a_step = 0.5 / self.settings.max_steps if self.settings.max_steps else 0.0
        set_learning_rates(self.optimizers, learning_rate_factor(self.spent_share() + half_a_step))
        logits = self.forward(source, target)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.working.step(loss, self.optimizers)
        self.step += 1
        # Reading the loss waits for a GPU: there only as often as it is shown.
        if self.settings.device == "cpu" or self.step % self.settings.log_interval == 0:
            self._note_loss(loss.item())

    def _to_device(self, ids: Tensor) -> Tensor:
        if self.settings.device != "cuda":
            return ids.to(self.settings.device)
        return ids.pin_memory().to("cuda", non_blocking=True)

    def _note_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the training loss became {loss} at step {self.step}: most likely the learning rate "
                f"({self.settings.learning_rate}) is too high; try half of it. The best weights so far are safe in "
                f"{resume_path(self.settings.model_path)}.",
                ExitCode.DIVERGED,
            )
        self.train_loss = loss if math.isnan(self.train_loss) else 0.98 * self.train_loss + 0.02 * loss

    def _check_evaluation_works(self) -> None:
        """Two validation batches before the first step: what would fail later fails now (the idea is litgpt's)."""
        first = self.corpus.num_train
        characters = min(2 * 32 * self.master.target_length, len(self.corpus.ids) - first)
        evaluate(self.working.model, self.corpus.ids, first, first + characters)

    def _evaluate_and_save(self, progress: Progress) -> None:
        first = self.corpus.num_train
        half = max(1, (len(self.corpus.ids) - first) // 2)
        loss = evaluate(
            self.working.model, self.corpus.ids, first, first + min(half, _SELECTION_CHARACTERS)
        ).nats_per_char
        self.history.append(
            {"step": self.step, "seconds": self.seconds, "train_nats_per_char": self.train_loss, "nats_per_char": loss}
        )
        best = loss < self.best_loss or not self.best_weights
        if best:
            self.best_loss, self.best_step = loss, self.step
            self.best_weights = _cpu_copy(self.master.state_dict())
        progress.write(
            f"step {self.step:,}: validation {loss:.4f} nats/char, training {self.train_loss:.4f}"
            f"{' (best so far)' if best else ''}, {format_duration(self.seconds)} spent"
        )
        self.save_resume(finished=False)

    def _finish(self, stop: StopRequest) -> Outcome:
        """Write the model where the run is complete, or where it was stopped and none stands there yet."""
        complete = self.spent_share() >= 1
        evaluation = None
        if complete or not self.settings.model_path.exists():
            self.master.load_state_dict(self.best_weights)
            self.working.refresh()
            evaluation = evaluate(self.working.model, self.corpus.ids, self.corpus.num_train)
            save_checkpoint(self.settings.model_path, self._checkpoint(evaluation))
        if complete:
            self.save_resume(finished=True)
        return Outcome(
            evaluation=evaluation,
            model=self.master,
            best_step=self.best_step,
            steps=self.step,
            seconds=self.seconds,
            stopped_by=None if complete else stop.exit_code,
        )

    def _checkpoint(self, evaluation: Evaluation) -> Checkpoint:
        return Checkpoint(
            model_state_dict=self.best_weights,
            config=self.config,
            vocab=self.corpus.vocabulary.index_of_token(),
            training_args=self.settings.training_args(),
            metrics={
                **evaluation.facts(),
                "step": self.best_step,
                "steps": self.step,
                "seconds": self.seconds,
                "characters_per_second": self._speed(),
                "train_nats_per_char": self.train_loss,
                "history": self.history,
            },
            corpus=self.corpus.facts(),
            environment={**library_versions(), "hardware": describe_hardware(self.settings.device)},
        )

    def save_resume(self, *, finished: bool) -> None:
        """Write everything that continuing needs.

        Raises:
            SuiteError: it cannot be written; an earlier state is untouched.
        """
        state = {
            "identity": self.identity(),
            "finished": finished,
            "step": self.step,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
            "weights": self._last_weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.working.state(),
            "sampler": self.sampler.state(),
            "random": random_states(),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "history": self.history,
        }
        save_resume_state(resume_path(self.settings.model_path), state)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.master.load_state_dict(state["weights"])
            for optimizer, earlier in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(earlier)
            self.sampler.restore(state["sampler"])
            restore_random_states(state["random"])
            self.step, self.seconds, self.train_loss = state["step"], state["seconds"], state["train_loss"]
            self.best_loss, self.best_step = state["best_loss"], state["best_step"]
            self.best_weights, self.history = state["best_weights"], state["history"]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise SuiteError(
                f"the resume state does not fit this version of the suite ({error}); start anew with --resume never.",
                ExitCode.BAD_DATA,
            ) from error


def run_identity(settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """Text, architecture and the arguments that decide the weights of a run."""
    args = settings.training_args()
    for irrelevant in ("data", "log_interval", "num_threads"):
        del args[irrelevant]
    return {"corpus_sha256": corpus.sha256, **args}


def _cpu_copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
