"""The model against an independent implementation, its own uncached self, exact probabilities, and the copy task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoder_decoder_transformer import Dropout, Transformer, attend, causal_mask, rotary_table, rotate, sample

SIZES: dict[str, Any] = {"vocab_size": 11, "d_model": 24, "num_heads": 3, "num_encoder_layers": 2}
SIZES |= {"num_decoder_layers": 2, "d_ff": 40, "source_length": 6, "target_length": 5}


def random_model(seed: int = 0, **changes: Any) -> Transformer:
    """A small model in evaluation mode with random weights everywhere: fresh ones are zero where they write."""
    torch.manual_seed(seed)
    model = Transformer(**SIZES | changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def random_ids(*shape: int, seed: int = 1, vocab_size: int = SIZES["vocab_size"]) -> Tensor:
    """Token ids without the start token."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- the same model once more, written from the formulas: one text at a time, one head and one query at a time


class Reference:
    """The model in float64 without batches, caches, masks or fused operations.

    The weights are read by the names of the state dict; this class is the only place in the tests that knows them.
    """

    def __init__(self, model: Transformer) -> None:
        self.weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
        self.heads = model.num_heads
        self.start_id = model.start_id

    def logits(self, source: list[int], target: list[int]) -> Tensor:
        """(target_length, vocab_size)."""
        memory = self.encode(source)
        read = [source[-1] if source else self.start_id, *target[:-1]]
        x = self.embed([*source[:-1], *read])[-len(read) :]
        for layer in self.layers("decoder"):
            h = self.norm(x)
            visible = [range(len(source) + i + 1) for i in range(len(read))]
            positions = range(len(source), len(source) + len(read))
            x = x + self.attention(layer, h, torch.cat([memory, h]), positions, visible) + self.feed_forward(layer, h)
        logits = self.norm(x) @ self.weights["head.weight"].T
        if "bigram.weight" in self.weights:
            logits = logits + self.weights["bigram.weight"][read]
        return logits

    def encode(self, source: list[int]) -> Tensor:
        """(source_length, d_model)."""
        x = self.embed(source)
        for layer in self.layers("encoder") if source else []:
            h = self.norm(x)
            attended = self.attention(layer, h, h, range(len(source)), [range(len(source))] * len(source))
            x = x + attended + self.feed_forward(layer, h)
        return self.norm(x)

    def layers(self, side: str) -> list[str]:
        """Prefixes of the layers' names, in order."""
        numbers = {int(name.split(".")[1]) for name in self.weights if name.startswith(f"{side}.")}
        return [f"{side}.{number}" for number in sorted(numbers)]

    def embed(self, ids: list[int]) -> Tensor:
        """Every token's vector, and shares of those of the up to three tokens before it."""
        own, shares = self.norm(self.weights["embedding.weight"][ids]), self.weights["embedding.shares"]
        rows = [sum(own[i - back] * shares[3 - back] for back in range(min(4, i + 1))) for i in range(len(ids))]
        return self.norm(torch.stack(rows)) if rows else own

    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    def feed_forward(self, layer: str, x: Tensor) -> Tensor:
        hidden = x @ self.weights[f"{layer}.feed_forward.up.weight"].T
        return hidden.clamp(min=0) ** 2 @ self.weights[f"{layer}.feed_forward.down.weight"].T

    def attention(self, layer: str, x: Tensor, context: Tensor, positions: range, visible: list[range]) -> Tensor:
        """Every row of `x`, at its position, looks at those rows of the context that it may see."""
        query, key, value = (
            rows @ self.weights[f"{layer}.attention.{name}.weight"].T
            for name, rows in (("query", x), ("key", context), ("value", context))
        )
        turned_keys = [self.turn(self.norm(row), place) for place, row in enumerate(key)]
        heads = []
        for of_head in query.chunk(self.heads, dim=-1):
            taken = []
            for row, place, seen in zip(of_head, positions, visible, strict=True):
                turned = self.turn(self.norm(row), place)
                scores = torch.stack([turned @ turned_keys[i] for i in seen]) / math.sqrt(len(row))
                shares = scores.exp() / scores.exp().sum()
                taken.append(sum(share * value[i] for share, i in zip(shares, seen, strict=True)))
            heads.append(torch.stack(taken))
        return torch.cat(heads, dim=-1) @ self.weights[f"{layer}.attention.output.weight"].T

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Feature i and feature i + half are one complex number, multiplied by e^(i angle)."""
        half = len(x) // 2
        angles = torch.tensor([position * 10_000.0 ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize(("source_length", "target_length"), [(6, 5), (6, 1), (3, 4), (1, 5), (0, 5), (0, 1)])
@pytest.mark.parametrize("bigram", [True, False])
def test_logits_are_those_of_the_reference(source_length: int, target_length: int, bigram: bool) -> None:
    model = random_model(bigram=bigram)
    source, target = random_ids(2, source_length), random_ids(2, target_length, seed=2)
    logits = model(source, target)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, target_length, SIZES["vocab_size"])
    expected = [Reference(model).logits(s, t) for s, t in zip(source.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(logits.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_reference() -> None:
    model, source = random_model(), random_ids(1, 6)
    expected = Reference(model).encode(source[0].tolist())
    torch.testing.assert_close(model.encode(source)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_reference() -> None:
    model, source, target = random_model(), random_ids(1, 6), random_ids(1, 5, seed=2)
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


def naive_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """One query at a time; `hidden` is (length, context)."""
    result = torch.empty_like(query)
    for b, i, h in itertools.product(*map(range, query.shape[:3])):
        seen = [j for j in range(key.shape[1]) if hidden is None or not hidden[i, j]]
        exponentials = [math.exp(float(query[b, i, h] @ key[b, j]) / math.sqrt(query.shape[3])) for j in seen]
        result[b, i, h] = sum(e / sum(exponentials) * value[b, j] for e, j in zip(exponentials, seen, strict=True))
    return result


def future(length: int, context: int) -> Tensor:
    """True where a query would look ahead, (length, context)."""
    return torch.ones(length, context, dtype=torch.bool).triu(context - length + 1)


@pytest.mark.parametrize(("length", "context"), [(4, 4), (3, 7), (1, 5), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_three_ways(length: int, context: int, causal: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, length, 3, 8)
    key, value = torch.randn(2, 2, context, 8)
    hidden = future(length, context) if causal else None
    taken = attend(query, key, value, causal_mask(length, context, like=query) if causal else None)
    torch.testing.assert_close(taken, naive_attention(query, key, value, hidden), rtol=1e-5, atol=1e-5)
    library = F.scaled_dot_product_attention(
        query.transpose(1, 2), key[:, None], value[:, None], None if hidden is None else ~hidden, enable_gqa=True
    )
    torch.testing.assert_close(taken, library.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_attention_of_a_long_text_is_the_same() -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 700, 2, 4), torch.randn(2, 1, 700, 4)
    taken = attend(query, key, value, causal_mask(700, 700, like=query))
    keys, values = (x[:, None].expand(1, 2, 700, 4) for x in (key, value))
    library = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_causal=True)
    torch.testing.assert_close(taken, library.transpose(1, 2))
    beginning = attend(query[:, :5], key[:, :5], value[:, :5], causal_mask(5, 5, like=query))
    torch.testing.assert_close(taken[:, :5], beginning)


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


def test_the_encoder_looks_both_ways_and_the_decoder_at_all_of_it() -> None:
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
    text = torch.cat([source, target[:, :-1]], dim=1)
    assert torch.equal(model.decode(model.encode(source), text), model(source, target))


# --- a fresh model


def test_a_fresh_model_knows_nothing() -> None:
    model = Transformer(**SIZES)
    logits = model(random_ids(3, 6), random_ids(3, 5))
    assert not logits.any(), "uniform: every loss begins at ln(vocab_size)"
    weights = model.state_dict()
    assert set(weights) == {name for name, _ in model.named_parameters()}, "nothing computed is part of the weights"


def test_what_a_sequence_loses_it_loses_at_all_positions() -> None:
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
        ({"d_model": -24, "num_heads": 0, "d_ff": 0}, ["d_model", "num_heads", "d_ff"]),
        ({"num_encoder_layers": 0, "num_decoder_layers": 0}, ["num_encoder_layers", "num_decoder_layers"]),
        ({"source_length": 0, "target_length": 0, "dropout": 1.0}, ["source_length", "target_length", "dropout"]),
        ({"num_heads": 5}, ["d_model", "num_heads"]),
        ({"num_heads": 8}, ["even"]),
        ({"num_heads": 5, "dropout": -0.1}, ["num_heads", "dropout"]),
        ({"dropout": math.nan}, ["dropout"]),
        ({"start_id": 11}, ["start_id"]),
        ({"start_id": -1}, ["start_id"]),
    ],
)
def test_wrong_sizes_are_refused_all_at_once(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        Transformer(**SIZES | changes)
    for name in named:
        assert name in str(refusal.value)


# --- writing


def without_cache(
    model: Transformer, source: Tensor, num_tokens: int, choose: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """What `generate` should write, by a whole forward pass for every token."""
    text = source[:, -model.source_length :]
    written = source[:, :0]
    while written.shape[1] < num_tokens:
        target = source[:, :0]
        for _ in range(min(model.target_length, num_tokens - written.shape[1])):
            unknown = target.new_ones(len(target), 1)  # the token to be scored; its own value must not matter
            logits = model(text, torch.cat([target, unknown], dim=1))[:, -1]
            logits[:, model.start_id] = -math.inf
            target = torch.cat([target, choose(logits)[:, None]], dim=1)
        written = torch.cat([written, target], dim=1)
        text = torch.cat([text, target], dim=1)[:, -model.source_length :]
    return written.tolist()


@pytest.mark.parametrize("source_length", [0, 1, 4, 6, 9, 30])
@pytest.mark.parametrize("num_tokens", [1, 5, 6, 23])
def test_cached_writing_is_uncached_writing(source_length: int, num_tokens: int) -> None:
    model, source = random_model(3), random_ids(2, source_length)
    expected = without_cache(model, source, num_tokens, lambda logits: logits.argmax(dim=-1))
    assert model.generate(source, num_tokens, temperature=0).tolist() == expected


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 5, "top_p": 0.9}])
def test_cached_probabilities_are_uncached_probabilities(options: dict[str, Any]) -> None:
    model, source = random_model(4), random_ids(3, 4)
    generator = torch.Generator().manual_seed(7)  # the same draws are the same tokens if the probabilities are alike

    def choose(logits: Tensor) -> Tensor:
        return sample(logits, torch.rand(3, generator=generator), **options)

    expected = without_cache(model, source, 40, choose)
    written = model.generate(source, 40, generator=torch.Generator().manual_seed(7), **options)
    assert written.tolist() == expected
    assert len({token for row in expected for token in row}) > 3, "a test of more than one likeliest token"


def test_only_the_end_of_a_long_source_is_read() -> None:
    model, source = random_model(), random_ids(1, 50)
    assert torch.equal(model.generate(source, 9, temperature=0), model.generate(source[:, -6:], 9, temperature=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("start_id", [0, 4])
def test_the_start_token_is_never_written(temperature: float, start_id: int) -> None:
    model = random_model(start_id=start_id)
    with torch.no_grad():
        assert model.bigram is not None
        model.bigram.weight[:, start_id] = 1e4  # a model that wants to write nothing else
    written = model.generate(random_ids(8, 0), 50, temperature=temperature, generator=torch.Generator().manual_seed(0))
    assert start_id not in written.flatten().tolist()


def test_the_source_may_be_empty_and_so_may_the_text() -> None:
    model, nothing = random_model(), random_ids(2, 0)
    assert model.encode(nothing).shape == (2, 0, SIZES["d_model"])
    assert model.generate(nothing, 3).shape == (2, 3)
    assert model.generate(nothing, 0).shape == (2, 0)
    assert model.generate(random_ids(2, 4), 0).shape == (2, 0)


def test_text_comes_as_it_is_written() -> None:
    stream = random_model().stream(random_ids(1, 4), 10**12, temperature=0)
    first = [int(token) for token in itertools.islice(stream, 30)]
    assert first == random_model().generate(random_ids(1, 4), 30, temperature=0)[0].tolist()


def test_a_seed_is_a_text_and_no_other_randomness_is_touched() -> None:
    model, source = random_model(), random_ids(2, 4)

    def written(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(source, 40, temperature=2.0, generator=generator).tolist()

    before = torch.get_rng_state()
    assert written(1) == written(1) != written(2)
    assert torch.equal(torch.get_rng_state(), before)


# --- choosing a token


PROBABILITIES = torch.tensor([0.02, 0.3, 0.05, 0.4, 0.2, 0.03])


def draws(count: int = 20_000, seed: int = 0, **options: Any) -> Tensor:
    """How often each token of `PROBABILITIES` is chosen."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    logits = PROBABILITIES.log().expand(count, -1) + 5.0  # a constant changes nothing
    return sample(logits, uniform, **options).bincount(minlength=len(PROBABILITIES))


