"""A text file -> ids, split, and windows.

The split is contiguous: the first 90 % of the characters train, the last 10 % validate. Training draws windows of
`source_length + target_length` characters without replacement: one pass lays windows end to end from a random
offset, so that every character is a target exactly once, and shuffles them.
"""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_SHARE = 0.9

# A batch reads its full source with this probability, else any length from none to full, so that the model also
# learns to go on from short and empty prompts (its price is in benchmarks/LOG.md).
FULL_SOURCE_SHARE = 0.8

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TextFile:
    """A text as it was read: its characters, and the name and sha256 of the file they came from."""

    name: str
    text: str
    sha256: str


def read_text(path: Path) -> TextFile:
    """Read a UTF-8 text; a byte order mark is dropped and CRLF becomes LF.

    Raises:
        SuiteError: missing, not a file, unreadable, empty, not UTF-8 (with the offset of the first wrong byte), or
            with NUL bytes.
    """
    try:
        if not path.exists():
            raise SuiteError(f"the text {path} does not exist; check --data_path.", ExitCode.NO_INPUT)
        if not path.is_file():
            kind = "folder" if path.is_dir() else "pipe or device"
            raise SuiteError(f"{path} is a {kind}, not a text file; name a file with --data_path.", ExitCode.NO_INPUT)
        raw = path.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"the text {path} cannot be read ({error.strerror}); check its permissions.", ExitCode.NO_INPUT
        ) from error
    text = _decode(path, raw)
    if not text:
        raise SuiteError(f"the text {path} is empty; give one with some thousands of characters.", ExitCode.BAD_DATA)
    return TextFile(path.name, text, hashlib.sha256(raw).hexdigest())


def _decode(path: Path, raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SuiteError(
            f"the text {path} is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8).", ExitCode.BAD_DATA
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset counts a byte order mark, as an editor would.
        offset = error.start + (len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0)
        raise SuiteError(
            f"the text {path} is not UTF-8: byte 0x{raw[offset]:02X} at offset {offset:,}; "
            "convert it (iconv -f LATIN1 -t UTF-8, say).",
            ExitCode.BAD_DATA,
        ) from error
    if "\0" in text:
        raise SuiteError(
            f"the text {path} has a NUL byte at offset {raw.index(0):,}: it is binary or UTF-16; give plain UTF-8.",
            ExitCode.BAD_DATA,
        )
    return text.replace("\r\n", "\n")


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
        SuiteError: the text cannot be read (see `read_text`), or is too short or too uniform to train on.
    """
    file = read_text(path)
    vocabulary = CharVocabulary.from_text(file.text)
    num_train = int(len(file.text) * TRAIN_SHARE)
    if num_train < 2 * window:
        needed = int(2 * window / TRAIN_SHARE) + 2
        raise SuiteError(
            f"the text {path} has {len(file.text):,} characters, training with these windows needs at least "
            f"{needed:,}; give a longer text or a smaller --source_length and --target_length.",
            ExitCode.BAD_DATA,
        )
    if len(vocabulary.characters) < 2:
        raise SuiteError(
            f"the text {path} consists of one character repeated; there is nothing to learn.", ExitCode.BAD_DATA
        )
    return Corpus(file.name, file.sha256, vocabulary, vocabulary.encode(file.text), num_train)


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

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next windows: source ids (batch, 0 to source_length) and target ids (batch, target_length), int64."""
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
        starts = np.concatenate(rows)
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
