"""Does a repository folder work for a stranger? Asked of a fresh process that sees nothing but the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from charseq2seq.publishing.failures import PublishError

_PROVE = Path(__file__).with_name("prove_folder.py")
_EXAMPLE = "usage_example.py"
_PRIVATE = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


def prove_folder(folder: Path) -> None:
    """Run the usage example, load both weight files strictly and compare them.

    Raises:
        PublishError: something in the folder does not work.
    """
    _run([str(_PROVE), str(folder.resolve())], folder)


def run_example(folder: Path) -> None:
    """Run the usage example of a downloaded folder.

    Raises:
        PublishError: it does not write text.
    """
    _run([_EXAMPLE], folder)


def _run(command: list[str], folder: Path) -> None:
    # -E -s: no Python settings of this user; -B: leave no caches in the folder. Offline: only what is in the folder.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "PYTHON")) and not any(word in name.upper() for word in _PRIVATE)
    }
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-B", *command],
        cwd=folder,
        env=kept | {"HF_HUB_OFFLINE": "1"},
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
        raise PublishError("proof", f"{_EXAMPLE} wrote no text")
