"""A training run from its text to its outcome: announce, continue or begin, train, and try once more if it diverges."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from dataclasses import replace
from typing import Any

from charseq2seq.checkpoint import load_resume_state
from charseq2seq.console import log
from charseq2seq.corpus import Corpus, load_corpus
from charseq2seq.errors import ExitCode, SuiteError, is_out_of_memory
from charseq2seq.files import resume_path, run_lock
from charseq2seq.options import Settings
from charseq2seq.training.processes import Group, process_group
from charseq2seq.training.resume import find_resume_state, new_state, run_identity
from charseq2seq.training.text_defaults import count_parameters, with_text_defaults
from charseq2seq.training.trainer import Outcome, Trainer

# What the learning rate is multiplied by after a divergence.
_RETRY_SCALE = 0.5

# Master weight, gradient and momentum in float32, the working copy and its gradient, the best weights so far, and what
# a step needs for a while: Muon's update, the copy that is saved.
_BYTES_PER_PARAMETER = 4 + 4 + 4 + 2 + 2 + 4 + 4


def train(settings: Settings) -> Outcome:
    """Do a whole run; no other one can write the same model meanwhile.

    Raises:
        SuiteError: see `load_corpus`, `run_lock`, `find_resume_state` and `Trainer.train`; or the loss diverged twice.
    """
    with process_group(settings.device) as group, contextlib.ExitStack() as held:

        def lock() -> None:
            if warning := held.enter_context(run_lock(settings.model_path)):
                log(warning)

        group.from_rank_0(lock)
        corpus = load_corpus(settings.data_path, settings.source_length + settings.target_length)
        settings = with_text_defaults(settings, corpus)
        check_group(settings, corpus, group)
        check_memory(settings.model_config(len(corpus.vocabulary)))
        identity = run_identity(settings, corpus)
        saved = group.from_rank_0(
            lambda: find_resume_state(settings.resume, settings.model_path, identity, settings.undecided)
        )
        if saved is not None and "dropout" in settings.undecided:  # whose default depends on the budget
            settings = replace(settings, dropout=saved["identity"]["dropout"])
            identity = run_identity(settings, corpus)
        try:
            return _train(settings, corpus, identity, saved, group)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SuiteError(
                f"out of memory: batches of {settings.batch_size} windows do not fit with this model; choose a "
                "smaller --batch_size, --target_length or --d_model.",
                ExitCode.OUT_OF_MEMORY,
            ) from error


def _train(
    settings: Settings, corpus: Corpus, identity: dict[str, Any], saved: dict[str, Any] | None, group: Group
) -> Outcome:
    """Train; if the loss diverges, continue once from the last good state with a smaller learning rate."""
    trainer = Trainer(settings, corpus, new_state(identity, saved), group)
    announce(trainer)
    first = trainer.train()
    del trainer  # or its memory would be needed twice
    gc.collect()  # it refers to itself through its step
    if first.diverged is None:
        return first
    if first.saved:
        saved = group.from_rank_0(lambda: load_resume_state(resume_path(settings.model_path)))
    state = new_state(identity, saved)
    if first.stopped_by is not None or state.learning_rate_scale < 1:
        raise SuiteError(first.diverged, ExitCode.DIVERGED)
    state.learning_rate_scale = _RETRY_SCALE
    log(f"{first.diverged} Going on from step {state.step:,} with {_RETRY_SCALE:g} of the learning rate.")
    second = Trainer(settings, corpus, state, group).train()
    if second.diverged is None:
        return second
    kept = f" The best weights so far are in {resume_path(settings.model_path)}." * (first.saved or second.saved)
    raise SuiteError(f"{second.diverged} It was the second try.{kept}", ExitCode.DIVERGED)


def check_group(settings: Settings, corpus: Corpus, group: Group) -> None:
    """Refuse what a group of processes cannot do.

    Raises:
        SuiteError: a batch has too few windows for all of them, or they read different texts.
    """
    parts = group.size * settings.accumulation_steps
    if settings.batch_size < parts:
        raise SuiteError(
            f"--batch_size {settings.batch_size} cannot be divided into {parts} parts ({group.size} processes, "
            f"--accumulation_steps {settings.accumulation_steps}); give at least {parts}.",
            ExitCode.USAGE,
        )
    if group.from_rank_0(lambda: corpus.sha256) != corpus.sha256:
        raise SuiteError(
            f"process {group.rank} reads another text than rank 0; give all machines the same {corpus.name}.",
            ExitCode.BAD_DATA,
        )


def check_memory(config: dict[str, Any]) -> None:
    """Refuse a model that this machine's memory cannot hold, before the system's killer ends the run without a word.

    Args:
        config: keyword arguments of `Transformer`.

    Raises:
        SuiteError: weights, gradients and optimizer state alone are larger than the memory.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not to be had on this system
        return
    parameters = count_parameters(config)
    if parameters * _BYTES_PER_PARAMETER > memory:
        raise SuiteError(
            f"a model of {parameters:,} parameters takes about {parameters * _BYTES_PER_PARAMETER / 2**30:,.0f} GiB to "
            f"train, this machine has {memory / 2**30:.0f} GiB; choose a smaller --d_model, --d_ff or fewer layers.",
            ExitCode.OUT_OF_MEMORY,
        )


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
        f"files: {settings.model_path} when the run ends, {resume_path(settings.model_path)} to continue it",
    ]
    if group.size > 1 or settings.accumulation_steps > 1:
        lines.append(f"batches: divided among {group.size} processes, {settings.accumulation_steps} parts each")
    if state.step:
        kind = "finished" if state.finished else "unfinished"
        lines.append(f"resume: continuing the {kind} run at step {state.step:,}")
    log("\n".join(lines))
