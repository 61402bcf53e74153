"""A small, modern encoder-decoder Transformer in one file that needs nothing but PyTorch.

The encoder reads a piece of text, the `source`, in both directions; the decoder writes the `target`, the text
that follows, one token at a time. It is the model of "Attention Is All You Need" (Vaswani et al., 2017,
arXiv:1706.03762) with what has proved itself since, each for a measured reason (benchmarks/LOG.md):

- merged attention: a decoder layer looks at the encoder's output and at its own past in *one* softmax instead
  of two attentions one after the other (Zhang et al., 2019, arXiv:1908.11365): a quarter fewer weights;
- attention and feed-forward block side by side, as in GPT-J and PaLM (Chowdhery et al., 2022, arXiv:2204.02311): one
  normalisation a layer instead of two, and when a text is written, two products with weights instead of four;
- one key and one value for all heads of a query (Shazeer, 2019, arXiv:1911.02150): training is a seventh faster, and
  writing many texts at once, which waits for the keys and values of the past, nearly twice as fast;
- rotary positions that run on from the source into the target, so that the last character read and the first
  one written are neighbours (Su et al., 2021, arXiv:2104.09864);
- normalisation without parameters before every layer (OLMo: Groeneveld et al., 2024, arXiv:2402.00838), and of
  queries and keys (Henry et al., 2020, arXiv:2010.04245);
- squared ReLU in the feed-forward blocks (Primer: So et al., 2021, arXiv:2109.08668);
- dropout of a feature at all positions of a sequence at once (Gal and Ghahramani, 2016, arXiv:1512.05287; T5 drops
  in this way too), which needs far fewer random numbers than a draw for every position;
- output projections that start at zero, so that every block starts as the identity;
- a short causal convolution over the embeddings: a letter alone says little, and no layer needs to find out first
  which ones stand before it (Primer, see above, has one inside attention);
- a bigram table: what usually follows the previous token is looked up and added to the logits, which leaves
  the layers to learn the rest.

Shapes are written in comments as `(batch, length, d_model)`. Token ids are int64 tensors.

    model = Transformer(vocab_size=66)
    logits = model(source, target)                      # training: every target token at once
    ids = model.generate(source, 200, temperature=0.8)  # writing: one token after the other
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Longest sequence for which attention on a CPU is written out: up to here two matrix products and a softmax
# beat scaled_dot_product_attention, whose backward pass would be the largest single cost of a step (benchmarks/LOG.md).
_WRITTEN_OUT_LENGTH = 512

# Tokens that are embedded together: the one at a position and those right before it (widths of 4 are the custom).
_SPAN = 4

# Positions by which a key/value cache grows.
_CACHE_ROOM = 64


def normalize(x: Tensor) -> Tensor:
    """Bring the last dimension to mean 0 and variance 1; no parameters."""
    return F.layer_norm(x, (x.shape[-1],))


def rotary_table(length: int, head_size: int) -> Tensor:
    """Cosines and signed sines of the rotary angles, (2, length, head_size).

    Feature i is paired with feature i + head_size / 2; both turn by the same angle, the first of them backwards.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])


class _Rotate(torch.autograd.Function):
    """Rotation of feature pairs; written out, because its derivative is the rotation back: half of autograd's work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table[0], table[1], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(gradients[0].contiguous(), table[0], table[1], -1), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partners, sin, value=direction)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of features by its position's angle.

    Args:
        x: (..., length, head_size).
        table: (2, length, head_size), the rows of `rotary_table` for the positions of `x`; or what broadcasts to it.
    """
    return cast("Tensor", _Rotate.apply(x, table))


