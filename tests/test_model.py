"""The model against an independent implementation, who sees what, a fresh model, and the copy task."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import encoder_decoder_transformer
from charseq2seq.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from charseq2seq.errors import SuiteError
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Dropout, Transformer, attend, causal_mask, rotary_table, rotate
from tests.push_client import tiny_checkpoint
from tests.reference_model import SIZES, Reference, random_ids, random_model


@pytest.mark.parametrize(("source_length", "target_length"), [(6, 5), (6, 1), (3, 4), (1, 5), (0, 5), (0, 1)])
@pytest.mark.parametrize(("num_kv_heads", "bigram"), [(1, True), (2, True), (4, True), (1, False)])
def test_logits_are_those_of_the_reference(
    source_length: int, target_length: int, num_kv_heads: int, bigram: bool
) -> None:
    model = random_model(num_kv_heads=num_kv_heads, bigram=bigram)
    source, target = random_ids(2, source_length), random_ids(2, target_length, seed=2)
    logits = model(source, target)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, target_length, SIZES["vocab_size"])
    expected = [Reference(model).logits(s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(logits.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_gradients_are_those_of_the_reference(num_kv_heads: int) -> None:
    model = random_model(num_kv_heads=num_kv_heads)
    source, target = random_ids(1, 6), random_ids(1, 5, seed=2)
    loss = F.cross_entropy(model(source, target)[0], target[0])
    gradients = dict(zip(model.state_dict(), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    reference = Reference(model)
    for weight in reference.weights.values():
        weight.requires_grad_()
    loss = F.cross_entropy(reference.logits(source[0].tolist(), target[0].tolist()), target[0])
    expected = torch.autograd.grad(loss, list(reference.weights.values()))
    for (name, gradient), exact in zip(gradients.items(), expected, strict=True):
        assert exact.abs().max() > 1e-4, f"{name} is of no use"
        assert (gradient.double() - exact).norm() < 1e-3 * exact.norm(), name


# --- attention and positions


def future(length: int, context: int) -> Tensor:
    """True where a query would look ahead, (length, context)."""
    return torch.ones(length, context, dtype=torch.bool).triu(context - length + 1)


def by_the_library(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """PyTorch's own grouped-query attention."""
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    visible = None if hidden is None else ~hidden
    return F.scaled_dot_product_attention(queries, keys, values, visible, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(("length", "context"), [(4, 4), (3, 7), (1, 5), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (6, 1), (6, 2), (6, 6), (1, 1)])
@pytest.mark.parametrize("longest", [512, 0])
def test_attention_is_that_of_the_library(
    length: int, context: int, causal: bool, heads: int, kv_heads: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two products and a softmax, and by what is used for long texts and on GPUs."""
    monkeypatch.setattr(encoder_decoder_transformer, "_LONGEST_EXPLICIT_ATTENTION", longest)
    torch.manual_seed(0)
    query = torch.randn(2, length, heads, 8)
    key, value = torch.randn(2, 2, context, kv_heads, 8)
    hidden = future(length, context) if causal else None
    output = attend(query, key, value, causal_mask(length, context, like=query) if causal else None)
    assert output.shape == query.shape
    torch.testing.assert_close(output, by_the_library(query, key, value, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_of_attention_are_those_of_the_library(kv_heads: int) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 5, 4, 8), torch.randn(2, 2, 9, kv_heads, 8)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    ours = attend(query, key, value, causal_mask(5, 9, like=query))
    theirs = by_the_library(query, key, value, future(5, 9))
    gradient = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(x, inputs, gradient) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_of_a_long_text_is_the_same(kv_heads: int) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 700, 2, 4), torch.randn(2, 1, 700, kv_heads, 4)
    output = attend(query, key, value, causal_mask(700, 700, like=query))
    torch.testing.assert_close(output, by_the_library(query, key, value, future(700, 700)))
    beginning = attend(query[:, :5], key[:, :5], value[:, :5], causal_mask(5, 5, like=query))
    torch.testing.assert_close(output[:, :5], beginning)


def test_rotary_positions_are_relative() -> None:
    torch.manual_seed(0)
    table = rotary_table(50, 16)
    query, key = torch.randn(2, 16)

    def score(i: int, j: int) -> float:
        return float(rotate(query[None], table[:, i : i + 1]) @ rotate(key[None], table[:, j : j + 1]).T)

    for distance in (0, 1, 7):
        scores = [score(i + distance, i) for i in (0, 3, 20, 40)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)
    assert abs(score(8, 1) - score(8, 2)) > 1e-2
    assert rotate(query[None], table[:, :1])[0].tolist() == pytest.approx(query.tolist(), abs=1e-6)


# --- who sees what


def test_no_logit_depends_on_a_later_target_token() -> None:
    model, source, target = random_model(), random_ids(1, 6), random_ids(1, 5, seed=2)
    logits = model(source, target)
    for changed in range(5):
        other = target.clone()
        other[0, changed] = other[0, changed] % (SIZES["vocab_size"] - 1) + 1
        moved = (model(source, other) - logits).abs().amax(dim=(0, 2))
        assert moved[: changed + 1].max() < 1e-5, "entry i scores token i from those before it"
        assert (moved[changed + 1 :] > 1e-3).all(), "and it does see them"


def test_the_encoder_sees_both_sides_and_the_decoder_all_of_it() -> None:
    model, source, target = random_model(), random_ids(1, 6), random_ids(1, 5, seed=2)
    memory, logits = model.encode(source), model(source, target)
    for changed in range(6):
        other = source.clone()
        other[0, changed] = other[0, changed] % (SIZES["vocab_size"] - 1) + 1
        assert ((model.encode(other) - memory).abs().amax(dim=2) > 1e-3).all()
        assert ((model(other, target) - logits).abs().amax(dim=2) > 1e-3).all()


def test_the_rows_of_a_batch_do_not_see_each_other() -> None:
    model, source, target = random_model(), random_ids(4, 6), random_ids(4, 5, seed=2)
    alone = torch.cat([model(source[i : i + 1], target[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(source, target), alone, rtol=1e-4, atol=1e-5)
    together = model.generate(source, 12, temperature=0)
    assert together.tolist() == [model.generate(source[i : i + 1], 12, temperature=0)[0].tolist() for i in range(4)]


def test_forward_is_encode_then_decode() -> None:
    model, source, target = random_model(), random_ids(2, 6), random_ids(2, 5, seed=2)
    context = model.decoder_context(source, target)
    assert torch.equal(context, torch.cat([source, target[:, :-1]], dim=1))
    assert torch.equal(model.decode(model.encode(source), context), model(source, target))
    nothing = source[:, :0]
    context = model.decoder_context(nothing, target)
    assert context.tolist() == [[model.start_id, *row[:-1]] for row in target.tolist()]
    assert torch.equal(model.decode(model.encode(nothing), context), model(nothing, target))


# --- a fresh model


def test_a_fresh_model_knows_nothing() -> None:
    model = Transformer(**SIZES)
    logits = model(random_ids(3, 6), random_ids(3, 5))
    assert not logits.any(), "uniform: every loss begins at ln(vocab_size)"
    weights = model.state_dict()
    assert set(weights) == {name for name, _ in model.named_parameters()}, "nothing computed is part of the weights"


def test_dropout_drops_a_feature_at_all_positions_of_a_sequence() -> None:
    torch.manual_seed(1)
    kept = Dropout(0.25)(torch.ones(4, 7, 2000))
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert not torch.equal(kept[0], kept[1]), "each sequence loses others"
    assert float(kept.mean()) == pytest.approx(1, abs=0.03), "what stays makes up for what goes"


def test_dropout_drops_in_training_only() -> None:
    model, source, target = random_model(dropout=0.5), random_ids(1, 6), random_ids(1, 5)
    assert torch.equal(model(source, target), model(source, target))
    torch.testing.assert_close(model(source, target), random_model(dropout=0.0)(source, target))
    model.train()
    assert not torch.equal(model(source, target), model(source, target))


def test_bf16_is_close_to_fp32() -> None:
    model, source, target = random_model(), random_ids(16, 6), random_ids(16, 5)
    exact = model(source, target).log_softmax(dim=-1)
    rounded = model.to(torch.bfloat16)(source, target)
    assert rounded.dtype == torch.float32
    assert (rounded.log_softmax(dim=-1) - exact).abs().mean() < 0.05
    assert (rounded.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"num_kv_heads": 3}, ["num_kv_heads must divide num_heads 4, not 3"]),
        ({"num_kv_heads": 8, "d_ff": 0}, ["num_kv_heads", "d_ff"]),
        ({"d_model": -24, "num_heads": 0, "d_ff": 0}, ["d_model", "num_heads", "d_ff"]),
        ({"source_length": 0, "target_length": 0, "dropout": 1.0}, ["source_length", "target_length", "dropout"]),
        ({"num_heads": 8}, ["even"]),
        ({"num_heads": 5, "dropout": -0.1}, ["num_heads", "dropout"]),
        ({"dropout": math.nan}, ["dropout"]),
        ({"start_id": 11}, ["start_id"]),
    ],
)
def test_wrong_sizes_are_refused_all_at_once(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Transformer(**SIZES | changes)
    for name in named:
        assert name in str(refusal.value)


# --- in a checkpoint


def checkpoint_with(model: Transformer, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of this model."""
    vocabulary = CharVocabulary("abcdefghij")
    return replace(
        tiny_checkpoint(), config=config, model_state_dict=model.state_dict(), vocab=vocabulary.index_of_token()
    )


def test_a_model_file_without_the_number_of_key_value_heads_has_one_of_them(tmp_path: Path) -> None:
    """Those that were published before there were several."""
    model, path, source = random_model(), tmp_path / "model.pth", random_ids(1, 6)
    assert "num_kv_heads" not in SIZES
    save_checkpoint(path, checkpoint_with(model, SIZES))
    loaded = load_checkpoint(path)
    assert "num_kv_heads" not in loaded.config
    assert torch.equal(loaded.build_model()(source, source[:, :5]), model(source, source[:, :5]))


def test_a_model_file_with_another_number_of_key_value_heads_than_its_weights_is_refused(tmp_path: Path) -> None:
    for number, config in enumerate((SIZES, SIZES | {"num_kv_heads": 4}, SIZES | {"num_kv_heads": 3})):
        path = tmp_path / f"{number}.pth"
        save_checkpoint(path, checkpoint_with(random_model(num_kv_heads=2), config))
        with pytest.raises(SuiteError, match=r"weights do not fit|its config does not fit"):
            load_checkpoint(path)


# --- learning


def test_it_learns_to_copy() -> None:
    """The smallest honest task for an encoder and a decoder: what is to be written stands in the source alone."""
    torch.manual_seed(0)
    length, vocab_size = 8, 12
    sizes: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_decoder_layers": 1, "d_ff": 64}
    model = Transformer(vocab_size, **sizes, source_length=length, target_length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        text = random_ids(64, length, seed=step, vocab_size=vocab_size)
        loss = F.cross_entropy(model(text, text).flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    unseen = random_ids(200, length, seed=10**6, vocab_size=vocab_size)
    assert (model.generate(unseen, length, temperature=0) == unseen).float().mean() > 0.99
