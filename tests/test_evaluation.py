"""The loss by the one protocol, against a loop that scores one character at a time."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.checkpoint import Checkpoint, load_checkpoint
from charseq2seq.corpus import Ids, load_corpus
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.evaluation import evaluate, evaluate_file
from encoder_decoder_transformer import Transformer
from tests.push_client import TEXT, tiny_checkpoint
from tests.train_client import Trainee, see, tiny_text
from tests.warm_client import WarmClient

VOCABULARY = 9


def small_model(source_length: int, target_length: int, **changes: Any) -> Transformer:
    """A model whose opinions depend on everything that it sees."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 8, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "d_ff": 8}
    sizes |= {"source_length": source_length, "target_length": target_length}
    model = Transformer(VOCABULARY, **sizes | changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.5)
    return model


def random_ids(length: int, seed: int = 0) -> Ids:
    """A text."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).astype(np.int32)


def one_at_a_time(model: Transformer, ids: Ids, first: int, last: int) -> list[float]:
    """Negative log likelihood of each character, given the part of its window before it and the source before that."""
    model.eval()
    losses = []
    for place in range(first, last):
        start = place - (place - first) % model.target_length
        source = ids[max(0, start - model.source_length) : start]
        target = ids[start : place + 1]
        with torch.inference_mode():
            logits = model(torch.from_numpy(source).long()[None], torch.from_numpy(target).long()[None])
        losses.append(-float(logits[0, -1].log_softmax(dim=-1)[int(ids[place])]))
    return losses


@given(
    length=st.integers(1, 90),
    first=st.integers(0, 89),
    last=st.none() | st.integers(1, 90),
    source_length=st.integers(1, 9),
    target_length=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_character_is_scored_once(
    length: int, first: int, last: int | None, source_length: int, target_length: int
) -> None:
    first = first % length
    end = length if last is None else max(first + 1, min(last, length))
    model, ids = small_model(source_length, target_length), random_ids(length)
    evaluation = evaluate(model, ids, first, None if last is None else end)
    losses = one_at_a_time(model, ids, first, end)
    assert evaluation.characters == len(losses) == end - first
    assert evaluation.nats_per_char == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert evaluation.max_context == source_length + target_length


def test_what_stands_before_is_context_and_not_scored() -> None:
    model, ids = small_model(5, 4), random_ids(60)
    scored = evaluate(model, ids, 20, 40).nats_per_char
    for changed, matters in ((14, False), (15, True), (19, True), (20, True), (39, True), (40, False), (59, False)):
        other = ids.copy()
        other[changed] = other[changed] % (VOCABULARY - 1) + 1
        assert (evaluate(model, other, 20, 40).nats_per_char != scored) == matters, changed


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_kept(training: bool) -> None:
    model, ids = small_model(4, 5, dropout=0.5).train(training), random_ids(50)
    first = evaluate(model, ids)
    assert evaluate(model, ids) == first
    assert model.training == training
    assert first.nats_per_char == pytest.approx(evaluate(small_model(4, 5), ids).nats_per_char, abs=1e-6)


def test_a_fresh_model_is_as_unsure_as_it_can_be() -> None:
    facts = evaluate(Transformer(VOCABULARY, d_model=8, num_heads=2, d_ff=8), random_ids(500)).facts()
    assert facts["nats_per_char"] == pytest.approx(math.log(VOCABULARY))
    assert facts["bits_per_char"] == pytest.approx(math.log2(VOCABULARY))
    assert facts["perplexity"] == pytest.approx(VOCABULARY)
    assert (facts["characters"], facts["max_context"]) == (500, 64 + 192)
    assert "windows of 192 given the 64 characters before them" in facts["protocol"]


# --- a file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """It says that it was trained on text.txt."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20)
    return dataclasses.replace(tiny_checkpoint(), corpus=load_corpus(path, 20).facts())


def test_of_its_own_text_the_validation_split_is_scored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = evaluate_file(checkpoint, tmp_path / "text.txt", "cpu", "fp32", "error")
    first = checkpoint.corpus["train_characters"]
    ids = checkpoint.vocabulary().encode(TEXT * 20)
    losses = one_at_a_time(checkpoint.build_model(), ids, first, len(ids))
    assert facts["nats_per_char"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (facts["split"], facts["characters"]) == ("validation", len(losses))


def test_of_another_text_all_is_scored_but_for_what_the_model_cannot_know(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("ROMEO: 莎\nBut soft, 🎭what")
    facts = evaluate_file(checkpoint, other, "cpu", "fp32", "skip")
    ids = checkpoint.vocabulary().encode("ROMEO: \nBut soft, what")
    losses = one_at_a_time(checkpoint.build_model(), ids, 0, len(ids))
    assert facts["nats_per_char"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (facts["split"], facts["characters"], facts["skipped_characters"]) == ("all", len(losses), 2)
    with pytest.raises(SuiteError, match=r"U\+1F3AD"):
        evaluate_file(checkpoint, other, "cpu", "fp32", "error")


def test_a_text_in_the_other_normal_form_is_scored_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(unicodedata.normalize("NFD", "ROMEO: é" * 9))
    facts = evaluate_file(checkpoint, other, "cpu", "fp32", "error")
    assert (facts["characters"], facts["skipped_characters"]) == (72, 0)


@pytest.mark.parametrize("text", ["莎莎莎", "莎士比亚全集 ROMEO"])
def test_a_text_of_which_most_is_unknown_is_no_measure(text: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text)
    with pytest.raises(SuiteError, match=r"never saw .* most of .*other\.txt .* no measure; .* text\.txt") as refusal:
        evaluate_file(checkpoint, other, "cpu", "fp32", "skip")
    assert refusal.value.exit_code == ExitCode.BAD_DATA


def test_of_a_text_that_begins_with_the_training_text_the_rest_is_scored(
    client: WarmClient, user: Trainee, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client.train(user, "--max_steps", "4").code == 0
    checkpoint, text = load_checkpoint(user.model), user.text.read_text()
    trained = checkpoint.corpus["train_characters"]
    for name, changed, split, scored in (
        ("one more line.txt", text + "ALL:\n", "after the training part", len(text) + 5 - trained),
        ("only the beginning.txt", text[:trained], "training", trained),
        ("another beginning.txt", "ALL" + text, "all", len(text) + 3),
    ):
        other = user.home / name
        other.write_text(changed)
        facts = evaluate_file(checkpoint, other, "cpu", "fp32", "error")
        assert (facts["split"], facts["characters"]) == (split, scored)
        said = f"note: {name} begins as the text that the model was trained on"
        assert (said in capfd.readouterr().err) == (split != "all")


def test_without_a_name_the_text_of_the_model_is_scored_or_asked_for(client: WarmClient, user: Trainee) -> None:
    assert client.train(user, "--max_steps", "4").code == 0
    own = client.run(user.home, "--mode", "evaluate")
    assert own.code == 0 and '"text": "text.txt"' in own.out and '"split": "validation"' in own.out, own.log
    user.text.write_text("another text of this name\n" * 99)
    refused = client.run(user.home, "--mode", "evaluate")
    see(refused, ExitCode.NO_INPUT, r"trained on text\.txt .*; name it with --data_path")
    elsewhere = user.home / "elsewhere"
    elsewhere.mkdir()
    user.text.write_text(tiny_text())
    assert client.run(elsewhere, "--mode", "evaluate", "--model_path", str(user.model)).out == own.out
