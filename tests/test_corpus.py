"""Texts in the wild, their ids and their split."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charseq2seq.corpus import find_files, load_corpus, read_text
from charseq2seq.errors import ExitCode, SuiteError

PLAY = "ROMEO: But soft!\nJULIET: Ay me! é莎🎭\n"


def saved(folder: Path, content: bytes | str) -> Path:
    """A file with this content."""
    path = folder / "play.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        PLAY.encode(),
        codecs.BOM_UTF8 + PLAY.encode(),
        PLAY.replace("\n", "\r").encode(),
        codecs.BOM_UTF8 + PLAY.replace("\n", "\r\n").encode(),
        codecs.BOM_UTF16_BE + PLAY.encode("utf-16-be"),
        PLAY.encode("utf-32"),
    ],
)
def test_a_text_is_read_whatever_wrote_it(content: bytes, tmp_path: Path) -> None:
    text = read_text(saved(tmp_path, content))
    assert "".join(text.pieces) == PLAY
    assert (text.characters, text.alphabet) == (len(PLAY), "".join(sorted(set(PLAY))))
    assert text.sha256 == hashlib.sha256(content).hexdigest(), "the file's, as sha256sum prints it"


NOVELS = {
    "gb18030": "他说：今天天气很好，我们去公园散步吧。\n她笑了，一句话也没有说。\n",
    "big5": "所有人生而自由，在尊嚴和權利上一律平等。\n他們賦有理性和良心。\n",
    "cp932": "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n",
    "cp1251": "Все счастливые семьи похожи друг на друга.\nВсё смешалось в доме Облонских.\n",
    "cp1252": "Voilà une œuvre où l'été était déjà passé.\nLe garçon mangeait à la forêt.\n",
}


@pytest.mark.parametrize("encoding", NOVELS)
def test_the_likely_encoding_is_named_and_a_named_one_is_read(encoding: str, tmp_path: Path) -> None:
    content = (PLAY[:20] * 50 + NOVELS[encoding] * 3000).encode(encoding)
    path = saved(tmp_path, content)
    with pytest.raises(SuiteError, match=rf"is not UTF-8: byte .*; most likely .*--encoding {encoding}") as refusal:
        read_text(path)
    assert NOVELS[encoding][:8] in str(refusal.value), "what it reads like"
    text = read_text(path, encoding)
    assert "".join(text.pieces) == content.decode(encoding)
    assert text.sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(SuiteError, match="is not ASCII: byte"):
        read_text(path, "ascii")


LATIN = b"Ay me, caf\xe9 Juliet\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        ((PLAY[:30] * 9).encode("utf-16-le"), "NUL byte at offset 1; most likely it is utf_16_le"),
        (LATIN, "byte 0xE9 at offset 10; most likely it is cp1252, where it reads 'Ay me, café Juliet'"),
        ("Où ça?\n".encode() * 9 + LATIN, "byte 0xE9 at offset 91; the rest is UTF-8, so it is damaged"),
        (codecs.BOM_UTF8 + b"a" * 1_234_564 + b"\xff", "byte 0xFF at offset 1,234,567"),
        (PLAY.encode()[:-2], "byte 0xF0 at offset 37"),  # cut off within a character
        ("\ud800".encode("utf-8", "surrogatepass"), "byte 0xED at offset 0"),
        (codecs.BOM_UTF8 + b"a\0", "NUL byte at offset 4"),
        (bytes(range(256)), "byte 0x80 at offset 128; it is binary"),
        (b"PK\3\4\x14\0", "is a zip archive .*docx"),
        (b"%PDF-1.4\n", "is a PDF file"),
        (gzip.compress(b"ROMEO", mtime=0), "is compressed by gzip, which its name must say"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(content: bytes, said: str, tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(SuiteError, match=said) as refusal:
        read_text(path)
    assert refusal.value.exit_code == ExitCode.BAD_DATA
    assert str(path) in str(refusal.value)


def test_utf16_without_its_mark_is_refused_where_the_mark_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, PLAY.encode("utf-16-le"))
    assert read_text(path, "utf-16-le").pieces
    with pytest.raises(SuiteError, match=r"is not UTF-16: .*BOM"):
        read_text(path, "utf-16")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    saved(tmp_path, PLAY)
    for name, said in {
        "missing": "does not exist",
        "dangling": "does not exist",
        "play.txt/part": "does not exist",
        "folder": "holds none",
        "pipe": "is a pipe or device",
        "x" * 300: "cannot be read",
        "loop": "does not exist",
    }.items():
        with pytest.raises(SuiteError, match=said) as refusal:
            read_text(tmp_path / name)
        assert refusal.value.exit_code == ExitCode.NO_INPUT
    with pytest.raises(SuiteError, match="is a pipe or device"):
        read_text(Path("/dev/zero"))


def test_a_text_that_may_not_be_read(tmp_path: Path, nobody: Callable[[], AbstractContextManager[None]]) -> None:
    path = Path(saved(tmp_path, PLAY).name)
    with nobody():  # who cannot write beside it
        assert read_text(path).characters == len(PLAY)
    (tmp_path / "folder").mkdir()
    (tmp_path / path).rename(tmp_path / "folder" / path)
    path = "folder" / path
    for name in (path, path.parent):
        (tmp_path / name).chmod(0)
        said = r"^the text folder/play.txt cannot be read \(Permission denied\); check its permissions"
        with nobody(), pytest.raises(SuiteError, match=said) as refusal:
            read_text(path)
        assert refusal.value.exit_code == ExitCode.NO_INPUT


# --- in pieces, in many files, compressed


def test_no_seam_between_pieces_shows(tmp_path: Path) -> None:
    chance = random.Random(5)
    text = "".join(
        chance.choices(["\r\n", "\r", "\n", "\x0b\x85\u2028", "é", "莎", "🎭", "\ufeff", "ab" * 50_000], k=2000)
    )
    read = read_text(saved(tmp_path, "x" + text))
    expected = ("x" + text).replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read.pieces) == expected
    assert (read.characters, read.alphabet) == (len(expected), "".join(sorted(set(expected))))


@pytest.mark.parametrize("offset", range(2**17 - 4, 2**17 + 2))
@pytest.mark.parametrize(("wrong", "said"), [(b"\xff", "byte 0xFF at offset"), (b"\0", "NUL byte at offset")])
def test_the_place_of_what_is_wrong_is_counted_across_pieces(
    wrong: bytes, said: str, offset: int, tmp_path: Path
) -> None:
    content = ("é莎" * 2**16).encode()[:offset].decode(errors="ignore").encode()
    with pytest.raises(SuiteError, match=f"{said} {len(content):,}"):
        read_text(saved(tmp_path, content + wrong + b"rest"))


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_text_is_the_same_text(suffix: str, tmp_path: Path) -> None:
    content = PLAY.encode() * 10_000
    plain, packed = saved(tmp_path, content), tmp_path / f"play.txt{suffix}"
    packed.write_bytes(PACKERS[suffix](content))
    one, other = read_text(plain), read_text(packed)
    assert (one.sha256, one.characters, one.alphabet) == (other.sha256, other.characters, other.alphabet)
    assert "".join(other.pieces) == PLAY * 10_000
    for damaged in (packed.read_bytes()[:-9], content, b""):
        packed.write_bytes(damaged)
        with pytest.raises(SuiteError, match=r"is damaged or not what its name says|is empty") as refusal:
            read_text(packed)
        assert refusal.value.exit_code == ExitCode.BAD_DATA and str(packed) in str(refusal.value)


def test_a_folder_or_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    plays = tmp_path / "plays"
    contents = {"b.txt": "second\n", "a/z.TXT": "first", "c.txt.gz": "third", "notes.md": "no", ".hidden.txt": "no"}
    contents["b2.txt"] = ""
    for name, content in contents.items():
        path = plays / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKERS[".gz"](content.encode()) if path.suffix == ".gz" else content.encode())
    whole = read_text(plays)
    assert "".join(whole.pieces) == "first\nsecond\nthird", "no word is glued to another"
    assert whole.sha256 == hashlib.sha256(b"first\nsecond\nthird").hexdigest()
    assert "".join(read_text(plays / "?.txt*").pieces) == "second\nthird"
    assert find_files(plays / "**" / "*.[tT]*[tT]") == [plays / "a/z.TXT", plays / "b.txt", plays / "b2.txt"]
    assert find_files(plays / "*.*[!t]") == [plays / "c.txt.gz", plays / "notes.md"]
    (tmp_path / "a[1].txt").write_text("the very file, not a pattern")
    assert find_files(tmp_path / "a[1].txt") == [tmp_path / "a[1].txt"]
    for missing in (tmp_path / "*.none", plays / "a" / "x*"):
        with pytest.raises(SuiteError, match="does not exist") as refusal:
            read_text(missing)
        assert refusal.value.exit_code == ExitCode.NO_INPUT


# --- the split


@pytest.mark.parametrize("change", [sorted, lambda lines: [*lines, *(line.upper() for line in lines[:900])]])
def test_an_end_that_is_unlike_the_beginning_is_told(
    change: Callable[[list[str]], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(1)
    lines = ["".join(chance.choices("abcdefghij klmnop", k=chance.randrange(3, 30))) for _ in range(8000)]
    load_corpus(saved(tmp_path, "\n".join(lines)), 100)
    assert capsys.readouterr().err == ""
    corpus = load_corpus(saved(tmp_path, "\n".join(change(lines))), 100)
    assert "its end is unlike its beginning" in capsys.readouterr().err
    assert corpus.beginning == change(lines)[0].strip(), "which the closing sample begins with"


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "has 1 character"),
        ("ab" * 10, "has 20 characters, training with these windows needs at least"),
        ("a" * 1000, "one character repeated"),
    ],
)
def test_a_text_that_teaches_nothing_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=said) as refusal:
        load_corpus(saved(tmp_path, text), 50)
    assert refusal.value.exit_code == ExitCode.BAD_DATA


def test_the_longest_validation_split_is_a_million_characters(tmp_path: Path) -> None:
    text = "We sail, we sail!\n" * 600_000 + "🎭"
    corpus = load_corpus(saved(tmp_path, text), 100)
    assert len(corpus.ids) - corpus.num_train == 1_000_000, "scoring a tenth of it would take longer than training"
    assert corpus.ids.dtype == np.uint8 and len(corpus.ids) == len(text)
    assert corpus.vocabulary.decode(corpus.ids[-1000:].tolist()) == text[-1000:]


def test_one_emoji_does_not_quadruple_the_memory_of_a_text(tmp_path: Path) -> None:
    text = read_text(saved(tmp_path, "We sail!\n" * 500_000 + "🎭"))
    assert sum(map(sys.getsizeof, text.pieces)) < 1.2 * text.characters
