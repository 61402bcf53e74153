"""The model against an independent implementation, who sees what, a fresh model, and the copy task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import encoder_decoder_transformer
from encoder_decoder_transformer import Dropout, Transformer, attend
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


@pytest.mark.parametrize(("length", "context"), [(4, 4), (3, 7), (1, 5), (700, 700)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("longest", [512, 0])
def test_attention_is_that_of_the_library(
    length: int, context: int, causal: bool, heads: int, kv_heads: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two products and a softmax, and by what is used for long texts and on GPUs; the gradients too."""
    monkeypatch.setattr(encoder_decoder_transformer, "_LONGEST_EXPLICIT_ATTENTION", longest)
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, length, heads, 8), torch.randn(2, 2, context, kv_heads, 8)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    hidden = torch.full((length, context), -torch.inf).triu(context - length + 1) if causal else None
    ours = attend(query, key, value, hidden)
    visible = torch.ones(length, context, dtype=torch.bool).tril(context - length) if causal else None
    queries, keys, values = (x.transpose(1, 2) for x in inputs)
    theirs = F.scaled_dot_product_attention(queries, keys, values, visible, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(x, inputs, gradient) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


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


# --- learning


def test_it_learns_to_copy() -> None:
    """The smallest honest task for an encoder and a decoder: what is to be written stands in the source alone."""
    torch.manual_seed(0)
    length, vocab_size = 8, 12
    sizes: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_decoder_layers": 1, "d_ff": 64}
    model = Transformer(vocab_size, **sizes, source_length=length, target_length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        text = random_ids(64, length, seed=step, vocab_size=vocab_size)
        loss = F.cross_entropy(model(text, text).flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    unseen = random_ids(200, length, seed=10**6, vocab_size=vocab_size)
    assert (model.generate(unseen, length, temperature=0) == unseen).float().mean() > 0.99