class _FeedForward(torch.autograd.Function):
    """down(relu(up(x)) ** 2); written out, because the wide tensors in the middle cost as much as the products.

    Autograd would keep and pass over three of them, (rows, d_ff) each; here it is two, and one is changed in place.
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
        half = torch.mm(gradient, down).mul_(positive)  # the square's derivative is twice this
        to_up = torch.mm(half.t(), rows).mul_(2)
        return torch.mm(half, up).mul_(2).view(gradients[0].shape), to_up, to_down


def causal_mask(target_length: int, context_length: int, like: Tensor) -> Tensor | None:
    """Additive mask (target_length, context_length): 0 where a query may look, -inf at its future.

    The last `target_length` columns are the target itself, those before it are all visible. None where there is
    nothing to hide.
    """
    if target_length == 1:
        return None
    hidden = torch.full((target_length, context_length), -math.inf, dtype=like.dtype, device=like.device)
    return hidden.triu(context_length - target_length + 1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of many heads to one key and one value per position.

    Args:
        query: (batch, target_length, heads, head_size).
        key, value: (batch, context_length, head_size).
        mask: additive, (target_length, context_length), or None.

    Returns:
        (batch, target_length, heads, head_size).
    """
    batch, length, heads, size = query.shape
    if query.device.type != "cpu" or max(length, key.shape[1]) > _WRITTEN_OUT_LENGTH:
        keys, values = (x.unsqueeze(1).expand(-1, heads, -1, -1) for x in (key, value))
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)
    rows = query.reshape(batch, length * heads, size)  # a position's heads are queries as those of others: one matrix
    if mask is None:
        scores = torch.bmm(rows, key.transpose(1, 2)) * size**-0.5
    else:
        mask = mask.unsqueeze(1).expand(-1, heads, -1).reshape(length * heads, -1)
        scores = torch.baddbmm(mask.expand(batch, -1, -1), rows, key.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value).view(query.shape)


