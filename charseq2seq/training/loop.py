"""The training loop: steps, evaluations, saving, stopping.

The loop's body runs N + 1 times for N steps: it evaluates and saves *before* a step, so that the last evaluation and
the last save are the same lines as every other (the idea is nanochat's).
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from charseq2seq.checkpoint import Checkpoint, library_versions, save_checkpoint, save_resume_state
from charseq2seq.corpus import Corpus, WindowSampler
from charseq2seq.device import describe_hardware, tune_cpu
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import resume_path
from charseq2seq.options import Settings
from charseq2seq.training.evaluation import Evaluation, evaluate
from charseq2seq.training.optimization import build_optimizers, learning_rate_factor, set_learning_rates
from charseq2seq.training.parallel import ALONE, Group
from charseq2seq.training.progress import Progress, format_duration
from charseq2seq.training.resume import (
    check_figures,
    random_states,
    restore_random_states,
    run_identity,
    seed_random_states,
)
from charseq2seq.training.sharding import (
    load_whole_optimizer_state,
    own_weights,
    set_own_weights,
    shard,
    split_weights,
    whole_optimizer_state,
    whole_weights,
)
from charseq2seq.training.stopping import StopRequest, stop_signals
from charseq2seq.training.working_copy import WorkingCopy
from encoder_decoder_transformer import Transformer

# Progress is measured on the first half of the validation split, and on no more than this many characters; the final
# figure on all of it. So choosing the best weights does not eat the split, and evaluating stays cheap.
_SELECTION_CHARACTERS = 32_768

_EVALUATIONS = 20  # a run, unless --eval_interval says otherwise,
_EVALUATIONS_A_MINUTE = 4  # and no more than these
_LONGEST_HISTORY = 4_000  # evaluations; of more, every second one is forgotten
_SAVE_SECONDS = 300.0  # the longest a run goes without saving: what a power cut can cost


class TrainingDivergedError(SuiteError):
    """The loss became NaN or infinite.

    Attributes:
        saved: whether this run had saved a good state before.
        stopped: whether a signal had asked the run to stop.
    """

    saved = False
    stopped = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        evaluation: of the weights that were kept, on the whole validation split; None where the run was stopped
            and no model was written.
        complete: whether its budget or its patience ended the run.
        stopped_by: the exit code of the signal that stopped it, or that came while a complete run was finishing.
    """

    evaluation: Evaluation | None
    best_step: int
    steps: int
    seconds: float
    complete: bool
    stopped_by: ExitCode | None


