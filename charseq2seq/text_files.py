"""Text as it lies on disk -> its characters, a piece at a time.

A text is a file, a folder of text files or a glob pattern of them, plain or compressed; in any case it is read in
small pieces, so that a text of many gigabytes takes no more memory than a small one. What the pieces are when joined
depends on the files only: UTF-8, without byte order marks, CRLF as LF, several files in the order of their names, as
`cat` joins them.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from charseq2seq.errors import ExitCode, SuiteError

_PIECE = 1 << 17  # bytes: fits into a core's cache, and most pieces of a Western text are pure ASCII, which is faster

_COMPRESSED = (".gz", ".bz2", ".xz")
_IDS = re.compile(r"\.[0-9a-f]{16}\.ids\.npy")  # what `corpus` leaves beside a large text
_IN_FOLDERS = (".txt", *(f".txt{suffix}" for suffix in _COMPRESSED))


@dataclass(frozen=True)
class Text:
    """A text that was read through once.

    Attributes:
        path: what the user named.
        files: the files that it consists of, in order.
        sha256: of the files' bytes, decompressed and joined; of a plain file, what sha256sum prints.
        characters: how many.
        alphabet: the distinct ones, in order of code point.
    """

    path: Path
    files: tuple[Path, ...]
    sha256: str
    characters: int
    alphabet: str

    @property
    def name(self) -> str:
        """What a model says that it was trained on: no path of a person's machine."""
        return self.path.name or self.path.resolve().name

    def pieces(self) -> Iterator[str]:
        """The text once more, a piece at a time.

        Raises:
            SuiteError: it has changed since, or can no longer be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            yield from _pieces_of(file, digest)
        if digest.hexdigest() != self.sha256:
            raise SuiteError(
                f"the text {self.path} changed while it was read; run again when it is complete.", ExitCode.BAD_DATA
            )


def read_through(path: Path) -> Text:
    """Read a text once, for its hash and its alphabet.

    Args:
        path: a file, a folder (every *.txt in it and below, compressed ones too) or a glob pattern.

    Raises:
        SuiteError: missing, not a file, unreadable, empty, damaged, not UTF-8 (with the offset of the first wrong
            byte), or with NUL bytes.
    """
    files = find_files(path)
    digest, characters, alphabet = hashlib.sha256(), 0, set[str]()
    known = b""  # the ASCII characters met so far; what is left of a piece without them is new or not ASCII
    for file in files:
        for piece in _pieces_of(file, digest):
            characters += len(piece)
            if left := piece.encode().translate(None, known):
                alphabet.update(left.decode())
                known = "".join(filter(str.isascii, alphabet)).encode()
    if not characters:
        raise SuiteError(f"the text {path} is empty; give one with some thousands of characters.", ExitCode.BAD_DATA)
    return Text(path, files, digest.hexdigest(), characters, "".join(sorted(alphabet)))


def find_files(path: Path) -> tuple[Path, ...]:
    """The files of a text, in the order of their names.

    Raises:
        SuiteError: there are none, or what is there is no file.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if not path.exists():
            found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []  # noqa: PTH207
            if not (files := tuple(file for file in map(Path, found) if file.is_file() and not _IDS.search(file.name))):
                raise SuiteError(f"the text {path} does not exist; check --data_path.", ExitCode.NO_INPUT)
            return files
        if not path.is_file():
            raise SuiteError(
                f"{path} is a pipe or device, not a text file; name a file with --data_path.", ExitCode.NO_INPUT
            )
    except OSError as error:
        raise _unreadable(path, error) from error
    return (path,)


def _in_folder(folder: Path) -> tuple[Path, ...]:
    inside = (file.relative_to(folder) for file in folder.rglob("*") if file.name.endswith(_IN_FOLDERS))
    visible = (name for name in inside if not any(part.startswith(".") for part in name.parts))
    files = tuple(folder / name for name in sorted(visible, key=Path.as_posix) if (folder / name).is_file())
    if not files:
        raise SuiteError(
            f"the folder {folder} holds no text ({', '.join('*' + suffix for suffix in _IN_FOLDERS)}); name another, "
            "or a file, with --data_path.",
            ExitCode.NO_INPUT,
        )
    return files


def _pieces_of(path: Path, digest: Any) -> Iterator[str]:
    """The characters of one file; its bytes go into the digest."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held = 0, ""
    for raw in _bytes_of(path):
        digest.update(raw)
        if not offset and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _no_text(path, "is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8).")
        begun = len(decoder.getstate()[0])  # bytes of a character that the last piece cut in two
        try:
            piece = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise _no_text(
                path,
                f"is not UTF-8: byte 0x{error.object[error.start]:02X} at offset {offset - begun + error.start:,}; "
                "convert it (iconv -f LATIN1 -t UTF-8, say).",
            ) from error
        if (nul := piece.find("\0")) >= 0:
            place = offset - begun + len(piece[:nul].encode())
            raise _no_text(path, f"has a NUL byte at offset {place:,}: it is binary or UTF-16; give plain UTF-8.")
        if not offset:
            piece = piece.removeprefix("\ufeff")
        offset += len(raw)
        piece = held + piece
        held = "\r" if raw and piece.endswith("\r") else ""  # its LF may come with the next piece
        yield piece.removesuffix(held).replace("\r\n", "\n") if "\r" in piece else piece  # most have none


def _bytes_of(path: Path) -> Iterator[bytes]:
    """The bytes of one file, decompressed; an empty piece ends them."""
    import lzma
    import zlib

    try:
        with _opener(path)(path, "rb") as file:
            while raw := file.read(_PIECE):
                yield raw
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise _no_text(path, f"is damaged or not what its name says ({error}); get it again.") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 complain of wrong content in this way
            raise _no_text(path, f"is damaged or not what its name says ({error}); get it again.") from error
        raise _unreadable(path, error) from error
    yield b""


def _opener(path: Path) -> Callable[[Path, str], IO[bytes]]:
    import bz2
    import gzip
    import lzma

    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener: Callable[[Path, str], IO[bytes]] = openers.get(path.suffix, Path.open)
    return opener


def _no_text(path: Path, what: str) -> SuiteError:
    return SuiteError(f"the text {path} {what}", ExitCode.BAD_DATA)


def _unreadable(path: Path, error: OSError) -> SuiteError:
    return SuiteError(f"the text {path} cannot be read ({error.strerror}); check its permissions.", ExitCode.NO_INPUT)
