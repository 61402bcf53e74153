"""What a window is: up to `source_length` characters that the encoder reads, and the `target_length` that follow.

Training samples windows without replacement: an epoch lays the targets end to end from a random offset, so that every
character is a target exactly once, and shuffles them. Evaluation lays them end to end in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from charseq2seq.corpus import Ids

# A batch reads its full source with this probability, else a shorter one or none, so that the model also learns to go
# on from short and empty prompts (benchmarks/LOG.md has its cost).
FULL_SOURCE_PROBABILITY = 0.8


def source_lengths(longest: int) -> list[int]:
    """The source lengths that training uses: the full one, its half, quarter, eighth, sixteenth, and none.

    They are few because each is a shape of its own: a GPU captures a graph for each (training/cuda_graph.py).
    """
    return sorted({0, *(longest >> halvings for halvings in range(5))})


def ids_on_device(ids: Ids, device: torch.device | str) -> Tensor:
    """A text's ids as a tensor, (characters,).

    PyTorch can index signed types only, so ids above 32,767 look negative: read them by `gather`, which undoes that.
    """
    signed = ids if ids.dtype == np.uint8 else ids.view(np.dtype(f"i{ids.itemsize}"))
    return torch.from_numpy(np.ascontiguousarray(signed)).to(device)


def gather(ids: Tensor, starts: Tensor, source_length: int, target_length: int) -> tuple[Tensor, Tensor]:
    """Slice windows out of a text, on its device: source (batch, source_length) and target (batch, target_length).

    Args:
        ids: what `ids_on_device` returned, (characters,).
        starts: where the targets begin, (batch,).
    """
    offsets = torch.arange(-source_length, target_length, device=ids.device)
    windows = ids[starts[:, None] + offsets].long()
    if ids.dtype == torch.int16:
        windows &= 0xFFFF  # undo the sign
    return windows[:, :source_length], windows[:, source_length:]


@dataclass
class WindowSampler:
    """Batches of windows, shuffled epoch by epoch.

    Everything is a function of the seed and of two counters, so a resumed run continues with the batch that would have
    come next.
    """

    characters: int  # of the training split
    source_length: int
    target_length: int
    batch_size: int
    seed: int
    epoch: int = 0  # in which the next batch begins
    position: int = 0  # windows of this epoch that were given
    _order: npt.NDArray[np.int64] | None = None

    def _shuffled_starts(self) -> npt.NDArray[np.int64]:
        """Where the targets of this epoch begin, in the order in which they are given."""
        generator = np.random.default_rng([self.seed, self.epoch])
        last = self.characters - self.target_length
        offset = int(generator.integers(min(self.target_length, last - self.source_length + 1)))
        return generator.permutation(np.arange(self.source_length + offset, last + 1, self.target_length))

    def next_batch(self, rank: int = 0, size: int = 1) -> tuple[Tensor, int]:
        """The next windows: where their targets begin, (batch,), int64, and their source length.

        Where `size` processes share a batch, the one called `rank` gets every `size`-th of its windows.
        """
        rows: list[npt.NDArray[np.int64]] = []
        generator = np.random.default_rng([self.seed, self.epoch, self.position])
        while (missing := self.batch_size - sum(map(len, rows))) > 0:  # a batch may reach into the next epoch
            if self._order is None:
                self._order = self._shuffled_starts()
            rows.append(self._order[self.position : self.position + missing])
            self.position += len(rows[-1])
            if self.position >= len(self._order):
                self.epoch, self.position, self._order = self.epoch + 1, 0, None
        *shorter, length = source_lengths(self.source_length)
        if generator.random() >= FULL_SOURCE_PROBABILITY:
            length = shorter[int(generator.integers(len(shorter)))]
        return torch.from_numpy(np.concatenate(rows)[rank::size]), length


def tile(
    first: int, last: int, source_length: int, target_length: int, batch_size: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Windows whose targets cover `first` to `last` (exclusive) once; those of one shape share a batch.

    Yields:
        Where the targets begin, (up to batch_size,), int64; their source length, shorter at the beginning of a text;
        their target length, shorter at the end.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for start in range(first, last, target_length):
        shape = (min(start, source_length), min(last - start, target_length))
        shapes.setdefault(shape, []).append(start)
    for shape, starts in shapes.items():
        for i in range(0, len(starts), batch_size):
            yield torch.tensor(starts[i : i + batch_size]), *shape
