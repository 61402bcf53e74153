"""The training loop: steps, evaluations, saving, stopping.

The loop's body runs N + 1 times for N steps: it evaluates and saves *before* a step, so that the last evaluation and
the last save are the same lines as every other (the idea is nanochat's).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from charseq2seq.checkpoint import Checkpoint, library_versions, save_checkpoint, save_resume_state
from charseq2seq.corpus import Corpus
from charseq2seq.device import describe_hardware, suitable_kernels, torch_dtype, tune
from charseq2seq.errors import ExitCode
from charseq2seq.files import metrics_path, resume_path
from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.options import Settings
from charseq2seq.training.cuda_graph import captured_where_possible
from charseq2seq.training.evaluation import LONGEST_BEGINNING, Evaluation, evaluate, sha256_of_beginning, summed_loss
from charseq2seq.training.metrics import Metrics
from charseq2seq.training.mixed_precision import WorkingCopy
from charseq2seq.training.optimization import build_optimizers, check_state, set_learning_rates
from charseq2seq.training.processes import ALONE, Group
from charseq2seq.training.progress import OverdueError, Progress, StopRequest, Stopwatch, format_duration, stop_signals
from charseq2seq.training.resume import State, does_not_fit
from charseq2seq.training.text_defaults import advice, check_memory, step_budget
from charseq2seq.windows import WindowSampler, ids_on_device
from encoder_decoder_transformer import Transformer

# During a run the loss is measured on the first half of the validation split, and on no more than so many characters;
# the final loss on all of it. That is cheap, and the final loss gains little from the choice of the best weights.
_SELECTION_CHARACTERS = 32_768

_EVALUATIONS = 20  # a run, unless --eval_interval is given
_LONGEST_HISTORY = 4_000  # evaluations; of more, every second one is dropped
_EVALUATIONS_PER_MINUTE = 4  # at most, where time is the limit
_SAMPLE_CHARACTERS = 60  # that the log shows at each evaluation
_SAVE_SECONDS = 300.0  # the longest a run goes without saving: what a power cut can cost
_SAVE_COST = 0.05  # saving takes at most this fraction of the time


class _DivergedError(Exception):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    evaluation: Evaluation | None  # of the model that was written, on the whole validation split
    best_step: int
    steps: int
    seconds: float
    complete: bool  # its budget or its patience ended the run
    stopped_by: ExitCode | None  # the signal that stopped it, or that came while a complete run was finishing
    diverged: str | None = None  # what became NaN or infinite, in a sentence
    saved: bool = False  # a resume state was written in this session
    beginning: str = ""  # of the text
    advice: tuple[str, ...] = ()  # what its end says about its text and its limits, a sentence each


class Trainer:
    """One training run, begun or continued from a state; in a group every process has a trainer of its own."""

    def __init__(self, settings: Settings, corpus: Corpus, state: State, group: Group = ALONE) -> None:
        self.settings, self.corpus, self.state, self.group = settings, corpus, state, group
        torch.manual_seed(settings.seed)
        tune()
        self.config = settings.model_config(len(corpus.vocabulary))
        check_memory(self.config, settings.device)
        self.max_steps = step_budget(settings, corpus.num_train)
        self.characters_per_step = settings.batch_size * settings.target_length
        dtype, kernels = torch_dtype(settings.precision), suitable_kernels(settings.device)
        self.master = Transformer(**self.config).to(settings.device).use_kernels(kernels)
        self.master.checkpoint_activations = settings.gradient_checkpointing
        self.optimizers = build_optimizers(self.master, settings.learning_rate, settings.weight_decay or 0.0)
        sizes = settings.source_length, settings.target_length, settings.batch_size
        self.sampler = WindowSampler(corpus.num_train, *sizes, settings.seed, state.epoch, state.position)
        self.ids = ids_on_device(corpus.ids, settings.device)
        self.working = WorkingCopy(self.master, dtype)
        group.check(settings.batch_size, settings.accumulation_steps, corpus.name, corpus.sha256)
        self.is_first_model = group.from_rank_0(lambda: not settings.model_path.exists())
        self.model = group.distribute(self.working.model)
        self.step = captured_where_possible(self._compute, settings, group.size)
        self.stop = StopRequest()
        self.metrics: Metrics | None = None
        self.unread_losses: list[Tensor] = []
        # Whoever reads a loss waits for the GPU, so losses are read only as often as they are shown.
        self.reading_interval = 1 if settings.device == "cpu" else settings.log_interval
        self.saved_at, self.saved_step = state.seconds, -1  # this session has saved nothing yet
        self.save_cost = 0.0  # seconds
        if state.weights:
            self._restore()

    def train(self) -> Outcome:
        """Run to the end of the budget, or until a signal or a divergence; write the model."""
        evaluation, diverged = None, None
        said: tuple[str, ...] = ()
        with contextlib.suppress(OverdueError), contextlib.ExitStack() as open_now:
            # Not in a group: each process would give up at another place, and the others would wait for it for ever.
            self.stop = open_now.enter_context(stop_signals(gives_up=self.group.size == 1))
            progress = open_now.enter_context(contextlib.closing(Progress(self.settings.log_interval)))
            self.group.from_rank_0(lambda: self._open_metrics(open_now))
            stopwatch = open_now.enter_context(contextlib.closing(Stopwatch(self.state.seconds)))
            try:
                evaluation = self._run(stopwatch, progress)
            except _DivergedError as error:
                diverged = str(error)
                # All processes see the same losses, but a signal may have reached only one of them.
                self.stop.signal, _ = self.group.synchronize(self.stop.signal)
        complete = evaluation is not None and self.is_complete()
        if evaluation and complete:
            time_is_over = self._fraction(0, self.state.seconds) >= 1
            said = advice(self.corpus, evaluation.nats_per_char, self.state, self.max_steps if time_is_over else None)
        return Outcome(
            evaluation=evaluation,
            best_step=self.state.best_step,
            steps=self.state.step,
            seconds=self.state.seconds,
            complete=complete,
            stopped_by=self.stop.exit_code,
            diverged=diverged,
            saved=self.saved_step >= 0,
            beginning=self.corpus.beginning,
            advice=said,
        )

    def spent_fraction(self) -> float:
        """How much of the budget is spent, 0 to 1: of steps, epochs or minutes, whichever is further."""
        return self._fraction(self.state.step, self.state.seconds)

    def _fraction(self, step: float, seconds: float) -> float:
        of_minutes = seconds / (60 * (self.settings.max_minutes or math.inf))
        return min(1.0, max(step / (self.max_steps or math.inf), of_minutes))

    def is_complete(self) -> bool:
        """Whether the budget or the patience is used up."""
        return self.spent_fraction() >= 1 or self.state.stale_evaluations >= (self.settings.patience or math.inf)

    def _open_metrics(self, open_now: contextlib.ExitStack) -> None:
        metrics = Metrics(metrics_path(self.settings.model_path), self.state.history, self.settings.tensorboard)
        self.metrics = open_now.enter_context(contextlib.closing(metrics))

    def _run(self, stopwatch: Stopwatch, progress: Progress) -> Evaluation | None:
        try:
            self._loop(stopwatch, progress)
            return self._finish(progress)
        except OverdueError:  # the step or evaluation is given up; weights and files are as before it
            if self.saved_step < self.state.step:
                self.save_resume(finished=False)
            return None

    def _loop(self, stopwatch: Stopwatch, progress: Progress) -> None:
        state = self.state
        while True:
            # Only a signal that all processes know of ends the run.
            stopped, figures = self.group.synchronize(self.stop.signal, stopwatch.seconds(), self.save_cost)
            state.seconds, self.save_cost = figures
            last = state.history[-1] if state.history else {"step": 0, "seconds": 0.0}
            due = self._evaluations_by(state.step, state.seconds) > self._evaluations_by(last["step"], last["seconds"])
            if due or self.spent_fraction() >= 1:
                self._evaluate(progress)
            ends = stopped is not None or self.is_complete()
            since = state.seconds - self.saved_at
            if ends or since >= _SAVE_SECONDS or (due and since * _SAVE_COST >= self.save_cost):
                self.save_resume(finished=False)
            if ends:
                self.stop.signal = self.stop.signal or stopped
                return
            self.train_step()
            spent = stopwatch.seconds()
            progress.show(state.step, state.train_loss, self._speed(spent), spent, self.spent_fraction())

    def _evaluations_by(self, step: float, seconds: float) -> int:
        """How many evaluations there should have been."""
        if self.settings.eval_interval:
            return int(step) // self.settings.eval_interval
        evaluations = min(_EVALUATIONS, _EVALUATIONS_PER_MINUTE * (self.settings.max_minutes or math.inf))
        return int(self._fraction(step, seconds) * evaluations)

    def _speed(self, seconds: float) -> float:
        """Target characters per second."""
        return self.state.step * self.characters_per_step / max(seconds, 1e-9)

    def train_step(self) -> None:
        """Update the weights by the next batch."""
        state, settings, group = self.state, self.settings, self.group
        # The middle of the step: at its beginning the first learning rate would be zero.
        progress = self.spent_fraction() + 0.5 / (self.max_steps or math.inf)
        set_learning_rates(self.optimizers, progress, state.learning_rate_scale)
        if settings.dropout:  # by seed, step and rank: a resumed run drops the same features
            torch.manual_seed((settings.seed * 1_000_003 + state.step) * group.size + group.rank)
        starts, source_length = self.sampler.next_batch(group.rank, group.size)
        if settings.device == "cuda":
            starts = starts.pin_memory()
        if settings.device != "cpu":  # a GPU cannot be interrupted in a step that it has begun
            self.stop.hold()
        self.unread_losses.append(self.step(starts, source_length))
        state.step += 1
        state.epoch, state.position = self.sampler.epoch, self.sampler.position  # not before: a step may be given up
        if state.step % self.reading_interval == 0:
            self._read_losses()
        self.stop.release()

    def _compute(self, starts: Tensor, source_length: int) -> Tensor:
        """Everything that a step does on the device; returns this process's part of the batch's mean loss."""
        settings, size = self.settings, self.group.size
        pieces = starts.to(self.ids.device).tensor_split(settings.accumulation_steps)
        losses = []
        for number, piece in enumerate(pieces, start=1):
            # Gradients to which more will be added are not averaged yet.
            grouped = number < len(pieces) and isinstance(self.model, DistributedDataParallel)
            with cast("Any", self.model).no_sync() if grouped else contextlib.nullcontext():
                summed = summed_loss(self.model, self.ids, piece, source_length, settings.target_length)
                loss = summed / self.characters_per_step
                self.working.backward(loss * size)  # the processes' gradients are averaged, not summed
            losses.append(loss.detach())
        self.stop.hold()
        self.working.step(self.optimizers)
        return torch.stack(losses).sum()

    def _read_losses(self) -> None:
        """Read the losses of the steps since the last call into the state, with rate and gradient of the last one."""
        if not self.unread_losses:
            return
        losses, state = self.group.sum(*torch.stack(self.unread_losses).tolist()), self.state
        self.unread_losses.clear()
        for loss in losses:
            self._check_finite("training loss", loss)
            state.train_loss = loss if math.isnan(state.train_loss) else 0.98 * state.train_loss + 0.02 * loss
        state.learning_rate = float(self.optimizers[0].param_groups[0]["lr"])
        norm = float(self.working.gradient_norm)
        state.gradient_norm = norm if math.isfinite(norm) else math.nan  # fp16's may overflow

    def _check_finite(self, name: str, figure: float) -> None:
        if not math.isfinite(figure):
            raise _DivergedError(
                f"the {name} became {figure} at step {self.state.step:,}: most likely the learning rate "
                f"({self.settings.learning_rate * self.state.learning_rate_scale:g}) is too high; try half of it."
            )

    def _evaluate(self, progress: Progress) -> None:
        """Measure the loss, and keep the weights if they are the best so far."""
        state = self.state
        if state.history and state.history[-1]["step"] == state.step:
            return  # the run was killed between its last evaluation and its end, and resumed
        first = self.corpus.num_train
        last = first + min(_SELECTION_CHARACTERS, max(1, (len(self.corpus.ids) - first) // 2))
        loss = evaluate(self.working.model, self.ids, first, last, self.group).nats_per_char
        self._check_finite("validation loss", loss)
        self.stop.hold()
        self._read_losses()
        row = self._row(loss)
        state.history.append(row)
        if len(state.history) > _LONGEST_HISTORY:
            del state.history[-2::-2]  # the last one stays
        best = loss < state.best_loss
        state.stale_evaluations = 0 if best else state.stale_evaluations + 1
        if best:
            state.best_loss, state.best_step, state.best_weights = loss, state.step, self.working.weights()
        if self.metrics:
            self.metrics.add(row)
        self.stop.release()
        progress.write(
            f"step {state.step:,}: validation {loss:.4f} nats/char, training {state.train_loss:.4f}"
            f"{' (best so far)' if best else ''}, {format_duration(state.seconds)} spent"
        )
        if self.metrics:  # as rank 0 has, who alone logs
            progress.write(f"sample: {self._sample()}")

    def _row(self, loss: float) -> dict[str, float]:
        """The row of the history for this step."""
        characters = self.state.step * self.characters_per_step
        return {
            "step": self.state.step,
            "epoch": characters / self.corpus.num_train,
            "seconds": self.state.seconds,
            "characters": characters,
            "characters_per_second": self._speed(self.state.seconds),
            "learning_rate": self.state.learning_rate,
            "gradient_norm": self.state.gradient_norm,
            "train_nats_per_char": self.state.train_loss,
            "nats_per_char": loss,
        }

    def _sample(self) -> str:
        """A line that the weights of this step generate."""
        beginning = self.corpus.beginning
        text = TextGenerator(self.master, self.corpus.vocabulary).generate(beginning, _SAMPLE_CHARACTERS, Sampling())
        self.master.train()
        return " ".join((beginning + text).split())

    def _finish(self, progress: Progress) -> Evaluation | None:
        """Write the model if the run is complete, or if it was stopped and there is none yet."""
        complete, evaluation = self.is_complete(), None
        if complete or self.is_first_model:
            if not self.state.best_weights:  # stopped before the first evaluation
                self._evaluate(progress)
            last = self.working.weights()
            self.working.load(self.state.best_weights)
            evaluation = evaluate(self.working.model, self.ids, self.corpus.num_train, group=self.group)
            self.working.load(last)
            self._check_finite("validation loss", evaluation.nats_per_char)
            self.stop.hold()
            if self.group.rank == 0:
                save_checkpoint(self.settings.model_path, self._checkpoint(evaluation))
        if complete:
            self.save_resume(finished=True)
        return evaluation

    def _checkpoint(self, evaluation: Evaluation) -> Checkpoint:
        state = self.state
        beginning = self.corpus.vocabulary.decode(self.corpus.ids[:LONGEST_BEGINNING].tolist())
        return Checkpoint(
            model_state_dict=state.best_weights,
            config=self.config,
            vocab=self.corpus.vocabulary.index_of_token(),
            training_args=self.settings.training_args(),
            metrics={
                **evaluation.facts(),
                "step": state.best_step,
                "steps": state.step,
                "seconds": state.seconds,
                "characters_per_second": self._speed(state.seconds),
                "train_nats_per_char": state.train_loss,
                "history": state.history,
            },
            corpus={**self.corpus.facts(), "beginning_sha256": sha256_of_beginning([beginning], self.corpus.num_train)},
            environment={**library_versions(), "hardware": describe_hardware(self.settings.device)},
        )

    def save_resume(self, *, finished: bool) -> None:
        """Write everything that continuing needs; where it cannot be written, an earlier state is untouched."""
        started = time.perf_counter()
        self.stop.hold()
        self._read_losses()
        state = self.state
        state.weights = self.working.weights()
        norms = torch.stack([weight.float().norm() for weight in state.weights.values()])
        self._check_finite("size of the weights", float(norms.sum()))  # no loss of these weights is known yet
        if self.group.rank == 0:
            state.finished = finished
            state.optimizers = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
            state.scaler = self.working.scaler.state_dict()
            save_resume_state(resume_path(self.settings.model_path), vars(state))
        state.weights = {}
        self.saved_at, self.saved_step = state.seconds, state.step
        self.save_cost = time.perf_counter() - started
        if not finished:  # a finished run has nothing left to give up
            self.stop.release()

    def _restore(self) -> None:
        state = self.state
        try:
            if state.best_weights:  # loaded only to see whether they fit
                self.working.load(state.best_weights)
                state.best_weights = self.working.weights()
            self.working.load(state.weights)
            for optimizer, saved in zip(self.optimizers, state.optimizers, strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(saved)})
                check_state(optimizer)
            if state.scaler:  # empty after a run in another precision
                self.working.scaler.load_state_dict(state.scaler)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError) as error:
            raise does_not_fit(error) from error
        state.weights, state.optimizers = {}, []
