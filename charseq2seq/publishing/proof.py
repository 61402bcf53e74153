"""Does a repository folder work for a stranger? A fresh process that sees nothing but the folder tries it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.secrets import strangers_environment

_PROVE = Path(__file__).parent / "published" / "prove_folder.py"


def prove_folder(folder: Path) -> None:
    """Take every way to the model that needs no browser: both weight files, the example, the notebook's first cells.

    Raises:
        PublishError: something in the folder does not work.
    """
    run_alone(folder, str(_PROVE), str(folder.resolve()))


def run_alone(folder: Path, *command: str) -> None:
    """Run a Python program that sees nothing but a folder; raise PublishError if it fails or prints nothing."""
    with strangers_environment():
        done = subprocess.run(
            [sys.executable, "-E", "-s", "-B", *command],  # no Python settings of this user; no caches in the folder
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},  # only what is in the folder
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        raise PublishError("proof", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    if not done.stdout.strip():
        raise PublishError("proof", "usage_example.py generated no text")
