"""Texts as they are found in the wild: whatever wrote them, in one file or many, plain or compressed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.text_files import find_files, read_through
from tests.push_client import ROOT

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
        PLAY.replace("\n", "\r\n").encode(),
        codecs.BOM_UTF8 + PLAY.replace("\n", "\r\n").encode(),
    ],
)
def test_a_text_is_read_whatever_wrote_it(content: bytes, tmp_path: Path) -> None:
    text = read_through(saved(tmp_path, content))
    assert "".join(text.pieces()) == PLAY
    assert (text.characters, text.alphabet) == (len(PLAY), "".join(sorted(set(PLAY))))
    assert text.sha256 == hashlib.sha256(content).hexdigest(), "the file's, as sha256sum prints it"


def test_only_line_ends_are_changed(tmp_path: Path) -> None:
    text = "a\rb\n\rc\t\x0b\x0c\x1b\x85\u2028\ufeffd\r"
    assert "".join(read_through(saved(tmp_path, text)).pieces()) == text


LATIN = b"Ay me, caf\xe9 Juliet\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (PLAY.encode("utf-16"), "UTF-16"),
        (codecs.BOM_UTF16_BE + PLAY.encode("utf-16-be"), "UTF-16"),
        ("ab".encode("utf-16-le"), "NUL byte at offset 1"),
        (LATIN, "byte 0xE9 at offset 10"),
        (codecs.BOM_UTF8 + LATIN, "byte 0xE9 at offset 13"),
        (b"a" * 1_234_567 + b"\xff", "byte 0xFF at offset 1,234,567"),
        (PLAY.encode()[:-2], "byte 0xF0 at offset 37"),  # cut off within a character
        ("\ud800".encode("utf-8", "surrogatepass"), "byte 0xED at offset 0"),
        (b"\xc0\x80", "byte 0xC0 at offset 0"),
        (PLAY.encode() + b"\0" + PLAY.encode(), f"NUL byte at offset {len(PLAY.encode())}"),
        (codecs.BOM_UTF8 + b"a\0", "NUL byte at offset 4"),
        (bytes(range(256)), "byte 0x80 at offset 128"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(content: bytes, said: str, tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(SuiteError, match=said) as refusal:
        read_through(path)
    assert refusal.value.exit_code == ExitCode.BAD_DATA
    assert str(path) in str(refusal.value)


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
        "folder": "holds no text",
        "pipe": "is a pipe or device",
        "x" * 300: "cannot be read",
        "loop": "does not exist",
    }.items():
        with pytest.raises(SuiteError, match=said) as refusal:
            read_through(tmp_path / name)
        assert refusal.value.exit_code == ExitCode.NO_INPUT
    with pytest.raises(SuiteError, match="is a pipe or device"):
        read_through(Path("/dev/zero"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become a user without rights")
def test_a_text_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    saved(folder, PLAY)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from charseq2seq.text_files import SuiteError, read_through\n"
        "read_through(Path('folder/play.txt')); os.setuid(65534)\n"  # from root to nobody
        "try: print(read_through(Path('folder/play.txt')).path.name)\n"
        "except SuiteError as error: print(int(error.exit_code), error)"
    )
    refused = "66 the text folder/play.txt cannot be read (Permission denied); check its permissions."
    for folder_mode, file_mode, said in ((0o755, 0o644, "play.txt"), (0o755, 0, refused), (0, 0o644, refused)):
        folder.chmod(folder_mode)
        (folder / "play.txt").chmod(file_mode)
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path, ROOT], capture_output=True, text=True, check=True
        )
        assert done.stdout == said + "\n"


# --- in pieces, in many files, compressed


def test_no_seam_between_pieces_shows(tmp_path: Path) -> None:
    chance = random.Random(5)
    text = "".join(chance.choices(["\r\n", "\r", "\n", "a", "é", "莎", "🎭", "\ufeff", "ab" * 50_000], k=2000))
    read = read_through(saved(tmp_path, "x" + text))
    expected = ("x" + text).replace("\r\n", "\n")
    assert "".join(read.pieces()) == expected
    assert (read.characters, read.alphabet) == (len(expected), "".join(sorted(set(expected))))


@pytest.mark.parametrize("place", range(2**17 - 4, 2**17 + 2))
@pytest.mark.parametrize(("wrong", "said"), [(b"\xff", "byte 0xFF at offset"), (b"\0", "NUL byte at offset")])
def test_the_place_of_what_is_wrong_is_counted_across_pieces(
    wrong: bytes, said: str, place: int, tmp_path: Path
) -> None:
    content = ("é莎" * 2**16).encode()[:place].decode(errors="ignore").encode()
    with pytest.raises(SuiteError, match=f"{said} {len(content):,}"):
        read_through(saved(tmp_path, content + wrong + b"rest"))


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_text_is_the_same_text(suffix: str, tmp_path: Path) -> None:
    content = PLAY.encode() * 10_000
    plain, packed = saved(tmp_path, content), tmp_path / f"play.txt{suffix}"
    packed.write_bytes(PACKERS[suffix](content))
    one, other = read_through(plain), read_through(packed)
    assert (one.sha256, one.characters, one.alphabet) == (other.sha256, other.characters, other.alphabet)
    assert "".join(other.pieces()) == PLAY * 10_000
    for damaged in (packed.read_bytes()[:-9], content, b""):
        packed.write_bytes(damaged)
        with pytest.raises(SuiteError, match=r"is damaged or not what its name says|is empty") as refusal:
            read_through(packed)
        assert refusal.value.exit_code == ExitCode.BAD_DATA and str(packed) in str(refusal.value)


def test_a_folder_or_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    plays = tmp_path / "plays"
    contents = {"b.txt": "second, ", "a/z.txt": "first, ", "c.txt.gz": "third", "notes.md": "no", ".hidden.txt": "no"}
    for name, content in contents.items():
        path = plays / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKERS[".gz"](content.encode()) if path.suffix == ".gz" else content.encode())
    whole = read_through(plays)
    assert "".join(whole.pieces()) == "first, second, third"
    assert whole.sha256 == hashlib.sha256(b"first, second, third").hexdigest(), "as cat joins them"
    assert "".join(read_through(plays / "?.txt*").pieces()) == "second, third"
    assert find_files(plays / "**" / "*.txt") == (plays / "a/z.txt", plays / "b.txt")
    (plays / f"_.{'0a' * 8}.ids.npy").write_bytes(b"\x93NUMPY, what an earlier run of the pattern left")
    assert find_files(plays / "*") == (plays / "b.txt", plays / "c.txt.gz", plays / "notes.md")
    (tmp_path / "a[1].txt").write_text("the very file, not a pattern")
    assert find_files(tmp_path / "a[1].txt") == (tmp_path / "a[1].txt",)
    for missing in (tmp_path / "*.none", plays / "a" / "*"[:0] / "x*"):
        with pytest.raises(SuiteError, match="does not exist") as refusal:
            read_through(missing)
        assert refusal.value.exit_code == ExitCode.NO_INPUT


def test_a_text_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, PLAY)
    text = read_through(path)
    path.write_text(PLAY.replace("soft", "hard"))
    with pytest.raises(SuiteError, match="changed while it was read"):
        list(text.pieces())
