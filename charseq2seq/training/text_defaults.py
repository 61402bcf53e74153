"""Defaults that depend on the text: size of the model, epochs, batches and regularisation.

Everything here is measured (benchmarks/LOG.md), and printed when a run starts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from charseq2seq.corpus import Corpus
from charseq2seq.device import available_memory
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.options import LIMITS, SIZES, Settings
from charseq2seq.training.resume import State, does_not_fit
from encoder_decoder_transformer import Transformer

# Texts of fewer characters to train on: what size of model, windows a step and epochs serve them best, on any device
# (benchmarks/LOG.md, 2026-11-28). A larger model would learn them by heart.
_SHORT_TEXTS = ((50_000, "nano", 4, 15.0), (250_000, "micro", 8, 10.0))
_BASE_TEXT = 2_000_000  # characters; on a GPU a shorter text is for size small, because base overfits it

# A default run ends when so many evaluations in a row, of its twenty, found no better weights.
_PATIENCE = 5
_LATE_ENOUGH = 0.8  # fraction of a run or of its budget: if the best weights are older, the run was too long

# Weight decay per epoch at the full learning rate: ignoring gradients, exp(-1.3) of a hidden matrix is left after an
# epoch. A rate per epoch, not per step, suits texts of all sizes (Wang and Aitchison, 2024, arXiv:2405.13698).
DECAY_PER_EPOCH = 1.3
_LARGEST_DECAY_PER_STEP = 0.02

# Master weight, gradient and momentum in float32, the working copy and its gradient, the best weights so far, and what
# a step needs for a while: Muon's update, the copy that is saved.
_BYTES_PER_PARAMETER = 4 + 4 + 4 + 2 + 2 + 4 + 4


def with_text_defaults(settings: Settings, corpus: Corpus) -> Settings:
    """The settings, with the defaults that depend on the length of the text."""
    characters, undecided, on_cpu = corpus.num_train, settings.undecided, settings.device == "cpu"
    otherwise = (
        settings.size if on_cpu or characters >= _BASE_TEXT else "small",
        16 if on_cpu else 32 if characters < 10_000_000 else 128,  # small batches learn more, large ones are faster
        # Ten for a million characters, four for the plays (benchmarks/LOG.md, 2026-11-27, on a GPU); on a CPU the
        # default time is over before.
        float(f"{min(20.0, 10 * (1e6 / characters) ** 0.63):.2g}"),
    )
    size, batch_size, epochs = next((row[1:] for row in _SHORT_TEXTS if characters < row[0]), otherwise)
    if {"size", *SIZES[size]} <= undecided and size != settings.size:
        reason = f"size {size}: default for a text of {characters:,} characters"
        sizes: dict[str, Any] = dict(SIZES[size])
        settings = replace(settings, size=size, reasons=(*settings.reasons[:-1], reason), **sizes)
    if settings.batch_size is None:
        settings = replace(settings, batch_size=batch_size)
    if undecided >= LIMITS:
        settings = replace(settings, max_epochs=epochs, patience=settings.patience or _PATIENCE)
    steps_per_epoch = characters / (settings.batch_size * settings.target_length)
    if settings.weight_decay is None:
        settings = replace(settings, weight_decay=suitable_weight_decay(settings.learning_rate, steps_per_epoch))
    if settings.dropout is None:  # for a large model that reads a small text often; else weight decay alone is better
        config = settings.model_config(len(corpus.vocabulary)) | {"dropout": 0.0}
        often = (step_budget(settings, characters) or 0) / steps_per_epoch > 5
        large = count_parameters(config) / characters > 4
        settings = replace(settings, dropout=0.1 if often and large else 0.0)
    return settings


def advice(corpus: Corpus, loss: float, state: State, budget: int | None) -> tuple[str, ...]:
    """What the end of a run says about its text and its limits, a sentence each.

    Args:
        loss: of the best weights on the validation split, nats per character.
        budget: the steps that the run was to make, if its time limit ended it; else None.
    """
    said = []
    if loss > 0.99 * guessing_loss(corpus):
        said.append(
            "the model does no better than guessing every character by how often it occurs: it found nothing to learn "
            "from. More time (--max_minutes) may help; a random text has nothing to learn."
        )
    if state.best_step < _LATE_ENOUGH * state.step:
        said.append(
            "after that step the loss rose: most likely the model overfits its text. A shorter run "
            f"(--max_steps {state.best_step}) should end better, and so may --dropout 0.2 or more text."
        )
    elif budget is not None and state.step < _LATE_ENOUGH * budget:
        minutes = math.ceil(state.seconds * budget / state.step / 60)
        said.append(
            f"the time was over after {state.step:,} of {budget:,} steps; --max_minutes {minutes} is enough for all."
        )
    return tuple(said)


def guessing_loss(corpus: Corpus) -> float:
    """The loss of guessing each character by how often it occurs in the training split, nats per character."""
    size = len(corpus.vocabulary)
    seen, asked = (np.bincount(ids, minlength=size) for ids in (corpus.train_ids, corpus.ids[corpus.num_train :]))
    return float(-asked @ np.log((seen + 1) / (seen + 1).sum()) / asked.sum())


def step_budget(settings: Settings, characters: int) -> int | None:
    """The most steps of a run: those asked for or those of its epochs, whichever are fewer; None: no such limit."""
    per_epoch = characters / (settings.batch_size * settings.target_length)
    limits = [settings.max_steps] if settings.max_steps else []
    limits += [max(1, math.ceil(settings.max_epochs * per_epoch))] if settings.max_epochs else []
    return min(limits, default=None)


def count_parameters(config: dict[str, Any]) -> int:
    """How many weights a model with these keyword arguments of `Transformer` has."""
    with torch.device("meta"):  # sizes without memory
        return sum(weight.numel() for weight in Transformer(**config).parameters())


def suitable_weight_decay(learning_rate: float, steps_per_epoch: float) -> float:
    """The weight decay, per unit of learning rate, for epochs of `steps_per_epoch` steps; three digits, as shown."""
    decay_per_step = min(DECAY_PER_EPOCH / steps_per_epoch, _LARGEST_DECAY_PER_STEP)
    return float(f"{decay_per_step / max(learning_rate, 1e-36):.3g}")  # finite, however small the learning rate


def check_memory(config: dict[str, Any], device: str) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone are larger than this machine's memory.

    The system's killer would end the run without a word. A GPU has a memory of its own, and says when it is full.
    """
    try:
        parameters, memory = count_parameters(config), available_memory()
    except ValueError as error:  # sizes that only a damaged resume state can have
        raise does_not_fit(error) from error
    if device != "cuda" and memory is not None and parameters * _BYTES_PER_PARAMETER > memory:
        raise SuiteError(
            f"a model of {parameters:,} parameters takes about {parameters * _BYTES_PER_PARAMETER / 2**30:,.0f} GiB to "
            f"train, there are {memory / 2**30:.1f} GiB here; choose a smaller --d_model, --d_ff or fewer layers.",
            ExitCode.OUT_OF_MEMORY,
        )