class Embedding(nn.Module):
    """Learnt shares, feature by feature, of the normalised vectors of a token and of those right before it; normalised.

    Attributes:
        weight: a vector for every token, (vocab_size, d_model).
        shares: (_SPAN, d_model); the last row is of the token itself.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.shares = nn.Parameter(torch.empty(_SPAN, d_model))

    def tables(self) -> tuple[Tensor, ...]:
        """What each token means _SPAN - 1, ..., 1 and 0 positions after it, (vocab_size, d_model) each."""
        return (normalize(self.weight) * self.shares[:, None]).unbind()

    def forward(self, ids: Tensor) -> Tensor:
        """ids, (batch, length) -> (batch, length, d_model)."""
        *earlier, own = self.tables()
        x = F.embedding(ids, own)
        for distance, table in enumerate(reversed(earlier), start=1):
            if distance < ids.shape[1]:
                x = x + F.pad(F.embedding(ids[:, :-distance], table), (0, 0, distance, 0))
        return normalize(x)

    def last(self, ids: Tensor, tables: Tensor) -> Tensor:
        """What `forward` says of the last position, (batch, d_model).

        Args:
            ids: (batch, up to _SPAN).
            tables: those of `tables()` one below the other: a position's vectors are then a single lookup.
        """
        firsts = torch.arange(0, len(tables), len(self.weight), device=ids.device)[-ids.shape[1] :]
        return normalize(F.embedding_bag(ids + firsts, tables, mode="sum"))


class Attention(nn.Module):
    """Many query heads look at one key per position; queries and keys are normalised and have rotary positions."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Separate matrices, not one: Muon orthogonalises each on its own.
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model // num_heads, bias=False)
        self.value = nn.Linear(d_model, d_model // num_heads, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def keys_and_values(self, context: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """What is looked at and what is taken from it, each (batch, context_length, head_size)."""
        return rotate(normalize(self.key(context)), table), self.value(context)

    def forward(
        self, x: Tensor, table: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Let every position of `x` (batch, length, d_model) take what it needs from the context."""
        query = self.query(x).unflatten(-1, (self.num_heads, -1))
        query = rotate(normalize(query), table[:, :, None])  # all heads of a position turn alike
        return self.output(attend(query, *keys_and_values, mask).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        if torch.is_grad_enabled():
            return _FeedForward.apply(x, self.up.weight, self.down.weight)
        wide = self.up(x).relu_()
        return self.down(wide.mul_(wide))


class Dropout(nn.Module):
    """Drop features in training; what a sequence loses it loses at all its positions.

    Args:
        share: of the features, 0 to below 1; those that stay are scaled up, so that the expected sum stays too.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        if not (self.training and self.share):
            return x
        kept = x.new_full((x.shape[0], 1, x.shape[2]), 1 - self.share)
        return x * (torch.bernoulli(kept) / kept)


class EncoderLayer(nn.Module):
    """Every source position looks at every other, and thinks."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """(batch, source_length, d_model) -> the same shape."""
        h = normalize(x)
        attended = self.attention(h, table, self.attention.keys_and_values(h, table))
        return x + self.dropout(attended + self.feed_forward(h))


class DecoderLayer(nn.Module):
    """Every target position looks at the whole source and at the target before it, and thinks."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        """All target positions at once.

        Args:
            x: (batch, target_length, d_model).
            memory: the encoder's output, (batch, source_length, d_model).
            table: rotary table for source and target positions, (2, source_length + target_length, ...).
            mask: `causal_mask(target_length, source_length + target_length)`.
        """
        h = normalize(x)
        keys_and_values = self.attention.keys_and_values(torch.cat([memory, h], dim=1), table)
        attended = self.attention(h, table[:, memory.shape[1] :], keys_and_values, mask)
        return x + self.dropout(attended + self.feed_forward(h))


class CachedLayer:
    """A decoder layer that takes one position after the other, and remembers the keys and values of all it has seen.

    Args:
        layer: whose weights these are; they must not change as long as this is in use.
        memory: the encoder's output, (batch, source_length, d_model).
        table: rotary table of the source's positions.

    Attributes:
        keys, values: (batch, room, head_size).
        nothing: what baddbmm wants to add to and, with beta=0, does not read.
    """

    def __init__(self, layer: DecoderLayer, memory: Tensor, table: Tensor) -> None:
        attention, feed_forward = layer.attention, layer.feed_forward
        self.keys, self.values = attention.keys_and_values(memory, table)
        self.heads, self.head_size = attention.num_heads, self.keys.shape[-1]
        self.nothing = self.keys.new_zeros(())
        # Two products instead of six: a single position is too little work for a CPU to be worth the calls.
        self.inward = torch.cat(
            [attention.query.weight, attention.key.weight, attention.value.weight, feed_forward.up.weight]
        )
        self.outward = torch.cat([attention.output.weight, feed_forward.down.weight], dim=1)

    def grow(self) -> None:
        """Make room for further positions.

        Always used as a whole: of a part of it bf16 products would make a copy, and be compiled for every length.
        """
        self.keys, self.values = (F.pad(x, (0, 0, 0, _CACHE_ROOM)) for x in (self.keys, self.values))

    def step(self, x: Tensor, place: int, table: Tensor) -> Tensor:
        """What `DecoderLayer.forward` makes of a further position.

        Args:
            x: (batch, d_model).
            place: the position; there must be room for it.
            table: the position's row of the rotary table, (2, head_size).

        Returns:
            (batch, d_model).
        """
        # Features by batch: a CPU rearranges the right-hand matrix of a product first, and the weights are the larger.
        inward = torch.mm(self.inward, normalize(x).t())
        narrow, wide = inward.tensor_split([(self.heads + 2) * self.head_size])
        rows = narrow.t().reshape(len(x), self.heads + 2, self.head_size)
        turned = _turn(normalize(rows), table[0], table[1], 1)  # the value too, which goes unused: no copy is made
        self.keys[:, place] = turned[:, -2]
        self.values[:, place] = rows[:, -1]
        scale = self.head_size**-0.5
        scores = torch.baddbmm(self.nothing, turned[:, :-2], self.keys.transpose(1, 2), beta=0, alpha=scale)
        scores[..., place + 1 :] = -math.inf  # room not yet filled; less work than a mask
        taken = torch.bmm(scores.softmax(dim=-1), self.values).flatten(1)
        found = torch.cat([taken.t(), wide.relu_().square()])
        return x + torch.mm(self.outward, found).t()


class Transformer(nn.Module):
    """Encoder-decoder over one vocabulary and one embedding for both sides.

    Args:
        vocab_size: number of token ids, the start token included.
        d_model: features per position.
        num_heads: attention heads; `d_model / num_heads` must be an even number (64 is fastest on CPUs).
        num_encoder_layers: layers that read the source.
        num_decoder_layers: layers that write the target.
        d_ff: features inside a feed-forward block.
        dropout: share of each layer's output features that is dropped in training, 0 to below 1 (see `Dropout`).
        source_length: most tokens the encoder reads.
        target_length: most tokens the decoder writes before what it wrote becomes the next source.
        start_id: the token that the decoder starts from when the source is empty.
        bigram: whether there is a bigram table, `vocab_size` squared weights.

    Raises:
        ValueError: sizes that do not fit together; the message names them all.
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
    ) -> None:
        super().__init__()
        problems = [
            f"{name} must be at least 1, not {number}"
            for name, number in {
                "vocab_size": vocab_size,
                "d_model": d_model,
                "num_heads": num_heads,
                "num_encoder_layers": num_encoder_layers,
                "num_decoder_layers": num_decoder_layers,
                "d_ff": d_ff,
                "source_length": source_length,
                "target_length": target_length,
            }.items()
            if number < 1
        ]
        if min(d_model, num_heads) > 0 and (d_model % num_heads or d_model // num_heads % 2):
            problems.append(f"d_model / num_heads must be an even whole number, not {d_model} / {num_heads}")
        if not 0.0 <= dropout < 1.0:
            problems.append(f"dropout must be at least 0 and below 1, not {dropout}")
        if not 0 <= start_id < max(1, vocab_size):
            problems.append(f"start_id must be an id below vocab_size, not {start_id}")
        if problems:
            raise ValueError("; ".join(problems))

        self.source_length = source_length
        self.target_length = target_length
        self.start_id = start_id
        self.num_heads = num_heads
        self.checkpoint_activations = False  # True trades time for memory: a layer's inside is computed twice
        self.embedding = Embedding(vocab_size, d_model)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_decoder_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.bigram = nn.Embedding(vocab_size, vocab_size) if bigram else None
        self.dropout = Dropout(dropout)
        table = rotary_table(source_length + target_length, d_model // num_heads)
        self.rotary: Tensor
        self.register_buffer("rotary", table, persistent=False)  # computed, so not part of the weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: what writes into the residual stream or the logits starts at zero."""
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
        """Where the weights are."""
        return self.head.weight.device

    def encode(self, source: Tensor) -> Tensor:
        """Read the source.

        Args:
            source: ids, (batch, source_length); may have length 0.

        Returns:
            The memory, (batch, source_length, d_model).
        """
        x = self.dropout(self.embedding(source))
        table = self.rotary[:, : source.shape[1]]
        if source.shape[1]:
            for layer in self.encoder:
                x = self._run(layer, x, table)
        return normalize(x)

    def decode(self, memory: Tensor, text: Tensor) -> Tensor:
        """Score what comes after each token of a text, from the last of its source on.

        Args:
            memory: the result of `encode`, (batch, source_length, d_model).
            text: the result of `known`: ids, (batch, source_length + target_length - 1), or (batch, target_length)
                after an empty source.

        Returns:
            Logits in float32, (batch, target_length, vocab_size).
        """
        first = max(0, memory.shape[1] - 1)
        decoder_input = text[:, first:]
        before = min(first, _SPAN - 1)  # tokens that are embedded with the first one
        length, end = decoder_input.shape[1], memory.shape[1] + decoder_input.shape[1]
        x = self.dropout(self.embedding(text[:, first - before :])[:, before:])
        mask = causal_mask(length, end, like=x)
        for layer in self.decoder:
            x = self._run(layer, x, memory, self.rotary[:, :end], mask)
        return self.logits(x, decoder_input)

    def _run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(layer, *inputs, use_reentrant=False))
        return cast("Tensor", layer(*inputs))

    def logits(self, x: Tensor, decoder_input: Tensor) -> Tensor:
        """Decoder output (batch, n, d_model) and the tokens it stands on -> float32 (batch, n, vocab_size)."""
        logits = F.linear(normalize(x).float(), self.head.weight.float())
        return logits if self.bigram is None else logits + self.bigram(decoder_input).float()

    def set_precision(self, dtype: torch.dtype) -> Transformer:
        """Compute in this type, all but the logits: rounded to 8 bits they would cost more than they save."""
        for part in (self.embedding, self.encoder, self.decoder):
            part.to(dtype)
        self.rotary = self.rotary.to(dtype)
        return self

    def known(self, source: Tensor, target: Tensor) -> Tensor:
        """All that comes before the last target token: the source, or the start token if it is empty, and the target.

        Its last `target_length` tokens are the decoder's input: the predecessor in the text of every target token.
        """
        return torch.cat([self._or_start(source), target[:, :-1]], dim=1)

    def _or_start(self, source: Tensor) -> Tensor:
        return source if source.shape[1] else source.new_full((source.shape[0], 1), self.start_id)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: logits of every target token, given the source and the target tokens before it.

        Args:
            source: ids, (batch, up to source_length); may have length 0.
            target: ids, (batch, up to target_length).

        Returns:
            Logits in float32, (batch, target_length, vocab_size); entry i scores target token i.
        """
        return self.decode(self.encode(source), self.known(source, target))

    @torch.inference_mode()
    def stream(
        self,
        source: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Write `num_tokens` tokens after the source, one at a time, in constant memory.

        When the decoder has written `target_length` tokens, the last `source_length` tokens of the text become
        the next source. Only the last `source_length` tokens of a longer source are read. The model is left in eval
        mode.

        Args:
            source: ids, (batch, any length, 0 included).
            num_tokens: how many tokens to write.
            temperature: divides the logits; below 1 is safer, above 1 wilder, 0 always takes the likeliest.
            top_k: choose among the k likeliest tokens only.
            top_p: choose among the fewest tokens that together have this probability (after temperature).
            generator: the source of randomness; its device must be the model's.

        Yields:
            The next token of every row, (batch,).
        """
        self.eval()
        text = source[:, -self.source_length :]
        while num_tokens > 0:
            score = self._begin(text)
            recent = self._or_start(text)[:, -_SPAN:]
            written = []
            places = range(text.shape[1], text.shape[1] + min(num_tokens, self.target_length))
            # As many draws for a short text as for a long one, so that the one begins as the other.
            draws = torch.rand(
                self.target_length, len(text), generator=generator, dtype=torch.float32, device=self.device
            )
            for place, draw in zip(places, draws, strict=False):
                logits = score(recent, place)
                logits[:, self.start_id] = -math.inf  # it is never written
                token = sample(logits, draw, temperature, top_k, top_p)
                written.append(token[:, None])
                recent = torch.cat([recent, written[-1]], dim=1)[:, -_SPAN:]
                yield token
            num_tokens -= len(written)
            text = torch.cat([text, *written], dim=1)[:, -self.source_length :]

    def _begin(self, source: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Read a source; the result scores what comes after a text, of which it needs the last `_SPAN` tokens.

        These, (batch, up to _SPAN), and the last one's position are its arguments, (batch, vocab_size) what it returns.
        Positions come one after the other; every decoder layer has a key/value cache.
        """
        memory = self.encode(source)
        table = self.rotary[:, : memory.shape[1]]
        layers = [CachedLayer(layer, memory, table) for layer in cast("list[DecoderLayer]", list(self.decoder))]
        tables = torch.cat(self.embedding.tables())

        def score(recent: Tensor, place: int) -> Tensor:
            x = self.embedding.last(recent, tables)
            for layer in layers:
                if place == layer.keys.shape[1]:
                    layer.grow()
                x = layer.step(x, place, self.rotary[:, place])
            return self.logits(x, recent[:, -1])

        return score

    def generate(
        self,
        source: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """All tokens of `stream` (which see) at once: ids, (batch, num_tokens), without the source."""
        tokens = list(
            self.stream(source, num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        )
        return torch.stack(tokens, dim=1) if tokens else source[:, :0]


def sample(
    logits: Tensor, draw: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Choose one token a row; the order is top-k, temperature, top-p.

    Args:
        logits: (batch, vocab_size).
        draw: (batch,), random numbers from 0 to below 1.
        temperature, top_k, top_p: as in `Transformer.stream`.

    Returns:
        ids, (batch,).
    """
    if temperature < 1e-30:  # so small that the likeliest token is certain
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if temperature != 1:
        # The largest is taken off first, so that a tiny temperature cannot overflow; nor must a huge one be infinite.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(temperature, 1e30)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        beyond[:, 0] = False  # the likeliest token always stays, however small top_p
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), 0.0)
    # The first token at which the running sum passes the draw's share of the total. GPUs add in parallel: there the sum
    # may waver by a rounding where nothing is added, so it is taken from where something is.
    running = (probabilities.cumsum(dim=-1) * (probabilities > 0)).cummax(dim=-1).values
    chosen = torch.searchsorted(running, draw[:, None] * running[:, -1:], right=True).squeeze(1)
    return chosen.remainder(logits.shape[-1])  # the first token where the logits are not numbers
