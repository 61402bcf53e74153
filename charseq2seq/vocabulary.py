"""Characters <-> ids.

A vocabulary is the special token `<start>`, from which the decoder starts when the source is empty, and every distinct
character of a text, sorted by code point. A character is a Unicode code point: an emoji with a skin tone is two.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError

START_TOKEN = "<start>"
START_ID = 0


class CharVocabulary:
    """A fixed set of characters, in the order of their code points: `characters[i]` has id `i + 1`, `<start>` has 0."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = tuple(characters)
        single = all(isinstance(character, str) and len(character) == 1 for character in self.characters)
        if not self.characters or not single or list(self.characters) != sorted(set(self.characters)):
            raise SuiteError("the vocabulary is not a sorted set of single characters.", ExitCode.BAD_DATA)
        # Unknown characters get the start token's id, which no character has. Untouched pages of zeros cost no memory.
        self._id_of_code_point = np.zeros(0x110000, dtype=np.min_scalar_type(len(self.characters)))
        self._id_of_code_point[[ord(c) for c in self.characters]] = np.arange(1, len(self.characters) + 1)

    def __len__(self) -> int:
        """Number of ids, the start token included: the model's `vocab_size`."""
        return len(self.characters) + 1

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, (characters,); a SuiteError names the characters that the vocabulary lacks."""
        if missing := self.unknown_characters(text):
            problem = f"the text has {describe_unknown(missing)}; leave them out or add --unknown skip."
            raise SuiteError(problem, ExitCode.BAD_DATA)
        return self._lookup(text).astype(np.int32)

    def encode_pieces(self, pieces: list[str]) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The ids of a text in pieces, of the smallest type, without the characters that the vocabulary lacks."""
        return np.concatenate([ids[ids != START_ID] for ids in map(self._lookup, pieces)])

    def unknown_characters(self, text: Iterable[str]) -> list[str]:
        """The distinct characters of `text` that the vocabulary lacks, in order of code point."""
        return sorted(set(text).difference(self.characters))

    def in_known_form(self, pieces: list[str], name: str) -> list[str]:
        """A text in the normal form of Unicode that leaves the fewest characters unknown; the log says if it changed.

        A keyboard may write é as one character where the vocabulary has e and an accent, or the reverse.
        """
        forms = {"": pieces}
        if self.unknown_characters(set().union(*pieces)):
            forms |= {form: [unicodedata.normalize(form, piece) for piece in pieces] for form in ("NFC", "NFD")}
        best = min(forms, key=lambda form: len(self.unknown_characters(set().union(*forms[form]))))
        if best:
            log(f"note: {name} is read in the normal form {best} of Unicode, as the model's text was.")
        return forms[best]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without start tokens."""
        return "".join(self.characters[i - 1] for i in ids if i != START_ID)

    def index_of_token(self) -> dict[str, int]:
        """The content of vocab.json: token -> index."""
        return {START_TOKEN: START_ID} | {c: i for i, c in enumerate(self.characters, start=1)}

    @classmethod
    def from_index_of_token(cls, index_of_token: Any) -> CharVocabulary:
        """The vocabulary of a parsed vocab.json; a SuiteError if it is not one that this suite wrote."""
        if not isinstance(index_of_token, dict):
            raise SuiteError("the vocabulary is not a table from tokens to indices.", ExitCode.BAD_DATA)
        vocabulary = cls(token for token in index_of_token if token != START_TOKEN)
        whole = all(type(index) is int for index in index_of_token.values())  # True and 1.0 are equal to 1
        if not whole or vocabulary.index_of_token() != index_of_token:
            raise SuiteError("the vocabulary's indices are not 0, 1, 2, … in order.", ExitCode.BAD_DATA)
        return vocabulary

    def _lookup(self, text: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        # Lone surrogates, which JSON can carry, pass through.
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        return self._id_of_code_point[code_points]


def describe_character(character: str) -> str:
    """A character with its code point and name: `'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)`."""
    name = unicodedata.name(character, unicodedata.category(character))
    return f"{ascii(character) if not character.isprintable() else repr(character)} (U+{ord(character):04X} {name})"


def describe_unknown(characters: list[str]) -> str:
    """How many characters are unknown, and the first ten: `1 character that the model never saw: 'é' (U+00E9 …)`."""
    named = ", ".join([*map(describe_character, characters[:10]), *["…"] * (len(characters) > 10)])
    return f"{len(characters)} character{'s' * (len(characters) > 1)} that the model never saw: {named}"
