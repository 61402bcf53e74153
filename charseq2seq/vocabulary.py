"""Characters <-> ids.

A vocabulary is the special token `<start>`, from which the decoder starts when the source is empty, and every distinct
character of a text, sorted by code point. A character is a Unicode code point: an emoji with a skin tone is two.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from charseq2seq.errors import ExitCode, SuiteError

START_TOKEN = "<start>"
START_ID = 0

_NUM_CODE_POINTS = 0x110000


class CharVocabulary:
    """A fixed, ordered set of characters; the id of `characters[i]` is `i + 1`, that of `<start>` is 0.

    Args:
        characters: distinct single characters in ascending order of code point.

    Raises:
        SuiteError: the characters are not distinct, not single, not ascending, or there are none.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = tuple(characters)
        if not self.characters:
            raise SuiteError("the vocabulary is empty: it needs at least one character.", ExitCode.BAD_DATA)
        if not all(isinstance(c, str) and len(c) == 1 for c in self.characters):
            raise SuiteError("the vocabulary holds an entry that is not a single character.", ExitCode.BAD_DATA)
        if any(a >= b for a, b in zip(self.characters, self.characters[1:], strict=False)):
            raise SuiteError("the vocabulary's characters are not distinct and sorted.", ExitCode.BAD_DATA)
        code_points = np.array([ord(c) for c in self.characters], dtype=np.int64)
        # Unknown characters get the start token's id, which no character has. Untouched pages of zeros cost no memory.
        self._id_of_code_point = np.zeros(_NUM_CODE_POINTS, dtype=np.min_scalar_type(len(self.characters)))
        self._id_of_code_point[code_points] = np.arange(1, len(self.characters) + 1)
        # Latin-1 comes first, so its ids fit into a byte; `bytes.translate` is the fastest lookup.
        self._latin1 = self._id_of_code_point[:256].astype(np.uint8).tobytes()

    @classmethod
    def from_text(cls, text: str) -> CharVocabulary:
        """The vocabulary of a text."""
        present = np.zeros(_NUM_CODE_POINTS, dtype=bool)
        present[code_points_of(text)] = True
        return cls(chr(i) for i in np.flatnonzero(present))

    def __len__(self) -> int:
        """Number of ids, the start token included: the model's `vocab_size`."""
        return len(self.characters) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharVocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, (characters,).

        Raises:
            SuiteError: the text has characters that the vocabulary lacks; the message lists them all.
        """
        ids = self._lookup(text).astype(np.int32)
        if not ids.all():
            missing = self.unknown_characters(text)
            raise SuiteError(
                f"{len(missing)} character{'s' * (len(missing) != 1)} not in the vocabulary: "
                + ", ".join(describe_character(c) for c in missing),
                ExitCode.BAD_DATA,
            )
        return ids

    def encode_known(self, text: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids of a text without the characters that the vocabulary lacks; fast where the text is Latin-1."""
        try:
            return np.frombuffer(text.encode("latin-1").translate(self._latin1).replace(b"\0", b""), dtype=np.uint8)
        except UnicodeEncodeError:
            ids = self._lookup(text)
            return ids if ids.all() else ids[ids != START_ID]

    def unknown_characters(self, text: str) -> list[str]:
        """The distinct characters of `text` that the vocabulary lacks, in order of code point."""
        points = code_points_of(text)
        return [chr(i) for i in np.unique(points[self._lookup(text) == START_ID])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without start tokens."""
        return "".join(self.characters[i - 1] for i in ids if i != START_ID)

    def index_of_token(self) -> dict[str, int]:
        """The content of vocab.json: token -> index."""
        return {START_TOKEN: START_ID} | {c: i for i, c in enumerate(self.characters, start=1)}

    def token_of_index(self) -> dict[str, str]:
        """The content of idx_to_vocab.json: index -> token; JSON's keys are strings."""
        return {str(i): token for token, i in self.index_of_token().items()}

    @classmethod
    def from_index_of_token(cls, index_of_token: Any) -> CharVocabulary:
        """The vocabulary of a parsed vocab.json.

        Raises:
            SuiteError: it is not one that this suite wrote.
        """
        if not isinstance(index_of_token, Mapping):
            raise SuiteError("the vocabulary is not a table from tokens to indices.", ExitCode.BAD_DATA)
        vocabulary = cls(token for token in index_of_token if token != START_TOKEN)
        whole = all(type(index) is int for index in index_of_token.values())  # True and 1.0 are equal to 1
        if not whole or vocabulary.index_of_token() != index_of_token:
            raise SuiteError("the vocabulary's indices are not 0, 1, 2, … in order.", ExitCode.BAD_DATA)
        return vocabulary

    def _lookup(self, text: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        ids: npt.NDArray[np.unsignedinteger[Any]] = self._id_of_code_point[code_points_of(text)]
        return ids


def code_points_of(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text, (characters,); lone surrogates, which JSON can carry, pass through."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def describe_character(character: str) -> str:
    """A character with its code point and name: `'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)`."""
    name = unicodedata.name(character, unicodedata.category(character))
    return f"{ascii(character) if not character.isprintable() else repr(character)} (U+{ord(character):04X} {name})"


def vocabulary_files(vocabulary: CharVocabulary) -> dict[str, str]:
    """The two JSON files of a repository, name -> text; ASCII, so that no tool can garble them."""
    return {
        "vocab.json": json.dumps(vocabulary.index_of_token(), indent=2) + "\n",
        "idx_to_vocab.json": json.dumps(vocabulary.token_of_index(), indent=2) + "\n",
    }