def expected_shares(temperature: float = 1.0, top_k: int = 6, top_p: float = 1.0) -> list[float]:
    """The documented order, in plain Python: top-k, temperature, top-p."""
    kept = sorted(range(6), key=lambda i: -float(PROBABILITIES[i]))[:top_k]
    heated = {i: float(PROBABILITIES[i]) ** (1 / temperature) for i in kept}
    shares = {i: value / sum(heated.values()) for i, value in heated.items()}
    nucleus, total = [], 0.0
    for i in kept:
        if total >= top_p:
            break
        nucleus.append(i)
        total += shares[i]
    return [shares[i] / total if i in nucleus else 0.0 for i in range(6)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_p": 0.65},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
        {"temperature": 1e6, "top_k": 5},
        {"top_k": 2, "top_p": 0.5},  # after top-k the likeliest has 0.57 alone; before, it would have 0.4
        {"temperature": 100.0, "top_p": 0.4},  # heated, the likeliest has 0.17; before, it would have been enough
        {"top_k": 100, "top_p": 1.0},
    ],
)
def test_tokens_come_as_often_as_they_should(options: dict[str, Any]) -> None:
    counts, shares = draws(**options), expected_shares(**options)
    assert [int(count) > 0 for count in counts] == [share > 0 for share in shares]
    statistic = sum(
        (float(count) - 20_000 * share) ** 2 / (20_000 * share)
        for count, share in zip(counts, shares, strict=True)
        if share
    )
    assert statistic < 37.0, "chi-squared with at most 5 degrees of freedom: less than once in a million"


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-3}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}]
)
def test_the_safest_choice_is_the_likeliest(options: dict[str, Any]) -> None:
    assert draws(500, **options).tolist() == [0, 0, 0, 500, 0, 0]


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1e-20, 0.3, 1.0, 50.0, 1e9]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(1e-6, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_what_is_chosen_is_among_the_likeliest(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    rows = torch.tensor(logits).expand(4, -1)
    draw = torch.tensor([0.0, 0.3, 0.7, 1 - 2**-24])  # the largest below 1
    chosen = sample(rows, draw, temperature, top_k, top_p).tolist()
    ordered = sorted(logits, reverse=True)
    lowest = ordered[min(top_k or len(logits), len(logits)) - 1]
    assert all(0 <= token < len(logits) and logits[token] >= lowest for token in chosen)
    if temperature == 0:
        assert all(logits[token] == ordered[0] for token in chosen)


def test_a_token_without_probability_is_never_chosen() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(2000, -1)
    assert sample(logits, torch.linspace(0, 1 - 2**-24, 2000)).tolist() == [1] * 1000 + [3] * 1000


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
