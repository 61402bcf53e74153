"""The peers: other people's encoder-decoders at the reference shape, and nanoGPT's CPU recipe.

Peers are compared as their libraries offer them, in both ways of attention that a library has (PyTorch's
`scaled_dot_product_attention`, and written out) where there are two: the faster one counts. Those that are not
installed (benchmarks/requirements.txt) are left out, with a message. nanoGPT (github.com/karpathy/nanoGPT) is no
package: its small model and the CPU recipe of its README are written anew here from their description, in fp32 and
without dropout as there; in its favour it has the fused AdamW, which nanoGPT uses on GPUs only.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charseq2seq.console import log
from charseq2seq.corpus import Ids


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder-decoder and of its batches; the defaults are the reference shape."""

    vocab_size: int = 66
    d_model: int = 192
    num_heads: int = 3
    num_kv_heads: int = 1  # ours; peers have as many as heads
    num_encoder_layers: int = 1
    num_decoder_layers: int = 4
    d_ff: int = 768
    source_length: int = 64
    target_length: int = 192
    batch_size: int = 16

    def model(self) -> dict[str, Any]:
        """The keyword arguments of our `Transformer`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch_size"}

    def random_batch(self) -> tuple[Tensor, Tensor]:
        """Source and target ids, (batch_size, source_length) and (batch_size, target_length); the start token is 0."""
        return (
            torch.randint(1, self.vocab_size, (self.batch_size, self.source_length)),
            torch.randint(1, self.vocab_size, (self.batch_size, self.target_length)),
        )

    def __str__(self) -> str:
        return (
            f"encoder {self.num_encoder_layers} layer(s), decoder {self.num_decoder_layers}, d_model {self.d_model}, "
            f"{self.num_heads} heads, d_ff {self.d_ff}, source {self.source_length}, target {self.target_length}, "
            f"vocabulary {self.vocab_size}"
        )


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """One argument for every size."""
    group = parser.add_argument_group("shape (default: the reference shape)")
    for field in fields(Shape):
        group.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N")


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that a command line asks for."""
    return Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})


def count_parameters(model: nn.Module) -> int:
    """How many different weights a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- encoder-decoders: forward(source, target) is the training loss, write(source, n) samples n tokens


class TorchTransformer(nn.Module):
    """torch.nn.Transformer with what it lacks: embeddings, learned positions, a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(max(shape.source_length, shape.target_length), shape.d_model)
        with warnings.catch_warnings(action="ignore"):  # that an odd number of heads rules out nested tensors
            self.transformer = nn.Transformer(
                shape.d_model,
                shape.num_heads,
                shape.num_encoder_layers,
                shape.num_decoder_layers,
                shape.d_ff,
                dropout=0.0,
                batch_first=True,
            )
        self.head = nn.Linear(shape.d_model, shape.vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, d_model)."""
        return self.embedding(ids) + self.positions.weight[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean loss of the target, nats per character."""
        decoder_input = torch.cat([source[:, -1:], target[:, :-1]], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(self.embed(source), self.embed(decoder_input), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), target.flatten())


class T5(nn.Module):
    """T5ForConditionalGeneration of transformers.

    Args:
        shape: of the model.
        attention: "sdpa", the library's default, or "eager".
    """

    def __init__(self, shape: Shape, attention: str = "sdpa") -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=shape.vocab_size,
            d_model=shape.d_model,
            d_kv=shape.d_model // shape.num_heads,
            d_ff=shape.d_ff,
            num_heads=shape.num_heads,
            num_layers=shape.num_encoder_layers,
            num_decoder_layers=shape.num_decoder_layers,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,  # a text has no end: as many tokens as are asked for
            attn_implementation=attention,
        )
        self.model: Any = T5ForConditionalGeneration(config)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean loss of the target, nats per character."""
        return self.model(input_ids=source, labels=target, use_cache=False).loss

    def write(self, source: Tensor, num_tokens: int) -> Tensor:
        """Sample from the model as it is.

        The cache is brought along, because in transformers 5.23 the one that `generate` makes itself has as many
        layers as the encoder: with more decoder layers it ends in an IndexError. Its kind is the same.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        ids = self.model.generate(
            source,
            attention_mask=torch.ones_like(source),
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=num_tokens,
        )
        return ids[:, 1:]  # without the start token