class Trainer:
    """One training run: everything that changes while it goes on.

    Args:
        settings: what to do.
        corpus: what to learn from.
        state: a resume state to continue from, or None.
        learning_rate_scale: what the learning rates are multiplied by, besides what the state says.
        group: the processes that train together, each of which has its own trainer.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        state: dict[str, Any] | None = None,
        learning_rate_scale: float = 1.0,
        group: Group = ALONE,
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.group = group
        seed_random_states(settings.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
        tune_cpu()
        self.config = settings.model_config(len(corpus.vocabulary))
        self.master = Transformer(**self.config)
        self.master.checkpoint_activations = settings.gradient_checkpointing
        self.sharded = settings.parallel == "fsdp"
        if self.sharded:  # which moves a layer at a time to the device: all of it may be more than that can hold
            shard(self.master, settings.device, group.size, settings.precision)
        else:
            self.master.to(settings.device)
        self.evaluators = ALONE if self.sharded else group  # all of them put every layer together at the same time
        assert settings.weight_decay is not None
        self.optimizers = build_optimizers(self.master, settings.learning_rate, settings.weight_decay, group)
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
        self.unread_losses: list[Tensor] = []
        # Reading a loss waits for a GPU: there only as often as it is shown.
        self.reading_interval = 1 if settings.device == "cpu" else settings.log_interval
        self.best_loss = math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}
        self.stale_evaluations = 0  # since the best one
        self.history: list[dict[str, float]] = []
        self.learning_rate_scale = learning_rate_scale
        self.saved = False  # in this sitting
        self.working = WorkingCopy(self.master, "fp32" if self.sharded else settings.precision)
        if state is not None:
            self._restore(state)
        self.distributed = self.working.model if self.sharded else group.distribute(self.working.model)
        self.forward = torch.compile(self.distributed) if settings.compile else self.distributed

    def train(self) -> Outcome:
        """Run to the end of the budget, or until a signal; write the model.

        Raises:
            TrainingDivergedError: the loss is no longer finite.
            SuiteError: a file cannot be written.
        """
        self._check_evaluation_works()
        try:
            with stop_signals() as stop, Progress(self.settings.log_interval) as progress:
                self._run(stop, progress)
                return self._finish(stop, progress)
        except TrainingDivergedError as error:
            error.saved = self.saved
            _, error.stopped = self.group.agree(
                self.seconds, stop
            )  # or one process would try again and wait for another
            raise

    def spent_share(self) -> float:
        """How much of the budget is spent, 0 to 1: of the steps or of the minutes, whichever is further."""
        steps, minutes = self.settings.max_steps, self.settings.max_minutes
        shares = [self.step / steps if steps else 0.0, self.seconds / (60 * minutes) if minutes else 0.0]
        return min(1.0, max(shares))

    def is_complete(self) -> bool:
        """Whether the budget is spent, or patience lost."""
        patience = self.settings.patience
        return self.spent_share() >= 1 or (patience is not None and self.stale_evaluations >= patience)

    def _run(self, stop: StopRequest, progress: Progress) -> None:
        started = time.perf_counter() - self.seconds
        saved_at = self.seconds
        evaluated = self._evaluations_due()
        while True:
            self.seconds, stopped = self.group.agree(time.perf_counter() - started, stop)
            due, complete = self._evaluations_due(), self.spent_share() >= 1
            if due > evaluated or complete:
                self._evaluate(progress)
            ends = stopped or self.is_complete()
            if due > evaluated or ends or self.seconds - saved_at >= _SAVE_SECONDS:
                self.save_resume(finished=False)
                saved_at = self.seconds
            if ends:
                return
            evaluated = due
            self._train_step()
            spent = time.perf_counter() - started
            progress.show(self.step, self.train_loss, self._speed(spent), spent, self.spent_share())

    def _evaluations_due(self) -> int:
        """How many evaluations there should have been by now."""
        if self.settings.eval_interval:
            return self.step // self.settings.eval_interval
        evaluations = min(_EVALUATIONS, _EVALUATIONS_A_MINUTE * (self.settings.max_minutes or math.inf))
        return int(self.spent_share() * evaluations)

    def _speed(self, seconds: float) -> float:
        """Target characters per second."""
        return self.step * self.settings.batch_size * self.master.target_length / max(seconds, 1e-9)

    def _train_step(self) -> None:
        # The middle of the step: with its beginning the first step would be lost to warm-up.
        half_a_step = 0.5 / self.settings.max_steps if self.settings.max_steps else 0.0
        factor = learning_rate_factor(self.spent_share() + half_a_step)
        set_learning_rates(self.optimizers, factor * self.learning_rate_scale)
        loss = self._accumulate_gradients()
        self.working.step(self.optimizers)
        self.step += 1
        self.unread_losses.append(loss)
        if self.step % self.reading_interval == 0:
            self._read_losses()

    def _accumulate_gradients(self) -> Tensor:
        """Leave the gradients of a batch's mean loss; returns this process's part of that loss."""
        size = self.group.size
        if size > 1:  # every process drops other features, and a resumed one the same again
            torch.manual_seed((self.settings.seed * 1_000_003 + self.step) * size + self.group.rank)
        batch = [self._to_device(ids) for ids in self.sampler.next_batch(self.group.rank, size)]
        pieces = list(zip(*(ids.tensor_split(self.settings.accumulation_steps) for ids in batch), strict=True))
        characters = self.settings.batch_size * self.master.target_length
        losses = []
        for number, (source, target) in enumerate(pieces, start=1):
            with self._local_gradients(wanted=number < len(pieces)):
                logits = self.forward(source, target)
                loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / characters
                self.working.backward(loss * size)  # the processes' gradients are averaged, not summed
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _local_gradients(self, *, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Where wanted, keep DistributedDataParallel from averaging gradients to which more will be added."""
        if wanted and isinstance(self.distributed, torch.nn.parallel.DistributedDataParallel):
            return self.distributed.no_sync()
        return contextlib.nullcontext()

    def _to_device(self, ids: Tensor) -> Tensor:
        if self.settings.device != "cuda":
            return ids.to(self.settings.device)
        return ids.pin_memory().to("cuda", non_blocking=True)

    def _read_losses(self) -> None:
        """Bring the running mean up to date."""
        losses = self.group.sum(*torch.stack(self.unread_losses).tolist()) if self.unread_losses else []
        self.unread_losses.clear()
        for loss in losses:
            self._check_finite("training loss", loss)
            self.train_loss = loss if math.isnan(self.train_loss) else 0.98 * self.train_loss + 0.02 * loss

    def _check_finite(self, name: str, figure: float) -> None:
        if not math.isfinite(figure):
            raise TrainingDivergedError(
                f"the {name} became {figure} at step {self.step:,}: most likely the learning rate "
                f"({self.settings.learning_rate * self.learning_rate_scale:g}) is too high; try half of it.",
                ExitCode.DIVERGED,
            )

    def _check_evaluation_works(self) -> None:
        """Two validation batches before the first step: what would fail later fails now (the idea is litgpt's)."""
        first = self.corpus.num_train
        characters = min(2 * 32 * self.master.target_length, len(self.corpus.ids) - first)
        evaluate(self.working.model, self.corpus.ids, first, first + characters, self.evaluators)

    def _evaluate(self, progress: Progress) -> None:
        """Measure on the selection part of the validation split, and keep the weights if they are the best so far."""
        if self.history and self.history[-1]["step"] == self.step:
            return  # a run that was killed between its last evaluation and its end
        self._read_losses()
        first = self.corpus.num_train
        half = max(1, (len(self.corpus.ids) - first) // 2)
        last = first + min(half, _SELECTION_CHARACTERS)
        loss = evaluate(self.working.model, self.corpus.ids, first, last, self.evaluators).nats_per_char
        self._check_finite("validation loss", loss)
        self.history.append(
            {"step": self.step, "seconds": self.seconds, "train_nats_per_char": self.train_loss, "nats_per_char": loss}
        )
        if len(self.history) > _LONGEST_HISTORY:
            del self.history[-2::-2]  # the last one stays
        best = loss < self.best_loss
        self.stale_evaluations = 0 if best else self.stale_evaluations + 1
        if best:
            self.best_loss, self.best_step = loss, self.step
            self.best_weights = own_weights(self.master)
        progress.write(
            f"step {self.step:,}: validation {loss:.4f} nats/char, training {self.train_loss:.4f}"
            f"{' (best so far)' if best else ''}, {format_duration(self.seconds)} spent"
        )

    def _finish(self, stop: StopRequest, progress: Progress) -> Outcome:
        """Write the model where the run is complete, or where it was stopped and none stands there yet."""
        complete = self.is_complete()
        evaluation = None
        if self.group.from_leader(lambda: complete or not self.settings.model_path.exists()):
            if not self.best_weights:  # stopped before the first evaluation
                self._evaluate(progress)
            evaluation = self._evaluate_best()
            self._check_finite("validation loss", evaluation.nats_per_char)
            weights = whole_weights(self.master, self.best_weights, keep=self.group.is_leader)
            if self.group.is_leader:
                save_checkpoint(self.settings.model_path, self._checkpoint(weights, evaluation))
        if complete:
            self.save_resume(finished=True)
        return Outcome(
            evaluation=evaluation,
            best_step=self.best_step,
            steps=self.step,
            seconds=self.seconds,
            complete=complete,
            stopped_by=stop.exit_code,
        )

    def _evaluate_best(self) -> Evaluation:
        """Measure the best weights on the whole validation split; the last ones then stand where they stood."""
        last = own_weights(self.master)
        for weights in (self.best_weights, last):
            set_own_weights(self.master, weights)
            self.working.refresh()
            if weights is self.best_weights:
                evaluation = evaluate(self.working.model, self.corpus.ids, self.corpus.num_train, group=self.evaluators)
        return evaluation

    def _checkpoint(self, weights: dict[str, Tensor], evaluation: Evaluation) -> Checkpoint:
        return Checkpoint(
            model_state_dict=weights,
            config=self.config,
            vocab=self.corpus.vocabulary.index_of_token(),
            training_args=self.settings.training_args(),
            metrics={
                **evaluation.facts(),
                "step": self.best_step,
                "steps": self.step,
                "seconds": self.seconds,
                "characters_per_second": self._speed(self.seconds),
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
            TrainingDivergedError: there are weights that no run could continue from; as above.
        """
        self._read_losses()
        weights = own_weights(self.master)
        (size,) = self.group.sum(sum(float(weight.norm()) for weight in weights.values()))
        self._check_finite("size of the weights", size)  # the last step's loss is of the weights before it
        keep = self.group.is_leader
        state = {
            "identity": run_identity(self.settings, self.corpus),
            "finished": finished,
            "step": self.step,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
            "learning_rate_scale": self.learning_rate_scale,
            "weights": whole_weights(self.master, weights, keep=keep),
            "optimizers": [whole_optimizer_state(optimizer, keep=keep) for optimizer in self.optimizers],
            "scaler": self.working.state(),
            "sampler": self.sampler.state(),
            "random": random_states(),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best_weights": whole_weights(self.master, self.best_weights, keep=keep) if self.best_weights else {},
            "stale_evaluations": self.stale_evaluations,
            "history": self.history,
        }
        if keep:
            save_resume_state(resume_path(self.settings.model_path), state)
        self.saved = True

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            check_figures(state)
            set_own_weights(self.master, split_weights(self.master, state["weights"]))
            for optimizer, earlier in zip(self.optimizers, state["optimizers"], strict=True):
                load_whole_optimizer_state(optimizer, earlier)
            self.working.scaler.load_state_dict(state["scaler"])
            self.working.refresh()
            self.sampler.restore(state["sampler"])
            restore_random_states(state["random"])
            self.step, self.seconds, self.train_loss = state["step"], state["seconds"], state["train_loss"]
            self.best_loss, self.best_step = state["best_loss"], state["best_step"]
            self.history = state["history"]
            self.stale_evaluations = state["stale_evaluations"]
            self.learning_rate_scale *= state["learning_rate_scale"]
            if state["best_weights"]:  # there are none before the first evaluation
                self.best_weights = split_weights(self.master, state["best_weights"])
            self.history = [dict(point) for point in self.history]
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError) as error:
            raise SuiteError(
                f"the resume state does not fit this version of the suite ({error}); start anew with --resume never.",
                ExitCode.BAD_DATA,
            ) from error
