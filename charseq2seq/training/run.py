"""A training run from its text to its outcome: announce, continue or begin, train, and try once more if it diverges."""

from __future__ import annotations

import contextlib
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
from charseq2seq.training.loop import Outcome, Trainer, TrainingDivergedError
from charseq2seq.training.optimization import suitable_weight_decay
from charseq2seq.training.parallel import Group, process_group
from charseq2seq.training.resume import find_resume_state, run_identity

# What the learning rate of the second try is multiplied by.
_RETRY_SCALE = 0.5

# Master weight, gradient and momentum in float32, the working copy and its gradient, the best weights so far, and what
# comes and goes: Muon's update in a step, the copy that is saved.
_BYTES_A_PARAMETER = 4 + 4 + 4 + 2 + 2 + 4 + 4


def train(settings: Settings) -> Outcome:
    """Do a whole run; no other one can write the same model meanwhile.

    Raises:
        SuiteError: see `load_corpus`, `run_lock`, `find_resume_state` and `Trainer.train`.
    """
    with process_group(settings.device) as group:
        return _train(settings, group)  # in a call of its own: what it holds of the group goes before the group does


def _train(settings: Settings, group: Group) -> Outcome:
    with contextlib.ExitStack() as held:
        group.from_leader(lambda: held.enter_context(run_lock(settings.model_path)))
        window = settings.model["source_length"] + settings.model["target_length"]
        corpus = group.after_first(lambda: load_corpus(settings.data_path, window))
        settings = suited_to(corpus, settings)
        check_group(settings, corpus, group)
        if settings.parallel != "fsdp":
            check_memory(settings.model_config(len(corpus.vocabulary)))
        identity = run_identity(settings, corpus)
        state = group.from_leader(lambda: find_resume_state(settings.resume, settings.model_path, identity))
        try:
            return _train_once_or_twice(settings, corpus, state, group)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise SuiteError(
                f"out of memory: batches of {settings.batch_size} windows do not fit with this model; choose a "
                "smaller --batch_size, --target_length or --d_model.",
                ExitCode.OUT_OF_MEMORY,
            ) from error


def _train_once_or_twice(settings: Settings, corpus: Corpus, state: dict[str, Any] | None, group: Group) -> Outcome:
    """Train; if the loss diverges, go on from the last good state with a smaller learning rate, only once in a run."""
    try:
        trainer = Trainer(settings, corpus, state, group=group)
        announce(trainer, state)
        return trainer.train()
    except TrainingDivergedError as first:
        error = first.with_traceback(None)  # which holds the trainer too
    del trainer  # or its memory would be taken twice
    if error.stopped:
        raise error
    if error.saved:
        state = group.from_leader(lambda: load_resume_state(resume_path(settings.model_path)))
    if state is not None and state["learning_rate_scale"] < 1:
        raise error
    trainer = Trainer(settings, corpus, state, _RETRY_SCALE, group)
    log(f"{error} Going on from step {trainer.step:,} with {_RETRY_SCALE:g} of the learning rate.")
    try:
        return trainer.train()
    except TrainingDivergedError as again:
        kept = resume_path(settings.model_path) if again.saved or error.saved else None
        where = f" The best weights so far are in {kept}." if kept else ""
        raise TrainingDivergedError(f"{again} It was the second try.{where}", ExitCode.DIVERGED) from again


def suited_to(corpus: Corpus, settings: Settings) -> Settings:
    """The settings, with what depends on the text and was not asked for."""
    if settings.weight_decay is not None:
        return settings
    steps_a_pass = corpus.num_train / (settings.batch_size * settings.model["target_length"])
    return replace(settings, weight_decay=suitable_weight_decay(settings.learning_rate, steps_a_pass))


def check_group(settings: Settings, corpus: Corpus, group: Group) -> None:
    """Refuse what a group of processes cannot do.

    Raises:
        SuiteError: a batch has too few windows for all of them, or they read different texts.
    """
    pieces = group.size * settings.accumulation_steps
    if settings.batch_size < pieces:
        raise SuiteError(
            f"--batch_size {settings.batch_size} cannot be shared out into {pieces} pieces ({group.size} processes, "
            f"--accumulation_steps {settings.accumulation_steps}); give at least {pieces}.",
            ExitCode.USAGE,
        )
    if settings.parallel == "fsdp" and (group.size == 1 or settings.precision == "fp16"):
        raise SuiteError(
            f"--parallel fsdp splits a model over several processes in fp32 or bf16, here are {group.size} in "
            f"{settings.precision}; start it by torchrun, or leave the flag out.",
            ExitCode.USAGE,
        )
    if group.from_leader(lambda: corpus.sha256) != corpus.sha256:
        raise SuiteError(
            f"process {group.rank} reads another text than the first one; give all machines the same {corpus.name}.",
            ExitCode.BAD_DATA,
        )


def check_memory(config: dict[str, Any]) -> None:
    """Refuse a model that this machine's memory cannot hold, before the system's killer ends the run without a word.

    Args:
        config: keyword arguments of `Transformer`.

    Raises:
        SuiteError: weights, gradients and optimizer state alone are larger than the memory.
    """
    import torch

    from encoder_decoder_transformer import Transformer

    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not to be had on this system
        return
    with torch.device("meta"):  # sizes without memory
        parameters = sum(weight.numel() for weight in Transformer(**config).parameters())
    if parameters * _BYTES_A_PARAMETER > memory:
        raise SuiteError(
            f"a model of {parameters:,} parameters takes about {parameters * _BYTES_A_PARAMETER / 2**30:,.0f} GiB to "
            f"train, this machine has {memory / 2**30:.0f} GiB; choose a smaller --d_model, --d_ff or fewer layers.",
            ExitCode.OUT_OF_MEMORY,
        )


def announce(trainer: Trainer, state: dict[str, Any] | None) -> None:
    """Say in one block what is going to happen, and from which resume state on."""
    settings, corpus = trainer.settings, trainer.corpus
    facts = corpus.facts()
    parts: Counter[str] = Counter()
    for name, weight in trainer.master.named_parameters():
        parts[name.partition(".")[0]] += weight.numel()
    budget = [f"{settings.max_steps:,} steps"] if settings.max_steps else []
    budget += [f"{settings.max_minutes:g} minutes"] if settings.max_minutes else []
    shares = []
    if trainer.group.size > 1 or settings.accumulation_steps > 1:
        shares = [f"batches: shared by {trainer.group.size} processes, in {settings.accumulation_steps} pieces each"]
    resume = []
    if state is not None:
        kind = "finished" if state.get("finished") else "unfinished"
        resume = [f"resume: continuing the {kind} run at step {trainer.step:,}"]
    log(
        "\n".join(
            [
                f"text: {corpus.name}, {facts['characters']:,} characters, {facts['distinct_characters']} distinct; "
                f"{facts['train_characters']:,} to train on, {facts['validation_characters']:,} to validate on",
                f"sha256: {corpus.sha256}",
                f"model: {parts.total():,} parameters (" + ", ".join(f"{n} {c:,}" for n, c in parts.items()) + ")",
                *settings.reasons,
                f"run: {' or '.join(budget)}, batches of {settings.batch_size} x {settings.model['target_length']} "
                f"characters, learning rate {settings.learning_rate:g}, weight decay {settings.weight_decay:g}, "
                f"seed {settings.seed}",
                f"files: {settings.model_path} when the run ends, {resume_path(settings.model_path)} to continue it",
                *shares,
                *resume,
            ]
        )
    )