class XTransformer(nn.Module):
    """XTransformer of x-transformers.

    Args:
        shape: of the model.
        flash: whether attention is PyTorch's; by default it is written out.
    """

    def __init__(self, shape: Shape, flash: bool = False) -> None:
        super().__init__()
        from x_transformers import XTransformer as Model

        layers = {
            "num_tokens": shape.vocab_size,
            "heads": shape.num_heads,
            "attn_dim_head": shape.d_model // shape.num_heads,
            "attn_flash": flash,
            "ff_mult": shape.d_ff / shape.d_model,
        }
        self.model: Any = Model(
            dim=shape.d_model,
            tie_token_emb=True,
            enc_depth=shape.num_encoder_layers,
            enc_max_seq_len=shape.source_length,
            dec_depth=shape.num_decoder_layers,
            dec_max_seq_len=shape.target_length,
            **{f"{side}_{name}": value for side in ("enc", "dec") for name, value in layers.items()},
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean loss of the target but for its first token: the library itself shifts it, and has no start token."""
        return self.model(source, target)

    def write(self, source: Tensor, num_tokens: int) -> Tensor:
        """Sample from the model as it is."""
        return self.model.generate(
            source, source[:, -1:], num_tokens, temperature=1.0, filter_logits_fn=lambda logits: logits
        )


@dataclass(frozen=True)
class Peer:
    """Somebody else's encoder-decoder.

    Attributes:
        name: as tables give it, after the library's version.
        distribution: what pip installs.
        builds: shape -> model, one for every way of attention.
        writes: whether it can generate with a cache.
    """

    name: str
    distribution: str
    builds: tuple[Callable[[Shape], Any], ...]
    writes: bool = True

    def __str__(self) -> str:
        return f"{self.distribution} {version(self.distribution)} {self.name}"


_PEERS = (
    Peer("nn.Transformer", "torch", (TorchTransformer,), writes=False),
    Peer("T5", "transformers", (T5, partial(T5, attention="eager"))),
    Peer("XTransformer", "x-transformers", (XTransformer, partial(XTransformer, flash=True))),
)


def installed_peers() -> list[Peer]:
    """The peers that are here; says which are not."""
    there = []
    for peer in _PEERS:
        if importlib.util.find_spec(peer.distribution.replace("-", "_")) is None:
            log(f"{peer.distribution} is not installed, so {peer.name} is left out: see benchmarks/requirements.txt.")
        else:
            there.append(peer)
    return there


# --- nanoGPT's CPU recipe


@dataclass(frozen=True)
class NanoGPTRecipe:
    """`train.py config/train_shakespeare_char.py` with the flags that nanoGPT's README gives for CPUs."""

    num_layers: int = 4
    num_heads: int = 4
    d_model: int = 128
    block: int = 64
    batch_size: int = 12
    iterations: int = 2000
    learning_rate: float = 1e-3
    lowest_rate: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1  # of matrices, tables included
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_norm: float = 1.0

    def rate(self, iteration: int) -> float:
        """Learning rate: linear warm-up, then a cosine to the lowest."""
        if iteration < self.warmup:
            return self.learning_rate * (iteration + 1) / (self.warmup + 1)
        share = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.lowest_rate + (self.learning_rate - self.lowest_rate) * (1 + math.cos(math.pi * share)) / 2


class NanoGPTLayer(nn.Module):
    """Causal attention and a feed-forward block, normalised before each; no biases."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(d_model, bias=False)
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.norm_feed_forward = nn.LayerNorm(d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        parts = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        taken = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(taken.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_feed_forward(x))))


class NanoGPT(nn.Module):
    """nanoGPT's decoder-only model.

    Attributes:
        source_length, target_length: make the suite's own `evaluate` score it too, with half a block to one block of
            context for every character.
    """

    def __init__(self, vocab_size: int, recipe: NanoGPTRecipe) -> None:
        super().__init__()
        self.target_length = recipe.block // 2
        self.source_length = recipe.block - self.target_length + 1  # the last target character is never read
        self.embedding = nn.Embedding(vocab_size, recipe.d_model)
        self.positions = nn.Embedding(recipe.block, recipe.d_model)
        self.layers = nn.ModuleList(NanoGPTLayer(recipe.d_model, recipe.num_heads) for _ in range(recipe.num_layers))
        self.norm = nn.LayerNorm(recipe.d_model, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * recipe.num_layers if into_residual else 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are; `evaluate` asks."""
        return self.norm.weight.device

    def logits(self, ids: Tensor) -> Tensor:
        """ids (batch, up to block) -> (batch, length, vocab_size); the embedding is the head."""
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """As our `Transformer`: logits of every target token, given the source (not empty) and the target before it."""
        return self.logits(torch.cat([source, target[:, :-1]], dim=1))[:, source.shape[1] - 1 :]


def train_nanogpt(ids: Ids, vocab_size: int, recipe: NanoGPTRecipe, seed: int) -> tuple[NanoGPT, float]:
    """Follow the recipe.

    Args:
        ids: the training split.
        vocab_size: number of ids.
        recipe: model and schedule.
        seed: of weights and batches.

    Returns:
        The model, and the seconds that its training steps took; the recipe's own evaluations are left out.
    """
    torch.manual_seed(seed)
    text = torch.from_numpy(ids).long()
    model = NanoGPT(vocab_size, recipe)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
    start = time.perf_counter()
    for iteration in range(recipe.iterations):
        starts = torch.randint(len(text) - recipe.block, (recipe.batch_size, 1))
        blocks = text[starts + torch.arange(recipe.block + 1)]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(iteration)
        loss = F.cross_entropy(model.logits(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, time.perf_counter() - start
