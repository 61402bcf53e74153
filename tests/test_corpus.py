"""The split, ids kept on disk, and windows that miss nothing and repeat nothing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.corpus import Corpus, Ids, WindowSampler, load_corpus
from charseq2seq.errors import ExitCode, SuiteError
from tests.push_client import ROOT

PLAY = "ROMEO: But soft!\nJULIET: Ay me! é莎🎭\n"


def saved(folder: Path, content: bytes | str) -> Path:
    """A file with this content."""
    path = folder / "play.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- the split


@given(length=st.integers(1, 400), window=st.integers(2, 30))
@settings(max_examples=80, deadline=None)
def test_the_first_nine_tenths_train(length: int, window: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = ("abcdefghij" * 40)[: length - 1] + "z"
    path = saved(tmp_path_factory.getbasetemp(), text)
    try:
        corpus = load_corpus(path, window)
    except SuiteError as error:
        assert error.exit_code == ExitCode.BAD_DATA
        needed = int(str(error).split("at least ")[1].split()[0].rstrip(",;").replace(",", ""))
        assert length < needed
        saved(path.parent, text * (needed // length) + text[: needed % length] if length > 1 else "ab" * needed)
        assert load_corpus(path, window).num_train >= 2 * window, "what the message asks for is enough"
        return
    assert corpus.num_train == len(corpus.train_ids) == int(length * 0.9)
    assert corpus.vocabulary.decode(corpus.ids.tolist()) == text
    assert corpus.num_train >= 2 * window
    assert corpus.facts() == {
        "name": "play.txt",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "characters": length,
        "distinct_characters": len(set(text)),
        "train_characters": corpus.num_train,
        "validation_characters": length - corpus.num_train,
    }


def test_the_vocabulary_is_that_of_the_whole_text(tmp_path: Path) -> None:
    corpus = load_corpus(saved(tmp_path, "ab" * 500 + "é"), 10)
    assert corpus.vocabulary.characters == ("a", "b", "é"), "validation has no unknown characters"
    assert 3 not in corpus.train_ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "has 1 character"),
        ("ab" * 10, "has 20 characters, training with these windows needs at least"),
        ("a" * 1000, "one character repeated"),
        ("\n" * 1000, "one character repeated"),
    ],
)
def test_a_text_that_teaches_nothing_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=said) as refusal:
        load_corpus(saved(tmp_path, text), 50)
    assert refusal.value.exit_code == ExitCode.BAD_DATA


def test_thousands_of_distinct_characters_and_one_long_line(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 5000))) * 20
    corpus: Corpus = load_corpus(saved(tmp_path, text), 100)
    assert len(corpus.vocabulary) == 5001
    assert corpus.vocabulary.decode(corpus.ids.tolist()) == text


# --- ids kept on disk


LARGE = 65 << 20  # characters; the ids of fewer are made anew by every run


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose ids are kept; tests put it back as it was."""
    path = tmp_path_factory.mktemp("large") / "large.txt"
    path.write_bytes((b"We sail, we sail!\n" * (LARGE // 18 + 1))[: LARGE - 2] + "é".encode())
    return path


def kept_beside(path: Path) -> list[Path]:
    """The files of ids in a text's folder."""
    return sorted(path.parent.glob("*.ids.npy"))


def test_ids_of_a_large_text_are_kept_and_found_again(large: Path) -> None:
    corpus = load_corpus(large, 100)
    (kept,) = kept_beside(large)
    assert kept.name == f"large.txt.{corpus.sha256[:16]}.ids.npy"
    assert len(corpus.ids) - corpus.num_train == 1_000_000, "scoring a tenth of it would take longer than training"
    assert isinstance(corpus.ids, np.memmap) and corpus.ids.dtype == np.uint8 and len(corpus.ids) == LARGE - 1
    text = large.read_text(encoding="utf-8")
    assert corpus.vocabulary.decode(corpus.ids[-1000:].tolist()) == text[-1000:]
    written = kept.stat().st_mtime_ns
    assert np.array_equal(load_corpus(large, 100).ids, corpus.ids) and kept.stat().st_mtime_ns == written
    source, target = WindowSampler(corpus.train_ids, 8, 16, 4, 0).next_batch()
    assert source.dtype == target.dtype == torch.int64


@pytest.mark.parametrize("damage", ["cut short", "not ids", "ids of no character", "empty"])
def test_ids_that_are_damaged_are_made_anew(damage: str, large: Path) -> None:
    expected = load_corpus(large, 100).ids[:100].copy()
    (kept,) = kept_beside(large)
    content = kept.read_bytes()
    kept.write_bytes(
        {
            "cut short": content[:-5],
            "not ids": b"x" * len(content),
            "ids of no character": content[:-5] + b"\xff\xff\xff\xff\xff",
            "empty": b"",
        }[damage]
    )
    assert np.array_equal(load_corpus(large, 100).ids[:100], expected) and kept.read_bytes() == content


def test_ids_of_a_text_that_has_changed_go(large: Path) -> None:
    load_corpus(large, 100)
    bystander = large.with_name("large.txt.notes.ids.npy")
    bystander.touch()
    (before,) = (path for path in kept_beside(large) if path != bystander)
    content = large.read_bytes()
    large.write_bytes(content.replace(b"sail", b"soil", 1))
    load_corpus(large, 100)
    assert bystander in kept_beside(large) and before not in kept_beside(large) and len(kept_beside(large)) == 2
    large.write_bytes(content)
    bystander.unlink()


def test_two_runs_that_make_the_same_ids_at_once_get_the_same(large: Path) -> None:
    for kept in kept_beside(large):
        kept.unlink()
    script = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from charseq2seq.corpus import load_corpus\n"
        "print(hashlib.sha256(load_corpus(Path(sys.argv[2]), 100).ids.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(large)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate()[0] for run in runs]
    assert printed[0] == printed[1] == hashlib.sha256(load_corpus(large, 100).ids.tobytes()).hexdigest() + "\n"
    assert len(list(large.parent.iterdir())) == 2, "the text and its ids"


# --- windows


def sampler(
    length: int = 1000, source: int = 7, target: int = 5, batch: int = 4, seed: int = 0, first: int = 0
) -> WindowSampler:
    """A sampler over a text whose every character is its own place."""
    ids: Ids = np.arange(first, first + length, dtype=np.int32)
    return WindowSampler(ids, source, target, batch, seed)


def joined(windows: WindowSampler) -> list[list[int]]:
    """The next batch, each source joined with its target."""
    source, target = windows.next_batch()
    return [[*s, *t] for s, t in zip(source.tolist(), target.tolist(), strict=True)]


def batches_of_this_pass(windows: WindowSampler) -> list[list[list[int]]]:
    """Batch by batch until a pass is over; the last one may reach further."""
    epoch, batches = windows.epoch, []
    while windows.epoch == epoch:
        batches.append(joined(windows))
    return batches


@given(
    source=st.integers(1, 12),
    target=st.integers(1, 12),
    extra=st.integers(0, 60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_in_one_pass_a_character_is_a_target_at_most_once(
    source: int, target: int, extra: int, batch: int, seed: int
) -> None:
    length = source + target + extra
    one_by_one = batches_of_this_pass(sampler(length, source, target, 1, seed))
    windows = sampler(length, source, target, batch, seed)
    rows: list[list[int]] = []
    while len(rows) < len(one_by_one):
        rows += joined(windows)
    del rows[len(one_by_one) :]  # the last batch may begin the next pass
    assert [row[-target:] for row in rows] == [row[-target:] for given in one_by_one for row in given]
    targets = Counter(place for row in rows for place in row[-target:])
    assert max(targets.values()) == 1
    assert len(targets) > extra + target - 2 * target, "and nearly every one is"
    assert source <= min(targets) <= max(targets) < length
    for row in rows:
        assert row == list(range(row[0], row[0] + len(row))), "the target follows its source"


def test_every_pass_is_shuffled_and_cut_anew() -> None:
    windows = sampler()
    first, second = ([row[-5] for given in batches_of_this_pass(windows) for row in given] for _ in range(2))
    assert first != sorted(first)
    assert {place % 5 for place in first[:150]} != {place % 5 for place in second[10:150]}
    assert windows.epoch == 2


def test_sources_have_every_length_and_mostly_the_full_one() -> None:
    windows = sampler(100_000, batch=8)
    lengths = Counter(windows.next_batch()[0].shape[1] for _ in range(2000))
    assert set(lengths) == set(range(8))
    assert lengths[7] == pytest.approx(2000 * (0.8 + 0.2 / 8), abs=80)
    for length in range(7):
        assert lengths[length] == pytest.approx(2000 * 0.2 / 8, abs=35)


def test_batches_are_int64_and_whole() -> None:
    windows = sampler(40, batch=50)  # a batch of more windows than a pass has
    for _ in range(5):
        source, target = windows.next_batch()
        assert str(source.dtype) == str(target.dtype) == "torch.int64"
        assert target.shape == (50, 5)
        assert len(source) == 50


@given(steps=st.integers(0, 60), batch=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_restored_sampler_goes_on_as_if_never_stopped(steps: int, batch: int, seed: int) -> None:
    straight, resumed = sampler(200, batch=batch, seed=seed), sampler(200, batch=batch, seed=seed)
    for _ in range(steps):
        straight.next_batch()
    resumed.next_batch()  # wherever it stood before
    resumed.restore(straight.state())
    assert all(type(value) is int for value in straight.state().values()), "plain, for the resume file"
    for _ in range(20):
        expected, got = straight.next_batch(), resumed.next_batch()
        assert [part.tolist() for part in got] == [part.tolist() for part in expected]
    assert resumed.state() == straight.state()


def test_a_seed_is_an_order() -> None:
    def given(seed: int) -> list[list[list[int]]]:
        return batches_of_this_pass(sampler(seed=seed))

    assert given(3) == given(3) != given(4)
