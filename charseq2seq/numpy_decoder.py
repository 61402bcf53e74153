"""One stream of text from a CPU, four times as fast as by PyTorch: the decoder's step in numpy.

A step for a single character is some hundred operations on 192 numbers. PyTorch takes two to five microseconds to
start each, numpy less than one, and its matrix-vector products are faster too (benchmarks/LOG.md). What is computed is
what `Transformer.stream` computes, but for rounding, with two identities that save passes over the data:

- Every reader of the residual stream normalises it, so its mean never matters; the weights that write into it are
  centred once, its mean stays zero, and `normalize` is one product and one scaling. The same with queries and keys.
- A rotary pair (a, b) that turns by an angle is the complex number a + ib times exp(i * angle).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    from encoder_decoder_transformer import Attention, DecoderLayer, Score, Transformer

Array = npt.NDArray[np.float32]

_EPSILON = 1e-5  # of torch.nn.functional.layer_norm


class NumpyDecoder:
    """A model's decoder, ready to write one text at a time.

    Args:
        model: its weights are copied; what happens to them later is not seen here.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        self.device = model.device
        self.embedding = _normalized(_array(model.embedding.weight))
        self.head = _array(model.head.weight)
        self.bigram = np.zeros((1, 1), np.float32) if model.bigram is None else _array(model.bigram.weight)
        cos, signed_sin = _array(model.rotary)
        half = cos.shape[1] // 2
        self.turns = (cos[:, :half] + 1j * signed_sin[:, half:]).astype(np.complex64)  # (positions, head_size / 2)
        capacity = model.source_length + model.target_length
        layers = cast("list[DecoderLayer]", list(model.decoder))
        self.layers = [_Layer(layer, capacity, self.turns) for layer in layers]

    def stream(self, source: Tensor, num_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """The tokens of `Transformer.stream` (which see) for a batch of one: ids, (1,)."""
        return self.model.stream(source, num_tokens, begin=self._begin, **sampling)

    def _begin(self, source: Tensor) -> Score:
        import torch

        memory = _array(self.model.encode(source)[0])
        for layer in self.layers:
            layer.begin(memory)
        return lambda token, place: torch.from_numpy(self.logits(int(token), place))[None]

    def logits(self, token: int, position: int) -> Array:
        """Scores of what follows `token` at `position`, (vocab_size,); positions come one after the other."""
        x = self.embedding[token].copy()
        for layer in self.layers:
            layer.step(x, position)
        scores: Array = self.head.dot(_scaled(x))
        return scores if self.model.bigram is None else scores + self.bigram[token]


class _Layer:
    """A decoder layer's weights and what it has seen: keys and values, (heads, positions, head_size)."""

    def __init__(self, layer: DecoderLayer, capacity: int, turns: npt.NDArray[np.complex64]) -> None:
        attention: Attention = layer.attention
        self.heads, self.turns = attention.num_heads, turns
        query, key = (self._by_pairs(_array(part.weight)) for part in (attention.query, attention.key))
        self.inward = np.concatenate([query, key, _array(attention.value.weight)])
        self.outward = _centred(_array(attention.output.weight), axis=0)
        self.up, self.down = _array(layer.feed_forward.up.weight), _centred(_array(layer.feed_forward.down.weight), 0)
        self.keys = np.empty((self.heads, capacity, len(query) // self.heads), np.float32)
        self.values = np.empty_like(self.keys)

    def _by_pairs(self, weight: Array) -> Array:
        """Rows of each head centred, and so ordered that the two features of a rotary pair are neighbours."""
        d_model = weight.shape[1]
        per_head = _centred(weight.reshape(self.heads, 2, -1, d_model), axis=(1, 2))
        return per_head.transpose(0, 2, 1, 3).reshape(d_model, d_model)

    def begin(self, memory: Array) -> None:
        """Look at a source, (source_length, d_model), and at nothing else."""
        length, d_model = memory.shape
        split = (length, 2, self.heads, d_model // self.heads)
        keys, values = (memory @ self.inward[d_model:].T).reshape(split).transpose(1, 2, 0, 3)
        self.keys[:, :length] = self._turned(np.ascontiguousarray(keys), self.turns[:length])
        self.values[:, :length] = values

    def step(self, x: Array, position: int) -> None:
        """Add to the residual stream `x`, (d_model,), what this layer has to say at a position."""
        heads, d_model, end = self.heads, len(x), position + 1
        inward = self.inward.dot(_scaled(x))
        turned = self._turned(inward[: 2 * d_model].reshape(2 * heads, -1), self.turns[position])
        query, self.keys[:, position] = turned[:heads], turned[heads:]
        self.values[:, position] = inward[2 * d_model :].reshape(heads, -1)
        scores = np.matmul(self.keys[:, :end], query[:, :, None])[:, :, 0]
        # Normalised queries and keys have bounded products: no maximum needs to be taken off before the exponential
        # while a head is smaller than 7,000 features.
        weights = np.exp(scores * np.float32(query.shape[1] ** -0.5))
        weights /= np.add.reduce(weights, axis=1, keepdims=True)
        x += self.outward.dot(np.matmul(weights[:, None], self.values[:, :end]).reshape(-1))
        wide = self.up.dot(_scaled(x))
        np.maximum(wide, 0, out=wide)
        wide *= wide
        x += self.down.dot(wide)

    @staticmethod
    def _turned(features: Array, turns: npt.NDArray[np.complex64]) -> Array:
        """Features (..., head_size) normalised and turned."""
        squares = np.add.reduce(features * features, axis=-1, keepdims=True)
        scaled = features / np.sqrt(squares / np.float32(features.shape[-1]) + np.float32(_EPSILON))
        turned: Array = (scaled.view(np.complex64) * turns).view(np.float32)
        return turned


def _array(weight: Tensor) -> Array:
    array: Array = weight.detach().float().contiguous().numpy()
    return array


def _centred(weight: Array, axis: int | tuple[int, ...]) -> Array:
    centred: Array = weight - weight.mean(axis=axis, keepdims=True)
    return np.ascontiguousarray(centred)


def _normalized(rows: Array) -> Array:
    rows = _centred(rows, 1)
    normalized: Array = rows / np.sqrt((rows * rows).mean(axis=1, keepdims=True) + np.float32(_EPSILON))
    return normalized


def _scaled(x: Array) -> Array:
    """`normalize` of a vector whose mean is zero."""
    scaled: Array = x * np.float32(1 / math.sqrt(x.dot(x) / len(x) + _EPSILON))
    return scaled
