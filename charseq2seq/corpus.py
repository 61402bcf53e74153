"""A text -> ids, split, and windows.

Ids have the smallest unsigned type that holds them. Those of a large text lie in a file beside it and are mapped into
memory, so that a text may be larger than the memory; the file's name has the text's hash, and the next run finds it.

The split is contiguous: the last 10 % of the characters, but no more than a million, validate, the others train.
Training draws windows of `source_length + target_length` characters without replacement: one pass lays windows end to
end from a random offset, so that every character is a target exactly once, and shuffles them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write
from charseq2seq.text_files import Text, read_through
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_SHARE = 0.9
LONGEST_VALIDATION = 1_000_000  # characters: half a minute on two cores, and exact to some thousandths

# A batch reads its full source with this probability, else any length from none to full, so that the model also
# learns to go on from short and empty prompts (its price is in benchmarks/LOG.md).
FULL_SOURCE_SHARE = 0.8

# Ids of so many bytes are made anew by every run: that takes less than half a second.
_LARGE = 64 << 20

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Corpus:
    """A text as ids, and where training ends and validation begins.

    Attributes:
        ids: (characters,).
        num_train: the first so many characters train, the others validate.
    """

    name: str
    sha256: str
    vocabulary: CharVocabulary
    ids: Ids
    num_train: int

    @property
    def train_ids(self) -> Ids:
        """The training split, (num_train,)."""
        return self.ids[: self.num_train]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the text it was trained on."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "characters": len(self.ids),
            "distinct_characters": len(self.vocabulary.characters),
            "train_characters": self.num_train,
            "validation_characters": len(self.ids) - self.num_train,
        }


def load_corpus(path: Path, window: int) -> Corpus:
    """Read a text and turn it into ids.

    Args:
        path: a UTF-8 text.
        window: the length of a training window in characters; both splits must have something to give.

    Raises:
        SuiteError: the text cannot be read (see `read_through`), or is too short or too uniform to train on, or the
            file for its ids cannot be written.
    """
    text = read_through(path)
    vocabulary = CharVocabulary(text.alphabet)
    num_train = max(int(text.characters * TRAIN_SHARE), text.characters - LONGEST_VALIDATION)
    if num_train < 2 * window:
        needed = int(2 * window / TRAIN_SHARE) + 2
        raise SuiteError(
            f"the text {path} has {text.characters:,} characters, training with these windows needs at least "
            f"{needed:,}; give a longer text or a smaller --source_length and --target_length.",
            ExitCode.BAD_DATA,
        )
    if len(vocabulary.characters) < 2:
        raise SuiteError(
            f"the text {path} consists of one character repeated; there is nothing to learn.", ExitCode.BAD_DATA
        )
    return Corpus(text.name, text.sha256, vocabulary, encode(text, vocabulary), num_train)


def encode(text: Text, vocabulary: CharVocabulary) -> Ids:
    """The ids of a text, (characters,), without the characters that the vocabulary lacks."""
    dtype = np.min_scalar_type(len(vocabulary) - 1)
    pieces = (vocabulary.encode_known(piece).astype(dtype, copy=False) for piece in text.pieces())
    if text.characters * dtype.itemsize <= _LARGE or text.alphabet != "".join(vocabulary.characters):
        return np.concatenate(list(pieces))
    path = cache_path(text)
    if (ids := _cached(path, text, vocabulary)) is None:
        log(f"ids: writing {path} ({text.characters * dtype.itemsize / 2**20:,.0f} MiB), for later runs too")
        _write_cache(path, pieces, np.zeros(0, dtype), text.characters)
        ids = np.load(path, mmap_mode="r")
    return ids


def cache_path(text: Text) -> Path:
    """Where the ids of a large text lie: beside it, under its hash."""
    folder = text.path.parent if text.path.exists() else text.files[0].parent  # the latter for a pattern
    name = re.sub(r"[^\w.-]", "_", text.path.resolve().name)
    return folder / f"{name}.{text.sha256[:16]}.ids.npy"


def _cached(path: Path, text: Text, vocabulary: CharVocabulary) -> Ids | None:
    """The ids that an earlier run left, or None where there are none or they are damaged."""
    try:
        ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = ids.shape == (text.characters,) and ids.dtype == np.min_scalar_type(len(vocabulary) - 1)
    return ids if fits and 0 < ids.min() <= ids.max() < len(vocabulary) else None


def _write_cache(path: Path, pieces: Iterator[Ids], like: Ids, length: int) -> None:
    """Write ids as numpy does, a piece at a time; those of an earlier state of the text go."""
    header = np.lib.format.header_data_from_array_1_0(like) | {"shape": (length,)}
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(piece.tobytes())
    name = path.name[: -len("0123456789abcdef.ids.npy")]
    for other in path.parent.iterdir():
        if other != path and re.fullmatch(re.escape(name) + r"[0-9a-f]{16}\.ids\.npy", other.name):
            other.unlink(missing_ok=True)


class WindowSampler:
    """Batches of (source, target) windows, shuffled pass by pass.

    Everything is a function of the seed and of two counters, `epoch` and `position`, so that a resumed run
    continues with exactly the batch that would have come next.

    Args:
        ids: the training split.
        batch_size: windows a batch.
        seed: of the order, the offsets and the source lengths.
    """

    def __init__(self, ids: Ids, source_length: int, target_length: int, batch_size: int, seed: int) -> None:
        self.ids = ids
        self.source_length = source_length
        self.target_length = target_length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.position = 0  # windows of this epoch already given
        self._order: npt.NDArray[np.int64] | None = None

    def _shuffled_starts(self) -> npt.NDArray[np.int64]:
        """First characters of this epoch's windows, in the order in which they are given."""
        generator = np.random.default_rng([self.seed, self.epoch])
        window = self.source_length + self.target_length
        offset = int(generator.integers(min(self.target_length, len(self.ids) - window + 1)))
        return generator.permutation(np.arange(offset, len(self.ids) - window + 1, self.target_length))

    def next_batch(self, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
        """The next windows: source ids (batch, 0 to source_length) and target ids (batch, target_length), int64.

        Where `size` processes share a batch, the one called `rank` gets every `size`-th of its windows.
        """
        import torch

        rows: list[npt.NDArray[np.int64]] = []
        generator = np.random.default_rng([self.seed, self.epoch, self.position])
        while (missing := self.batch_size - sum(map(len, rows))) > 0:  # a batch may reach into the next epoch
            if self._order is None:
                self._order = self._shuffled_starts()
            rows.append(self._order[self.position : self.position + missing])
            self.position += len(rows[-1])
            if self.position >= len(self._order):
                self.epoch, self.position, self._order = self.epoch + 1, 0, None
        starts = np.concatenate(rows)[rank::size]
        windows = self.ids[starts[:, None] + np.arange(self.source_length + self.target_length)]
        length = self.source_length
        if generator.random() >= FULL_SOURCE_SHARE:
            length = int(generator.integers(self.source_length + 1))
        tensor = torch.from_numpy(windows.astype(np.int64))
        source = tensor[:, self.source_length - length : self.source_length]
        return source, tensor[:, self.source_length :]

    def state(self) -> dict[str, int]:
        """Where the sampler stands; plain numbers."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Stand where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = None
