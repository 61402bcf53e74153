"""The bytes of a text or prompt -> its characters; a refusal says what is not plain UTF-8, and what to do about it."""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator

from charseq2seq.errors import ExitCode, SuiteError

# Byte order marks; that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# The first bytes of files that hold a text, but are not plain text.
_KINDS = {
    b"PK\3\4": "a zip archive (.docx, .odt and .epub are such archives too)",
    b"%PDF-": "a PDF file",
    b"{\\rtf": "an RTF document",
    b"\x1f\x8b": "compressed by gzip, which its name must say (.gz)",
    b"BZh": "compressed by bzip2, which its name must say (.bz2)",
    b"\xfd7zXZ\0": "compressed by xz, which its name must say (.xz)",
}


def known_encoding(name: str) -> str:
    """The name; a ValueError if Python knows no encoding of texts by it."""
    try:
        b"".decode(name)
    except (LookupError, ValueError) as error:
        raise ValueError("an encoding that Python knows, such as gb18030 or cp1252") from error
    return name


def decode(pieces: Iterable[bytes], what: str, encoding: str | None = None) -> Iterator[str]:
    """The characters of a file, every line with LF at its end.

    A SuiteError says that it is no text, or where it is not in this encoding, and in which one it probably is.

    Args:
        pieces: its bytes; an empty piece ends them.
        what: what a refusal calls it.
        encoding: None: UTF-8, or UTF-16 and UTF-32 with a byte order mark.
    """
    pieces = iter(pieces)
    first = next(pieces)
    if kind := next((kind for begin, kind in _KINDS.items() if first.startswith(begin)), ""):
        raise SuiteError(f"{what} is {kind}; save its text as plain text (UTF-8) and give that.", ExitCode.BAD_DATA)
    encoding = encoding or next((name for mark, name in _MARKS.items() if first.startswith(mark)), "utf-8")
    in_bytes = codecs.getincrementaldecoder(encoding)()
    decoder = io.IncrementalNewlineDecoder(in_bytes, translate=True)
    offset, sample, problem = 0, b"", ""
    for raw in itertools.chain([first], pieces):
        sample = raw or sample
        split = len(in_bytes.getstate()[0])  # bytes of a character that began in the last piece
        try:
            piece = decoder.decode(raw, final=not raw)
            if "\0" in piece:
                problem = f"has a NUL byte at offset {offset + raw.find(0):,}"
        except UnicodeError as error:
            where = str(error)  # of UTF-16 and UTF-32 without the mark that says which half comes first
            if isinstance(error, UnicodeDecodeError):
                where = f"byte 0x{error.object[error.start]:02X} at offset {offset - split + error.start:,}"
            problem = f"is not {encoding.upper()}: {where}"
        if problem:
            raise SuiteError(f"{what} {problem}; {_advice(sample)}", ExitCode.BAD_DATA)
        yield piece if offset else piece.removeprefix("\ufeff")
        offset += len(raw)


def _advice(sample: bytes) -> str:
    """The likely encoding of bytes that are not UTF-8, and what to do about it."""
    from charset_normalizer import from_bytes

    read = sample.decode(errors="replace")
    wrong = read.count("\ufffd")
    if 0 < wrong < sum(not character.isascii() for character in read) - wrong:
        return "the rest is UTF-8, so it is damaged; `iconv -c -f UTF-8 -t UTF-8` leaves out what is."
    if b"\0" not in sample:  # whole lines that have other than ASCII
        lines = sample.splitlines(keepends=True)
        sample = b"".join(line for line in lines[:-1] or lines if not line.isascii()) or sample
    matches = from_bytes(sample) or from_bytes(sample, threshold=0.5)
    # Western texts look like Central European ones to it: both are shown, where they differ.
    found = [one for match in matches for one in ("cp1252", match.encoding) if one in match.could_be_from_charset]
    likely = dict.fromkeys([*found[:1], *(name for name in found if name == "cp1252")])
    if not likely or (b"\0" in sample and not found[0].startswith(("utf_16", "utf_32"))):
        return "it is binary, or in a rare encoding: give plain text (UTF-8), or name its encoding with --encoding."
    shown = " or ".join(f"{name}, where it reads {_excerpt(sample.decode(name, errors='replace'))}" for name in likely)
    return f"most likely it is {shown}; give {' or '.join(f'--encoding {name}' for name in likely)}."


def _excerpt(text: str) -> str:
    """Some words around the first character that is not ASCII."""
    at = next((at for at, character in enumerate(text) if not character.isascii()), 0)
    return repr(" ".join(text[max(0, at - 12) : at + 18].split()))
