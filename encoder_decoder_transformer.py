"""A small, modern encoder-decoder Transformer in one file that needs nothing but PyTorch.

The encoder reads a piece of text, the `source`, in both directions; the decoder generates the `target`, the text
that follows, one token at a time. It is the model of "Attention Is All You Need" (Vaswani et al., 2017,
arXiv:1706.03762) with later improvements, each for a measured reason (benchmarks/LOG.md):

- merged attention: a decoder layer looks at the encoder's output and at its own past in *one* softmax instead
  of two attentions one after the other (Zhang et al., 2019, arXiv:1908.11365): a quarter fewer weights;
- attention and feed-forward block side by side, as in GPT-J and PaLM (Chowdhery et al., 2022, arXiv:2204.02311): one
  normalisation a layer instead of two, and when generating, two matrix products instead of four;
- few key/value heads, by default one for all query heads (Shazeer, 2019, arXiv:1911.02150; Ainslie et al., 2023,
  arXiv:2305.13245): training is a seventh faster, and generating many texts at once nearly twice as fast;
- rotary positions that run on from the source into the target, so that the last character read and the first
  one written are neighbours (Su et al., 2021, arXiv:2104.09864);
- normalisation without parameters before every layer (OLMo: Groeneveld et al., 2024, arXiv:2402.00838), and of
  queries and keys (Henry et al., 2020, arXiv:2010.04245);
- squared ReLU in the feed-forward blocks (Primer: So et al., 2021, arXiv:2109.08668);
- dropout of a feature at all positions of a sequence at once (Gal and Ghahramani, 2016, arXiv:1512.05287; T5 drops
  in this way too), which needs far fewer random numbers than dropout at every position;
- output projections that start at zero, so that every block starts as the identity;
- a short causal convolution over the embeddings: every position begins with the three letters before it, which a
  layer would otherwise have to learn to look up (Primer, see above, has one inside attention);
- a bigram table: logits of the next token given the last one alone, so that the layers learn only the rest.

Shapes are written in comments as `(batch, length, d_model)`. Token ids are int64 tensors.

    model = Transformer(vocab_size=66)
    logits = model(source, target)                      # training: every target token at once
    ids = model.generate(source, 200, temperature=0.8)  # one token after the other

    model = Transformer.from_pretrained("owner/name")   # a published model; a folder does as well
    text = model.write("ROMEO:", 300, seed=1)           # what follows the prompt
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Up to this length two matrix products and a softmax beat scaled_dot_product_attention on a CPU, whose backward pass
# would be the largest single cost of a step (benchmarks/LOG.md).
_LONGEST_EXPLICIT_ATTENTION = 512

_SPAN = 4  # width of the convolution over the embeddings: a token and the three before it
LARGEST_TABLE = 1 << 23  # positions times head size: a small file must not ask for a huge rotary table
_CACHE_GROWTH = 64  # positions by which a key/value cache grows on a CPU
_TOKENS_AHEAD = 16  # that a GPU generates before the first of them is read


# ----- reading and training ---------------------------------------------------------------------------------------


def normalize(x: Tensor) -> Tensor:
    """Bring the last dimension to mean 0 and variance 1; no parameters."""
    return F.layer_norm(x, (x.shape[-1],))


def rotary_table(length: int, head_size: int) -> Tensor:
    """Cosines and signed sines of the rotary angles, (2, length, head_size).

    Features i and i + head_size / 2 are rotated together, like the two coordinates of a point. The first half of the
    sines is negative, as `_rotate` needs it.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])


