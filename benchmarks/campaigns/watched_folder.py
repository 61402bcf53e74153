"""The folder of a training job: runs in it are searched for tokens, and its files are compared."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.hub.server import WRITE, fake_token
from tests.train_client import ROOT, tiny_text

SPARE = fake_token("spare")  # in the environment of every run
CLOCKS = {"seconds", "characters_per_second"}  # all that may differ between two runs of one job


class Search:
    """Looks for tokens in everything that runs print and write."""

    def __init__(self) -> None:
        self.outputs = self.size = 0
        self.finds: list[str] = []

    def text(self, name: str, content: bytes) -> None:
        """Search one output."""
        self.outputs, self.size = self.outputs + 1, self.size + len(content)
        self.finds += [f"a token in {name}" for token in (SPARE, WRITE) if token.encode() in content]

    def folder(self, folder: Path, but: Sequence[str] = ()) -> None:
        """Search all files in a folder, except those that were given the token."""
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in but:
                self.text(str(path), path.read_bytes())


class Folder:
    """Where a job works: its text, its model, its state.

    Args:
        path: an empty folder.
        search: gets what the job's runs print and write.
    """

    def __init__(self, path: Path, search: Search) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.search = search
        self.log = ""
        (path / "text.txt").write_text(tiny_text())

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start train_transformer.py here; stdout and stderr go to files."""
        with (self.path / "stdout").open("wb") as out, (self.path / "stderr").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "train_transformer.py"), *arguments],
                cwd=self.path,
                env={"PATH": os.environ["PATH"], "HOME": str(self.path), "HF_TOKEN": SPARE, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )

    def end(self, process: subprocess.Popen[bytes], but: Sequence[str] = ()) -> int:
        """Wait for a run, search what it left, and return its exit code."""
        code = process.wait()
        self.log = (self.path / "stderr").read_text(encoding="utf-8", errors="replace")
        self.search.folder(self.path, but)
        return code

    def run(self, arguments: Sequence[str], **environment: str) -> int:
        """A run from start to end."""
        return self.end(self.start(arguments, {"OMP_NUM_THREADS": "1", **environment}))

    def report(self) -> dict[str, Any]:
        """The last line of stdout."""
        return dict(json.loads((self.path / "stdout").read_text().splitlines()[-1]))

    def temporaries(self) -> list[str]:
        """The files that are being written, or were when a run was killed."""
        return [path.name for path in self.path.glob("*.tmp")]


def fingerprint(path: Path) -> str:
    """A hash of everything in a model file or resume state but what a clock told."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value.keys() - CLOCKS, key=str):
                found.update(f"{name!r}:".encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            found.update(f"{type(value).__name__}{len(value)}".encode())
            for part in value:
                add(part)
        else:
            found.update(f"{value!r};".encode())

    add(torch.load(path, map_location="cpu", weights_only=True))
    return found.hexdigest()
