"""The defaults that a text decides, and what a run says about its text when it ends."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from charseq2seq.corpus import Corpus
from charseq2seq.errors import SuiteError
from charseq2seq.options import SIZES, Settings, read_settings, resolve_settings
from charseq2seq.training.resume import State
from charseq2seq.training.text_defaults import (
    advice,
    check_memory,
    count_parameters,
    guessing_loss,
    step_budget,
    with_text_defaults,
)
from charseq2seq.vocabulary import CharVocabulary


def corpus_of(characters: int, symbols: str = "ab") -> Corpus:
    """Random letters, `characters` of them to train on and a tenth more to validate."""
    ids = np.random.default_rng(1).integers(1, len(symbols) + 1, characters + characters // 10).astype(np.uint8)
    return Corpus("text.txt", "0" * 64, CharVocabulary(symbols), ids, characters)


def defaults_for(characters: int, *flags: str) -> Settings:
    settings = resolve_settings(read_settings(["--device", "cpu", *flags]), Path("text.txt"))
    return with_text_defaults(settings, corpus_of(characters))


@pytest.mark.parametrize(
    ("characters", "size", "batch_size", "epochs"),
    [
        (18_000, "nano", 4, 15.0),
        (49_999, "nano", 4, 15.0),
        (50_000, "micro", 8, 10.0),
        (250_000, "tiny", 16, 20.0),
        (1_000_000, "tiny", 16, 10.0),
        (4_300_000, "tiny", 16, 4.0),
    ],
)
def test_the_length_of_the_text_decides(characters: int, size: str, batch_size: int, epochs: float) -> None:
    settings = defaults_for(characters)
    sizes = {name: getattr(settings, name) for name in SIZES[size]}
    assert (settings.size, sizes) == (size, SIZES[size])
    assert (settings.batch_size, settings.max_epochs, settings.patience) == (batch_size, epochs, 5)
    assert any(reason.startswith(f"size {size}: ") for reason in settings.reasons)


def test_what_was_asked_for_stays() -> None:
    asked = defaults_for(18_000, "--size", "micro", "--batch_size", "7", "--max_steps", "5", "--dropout", "0.3")
    assert (asked.size, asked.d_model, asked.batch_size) == ("micro", 128, 7)
    assert (asked.dropout, asked.max_epochs, asked.patience) == (0.3, None, None)
    assert defaults_for(18_000, "--d_ff", "99").d_model == SIZES["tiny"]["d_model"], "a part of tiny was changed"
    assert defaults_for(18_000, "--patience", "9").patience == 9


def test_one_limit_asked_for_switches_the_default_ones_off() -> None:
    by_default = defaults_for(18_000)
    assert by_default.max_steps is None and by_default.max_epochs and by_default.max_minutes == 4.5
    assert step_budget(by_default, 18_000) == math.ceil(by_default.max_epochs * 18_000 / (4 * 192))
    for limits in ("--max_steps 5", "--max_epochs 3.0", "--max_minutes 2.0", "--max_steps 5 --max_minutes 2.0"):
        settings = defaults_for(18_000, *limits.split())
        found = {name: getattr(settings, name) for name in ("max_steps", "max_epochs", "max_minutes")}
        assert " ".join(f"--{name} {value}" for name, value in found.items() if value is not None) == limits


@pytest.mark.parametrize("flags", ["", "--d_model 1024", "--num_heads 16", "--num_kv_heads 8"])
def test_defaults_of_a_gpu_fit_what_was_asked_for(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that were accepted are not made impossible by the text, which decides the size of the model there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = defaults_for(5_000, "--device", "auto", "--precision", "fp32", *flags.split())
    assert settings.device == "cuda" and count_parameters(settings.model_config(66)) > 0


def test_short_texts_are_read_with_dropout() -> None:
    assert [defaults_for(characters).dropout for characters in (18_000, 90_000, 4_300_000)] == [0.1, 0.1, 0.0]


def test_a_model_that_does_not_fit_into_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = defaults_for(18_000).model_config(66)
    needed = 24 * count_parameters(config)  # bytes: five numbers in float32, two in bf16
    monkeypatch.setattr("charseq2seq.training.text_defaults.available_memory", lambda: needed)
    check_memory(config, "cpu")
    needed -= 1
    with pytest.raises(SuiteError, match="choose a smaller --d_model"):
        check_memory(config, "cpu")
    check_memory(config, "cuda")  # has a memory of its own


def at_end(best_step: int) -> State:
    """The state of a run of 100 steps and two minutes."""
    return State({}, step=100, seconds=120.0, best_step=best_step)


def test_a_model_that_guesses_is_told_so() -> None:
    corpus = corpus_of(50_000)
    assert guessing_loss(corpus) == pytest.approx(math.log(2), abs=0.001)
    (said,) = advice(corpus, 0.692, at_end(best_step=100), None)
    assert "no better than guessing" in said
    assert advice(corpus, 0.6, at_end(best_step=100), None) == ()


def test_a_run_that_was_too_long_or_too_short_is_told_so() -> None:
    corpus = corpus_of(50_000)
    (long,) = advice(corpus, 0.6, at_end(best_step=70), None)
    assert "the loss rose" in long and "--max_steps 70" in long
    (short,) = advice(corpus, 0.6, at_end(best_step=100), 200)
    assert "100 of 200 steps" in short and "--max_minutes 4 " in short
    assert advice(corpus, 0.6, at_end(best_step=100), 110) == ()
