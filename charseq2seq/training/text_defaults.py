"""Defaults that depend on the text: size of the model, epochs, batches and regularisation.

Everything here is measured (benchmarks/LOG.md), and printed when a run starts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from charseq2seq.corpus import Corpus
from charseq2seq.options import LIMITS, SIZES, Settings

# Characters to train on; size base overfits a shorter text.
_SHORT_TEXT = 2_000_000

# Weight decay per epoch at the full learning rate: ignoring gradients, exp(-1.3) of a hidden matrix is left after an
# epoch. A rate per epoch, not per step, suits texts of all sizes (Wang and Aitchison, 2024, arXiv:2405.13698): what was
# learnt from a character should have faded before the character comes again (benchmarks/LOG.md).
DECAY_PER_EPOCH = 1.3
_LARGEST_DECAY_PER_STEP = 0.02


def with_text_defaults(settings: Settings, corpus: Corpus) -> Settings:
    """The settings, with the defaults that depend on the length of the text.

    These are the size of the model, the epochs, the batch size, dropout and weight decay.
    """
    characters, undecided = corpus.num_train, settings.undecided
    if {"size", *SIZES["small"]} <= undecided and settings.device != "cpu" and characters < _SHORT_TEXT:
        reason = "size small: default for a GPU and a text of less than two million characters"
        sizes: dict[str, Any] = dict(SIZES["small"])
        settings = replace(settings, size="small", reasons=(*settings.reasons[:-1], reason), **sizes)
    if settings.batch_size is None:
        settings = replace(settings, batch_size=suitable_batch_size(settings.device, characters))
    if undecided >= LIMITS:
        settings = replace(settings, max_epochs=suitable_epochs(characters))
    steps_per_epoch = characters / (settings.batch_size * settings.target_length)
    if settings.dropout is None:
        config = settings.model_config(len(corpus.vocabulary)) | {"dropout": 0.0}
        epochs = (step_budget(settings, characters) or 0) / steps_per_epoch
        settings = replace(settings, dropout=suitable_dropout(count_parameters(config) / characters, epochs))
    if settings.weight_decay is None:
        decay = suitable_weight_decay(settings.learning_rate, steps_per_epoch)
        settings = replace(settings, weight_decay=decay)
    return settings


def step_budget(settings: Settings, characters: int) -> int | None:
    """The most steps of a run: those asked for or those of its epochs, whichever are fewer; None: no such limit."""
    per_epoch = characters / (settings.batch_size * settings.target_length)
    limits = [settings.max_steps] if settings.max_steps else []
    limits += [max(1, math.ceil(settings.max_epochs * per_epoch))] if settings.max_epochs else []
    return min(limits, default=None)


def count_parameters(config: dict[str, Any]) -> int:
    """How many weights a model with these keyword arguments of `Transformer` has."""
    import torch

    from encoder_decoder_transformer import Transformer

    with torch.device("meta"):  # sizes without memory
        return sum(weight.numel() for weight in Transformer(**config).parameters())


def suitable_weight_decay(learning_rate: float, steps_per_epoch: float) -> float:
    """The weight decay, per unit of learning rate, for epochs of `steps_per_epoch` steps.

    Rounded to three digits, as it is shown.
    """
    decay_per_step = min(DECAY_PER_EPOCH / steps_per_epoch, _LARGEST_DECAY_PER_STEP)
    return float(f"{decay_per_step / max(learning_rate, 1e-36):.3g}")  # finite, however small the learning rate


def suitable_epochs(characters: int) -> float:
    """Epochs of a run for which no limit was asked: ten for a million characters, four for the plays.

    Measured on a GPU (benchmarks/LOG.md, 2026-11-27); on a CPU the default time is over before, except for short texts.
    """
    return float(f"{min(20.0, 10 * (1e6 / characters) ** 0.63):.2g}")


def suitable_batch_size(device: str, characters: int) -> int:
    """Windows a step: small batches learn more from a short text, large ones are faster on a GPU."""
    if device == "cpu":
        return 16
    return 32 if characters < 10_000_000 else 128


def suitable_dropout(parameters_per_character: float, epochs: float) -> float:
    """Dropout where a large model reads a small text often; elsewhere weight decay alone is better."""
    return 0.1 if epochs > 5 and parameters_per_character > 8 else 0.0
