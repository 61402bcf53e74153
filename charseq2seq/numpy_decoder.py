"""One stream of text on a CPU, more than twice as fast as by PyTorch: the decoder's step in numpy.

A step for a single character is some hundred operations on 192 numbers. PyTorch takes two to five microseconds to
start each, numpy less than one, and its matrix-vector products are faster too (benchmarks/LOG.md). The result is that
of `Transformer.stream` up to rounding; four identities save work:

- Every reader of the residual stream normalises it, so its mean never matters: the weights that write into it are
  centred once, its mean stays zero, and normalising is one product and one scaling. So it is with queries and keys.
- Attention and feed-forward block of a layer read the same input and their outputs are added: one product with the
  matrix `inward` begins both, one with `outward` ends them.
- Rotating a pair (a, b) by an angle is multiplying the complex number a + ib by exp(i * angle). The table of these
  factors also contains the lengths of queries and keys and the attention's 1 / sqrt(head_size).
- A column of ones beside the values gives the sum of weights that the softmax divides by.

Every result has a buffer that is allocated once, and the views of the buffers at each position are cached: slicing
takes as long as computing here. Scalars in operations are arrays, which numpy handles half a microsecond faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from encoder_decoder_transformer import Layer, Transformer
from encoder_decoder_transformer import sample as sample_rows

Array = npt.NDArray[np.float32]

_EPSILON = 1e-5  # of torch.nn.functional.layer_norm


class NumpyDecoder:
    """A model's decoder for one text at a time: a new stream ends the one before. The weights must not change.

    Attributes:
        tables: what a token adds to its own position and to those 1, 2, ... after it, (vocab_size, d_model) each.
        bias: what the previous token adds to the logits, (vocab_size, vocab_size); -inf for the start token.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.device = model.device
        self.tables = [_centred(_array(table), axis=1) for table in reversed(model.embedding.tables())]
        self.head = _array(model.head.weight)
        never = np.zeros(len(self.head), np.float32)
        never[model.start_id] = -math.inf
        # Without a bigram table all rows are one and the same, in memory too.
        rows = np.broadcast_to(never, (len(never), len(never)))
        self.bias = rows if model.bigram is None else _array(model.bigram.weight) + never
        capacity = model.source_length + model.target_length
        factors = _rotary_factors(model)
        self.layers = [_Layer(layer, capacity, factors) for layer in cast("list[Layer]", list(model.decoder))]
        self.x, self.normalized = np.empty_like(self.tables[0][0]), np.empty_like(self.tables[0][0])
        self.scores = np.empty_like(self.bias[0])

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether this can generate for a model: on the CPU, with one key/value head."""
        return model.device.type == "cpu" and model.config["num_kv_heads"] == 1

    def stream(
        self, source: Tensor, num_tokens: int, *, generator: Generator | None = None, **sampling: Any
    ) -> Iterator[int]:
        """The tokens of `Transformer.stream` for a batch of one, as numbers; for the arguments see there."""
        model = self.model.eval()
        text = source[0, -model.source_length :].tolist()
        while num_tokens > 0:
            self.begin(torch.tensor([text], dtype=torch.long))
            recent = text[-len(self.tables) :] or [model.start_id]
            positions = range(len(text), len(text) + min(num_tokens, model.target_length))
            # Always as many random numbers: a shorter text is the beginning of a longer one.
            random = torch.rand(model.target_length, generator=generator, dtype=torch.float32).tolist()
            for position, number in zip(positions, random, strict=False):
                with np.errstate(all="ignore"):  # one overflow in a model would warn at every character
                    token = sample(self.logits(recent, position), number, **sampling)
                text.append(token)
                recent = [*recent[1 - len(self.tables) :], token]
                yield token
            num_tokens -= len(positions)
            text = text[-model.source_length :]

    def begin(self, source: Tensor) -> None:
        """Read a source, (1, up to source_length), and forget everything else."""
        with torch.inference_mode():
            memory = _array(self.model.encode(source)[0])
        for layer in self.layers:
            layer.begin(memory)

    def logits(self, recent: Sequence[int], position: int) -> Array:
        """Logits of the next token, (vocab_size,); the next call overwrites them.

        Args:
            recent: the last tokens of the text, as many as the embedding's convolution is wide, or all there are.
            position: of the last one of them; positions come one after the other.
        """
        x, scores = self.x, self.scores
        x[:] = self.tables[0][recent[-1]]
        for table, token in zip(self.tables[1:], recent[-2::-1], strict=False):
            x += table[token]
        _normalize(x, x)
        for layer in self.layers:
            x += layer.step(_normalize(x, self.normalized), position)
        self.head.dot(_normalize(x, self.normalized), scores)
        scores += self.bias[recent[-1]]
        return scores


class _Layer:
    """A decoder layer at one position x: softmax(q K^T) V, with q, k, v = x Wq, x Wk, x Wv, and relu(x Wup)^2.

    heads n, head size h, d = d_model = n h, f = d_ff, capacity p positions; buffers with n + 1 rows have the key below
    the queries of all heads. After a semicolon: views of the same memory.

        attribute        shape            in the formula
        inward           (d + 2h + f, d)  Wq, Wk, Wv and Wup, one below the other
        key_and_value    (2h, d)          Wk and Wv, for the source
        outward          (d, d + f)       output projection and Wdown, side by side
        factors          (p, n + 1, h/2)  complex rotations of q and k, with their lengths
        keys, values     (p, h), (p, h + 1)   K; V and a column of ones
        weights          ((n + 1) p)      exp(q K^T)
        views            by position      its factors, key and value; all keys and values so far; its weights
        projected        (d + 2h + f)     x Wq, x Wk, x Wv, x Wup; queries_and_key, value, wide
        norms            (n + 1, 1)       |q| and |k|; flat_norms
        rotated          (n + 1, h)       q and k; rotated_pairs as complex numbers, rotated_key its last row
        sums             (n + 1, h + 1)   exp(q K^T) V; weighted_values, and totals, which divides them
        outputs          (d + f)          softmax(q K^T) V and relu(x Wup)^2; attended, squared
        change           (d)              what is added to the residual stream
    """

    def __init__(self, layer: Layer, capacity: int, factors: npt.NDArray[np.complex64]) -> None:
        attention = layer.attention
        heads, half = attention.num_heads, factors.shape[2]
        size, d_model = 2 * half, heads * 2 * half
        query, key = (_pairwise(_array(part.weight), half) for part in (attention.query, attention.key))
        self.key_and_value = np.concatenate([key, _array(attention.value.weight)])
        up, down = (_array(part.weight) for part in (layer.feed_forward.up, layer.feed_forward.down))
        self.inward = _aligned(np.concatenate([query, self.key_and_value, up]))
        self.outward = _aligned(_centred(np.concatenate([_array(attention.output.weight), down], axis=1), axis=0))
        self.factors, self.epsilon = factors, np.full((heads + 1, 1), size * _EPSILON, np.float32)
        self.zeros = np.zeros(len(up), np.float32)
        self.keys, self.values = np.empty((capacity, size), np.float32), np.ones((capacity, size + 1), np.float32)
        self.weights = np.empty((heads + 1) * capacity, np.float32)
        self.projected = np.empty(len(self.inward), np.float32)
        queries_and_key, self.value, self.wide = np.split(self.projected, [d_model + size, d_model + 2 * size])
        self.queries_and_key = queries_and_key.reshape(heads + 1, size)
        self.rotated, self.norms = np.empty_like(self.queries_and_key), np.empty((heads + 1, 1), np.float32)
        self.rotated_pairs, self.rotated_key = self.rotated.view(np.complex64), self.rotated[-1]
        self.flat_norms = self.norms[:, 0]
        self.sums = np.empty((heads + 1, size + 1), np.float32)
        self.weighted_values, self.totals = self.sums[:-1, :-1], self.sums[:-1, -1:]
        self.outputs, self.change = np.empty(d_model + len(up), np.float32), np.empty(d_model, np.float32)
        self.attended, self.squared = self.outputs[:d_model].reshape(heads, size), self.outputs[d_model:]
        self.views: dict[int, tuple[Any, ...]] = {}

    def begin(self, memory: Array) -> None:
        """Cache the keys and values of a source, (source_length, d_model), and forget all others."""
        length, size = len(memory), self.keys.shape[1]
        keys, self.values[:length, :-1] = np.split(memory @ self.key_and_value.T, [size], axis=1)
        variances = np.vecdot(keys, keys) / np.float32(size) + np.float32(_EPSILON)
        keys = np.divide(keys, np.sqrt(size * variances[:, None]), order="C")
        self.keys[:length] = (keys.view(np.complex64) * self.factors[:length, -1]).view(np.float32)

    def _views_at(self, position: int) -> tuple[Any, ...]:
        length, rows = position + 1, len(self.queries_and_key)
        own = (self.factors[position], self.keys[position], self.values[position, :-1])
        weights = self.weights[: rows * length].reshape(rows, -1)
        return self.views.setdefault(position, (*own, self.keys[:length].T, self.values[:length], weights))

    def step(self, x: Array, position: int) -> Array:
        """What this layer adds to the residual stream, (d_model,), given the normalised stream at a position."""
        queries_and_key, rotated, norms, wide = self.queries_and_key, self.rotated, self.norms, self.wide
        factors, own_key, own_value, keys, values, weights = self.views.get(position) or self._views_at(position)
        self.inward.dot(x, self.projected)
        np.vecdot(queries_and_key, queries_and_key, self.flat_norms)
        np.add(norms, self.epsilon, norms)
        np.sqrt(norms, norms)
        np.divide(queries_and_key, norms, rotated)
        np.multiply(self.rotated_pairs, factors, self.rotated_pairs)
        own_key[...] = self.rotated_key
        own_value[...] = self.value
        # No maximum is subtracted before the exponential: products of normalised queries and keys are bounded, and
        # overflow only in heads of more than 7,000 features.
        rotated.dot(keys, weights)  # the row of the key is not needed, but four rows take less time than three
        np.exp(weights, weights)
        weights.dot(values, self.sums)
        np.divide(self.weighted_values, self.totals, self.attended)
        np.maximum(wide, self.zeros, out=wide)
        np.multiply(wide, wide, self.squared)
        return self.outward.dot(self.outputs, self.change)


def sample(
    scores: Array, number: float, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> int:
    """What `encoder_decoder_transformer.sample` returns, faster in the usual case; overwrites the scores."""
    if top_k is not None or top_p is not None or temperature < 1e-30:
        return int(sample_rows(torch.from_numpy(scores)[None], torch.tensor([number]), temperature, top_k, top_p))
    scores -= np.maximum.reduce(scores)
    if temperature != 1:
        scores *= np.float32(1 / min(temperature, 1e30))  # so that it stays finite
    cumulative = np.add.accumulate(np.exp(scores, scores))
    token = int(cumulative.searchsorted(np.float32(number) * cumulative[-1], side="right"))
    return token if token < len(scores) else 0  # where the scores are NaN


def _normalize(x: Array, out: Array) -> Array:
    """`normalize` of a vector whose mean is zero."""
    return np.multiply(x, 1 / math.sqrt(float(x.dot(x)) / len(x) + _EPSILON), out)


def _rotary_factors(model: Transformer) -> npt.NDArray[np.complex64]:
    """Complex factors of the queries of all heads, and of the key after them, (positions, heads + 1, head_size / 2)."""
    cos, signed_sin = _array(model.rotary)
    half = cos.shape[1] // 2
    factors = (cos[:, None, :half] + 1j * signed_sin[:, None, half:]).astype(np.complex64)
    # Queries and keys come with length 1 and should have sqrt(head_size); attention then divides their product by that.
    # So queries are right as they are, and keys have to be stretched.
    return np.concatenate([factors] * model.config["num_heads"] + [factors * np.float32((2 * half) ** 0.5)], axis=1)


def _pairwise(weight: Array, half: int) -> Array:
    """Rows of each head centred, and reordered so that the two features of a rotary pair are neighbours."""
    d_model = weight.shape[1]
    per_head = _centred(weight.reshape(-1, 2, half, d_model), axis=(1, 2))
    return per_head.transpose(0, 2, 1, 3).reshape(-1, d_model)


def _array(weight: Tensor) -> Array:
    return weight.detach().float().contiguous().numpy()


def _aligned(weight: Array) -> Array:
    """A copy that begins at a cache line, so that no load of 64 bytes needs two of them."""
    buffer = np.empty(weight.size + 16, np.float32)
    first = -buffer.ctypes.data // buffer.itemsize % 16
    copy = buffer[first : first + weight.size].reshape(weight.shape)
    copy[:] = weight
    return copy


def _centred(weight: Array, axis: int | tuple[int, ...]) -> Array:
    return np.ascontiguousarray(weight - weight.mean(axis=axis, keepdims=True))
