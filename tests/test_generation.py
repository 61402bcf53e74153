"""From a prompt to text: unknown characters are named, text is streamed, and a seed is a text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.generation import Sampling, TextGenerator, is_small, known_prompt, read_prompt
from charseq2seq.options import SIZES
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Transformer
from tests.push_client import tiny_checkpoint


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    """Text of a tiny model."""
    checkpoint = tiny_checkpoint()
    return TextGenerator(checkpoint.build_model(), checkpoint.vocabulary())


@pytest.mark.parametrize(("size", "small"), [("tiny", True), ("small", False), ("base", False)])
def test_small_models_are_better_off_on_the_cpu(size: str, small: bool) -> None:
    sizes: dict[str, Any] = SIZES[size]
    with torch.device("meta"):
        assert is_small(Transformer(66, **sizes)) is small


@pytest.mark.parametrize("prompt", ["", "R", "ROMEO: But soft,", "ROMEO: But soft, what light through " * 20])
@pytest.mark.parametrize("num_chars", [0, 1, 12, 50])
def test_any_prompt_gives_any_length(generator: TextGenerator, prompt: str, num_chars: int) -> None:
    text = generator.generate(prompt, num_chars, Sampling(temperature=1.0))
    assert len(text) == num_chars
    assert set(text) <= set(generator.vocabulary.characters)


def test_text_is_streamed_a_character_at_a_time(generator: TextGenerator) -> None:
    whole = generator.generate("ROMEO:", 40, Sampling())
    stream = generator.stream("ROMEO:", 10**9, Sampling())
    pieces = list(itertools.islice(stream, 40))
    assert "".join(pieces) == whole
    assert {len(piece) for piece in pieces} == {1}


def test_the_same_seed_gives_the_same_text_whatever_happened_before(generator: TextGenerator) -> None:
    torch.manual_seed(1)
    first = generator.generate("ROMEO:", 60, Sampling(seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert generator.generate("ROMEO:", 60, Sampling(seed=5)) == first
    assert generator.generate("ROMEO:", 60, Sampling(seed=6)) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_is_what_was_asked_for(generator: TextGenerator) -> None:
    greedy = generator.generate("ROMEO:", 60, Sampling(temperature=0))
    source = torch.from_numpy(generator.vocabulary.encode("ROMEO:")).long()[None]
    expected = tiny_checkpoint().build_model().generate(source, 60, temperature=0)[0].tolist()
    assert greedy == generator.vocabulary.decode(expected), "the prompt is continued, not repeated"
    for same in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6), Sampling(temperature=1e-6)):
        assert generator.generate("ROMEO:", 60, same) == greedy
    wild = generator.generate("ROMEO:", 400, Sampling(temperature=1e9))
    assert len(set(wild)) > 0.9 * len(generator.vocabulary.characters)


@given(prompt=st.text(st.sampled_from("ROMEO: é|ÄÖ莎\0\ud800"), max_size=30))
@settings(max_examples=100, deadline=None)
def test_unknown_characters_are_named_or_skipped(prompt: str) -> None:
    vocabulary = CharVocabulary(sorted(set("ROMEO: é|")))
    known = "".join(character for character in prompt if character in vocabulary.characters)
    assert known_prompt(vocabulary, prompt, "skip") == known
    if known == prompt:
        assert known_prompt(vocabulary, prompt, "error") == prompt
        return
    with pytest.raises(SuiteError, match="--unknown skip") as refusal:
        known_prompt(vocabulary, prompt, "error")
    assert refusal.value.exit_code == ExitCode.BAD_DATA
    for character in sorted(set(prompt) - set(known))[:10]:
        assert f"U+{ord(character):04X}" in str(refusal.value)


@pytest.mark.parametrize("unknown", ["error", "skip"])
@pytest.mark.parametrize(("learned", "typed"), [("café", "cafe\u0301"), ("cafe\u0301", "café")])
def test_a_prompt_in_the_other_normal_form_is_the_same_prompt(
    learned: str, typed: str, unknown: Literal["error", "skip"], capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = CharVocabulary(sorted(set(learned)))
    assert known_prompt(vocabulary, learned, unknown) == learned
    assert capsys.readouterr().err == ""
    assert known_prompt(vocabulary, typed, unknown) == learned
    assert "normal form NF" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"", ""),
        (b"\xef\xbb\xbfROMEO:", "ROMEO:"),
        (b"a\r\nb\n", "a\nb\n"),
        ("莎🎭".encode(), "莎🎭"),
        ("é".encode("utf-16"), "é"),
    ],
)
def test_a_prompt_from_a_file(content: bytes, prompt: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    assert read_prompt(tmp_path / "prompt.txt") == prompt


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [
        ("missing.txt", "No such file", ExitCode.NO_INPUT),
        (".", "Is a directory", ExitCode.NO_INPUT),
        ("latin.txt", "byte 0xE9 at offset 5", ExitCode.BAD_DATA),
    ],
)
def test_a_prompt_file_that_cannot_be_used(name: str, said: str, code: ExitCode, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"ROMEO\xe9")
    with pytest.raises(SuiteError, match=said) as refusal:
        read_prompt(tmp_path / name)
    assert refusal.value.exit_code == code
    assert str(tmp_path / name) in str(refusal.value)
