"""Generating: the cached decoder against uncached passes and the reference, sampling against exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from encoder_decoder_transformer import CachedDecoder, Transformer, sample
from tests.reference_model import Reference, random_ids, random_model


def without_cache(
    model: Transformer, source: Tensor, num_tokens: int, choose: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """What `generate` should return, by a whole forward pass for every token."""
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
@pytest.mark.parametrize(("num_tokens", "num_kv_heads"), [(1, 1), (5, 1), (6, 1), (23, 1), (1, 2), (23, 2), (23, 4)])
def test_cached_generation_is_uncached_generation(source_length: int, num_tokens: int, num_kv_heads: int) -> None:
    model, source = random_model(3, num_kv_heads=num_kv_heads), random_ids(2, source_length)
    expected = without_cache(model, source, num_tokens, lambda logits: logits.argmax(dim=-1))
    generated = model.generate(source, num_tokens, temperature=0).tolist()
    assert generated == expected
    assert num_tokens < 23 or len(set(generated[0])) > 2, "a test of more than one token over and over"


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("source_length", [0, 3, 6])
def test_cached_logits_are_those_of_the_reference(source_length: int, num_kv_heads: int) -> None:
    model = random_model(5, num_kv_heads=num_kv_heads)
    source, target = random_ids(1, source_length), random_ids(1, 5, seed=2)
    decoder = CachedDecoder(model, 1, (0.0, None, None))
    with torch.inference_mode():
        decoder.begin(source)
        logits = []
        for token in target[0]:
            logits.append(decoder.logits()[0].double())
            decoder.recent.copy_(torch.cat([decoder.recent[:, 1:], token.view(1, 1)], dim=1))
    expected = Reference(model).logits(source[0].tolist(), target[0].tolist())
    expected[:, model.start_id] = -math.inf
    torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_several_generators_are_one_for_each_text(num_kv_heads: int) -> None:
    model, source = random_model(num_kv_heads=num_kv_heads), random_ids(1, 4)

    def generated(*seeds: int) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.generate(source.expand(len(seeds), -1), 30, temperature=1.5, generator=generators).tolist()

    alone = [model.generate(source, 30, temperature=1.5, generator=torch.Generator().manual_seed(s)) for s in (3, 4, 5)]
    assert generated(3, 4, 5) == [ids[0].tolist() for ids in alone] and len({str(ids) for ids in alone}) == 3


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 5, "top_p": 0.9}])
def test_cached_probabilities_are_uncached_probabilities(options: dict[str, Any]) -> None:
    model, source = random_model(4), random_ids(3, 4)
    generator = torch.Generator().manual_seed(7)  # which makes the same tokens of the same probabilities

    def choose(logits: Tensor) -> Tensor:
        return sample(logits, torch.rand(3, generator=generator), **options)

    expected = without_cache(model, source, 40, choose)
    written = model.generate(source, 40, generator=torch.Generator().manual_seed(7), **options)
    assert written.tolist() == expected
    assert len({token for row in expected for token in row}) > 3, "a test of more than one likeliest token"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("start_id", [0, 4])
def test_the_start_token_is_never_generated(temperature: float, start_id: int) -> None:
    model = random_model(start_id=start_id)
    with torch.no_grad():
        assert model.bigram is not None
        model.bigram.weight[:, start_id] = 1e4  # a model to which nothing else is likely
    written = model.generate(random_ids(8, 0), 50, temperature=temperature, generator=torch.Generator().manual_seed(0))
    assert start_id not in written.flatten().tolist()


def test_the_source_may_be_empty_and_so_may_the_text() -> None:
    model, nothing = random_model(), random_ids(2, 0)
    assert model.generate(nothing, 3).shape == (2, 3)
    assert model.generate(nothing, 0).shape == model.generate(random_ids(2, 4), 0).shape == (2, 0)


def test_a_seed_is_a_text_and_no_other_randomness_is_touched() -> None:
    model, source = random_model(), random_ids(2, 4)

    def written(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(source, 40, temperature=2.0, generator=generator).tolist()

    before = torch.get_rng_state()
    assert written(1) == written(1) != written(2)
    assert torch.equal(torch.get_rng_state(), before)


# --- sampling a token


PROBABILITIES = torch.tensor([0.02, 0.3, 0.05, 0.4, 0.2, 0.03])


def counts_of(count: int = 20_000, seed: int = 0, **options: Any) -> Tensor:
    """How often each token of `PROBABILITIES` is sampled."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    logits = PROBABILITIES.log().expand(count, -1) + 5.0  # a constant changes nothing
    return sample(logits, uniform, **options).bincount(minlength=len(PROBABILITIES))


def expected_fractions(temperature: float = 1.0, top_k: int = 6, top_p: float = 1.0) -> list[float]:
    """The documented order, in plain Python: top-k, temperature, top-p."""
    kept = sorted(range(6), key=lambda i: -float(PROBABILITIES[i]))[:top_k]
    heated = {i: float(PROBABILITIES[i]) ** (1 / temperature) for i in kept}
    fractions = {i: value / sum(heated.values()) for i, value in heated.items()}
    nucleus, total = [], 0.0
    for i in kept:
        if total >= top_p:
            break
        nucleus.append(i)
        total += fractions[i]
    return [fractions[i] / total if i in nucleus else 0.0 for i in range(6)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.65},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
        {"temperature": 1e6, "top_k": 5},
        {"top_k": 2, "top_p": 0.5},  # after top-k the likeliest has 0.57 alone; before, it would have 0.4
        {"temperature": 100.0, "top_p": 0.4},  # heated, the likeliest has 0.17; before, it would have been enough
        {"top_k": 100, "top_p": 1.0},
    ],
)
def test_tokens_come_as_often_as_they_should(options: dict[str, Any]) -> None:
    counts, fractions = counts_of(**options), expected_fractions(**options)
    assert [int(count) > 0 for count in counts] == [fraction > 0 for fraction in fractions]
    statistic = sum(
        (float(count) - 20_000 * fraction) ** 2 / (20_000 * fraction)
        for count, fraction in zip(counts, fractions, strict=True)
        if fraction
    )
    assert statistic < 37.0, "chi-squared with at most 5 degrees of freedom: less than once in a million"


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-3}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}]
)
def test_the_safest_choice_is_the_likeliest(options: dict[str, Any]) -> None:
    assert counts_of(500, **options).tolist() == [0, 0, 0, 500, 0, 0]


def test_a_token_without_probability_is_never_sampled() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(2000, -1)
    assert sample(logits, torch.linspace(0, 1 - 2**-24, 2000)).tolist() == [1] * 1000 + [3] * 1000
