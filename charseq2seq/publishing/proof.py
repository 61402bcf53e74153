"""Does a repository folder work for a stranger? Asked of fresh processes that see nothing but the folder."""

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
    """Load both weight files strictly and compare them, and run the usage example; both at the same time.

    Raises:
        PublishError: something in the folder does not work.
    """
    _finish({"loading the weights": _start([_PROVE, folder.resolve()], folder), _EXAMPLE: _start([_EXAMPLE], folder)})


def run_example(folder: Path) -> None:
    """Run the usage example of a downloaded folder.

    Raises:
        PublishError: it does not write text.
    """
    _finish({_EXAMPLE: _start([_EXAMPLE], folder)})


def _start(command: list[Path | str], folder: Path) -> subprocess.Popen[str]:
    # -E -s: no Python settings of this user; -B: leave no caches in the folder. Offline: only what is in the folder.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "PYTHON")) and not any(word in name.upper() for word in _PRIVATE)
    }
    return subprocess.Popen(
        [sys.executable, "-E", "-s", "-B", *map(str, command)],
        cwd=folder,
        env=kept | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def _finish(running: dict[str, subprocess.Popen[str]]) -> None:
    problems = []
    for name, process in running.items():
        output, log = process.communicate()
        if process.returncode != 0:
            last_line = (log.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            problems.append(f"{name}: {last_line}")
        elif name == _EXAMPLE and not output.strip():
            problems.append(f"{name} wrote no text")
    if problems:
        raise PublishError("proof", "; ".join(problems))
