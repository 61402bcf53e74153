"""A small model with random weights, and the same model once more, written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from encoder_decoder_transformer import Transformer

SIZES: dict[str, Any] = {"vocab_size": 11, "d_model": 24, "num_heads": 4, "num_encoder_layers": 2}
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
        self.heads = model.config["num_heads"]
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
        """Every token's vector, and fractions of those of the up to three tokens before it."""
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
        """Every row of `x`, at its position, looks at those rows of the context that it may see.

        Heads in a group, neighbours, share one key and one value of a position.
        """
        query, key, value = (
            rows @ self.weights[f"{layer}.attention.{name}.weight"].T
            for name, rows in (("query", x), ("key", context), ("value", context))
        )
        size = query.shape[1] // self.heads
        group = self.heads // (key.shape[1] // size)
        heads = []
        for number, of_head in enumerate(query.split(size, dim=-1)):
            own_keys, own_values = (rows.split(size, dim=-1)[number // group] for rows in (key, value))
            turned_keys = [self.turn(self.norm(row), position) for position, row in enumerate(own_keys)]
            outputs = []
            for row, position, seen in zip(of_head, positions, visible, strict=True):
                turned = self.turn(self.norm(row), position)
                scores = torch.stack([turned @ turned_keys[i] for i in seen]) / math.sqrt(size)
                weights = scores.exp() / scores.exp().sum()
                outputs.append(sum(weight * own_values[i] for weight, i in zip(weights, seen, strict=True)))
            heads.append(torch.stack(outputs))
        return torch.cat(heads, dim=-1) @ self.weights[f"{layer}.attention.output.weight"].T

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Feature i and feature i + half are one complex number, multiplied by e^(i angle)."""
        half = len(x) // 2
        angles = torch.tensor([position * 10_000.0 ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])
