"""A training run from its text to its outcome: announce, continue or begin, train, and try once more if it diverges."""

from __future__ import annotations

import contextlib
import gc
import shlex
from collections import Counter
from pathlib import Path

from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.console import log
from charseq2seq.corpus import Corpus, load_corpus
from charseq2seq.errors import ExitCode, SuiteError, is_out_of_memory
from charseq2seq.files import metrics_path, resume_path, run_lock
from charseq2seq.options import Settings
from charseq2seq.training.processes import Group, process_group
from charseq2seq.training.resume import State, find_resume_state, new_state, run_identity
from charseq2seq.training.text_defaults import with_text_defaults
from charseq2seq.training.trainer import Outcome, Trainer

# What the learning rate is multiplied by after a divergence.
_RETRY_SCALE = 0.5


def train(settings: Settings) -> Outcome:
    """Do a whole run; no other one can write the same model meanwhile.

    If the loss diverges, the run continues once from the last good state with a smaller learning rate.
    """
    with process_group(settings.device) as group, contextlib.ExitStack() as held:
        if warning := group.from_rank_0(lambda: held.enter_context(run_lock(settings.model_path))):
            log(warning)
        corpus = load_corpus(settings.data_path, settings.source_length + settings.target_length, settings.encoding)
        settings = with_text_defaults(settings, corpus)
        settings, saved = group.from_rank_0(lambda: find_resume_state(settings, corpus.sha256))
        identity, path = run_identity(settings, corpus.sha256), resume_path(settings.model_path)
        try:
            state = new_state(identity, saved)
            first = _attempt(settings, corpus, state, group, announced=False)
            if first.diverged is None:
                return first
            if first.stopped_by is not None or state.learning_rate_scale < 1:
                raise SuiteError(first.diverged, ExitCode.DIVERGED)
            if first.saved:
                saved = group.from_rank_0(lambda: load_resume_state(path))
            state = new_state(identity, saved)
            state.learning_rate_scale = _RETRY_SCALE
            log(f"{first.diverged} Going on from step {state.step:,} with {_RETRY_SCALE:g} of the learning rate.")
            second = _attempt(settings, corpus, state, group, announced=True)
            if second.diverged is None:
                return second
            problem = f"{second.diverged} It was the second try."
            if first.saved or second.saved:
                words = f"--resume {shlex.quote(str(path))} --max_steps 1 --model_path NEW.pth"
                problem += f" The best weights so far are in {path}; the same command with {words} makes no more steps "
                problem += "and writes a model of them."
            raise SuiteError(problem, ExitCode.DIVERGED)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SuiteError(
                f"out of memory: batches of {settings.batch_size} windows do not fit with this model; choose a "
                "smaller --batch_size, --target_length or --d_model.",
                ExitCode.OUT_OF_MEMORY,
            ) from error


def _attempt(settings: Settings, corpus: Corpus, state: State, group: Group, *, announced: bool) -> Outcome:
    """Train from a state on; the memory that it took is free when this returns."""
    trainer = Trainer(settings, corpus, state, group)
    if not announced:
        announce(trainer)
    outcome = trainer.train()
    del trainer
    gc.collect()  # it refers to itself through its step
    return outcome


def announce(trainer: Trainer) -> None:
    """Say in one block what is going to happen, and from which resume state on."""
    settings, corpus, state, group = trainer.settings, trainer.corpus, trainer.state, trainer.group
    facts = corpus.facts()
    parts: Counter[str] = Counter()
    for name, weight in trainer.master.named_parameters():
        parts[name.partition(".")[0]] += weight.numel()
    budget = [f"{settings.max_steps:,} steps"] if settings.max_steps else []
    budget += [f"{settings.max_epochs:g} epochs ({trainer.max_steps:,} steps)"] if settings.max_epochs else []
    budget += [f"{settings.max_minutes:g} minutes"] if settings.max_minutes else []
    lines = [
        f"text: {corpus.name}, {facts['characters']:,} characters, {facts['distinct_characters']} distinct; "
        f"{facts['train_characters']:,} to train on, {facts['validation_characters']:,} to validate on",
        f"sha256: {corpus.sha256}",
        f"model: {parts.total():,} parameters (" + ", ".join(f"{n} {c:,}" for n, c in parts.items()) + ")",
        *settings.reasons,
        f"run: {' or '.join(budget)}, batches of {settings.batch_size} x {settings.target_length} characters, "
        f"learning rate {settings.learning_rate:g}, weight decay {settings.weight_decay:g}, seed {settings.seed}",
        f"files: {settings.model_path} when the run ends, {resume_path(settings.model_path)} to continue it, "
        f"{metrics_path(settings.model_path)} to watch it",
    ]
    if not trainer.is_first_model and group.rank == 0:
        replaced = _describe_model(settings.model_path)
        lines.append(f"replaced when the run ends: {replaced}; to keep it, give another --model_path")
    if group.size > 1 or settings.accumulation_steps > 1:
        lines.append(f"batches: divided among {group.size} processes, {settings.accumulation_steps} parts each")
    if state.step:
        kind = "finished" if state.finished else "unfinished"
        lines.append(f"resume: continuing the {kind} run at step {state.step:,}")
    log("\n".join(lines))


def _describe_model(path: Path) -> str:
    try:
        model = load_checkpoint(path)
    except SuiteError as error:
        return f"{path}, which is no model ({error})"
    loss, steps = model.metrics["nats_per_char"], model.metrics.get("steps", 0)
    return f"the model of {model.corpus['name']} in {path} ({loss:.4f} nats per character, {steps:,} steps)"
