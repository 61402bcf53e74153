"""One stream of text from a CPU, more than twice as fast as by PyTorch: the decoder's step in numpy.

A step for a single character is some hundred operations on 192 numbers. PyTorch takes two to five microseconds to
start each, numpy less than one, and its matrix-vector products are faster too (benchmarks/LOG.md). What is computed is
what `Transformer.stream` computes, but for rounding, with identities that save passes over the data:

- Every reader of the residual stream normalises it, so its mean never matters; the weights that write into it are
  centred once, its mean stays zero, and to normalise is one product and one scaling. The same with queries and keys.
- A layer's attention and feed-forward block read the same and are added: one matrix reads for both, one writes.
- A rotary pair (a, b) that turns by an angle is the complex number a + ib times exp(i * angle). The table of these has
  the lengths of queries and keys in it, and the attention's 1 / sqrt(head_size).
- A column of ones beside the values gives the sum of the weights that the softmax divides by.

All results go into arrays that are made once, and what a position needs of them is looked up, not cut out anew. Numbers
that take part are arrays too: numpy takes half a microsecond more for a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from encoder_decoder_transformer import Attention, DecoderLayer, Transformer

Array = npt.NDArray[np.float32]

_EPSILON = 1e-5  # of torch.nn.functional.layer_norm
_PREPARED = 1024  # positions whose views are cut out beforehand; of all of a huge model's they would fill the memory


class NumpyDecoder:
    """A model's decoder, ready to write one text at a time: a stream that is begun ends the one before.

    Args:
        model: must not change as long as this is in use.

    Attributes:
        tables: what a token means at its own position, and 1, 2, ... after it, (vocab_size, d_model) each.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.device = model.device
        self.tables = [_centred(_array(table), axis=1) for table in reversed(model.embedding.tables())]
        self.head = _array(model.head.weight)
        never = np.zeros(len(self.head), np.float32)
        never[model.start_id] = -math.inf  # it is never written
        # What the previous token adds to the scores; without a table one row stands for all of them.
        rows = np.broadcast_to(never, (len(never), len(never)))
        self.bias = rows if model.bigram is None else _array(model.bigram.weight) + never
        capacity = model.source_length + model.target_length
        turns = _turns(model)
        self.layers = [_Layer(layer, capacity, turns) for layer in cast("list[DecoderLayer]", list(model.decoder))]
        self.x, self.normalized = np.empty_like(self.tables[0][0]), np.empty_like(self.tables[0][0])
        self.scores = np.empty_like(self.bias[0])

    def stream(
        self,
        source: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generator | None = None,
    ) -> Iterator[int]:
        """The tokens of `Transformer.stream` (which see) for a batch of one, as numbers."""
        import torch

        model = self.model.eval()
        text = source[0, -model.source_length :].tolist()
        while num_tokens > 0:
            self.begin(torch.tensor([text], dtype=torch.long))
            recent = text[-len(self.tables) :] or [model.start_id]
            places = range(len(text), len(text) + min(num_tokens, model.target_length))
            draws = torch.rand(model.target_length, generator=generator, dtype=torch.float32).tolist()
            for place, draw in zip(places, draws, strict=False):
                with np.errstate(all="ignore"):  # a model whose numbers overflow is not worth a warning for every one
                    token = choose(self.logits(recent, place), draw, temperature, top_k, top_p)
                text.append(token)
                recent = [*recent[1 - len(self.tables) :], token]
                yield token
            num_tokens -= len(places)
            text = text[-model.source_length :]

    def begin(self, source: Tensor) -> None:
        """Read a source, (1, up to source_length), and forget everything else."""
        import torch

        with torch.inference_mode():
            memory = _array(self.model.encode(source)[0])
        for layer in self.layers:
            layer.begin(memory)

    def logits(self, recent: Sequence[int], position: int) -> Array:
        """Scores of what follows some tokens, (vocab_size,), until the next call.

        Args:
            recent: the last tokens of the text, as many as are embedded together or all that there are.
            position: of the last one of them; positions come one after the other.

        The start token's score is minus infinity.
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
    """A decoder layer's weights, what it has seen, and room for what it computes.

    Attributes:
        keys: (positions, head_size).
        values: (positions, head_size + 1); the last column is ones.
        weights: room for how much each head looks at every position.
        places: for each position that was reached what turns its queries and key, where its key and value go, what it
            can look at, and its part of `weights`.
        projected: a position's queries of all heads, key, value and wide features, as `to_turn`, `value` and `wide`.
        turned, norms: queries and key, normalised and turned, and their lengths.
        turned_pairs, turned_key: `turned`, each rotary pair as a complex number; its last row.
        sums, summed, totals: what the heads take, and the sums of the weights by which it is to be divided.
        found: what the heads took and the squared wide features, of which `taken` and `squared` are parts.
        change: what the layer adds to the residual stream.
    """

    def __init__(self, layer: DecoderLayer, capacity: int, turns: npt.NDArray[np.complex64]) -> None:
        attention: Attention = layer.attention
        heads, half = attention.num_heads, turns.shape[2]
        size, d_model = 2 * half, heads * 2 * half
        query, key = (_by_pairs(_array(part.weight), half) for part in (attention.query, attention.key))
        self.key_and_value = np.concatenate([key, _array(attention.value.weight)])
        up, down = (_array(part.weight) for part in (layer.feed_forward.up, layer.feed_forward.down))
        self.inward = _aligned(np.concatenate([query, self.key_and_value, up]))
        self.outward = _aligned(_centred(np.concatenate([_array(attention.output.weight), down], axis=1), axis=0))
        self.turns, self.epsilon = turns, np.full((heads + 1, 1), size * _EPSILON, np.float32)
        self.zeros = np.zeros(len(up), np.float32)
        self.keys, self.values = np.empty((capacity, size), np.float32), np.ones((capacity, size + 1), np.float32)
        self.weights = np.empty((heads + 1) * capacity, np.float32)
        self.places: dict[int, tuple[Any, ...]] = {}
        self.projected = np.empty(len(self.inward), np.float32)
        to_turn, self.value, self.wide = np.split(self.projected, [d_model + size, d_model + 2 * size])
        self.to_turn = to_turn.reshape(heads + 1, size)
        self.turned, self.norms = np.empty_like(self.to_turn), np.empty((heads + 1, 1), np.float32)
        self.turned_pairs, self.turned_key = self.turned.view(np.complex64), self.turned[-1]
        self.flat_norms = self.norms[:, 0]
        self.sums = np.empty((heads + 1, size + 1), np.float32)
        self.summed, self.totals = self.sums[:-1, :-1], self.sums[:-1, -1:]
        self.found, self.change = np.empty(d_model + len(up), np.float32), np.empty(d_model, np.float32)
        self.taken, self.squared = self.found[:d_model].reshape(heads, size), self.found[d_model:]
        for position in range(min(capacity, _PREPARED)):
            self._reach(position)

    def begin(self, memory: Array) -> None:
        """Look at a source, (source_length, d_model), and at nothing else."""
        length, size = len(memory), self.keys.shape[1]
        keys, self.values[:length, :-1] = np.split(memory @ self.key_and_value.T, [size], axis=1)
        keys = np.divide(keys, np.sqrt(size * _power(keys)[:, None]), order="C")
        self.keys[:length] = (keys.view(np.complex64) * self.turns[:length, -1]).view(np.float32)

    def _reach(self, position: int) -> tuple[Any, ...]:
        """Cut out what a position needs."""
        length, rows = position + 1, len(self.to_turn)
        self.places[position] = (
            self.turns[position],
            self.keys[position],
            self.values[position, :-1],
            self.keys[:length].T,
            self.values[:length],
            self.weights[: rows * length].reshape(rows, -1),
        )
        return self.places[position]

    def step(self, x: Array, position: int) -> Array:
        """What this layer has to say at a position, (d_model,), given the normalised residual stream there."""
        to_turn, turned, turned_pairs, norms, wide = self.to_turn, self.turned, self.turned_pairs, self.norms, self.wide
        turns, own_key, own_value, keys, values, weights = self.places.get(position) or self._reach(position)
        self.inward.dot(x, self.projected)
        np.vecdot(to_turn, to_turn, self.flat_norms)
        np.add(norms, self.epsilon, norms)
        np.sqrt(norms, norms)
        np.divide(to_turn, norms, turned)
        np.multiply(turned_pairs, turns, turned_pairs)
        own_key[...] = self.turned_key
        own_value[...] = self.value
        # Normalised queries and keys have bounded products: no maximum needs to be taken off before the exponential
        # while a head is smaller than 7,000 features.
        turned.dot(keys, weights)  # the key's row is of no use, but four rows take less time than three
        np.exp(weights, weights)
        weights.dot(values, self.sums)
        np.divide(self.summed, self.totals, self.taken)
        np.maximum(wide, self.zeros, out=wide)
        np.multiply(wide, wide, self.squared)
        return self.outward.dot(self.found, self.change)


def choose(scores: Array, draw: float, temperature: float, top_k: int | None, top_p: float | None) -> int:
    """What `sample` chooses; faster, but for top-k and top-p. The scores, (vocab_size,), are used up."""
    if top_k is not None or top_p is not None or temperature < 1e-30:
        import torch

        from encoder_decoder_transformer import sample

        return int(sample(torch.from_numpy(scores)[None], torch.tensor([draw]), temperature, top_k, top_p))
    scores -= np.maximum.reduce(scores)
    if temperature != 1:
        scores *= np.float32(1 / min(temperature, 1e30))
    running = np.add.accumulate(np.exp(scores, scores))
    chosen = int(running.searchsorted(np.float32(draw) * running[-1], side="right"))
    return chosen if chosen < len(scores) else 0  # as `sample`, where the scores are not numbers


def _normalize(x: Array, out: Array) -> Array:
    """`normalize` of a vector whose mean is zero."""
    return np.multiply(x, 1 / math.sqrt(float(x.dot(x)) / len(x) + _EPSILON), out)


def _turns(model: Transformer) -> npt.NDArray[np.complex64]:
    """What turns the queries of all heads, and the key after them, (positions, heads + 1, head_size / 2)."""
    cos, signed_sin = _array(model.rotary)
    half = cos.shape[1] // 2
    turns = (cos[:, None, :half] + 1j * signed_sin[:, None, half:]).astype(np.complex64)
    # What is turned has length 1. A key's is to be sqrt(head_size), as is a query's, but that attention divides by it.
    return np.concatenate([turns] * model.num_heads + [turns * np.float32((2 * half) ** 0.5)], axis=1)


def _by_pairs(weight: Array, half: int) -> Array:
    """Rows of each head centred, and so ordered that the two features of a rotary pair are neighbours."""
    d_model = weight.shape[1]
    per_head = _centred(weight.reshape(-1, 2, half, d_model), axis=(1, 2))
    return per_head.transpose(0, 2, 1, 3).reshape(-1, d_model)


def _array(weight: Tensor) -> Array:
    array: Array = weight.detach().float().contiguous().numpy()
    return array


def _aligned(weight: Array) -> Array:
    """A copy that begins where a cache line does: no load of 64 bytes needs two of them."""
    room = np.empty(weight.size + 16, np.float32)
    first = -room.ctypes.data // room.itemsize % 16
    copy = room[first : first + weight.size].reshape(weight.shape)
    copy[:] = weight
    return copy


def _centred(weight: Array, axis: int | tuple[int, ...]) -> Array:
    centred: Array = weight - weight.mean(axis=axis, keepdims=True)
    return np.ascontiguousarray(centred)


def _power(rows: Array) -> Array:
    """The variance, and an epsilon, of rows whose mean is zero."""
    power: Array = np.vecdot(rows, rows) / np.float32(rows.shape[1]) + np.float32(_EPSILON)
    return power
