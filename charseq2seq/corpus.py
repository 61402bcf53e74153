"""A text on disk -> ids, and its contiguous split.

A text is a file, a folder of text files or a glob pattern of them, plain or compressed. What is read depends on the
files only: UTF-8 without byte order marks, CRLF and CR as LF, several files in the order of their names, with a line
end between any two.

The last 10 % of the characters, but at most a million, are the validation split; the others train.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import itertools
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.text_encoding import decode
from charseq2seq.vocabulary import CharVocabulary

TRAIN_FRACTION = 0.9
LONGEST_VALIDATION = 1_000_000  # characters: half a minute on two cores, and exact to some thousandths

# A text is kept in pieces of so many bytes: most pieces of a Western text are ASCII, which Python keeps in one byte a
# character, where a single emoji would quadruple the memory of a string that holds the whole text.
_PIECE = 1 << 17

_IN_FOLDERS = (".txt", ".txt.gz", ".txt.bz2", ".txt.xz")

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Text:
    """A text in memory."""

    name: str  # of the file or folder, not its path: a model records it
    sha256: str  # of the files' bytes, decompressed and joined; for a plain file, what sha256sum prints
    alphabet: str  # its distinct characters, in order of code point
    pieces: list[str]  # its characters; joined, they are the text

    @property
    def characters(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class Corpus:
    """A text as ids, and where training ends and validation begins."""

    name: str
    sha256: str
    vocabulary: CharVocabulary
    ids: Ids  # (characters,), of the smallest unsigned type that holds them
    num_train: int  # the first so many characters train, the others validate

    @property
    def train_ids(self) -> Ids:
        """The training split, (num_train,)."""
        return self.ids[: self.num_train]

    @property
    def beginning(self) -> str:
        """The text's first line that is not blank, at most forty characters of it."""
        line = self.vocabulary.decode(self.ids[:1000].tolist()).strip().partition("\n")[0]
        return line if len(line) <= 40 else line[:40].rpartition(" ")[0] or line[:40]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint records of the text it was trained on."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "characters": len(self.ids),
            "distinct_characters": len(self.vocabulary.characters),
            "train_characters": self.num_train,
            "validation_characters": len(self.ids) - self.num_train,
        }


def load_corpus(path: Path, window: int, encoding: str | None = None) -> Corpus:
    """The ids of a text, see `read_text`; one with less than two windows to train on, or one letter, is refused."""
    text = read_text(path, encoding)
    vocabulary = CharVocabulary(text.alphabet)
    num_train = max(int(text.characters * TRAIN_FRACTION), text.characters - LONGEST_VALIDATION)
    if num_train < 2 * window:
        needed = int(2 * window / TRAIN_FRACTION) + 2
        problem = f"has {text.characters:,} characters, training with these windows needs at least {needed:,}"
        raise _refusal(path, f"{problem}; give a longer text or a smaller --source_length and --target_length.")
    if len(text.alphabet) < 2:
        raise _refusal(path, "consists of one character repeated; there is nothing to learn.")
    corpus = Corpus(text.name, text.sha256, vocabulary, vocabulary.encode_pieces(text.pieces), num_train)
    if _end_differs(text, corpus):
        log(
            f"note: {text.name} is sorted, or its end is unlike its beginning; the end validates the model, so shuffle "
            "its lines or files, or the loss says little."
        )
    return corpus


def _end_differs(text: Text, corpus: Corpus) -> bool:
    """Whether a text is sorted, or its validation split has characters of other frequencies than the rest."""
    lines = "".join(text.pieces[-2:]).casefold().split("\n")
    pairs = [(line, following) for line, following in itertools.pairwise(lines) if line != following]
    if len(pairs) > 20 and sum(line < following for line, following in pairs) > 0.9 * len(pairs):
        return True
    validation = corpus.ids[corpus.num_train :]
    sample = corpus.train_ids[:: max(1, corpus.num_train // LONGEST_VALIDATION)]
    frequencies = [np.bincount(ids, minlength=len(corpus.vocabulary)) / len(ids) for ids in (sample, validation)]
    # Jensen-Shannon divergence in nats: 0.001 to 0.006 for plays, programs and prose; few characters vary more.
    mean = np.maximum(sum(frequencies) / 2, 1e-12)
    divergence = sum(float((one * np.log(np.maximum(one, 1e-12) / mean)).sum()) for one in frequencies) / 2
    return divergence > 0.04 + len(corpus.vocabulary) / (4 * len(validation))


def read_text(path: Path, encoding: str | None = None) -> Text:
    """Read a text; a SuiteError if it is missing, unreadable, empty, damaged, or not in this encoding.

    Args:
        path: a file, a folder (every *.txt in it and below, compressed ones too) or a glob pattern.
        encoding: of its files, see `decode`.
    """
    digest = hashlib.sha256()
    pieces: list[str] = []
    try:
        for file in find_files(path):
            if pieces and not pieces[-1].endswith("\n"):
                pieces.append("\n")
                digest.update(b"\n")
            pieces += filter(None, decode(_bytes_of(file, digest), f"the text {file}", encoding))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            problem = f"cannot be read ({error.strerror}); check its permissions."
            raise _refusal(error.filename or path, problem, ExitCode.NO_INPUT) from error
        # gzip and bz2 report damage without a number
        raise _refusal(file, f"is damaged or not what its name says ({error}); get it again.") from error
    alphabet: set[str] = set()
    ascii_so_far = b""  # deleting known ASCII characters from a piece is much faster than a set of all its characters
    for piece in pieces:
        if new := piece.encode().translate(None, ascii_so_far):
            alphabet.update(new.decode())
            ascii_so_far = "".join(filter(str.isascii, alphabet)).encode()
    if not alphabet:
        raise _refusal(path, "is empty; give one with some thousands of characters.")
    return Text(path.name or path.resolve().name, digest.hexdigest(), "".join(sorted(alphabet)), pieces)


def find_files(path: Path) -> list[Path]:
    """The files of a text, in the order of their names; a SuiteError if there are none."""
    if path.is_dir():
        names = sorted(f"/{file.relative_to(path).as_posix()}" for file in path.rglob("*.*"))
        found = [path / name[1:] for name in names if name.lower().endswith(_IN_FOLDERS) and "/." not in name]
        problem = f"is a folder that holds none ({', '.join('*' + suffix for suffix in _IN_FOLDERS)}); name another, "
        problem += f'or a pattern, --data_path "{path}/**/*.py", say.'
    elif path.exists():
        found, problem = [path], "is a pipe or device, not a text file; name a file with --data_path."
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        problem = "does not exist; check --data_path."
    files = [file for file in found if file.is_file()]
    if not files:
        raise _refusal(path, problem, ExitCode.NO_INPUT)
    return files


def _bytes_of(path: Path, digest: Any) -> Iterator[bytes]:
    """The bytes of one file, decompressed, which also go into the digest; an empty piece ends them."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(path.suffix.lower(), Path.open)(path, "rb") as file:
        while raw := file.read(_PIECE):
            digest.update(raw)
            yield raw
    yield b""


def _refusal(path: Path | str, problem: str, exit_code: ExitCode = ExitCode.BAD_DATA) -> SuiteError:
    return SuiteError(f"the text {path} {problem}", exit_code)
