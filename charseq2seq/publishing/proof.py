"""Does a repository folder work for a stranger? A fresh process that sees nothing but the folder tries it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.secrets import strangers_environment

_PROVE = Path(__file__).parent / "published" / "prove_folder.py"
_EXAMPLE = "usage_example.py"


def prove_folder(folder: Path) -> None:
    """Run the usage example, load both weight files strictly and compare them.

    Raises:
        PublishError: something in the folder does not work.
    """
    _run([str(_PROVE), str(folder.resolve())], folder)


def run_example(folder: Path) -> None:
    """Run the usage example of a downloaded folder.

    Raises:
        PublishError: it does not generate text.
    """
    _run([_EXAMPLE], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-B", *command],  # no Python settings of this user; no caches in the folder
        cwd=folder,
        env=strangers_environment() | {"HF_HUB_OFFLINE": "1"},  # only what is in the folder
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise PublishError("proof", last_line)
    if not done.stdout.strip():
        raise PublishError("proof", f"{_EXAMPLE} generated no text")