class _Rotate(torch.autograd.Function):
    """Rotation with a hand-written backward pass: the gradient is rotated back, which is half of autograd's work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _rotate(x, table, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _rotate(gradients[0].contiguous(), table, -1), None


def _rotate(x: Tensor, table: Tensor, direction: int) -> Tensor:
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * table[0], partners, table[1], value=direction)


def normalize_and_rotate(x: Tensor, table: Tensor) -> Tensor:
    """Normalise the heads of queries or keys, (batch, length, heads, head_size), and give them their positions."""
    x, table = normalize(x), table[:, :, None]  # all heads of a position are rotated alike
    return _Rotate.apply(x, table) if torch.is_grad_enabled() else _rotate(x, table, 1)


class _FeedForward(torch.autograd.Function):
    """down(relu(up(x)) ** 2) with a hand-written backward pass.

    Reading and writing the wide tensors, (rows, d_ff), takes as long as the matrix products. Autograd would keep three
    of them; here it is two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        positive = torch.mm(rows, up.t()).relu_()
        squared = positive * positive
        ctx.save_for_backward(rows, up, down, positive, squared)
        return torch.mm(squared, down.t()).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, up, down, positive, squared = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape)
        to_down = torch.mm(gradient.t(), squared)
        half = torch.mm(gradient, down).mul_(positive)  # half of the derivative
        to_up = torch.mm(half.t(), rows).mul_(2)
        return torch.mm(half, up).mul_(2).view(gradients[0].shape), to_up, to_down


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two matrices with a squared ReLU between them: x (..., d_model), up (d_ff, d_model), down (d_model, d_ff)."""
    if torch.is_grad_enabled():
        return _FeedForward.apply(x, up, down)
    wide = F.linear(x, up).relu_()
    return F.linear(wide.mul_(wide), down)


class Kernels(NamedTuple):
    """The operations that faster kernels may replace, see `Transformer.use_kernels`."""

    embedding: Callable[[Tensor, Tensor], Tensor] = F.embedding
    normalize_and_rotate: Callable[[Tensor, Tensor], Tensor] = normalize_and_rotate
    feed_forward: Callable[[Tensor, Tensor, Tensor], Tensor] = feed_forward


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; several query heads share a key/value head (grouped-query attention).

    The query is (batch, target_length, heads, head_size), key and value (batch, context_length, kv_heads, head_size).
    The mask, (target_length, context_length), is added: 0 where a query may look, -inf elsewhere; None hides nothing.
    """
    if query.device.type == "cpu" and max(query.shape[1], key.shape[1]) <= _LONGEST_EXPLICIT_ATTENTION:
        return _attend_explicitly(query, key, value, mask)
    group = query.shape[2] // key.shape[2]
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    keys, values = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Two matrix products: the queries of all heads that share a key/value head are rows of one matrix."""
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    rows = query.view(batch, length, kv_heads, -1, size).transpose(1, 2).reshape(batch * kv_heads, -1, size)
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    if mask is None:
        scores = torch.bmm(rows, key.transpose(1, 2)) * size**-0.5
    else:
        mask = mask.unsqueeze(1).expand(-1, heads // kv_heads, -1).reshape(rows.shape[1], -1)
        scores = torch.baddbmm(mask.expand(len(rows), -1, -1), rows, key.transpose(1, 2), alpha=size**-0.5)
    attended = torch.bmm(scores.softmax(dim=-1), value).view(batch, kv_heads, length, -1, size)
    return attended.transpose(1, 2).reshape(query.shape)


class Embedding(nn.Module):
    """Depthwise causal convolution of width 4 over the normalised embeddings of tokens; its output is normalised."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.shares = nn.Parameter(torch.empty(_SPAN, d_model))  # convolution; the last row is for the token itself

    def tables(self) -> tuple[Tensor, ...]:
        """What each token adds to the positions 3, 2, 1 and 0 after it, (vocab_size, d_model) each."""
        return (normalize(self.weight) * self.shares[:, None]).unbind()

    def forward(self, ids: Tensor) -> Tensor:
        """ids, (batch, length) -> (batch, length, d_model)."""
        *earlier, own = self.tables()
        x = self.kernels.embedding(ids, own)
        for distance, table in enumerate(reversed(earlier), start=1):
            if distance < ids.shape[1]:
                x = x + F.pad(self.kernels.embedding(ids[:, :-distance], table), (0, 0, distance, 0))
        return normalize(x)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised and have rotary positions."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        kv_size = d_model // num_heads * num_kv_heads
        # Separate matrices, not one, because the optimizer Muon orthogonalises each matrix as a whole.
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, kv_size, bias=False)
        self.value = nn.Linear(d_model, kv_size, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def keys_and_values(self, context: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, each (batch, context_length, kv_heads, head_size)."""
        key, value = (part(context).unflatten(-1, (self.num_kv_heads, -1)) for part in (self.key, self.value))
        return self.kernels.normalize_and_rotate(key, table), value

    def forward(self, x: Tensor, context: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        """Every position of x, the last ones of the context, attends to the context; both (batch, length, d_model)."""
        keys_and_values = self.keys_and_values(context, table)
        query = self.query(x).unflatten(-1, (self.num_heads, -1))
        query = self.kernels.normalize_and_rotate(query, table[:, context.shape[1] - x.shape[1] :])
        return self.output(attend(query, *keys_and_values, mask).flatten(2))


class FeedForward(nn.Module):
    """The feed-forward block of a layer, see `feed_forward`."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        return self.kernels.feed_forward(x, self.up.weight, self.down.weight)


class Dropout(nn.Module):
    """In training, drop a fraction of the features, each at all positions, and scale the others up to keep the sum."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        if not (self.training and self.rate):
            return x
        kept = x.new_full((x.shape[0], 1, x.shape[2]), 1 - self.rate)
        return x * (torch.bernoulli(kept) / kept)


class Layer(nn.Module):
    """Attention and feed-forward block side by side, on one normalised input."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, num_heads, num_kv_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(batch, length, d_model) -> the same shape.

        In the encoder every position attends to every other; in the decoder to the memory, which is the encoder's
        output, (batch, source_length, d_model), and to those positions of x that the mask leaves visible. The rotary
        table has a row for each position of memory and x.
        """
        h = normalize(x)
        context = h if memory is None else torch.cat([memory, h], dim=1)
        return x + self.dropout(self.attention(h, context, table, mask) + self.feed_forward(h))


class Transformer(nn.Module):
    """Encoder-decoder over one vocabulary and one embedding for both sides.

    A ValueError names all sizes that do not fit together.

    Args:
        vocab_size: number of token ids, the start token included.
        d_model: features per position.
        num_heads: attention heads; `d_model / num_heads` must be an even number (64 is fastest).
        num_encoder_layers: layers that read the source.
        num_decoder_layers: layers that write the target.
        d_ff: features inside a feed-forward block.
        dropout: fraction of each layer's output features that is dropped in training (see `Dropout`).
        source_length: most tokens the encoder reads.
        target_length: most tokens that the decoder generates from one source; then the end of the text is the next one.
        start_id: the token that the decoder starts from when the source is empty.
        bigram: whether there is a bigram table, `vocab_size` squared weights.
        num_kv_heads: key/value heads, a divisor of `num_heads`: each serves a group of query heads.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 192,
        num_heads: int = 3,
        num_encoder_layers: int = 1,
        num_decoder_layers: int = 3,
        d_ff: int = 1024,
        dropout: float = 0.0,
        source_length: int = 64,
        target_length: int = 192,
        start_id: int = 0,
        bigram: bool = True,
        num_kv_heads: int = 1,
    ) -> None:
        arguments = dict(locals())
        self.config = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        super().__init__()
        counts = {name: value for name, value in self.config.items() if name not in ("dropout", "start_id", "bigram")}
        problems = [f"{name} must be at least 1, not {number}" for name, number in counts.items() if number < 1]
        if min(d_model, num_heads) > 0 and (d_model % num_heads or d_model // num_heads % 2):
            problems.append(f"d_model / num_heads must be an even whole number, not {d_model} / {num_heads}")
        if min(num_heads, num_kv_heads) > 0 and num_heads % num_kv_heads:
            problems.append(f"num_kv_heads must divide num_heads {num_heads}, not {num_kv_heads}")
        if not 0.0 <= dropout < 1.0:
            problems.append(f"dropout must be at least 0 and below 1, not {dropout}")
        if not 0 <= start_id < max(1, vocab_size):
            problems.append(f"start_id must be an id below vocab_size, not {start_id}")
        if problems:
            raise ValueError("; ".join(problems))

        self.vocab: dict[str, int] = {}  # token -> id, where the model came with one
        self.source_length = source_length
        self.target_length = target_length
        self.start_id = start_id
        self.checkpoint_activations = False  # True saves memory and costs time: each layer is computed twice
        self.embedding = Embedding(vocab_size, d_model)
        sizes = (d_model, num_heads, num_kv_heads, d_ff, dropout)
        self.encoder = nn.ModuleList(Layer(*sizes) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(Layer(*sizes) for _ in range(num_decoder_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.bigram = nn.Embedding(vocab_size, vocab_size) if bigram else None
        self.dropout = Dropout(dropout)
        table = rotary_table(source_length + target_length, d_model // num_heads)
        self.rotary: Tensor
        self.register_buffer("rotary", table, persistent=False)  # computed, so not part of the weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the first weights; a matrix whose output is added to the residual stream or the logits starts at zero."""
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.embedding.shares[:-1])
        nn.init.ones_(self.embedding.shares[-1])
        nn.init.zeros_(self.head.weight)
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.weight)
        for layer in [*self.encoder, *self.decoder]:
            for name, weight in layer.named_parameters():
                if name.endswith(("output.weight", "down.weight")):
                    nn.init.zeros_(weight)
                else:  # uniform with variance 1 / inputs: a normalised input stays normalised
                    bound = math.sqrt(3 / weight.shape[1])
                    nn.init.uniform_(weight, -bound, bound)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def encode(self, source: Tensor) -> Tensor:
        """Ids, (batch, source_length), may have length 0 -> the memory, (batch, source_length, d_model)."""
        x = self.dropout(self.embedding(source))
        table = self.rotary[:, : source.shape[1]]
        if source.shape[1]:
            for layer in self.encoder:
                x = self._run(layer, x, table)
        return normalize(x)

    def decode(self, memory: Tensor, text: Tensor) -> Tensor:
        """Score every target token, given the source and the target tokens before it.

        Args:
            memory: the result of `encode`, (batch, source_length, d_model).
            text: ids of the source, or of the start token if the source is empty, and of all but the last target token.

        Returns:
            Logits in float32, (batch, target_length, vocab_size).
        """
        source_length = memory.shape[1]
        first = max(0, source_length - 1)  # the last source token, or the start token, is the first input
        decoder_input = text[:, first:]
        before = min(first, _SPAN - 1)  # tokens that the convolution needs before the first one
        length, end = decoder_input.shape[1], source_length + decoder_input.shape[1]
        x = self.dropout(self.embedding(text[:, first - before :])[:, before:])
        mask = x.new_full((length, end), -math.inf).triu(source_length + 1)  # hides the future
        for layer in self.decoder:
            x = self._run(layer, x, self.rotary[:, :end], memory, mask)
        return self.logits(x, decoder_input)

    def _run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def logits(self, x: Tensor, decoder_input: Tensor) -> Tensor:
        """Decoder output (..., d_model) and the input token of each position -> float32 (..., vocab_size)."""
        logits = F.linear(normalize(x).float(), self.head.weight.float())
        return logits if self.bigram is None else logits + self.bigram(decoder_input).float()

    def set_precision(self, dtype: torch.dtype) -> Transformer:
        """Compute in this type; only the logits stay in float32, because rounding them costs loss."""
        for part in (self.embedding, self.encoder, self.decoder):
            part.to(dtype)
        self.rotary = self.rotary.to(dtype)
        return self

    def use_kernels(self, kernels: Kernels) -> Transformer:
        """Compute with these operations, e.g. with faster ones for a GPU."""
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = cast("Any", kernels)
        return self

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: logits of every target token, given the source and the target tokens before it.

        Args:
            source: ids, (batch, up to source_length); may have length 0.
            target: ids, (batch, up to target_length).

        Returns:
            Logits in float32, (batch, target_length, vocab_size); entry i scores target token i.
        """
        before = source if source.shape[1] else source.new_full((source.shape[0], 1), self.start_id)
        return self.decode(self.encode(source), torch.cat([before, target[:, :-1]], dim=1))

    @torch.inference_mode()
    def stream(
        self,
        source: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[Tensor]:
        """Generate `num_tokens` tokens after the source, one at a time, in constant memory.

        After `target_length` generated tokens, the last `source_length` tokens of the text become the next source.
        Only the last `source_length` tokens of a longer source are read. The model is left in eval mode.

        Args:
            source: ids, (batch, any length, 0 included).
            num_tokens: how many tokens to generate.
            temperature: divides the logits; below 1 is safer, above 1 wilder, 0 always takes the likeliest.
            top_k: sample from the k likeliest tokens only.
            top_p: sample from the fewest tokens that together have this probability (after temperature).
            generator: of random numbers, on any device; or one for each row, whose text then depends on no other row.

        Yields:
            The next token of every row, (batch,).
        """
        self.eval()
        text = source[:, -self.source_length :]
        decoder = CachedDecoder(self, len(text), (temperature, top_k, top_p))
        while num_tokens > 0:
            decoder.begin(text)
            random = self._random_numbers(len(text), generator)[:num_tokens]
            tokens: list[Tensor] = []
            # A GPU works ahead of the caller, who would otherwise wait for it at every token.
            number = _TOKENS_AHEAD if self.device.type == "cuda" else 1
            for rows in torch.split(random, number):
                ahead = [decoder.step(numbers) for numbers in rows]
                tokens += ahead
                yield from ahead
            num_tokens -= len(tokens)
            text = torch.cat([text, torch.stack(tokens, dim=1)], dim=1)[:, -self.source_length :]

    def _random_numbers(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        """(target_length, batch): always that many, so that a shorter text is the beginning of a longer one."""
        if isinstance(generator, Sequence):
            columns = [torch.rand(self.target_length, generator=own, device=own.device) for own in generator]
            return torch.stack(columns, dim=1).to(self.device)
        device = self.device if generator is None else generator.device
        return torch.rand(self.target_length, batch, generator=generator, device=device).to(self.device)

    def generate(self, source: Tensor, num_tokens: int, **sampling: Any) -> Tensor:
        """All tokens of `stream` at once, see there: ids, (batch, num_tokens), without the source."""
        tokens = list(self.stream(source, num_tokens, **sampling))
        return torch.stack(tokens, dim=1) if tokens else source[:, :0]

    def write(
        self, prompt: str, num_chars: int = 300, *, temperature: float = 0.8, seed: int | None = None, **sampling: Any
    ) -> str:
        """The text that follows a prompt, which may be empty; the prompt is not repeated.

        The same seed gives the same text. For the temperature, top_k and top_p see `stream`. A ValueError names
        characters of the prompt that the model never saw.
        """
        if not self.vocab:
            raise ValueError("the model has no vocabulary: load it with Transformer.from_pretrained")
        if unknown := sorted(set(prompt).difference(self.vocab)):
            raise ValueError(f"the model never saw {', '.join(map(repr, unknown))}; leave them out of the prompt")
        source = torch.tensor([[self.vocab[character] for character in prompt]], dtype=torch.long, device=self.device)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ids = self.generate(source, num_chars, temperature=temperature, generator=generator, **sampling)[0].tolist()
        token_of_id = {number: token for token, number in self.vocab.items()}
        return "".join(token_of_id[number] for number in ids)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Transformer:
        """A published model, on the CPU, ready to write; no code of its repository is run.

        A ValueError says which files are missing, damaged, or do not fit this version of the model.

        Args:
            name: a folder, or a repository of the Hugging Face Hub, `owner/name`, which needs `huggingface_hub`.
            revision: the repository's branch, tag or commit.
            token: for a private repository; without it, the one that `hf auth login` stored.
        """
        folder = Path(name)
        is_folder = folder.is_dir()
        if not is_folder and str(name).count("/") != 1:
            raise ValueError(f"there is no folder {name}, and a repository of the Hub is named owner/name")
        # Safetensors first: such a file can hold nothing but tensors.
        for weights in ["model.safetensors"] * bool(find_spec("safetensors")) + ["pytorch_model.bin"]:
            if not is_folder:
                from huggingface_hub import snapshot_download

                files = ["config.json", "vocab.json", weights]
                folder = Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))
            if (folder / weights).is_file():
                break
        try:
            return cls._from_files(folder, folder / weights)
        # Which error it is depends on the libraries; all of it means the same to the user.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            problem = "files are missing, damaged or of another version of the model"
            raise ValueError(f"{name} cannot be loaded: {problem} ({reason})") from error

    @classmethod
    def _from_files(cls, folder: Path, weights: Path) -> Transformer:
        config, vocab = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "vocab.json"))
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(weights)
        else:
            tensors = torch.load(weights, map_location="cpu", weights_only=True)["model_state_dict"]
        return cls.from_weights(config, tensors, vocab)

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, Any], vocab: Mapping[str, int]) -> Self:
        """A model of this config with these weights, on the CPU, ready to write; a ValueError if they do not fit."""
        # A small file must not ask for a large model: what its sizes decide is looked up before a model is made.
        asked = {name: parameter.default for name, parameter in signature(cls).parameters.items()} | dict(config)
        vocab_size, d_model = weights["head.weight"].shape
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "d_ff": len(weights["decoder.0.feed_forward.up.weight"])}
        for part in ("encoder", "decoder"):
            sizes[f"num_{part}_layers"] = len({name.split(".")[1] for name in weights if name.startswith(f"{part}.")})
        sizes["bigram"] = "bigram.weight" in weights
        different = [name for name, size in sizes.items() if asked[name] != size]
        if (asked["source_length"] + asked["target_length"]) * d_model > LARGEST_TABLE * max(1, asked["num_heads"]):
            different.append("too many positions, which take more memory than its weights")
        if different:
            raise ValueError(f"config and weights do not fit together: {', '.join(different)}")
        if vocab and sorted(vocab.values()) != list(range(vocab_size)):
            raise ValueError("vocab.json and config.json differ in size")
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced at once
            model = cls(**config)
        model.load_state_dict(weights)
        model.vocab = dict(vocab)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads: config.json, vocab.json and, in float32, model.safetensors."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in {"config.json": self.config, "vocab.json": self.vocab}.items():
            Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights = {name: weight.float().cpu().contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})


# ----- writing: the decoder one position at a time ----------------------------------------------------------------


class _CachedLayer:
    """A decoder layer that takes one position after the other and caches its keys and values.

    Both are (batch, kv_heads, positions, head_size). On a GPU they have room for all positions from the start, because
    a CUDA graph needs fixed addresses; on a CPU they grow.
    """

    def __init__(self, layer: Layer) -> None:
        attention, feed_forward = layer.attention, layer.feed_forward
        self.attention = attention
        self.head_size = len(attention.query.weight) // attention.num_heads
        # Two products instead of six: with a single position, starting a product takes longer than computing it.
        inward = (attention.query, attention.key, attention.value, feed_forward.up)
        self.inward = torch.cat([part.weight for part in inward])
        self.outward = torch.cat([attention.output.weight, feed_forward.down.weight], dim=1)
        self.on_gpu = self.inward.device.type == "cuda"
        self.keys = self.values = self.inward.new_empty(0)

    def begin(self, memory: Tensor, table: Tensor, capacity: int) -> None:
        """Cache the keys and values of the encoder's output, (batch, source_length, d_model), and forget all others."""
        keys, values = (x.transpose(1, 2) for x in self.attention.keys_and_values(memory, table))
        if not self.on_gpu:
            self.keys, self.values = keys, values
            return
        if self.keys.dim() == 1:
            self.keys, self.values = keys.new_zeros(2, *keys.shape[:2], capacity, self.head_size)
        self.keys[:, :, : keys.shape[2]], self.values[:, :, : keys.shape[2]] = keys, values

    def step(self, x: Tensor, position: Tensor, table: Tensor, hidden: Tensor) -> Tensor:
        """`Layer.forward` for one more position, int64, (1,).

        x is (batch, d_model), the position's part of the rotary table (2, 1, head_size), the additive mask `hidden`
        (1, capacity).
        """
        batch, heads, kv_heads = len(x), self.attention.num_heads, self.attention.num_kv_heads
        if not self.on_gpu and int(position) == self.keys.shape[2]:
            # Attention always reads the whole cache: a slice would be copied, and oneDNN would compile a kernel for
            # every length.
            more = min(_CACHE_GROWTH, hidden.shape[1] - self.keys.shape[2])
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        inward = self._product(self.inward, normalize(x))
        narrow, wide = inward.tensor_split([(heads + 2 * kv_heads) * self.head_size], dim=1)
        rows = narrow.reshape(batch, 1, -1, self.head_size)
        rotated = self.attention.kernels.normalize_and_rotate(rows, table)[:, 0]  # rotated values are not used
        self.keys.index_copy_(2, position, rotated[:, heads : heads + kv_heads].unsqueeze(2))
        self.values.index_copy_(2, position, rows[:, 0, heads + kv_heads :].unsqueeze(2))
        queries = rotated[:, :heads].reshape(batch * kv_heads, -1, self.head_size)
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        mask = hidden[:, : keys.shape[1]].expand(*queries.shape[:2], -1)
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=self.head_size**-0.5)
        attended = torch.bmm(scores.softmax(dim=-1), values).reshape(batch, -1)
        return x + self._product(self.outward, torch.cat([attended.t(), wide.relu_().square_().t()]).t())

    def _product(self, weight: Tensor, x: Tensor) -> Tensor:
        """`F.linear(x, weight)`; on a CPU the weight is the left factor: oneDNN copies the right one each time."""
        return F.linear(x, weight) if self.on_gpu else torch.mm(weight, x.t()).t()


class CachedDecoder:
    """Generates a batch of texts, one token after the other; the model must not change meanwhile.

    On a GPU, starting some hundred small kernels takes longer than running them. So a step is captured there once, as
    a CUDA graph, and replayed for every token. `sampling` is temperature, top_k and top_p of `Transformer.stream`.
    """

    def __init__(self, model: Transformer, batch: int, sampling: tuple[float, int | None, float | None]) -> None:
        device = model.device
        self.model, self.sampling = model, sampling
        self.layers = [_CachedLayer(layer) for layer in cast("list[Layer]", list(model.decoder))]
        # A row of zeros before each table stands for tokens before the text, which are -1.
        self.tables = torch.cat([F.pad(table, (0, 0, 1, 0)) for table in model.embedding.tables()])
        self.first_rows = torch.arange(1, len(self.tables), len(self.tables) // _SPAN, device=device)
        self.recent = torch.empty(batch, _SPAN, dtype=torch.long, device=device)  # the last tokens; -1 before the text
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the last token
        self.positions = torch.arange(model.source_length + model.target_length, device=device)
        self.random = torch.empty(batch, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm_up_steps = 2 if device.type == "cuda" else math.inf  # before the capture

    def begin(self, source: Tensor) -> None:
        """Read a source, (batch, up to source_length), and forget everything else."""
        memory = self.model.encode(source)
        length = memory.shape[1]
        for layer in self.layers:
            layer.begin(memory, self.model.rotary[:, :length], len(self.positions))
        tokens = source if source.shape[1] else torch.full_like(self.recent[:, :1], self.model.start_id)
        self.recent.copy_(F.pad(tokens, (_SPAN, 0), value=-1)[:, -_SPAN:])
        self.position.fill_(length - 1)

    def step(self, random: Tensor) -> Tensor:
        """The next token of every text, (batch,), given random numbers in [0, 1), (batch,)."""
        self.random.copy_(random)
        if self.warm_up_steps:
            self.warm_up_steps -= 1
            return self._step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.next_token = self._step()
        self.graph.replay()
        return self.next_token.clone()

    def _step(self) -> Tensor:
        token = sample(self.logits(), self.random, *self.sampling)
        self.recent.copy_(torch.cat([self.recent[:, 1:], token[:, None]], dim=1))
        return token

    def logits(self) -> Tensor:
        """Process the last token; the next one's logits, (batch, vocab_size), -inf for the start token."""
        self.position += 1
        x = normalize(F.embedding_bag(self.recent + self.first_rows, self.tables, mode="sum"))
        table = self.model.rotary.index_select(1, self.position)
        hidden = x.new_zeros(1, len(self.positions)).masked_fill_(self.positions > self.position, -math.inf)
        for layer in self.layers:
            x = layer.step(x, self.position, table, hidden)
        logits = self.model.logits(x, self.recent[:, -1])
        logits[:, self.model.start_id] = -math.inf
        return logits


def sample(
    logits: Tensor, random: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Sample a token for each row of logits, (batch, vocab_size): top-k, then temperature, then top-p.

    The random numbers, (batch,), are from 0 to below 1.
    """
    if temperature < 1e-30:  # so small that the likeliest token is certain
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if temperature != 1:
        # The largest logit is subtracted, so that a tiny temperature cannot overflow; a huge one has to stay finite.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(temperature, 1e30)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        beyond[:, 0] = False  # the likeliest token always stays, however small top_p
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), 0.0)
    # The token in whose interval of the cumulative sum the random number falls. A GPU adds in parallel, so its rounded
    # sum may rise even at a token of probability 0; such a token gets the sum before it, and is never sampled.
    running = (probabilities.cumsum(dim=-1) * (probabilities > 0)).cummax(dim=-1).values
    token = torch.searchsorted(running, random[:, None] * running[:, -1:], right=True).squeeze(1)
    return token.remainder(logits.shape[-1])  # token 0 where the logits are NaN
