"""Characters and ids: the same for the same text, there and back again, and no damaged vocabulary is accepted."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.publishing.folder import json_text
from charseq2seq.vocabulary import START_ID, START_TOKEN, CharVocabulary, describe_character

# Hypothesis' own alphabet leaves lone surrogates out.
ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=80)
STRANGE = "a\0\t\n\r\x1b\x7f\x85\xa0é\u0301\u200d\u2028\ud800\udfff\ufeff\uffff莎🎭👩🏽\U0010ffff"


@given(ANY_TEXT.filter(bool))
@example(STRANGE)
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back_and_so_does_its_vocabulary(text: str) -> None:
    characters = sorted(set(text))
    vocabulary = CharVocabulary(characters)
    assert len(vocabulary) == len(characters) + 1
    ids = vocabulary.encode(text)
    assert ids.tolist() == [characters.index(character) + 1 for character in text]
    assert vocabulary.decode(ids.tolist()) == text
    content = json_text(vocabulary.index_of_token())  # what is published
    assert content.isascii() and content.endswith("}\n")
    index_of = json.loads(content)
    assert index_of == {START_TOKEN: 0} | {character: i for i, character in enumerate(characters, start=1)}
    assert CharVocabulary.from_index_of_token(index_of).characters == vocabulary.characters


def test_the_start_token_stands_for_no_character() -> None:
    vocabulary = CharVocabulary("ab")
    assert vocabulary.index_of_token() == {"<start>": 0, "a": 1, "b": 2}
    assert vocabulary.decode([START_ID, 1, START_ID, 2, 2]) == "abb"
    assert START_ID not in CharVocabulary(sorted(set("<start>"))).encode("<start>")


def test_unknown_characters_are_named_ten_of_them() -> None:
    with pytest.raises(SuiteError, match=r"has 21 characters that .* saw: '\\x00' \(U\+0000 Cc\), .*, …;") as refusal:
        CharVocabulary("a").encode(STRANGE)
    assert str(refusal.value).count("U+") == 10 and refusal.value.exit_code == ExitCode.BAD_DATA
    assert CharVocabulary("a").encode_pieces([STRANGE, "", "aé"]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("character", "description"),
    [
        ("é", "'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)"),
        ("\n", r"'\n' (U+000A Cc)"),
        ("\x1b", r"'\x1b' (U+001B Cc)"),
        ("\ud800", r"'\ud800' (U+D800 Cs)"),
        ("🎭", "'🎭' (U+1F3AD PERFORMING ARTS)"),
        ("莎", f"'莎' (U+838E {unicodedata.name('莎')})"),
    ],
)
def test_a_character_is_described_so_that_it_can_be_looked_up(character: str, description: str) -> None:
    assert describe_character(character) == description


@pytest.mark.parametrize("characters", [[], ["b", "a"], ["a", "a"], ["ab"], [""], [1], [None], ["a", 2]])
def test_what_is_no_alphabet_is_refused(characters: list[Any]) -> None:
    with pytest.raises(SuiteError) as refusal:
        CharVocabulary(characters)
    assert refusal.value.exit_code == ExitCode.BAD_DATA


WHOLE: dict[Any, Any] = {"<start>": 0, "a": 1, "b": 2}
DAMAGED: list[Any] = [
    *({}, {"<start>": 0}, {"a": 1, "b": 2}, None, ["<start>", "a"], "ab", 3),
    *(WHOLE | {"b": wrong} for wrong in (1, 2.0, None, [2], 10**4000)),
    *(WHOLE | {"a": True}, WHOLE | {"bc": 3}, WHOLE | {"": 3}, WHOLE | {3: 3}, WHOLE | {None: 3}),
    *({"<start>": 0, "b": 1, "a": 2}, {"<start>": 1, "a": 0, "b": 2}),
]


@pytest.mark.parametrize("table", DAMAGED, ids=lambda table: repr(table)[:50])
def test_a_damaged_table_is_refused(table: Any) -> None:
    assert CharVocabulary.from_index_of_token(WHOLE).characters == ("a", "b")
    with pytest.raises(SuiteError) as refusal:
        CharVocabulary.from_index_of_token(table)
    assert refusal.value.exit_code == ExitCode.BAD_DATA
