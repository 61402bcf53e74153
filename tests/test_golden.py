"""The models of tests/golden: PyTorch and numpy compute what is written there; test_demo.py tries JavaScript."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.numpy_decoder import NumpyDecoder
from charseq2seq.numpy_decoder import sample as sample_one
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Transformer, sample
from tests.golden.make_golden import HERE, SHAPES

Golden = tuple[Transformer, dict[str, Any]]


@pytest.fixture(params=SHAPES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """A model and what it must compute."""
    folder = HERE / request.param
    return Transformer.from_pretrained(folder), json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def test_pytorch_computes_what_is_written(golden: Golden) -> None:
    model, expected = golden
    ids = [torch.tensor(expected[name], dtype=torch.long)[None] for name in ("source", "target")]
    logits = model(*ids)[0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-4)
    assert model.write(expected["prompt"], expected["num_chars"], temperature=0) == expected["greedy"]
    row = logits[-1:].index_fill(1, torch.tensor([model.start_id]), -math.inf)
    for one in expected["sampled"]:
        assert sample(row, torch.tensor([one["random"]]), one["temperature"], None, one["top_p"]) == one["id"], one


def test_what_generates_on_a_cpu_computes_what_is_written(golden: Golden) -> None:
    model, expected = golden
    generator = TextGenerator(model, CharVocabulary.from_index_of_token(model.vocab))
    assert generator.generate(expected["prompt"], expected["num_chars"], Sampling(temperature=0)) == expected["greedy"]
    if not NumpyDecoder.supports(model):
        return
    decoder, source = NumpyDecoder(model), expected["source"]
    decoder.begin(torch.tensor([source], dtype=torch.long))
    text = [*(source or [model.start_id]), *expected["target"][:-1]]
    first = len(text) - len(expected["target"])
    for index, row in enumerate(expected["logits"]):
        logits = decoder.logits(text[: first + index + 1][-4:], len(source) + index)
        np.testing.assert_allclose(logits[1:], row[1:], rtol=0, atol=1e-4)
    for one in expected["sampled"]:
        assert sample_one(logits.copy(), one["random"], one["temperature"], None, one["top_p"]) == one["id"], one
