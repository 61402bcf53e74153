"""The decoder in numpy says what the model says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.numpy_decoder import NumpyDecoder
from charseq2seq.numpy_decoder import sample as sample_one
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import sample
from tests.reference_model import random_ids, random_model


def text_of(writer: Any, source: torch.Tensor, number: int, **sampling: Any) -> list[int]:
    """The tokens that a model or its decoder writes with seed 1."""
    return list(map(int, writer.stream(source, number, **sampling, generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("sizes", [{}, {"bigram": False}, {"num_heads": 1}, {"num_encoder_layers": 1, "d_ff": 8}])
def test_its_logits_are_the_models(sizes: dict[str, Any], length: int) -> None:
    made = random_model(**sizes)
    source, target = random_ids(1, length), random_ids(1, 5, seed=2)
    expected = made(source, target)[0].detach().numpy()
    decoder = NumpyDecoder(made)
    decoder.begin(source)
    context = [*(source[0].tolist() or [made.start_id]), *target[0, :-1].tolist()]
    ends = range(len(context) - 4, len(context) + 1)
    scores = np.stack([decoder.logits(context[:end][-4:], length + offset).copy() for offset, end in enumerate(ends)])
    np.testing.assert_allclose(scores[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    assert (scores[:, 0] == -np.inf).all(), "the start token is never written"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7, "temperature": 1.3}])
def test_the_same_seed_writes_the_same_text(sampling: dict[str, Any]) -> None:
    made = random_model(dropout=0.5)
    for length in (0, 3, 30):
        source = random_ids(1, length)
        written = text_of(NumpyDecoder(made.train()), source, 40, **sampling)
        assert written == text_of(made, source, 40, **sampling) and len(written) == 40, "through eight windows"


NUMBERS = [0.0, 1e-9, 0.3, 0.5, 0.99, 1 - 2**-24]
EDGES = [
    [-math.inf, 1.0, 1.0, -math.inf],
    [-math.inf, 1e10, 1.0, 2.0],
    [-math.inf, -1e4, -1e4, 5.0],
    [-math.inf, math.inf, 1.0, 2.0],
    [-math.inf, 0.0, math.nan, 0.0],
]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3, 1.0, 1e9, 1e38])
@pytest.mark.parametrize("scores", EDGES)
def test_it_chooses_as_the_model_does(scores: list[float], temperature: float) -> None:
    rows = torch.tensor(scores).expand(len(NUMBERS), -1)
    expected = sample(rows, torch.tensor(NUMBERS), temperature).tolist()
    with np.errstate(all="ignore"):
        chosen = [sample_one(np.array(scores, np.float32), number, temperature, None, None) for number in NUMBERS]
    assert chosen == expected
    if all(score < math.inf for score in scores):  # none of them infinite or not a number
        assert all(scores[token] > -math.inf for token in chosen)


def test_a_model_whose_numbers_overflow_writes_the_same_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    made = random_model()
    with torch.no_grad():
        made.head.weight.mul_(1e39)
    source = torch.ones(1, 3).long()
    assert text_of(made, source, 5) == text_of(NumpyDecoder(made), source, 5)
    assert not recwarn.list


def test_it_is_what_generates_on_a_cpu() -> None:
    made, vocabulary = random_model(), CharVocabulary("abcdefghij")
    writer = TextGenerator(made, vocabulary)
    assert isinstance(writer.decoder, NumpyDecoder)
    expected = made.generate(torch.tensor([[1, 2, 3]]), 30, top_k=5, generator=torch.Generator().manual_seed(7))
    text = writer.generate("abc", 30, Sampling(temperature=1.0, top_k=5, seed=7))
    assert text == vocabulary.decode(expected[0].tolist())


def test_models_with_several_key_heads_are_left_to_pytorch() -> None:
    made, vocabulary = random_model(num_kv_heads=2), CharVocabulary("abcdefghij")
    assert TextGenerator(made, vocabulary).decoder is made
    assert len(TextGenerator(made, vocabulary).generate("abc", 30, Sampling())) == 30


def test_a_large_alphabet_without_a_bigram_table_takes_no_table() -> None:
    without = NumpyDecoder(random_model(bigram=False))
    assert without.bias.strides[0] == 0 and (without.bias[:, 0] == -np.inf).all() and not without.bias[:, 1:].any()


def test_positions_of_a_huge_model_are_prepared_when_they_are_reached() -> None:
    made = random_model(source_length=5000)
    decoder, source = NumpyDecoder(made), random_ids(1, 3000)
    assert text_of(made, source, 12) == text_of(decoder, source, 12)
    assert len(decoder.layers[0].views) == 12, "three windows"


def test_weights_begin_where_a_cache_line_does() -> None:
    for layer in NumpyDecoder(random_model()).layers:
        for weight in (layer.inward, layer.outward):
            assert weight.ctypes.data % 64 == 0 and weight.flags.c_contiguous
