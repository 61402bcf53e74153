"""The suite's own programs in processes that file_calls.c watches, and what the suite reads in the files they leave."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaigns.disk_after_power_cut import Call, Files, read_record
from benchmarks.campaigns.watched_folder import fingerprint
from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.console import run_with_report
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.publishing import proof

LIBRARY = "file_calls.so"
MODEL, STATE, METRICS = "transformer_model.pth", "transformer_model.resume.pth", "transformer_model.metrics.jsonl"
Facts = dict[str, str]  # path within the folder -> what the suite reads there


@dataclass(frozen=True)
class Program:
    """What a user runs; `stop`: the call before which SIGTERM comes."""

    name: str
    main: Callable[..., int]
    arguments: tuple[str, ...]
    code: int = ExitCode.OK
    stop: int = 0


def compile_library(folder: Path) -> Path:
    """Compile file_calls.c into a folder.

    Raises:
        SuiteError: there is no compiler.
    """
    library, source = folder / LIBRARY, Path(__file__).with_name("file_calls.c")
    command = ["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        raise SuiteError(f"no C compiler (apt-get install gcc): {reason}", ExitCode.NO_INPUT) from error
    return library


def read_folder(folder: Path) -> Files:
    """What a folder holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def temporaries(files: Files) -> list[str]:
    """Files that were being written."""
    return sorted(name for name in files if name.endswith(".tmp"))


class Machine:
    """Runs programs in processes of its own, watched.

    Args:
        root: an empty folder.
        library: file_calls.c, loaded.

    Attributes:
        folder: where they run.
        log: what the last one said.
    """

    def __init__(self, root: Path, library: ctypes.CDLL) -> None:
        self.root, self.library, self.folder = root, library, root / "disk"
        self.folder.mkdir()
        self.log = ""
        self.meanings: dict[tuple[str, str], str] = {}

    def put(self, files: Files) -> None:
        """Make the folder hold these files and nothing else."""
        for path in self.folder.iterdir():  # the folder itself stays: a record knows it by its inode
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def run(self, program: Program, nth: int = 0, error: int = 0, for_good: bool = False, prove: bool = False) -> int:
        """Run a program; its nth call fails, or all from there on. Returns its exit code."""
        gc.freeze()  # or the child's garbage collector would copy all of this process's memory
        child = os.fork()
        if not child:
            self._child(program, (nth, error, for_good), prove)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.log = (self.root / "log").read_text(encoding="utf-8", errors="replace")
        return code

    def import_the_same(self) -> None:
        """Import here what the last program did: the next ones need not."""
        for name in (self.root / "modules").read_text().split("\n"):
            with contextlib.suppress(Exception):  # some are other names of modules
                importlib.import_module(name)

    def _child(self, program: Program, failure: tuple[int, int, bool], prove: bool) -> None:
        code: int = ExitCode.UNEXPECTED
        try:
            os.chdir(self.folder)
            with (self.root / "log").open("wb") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            record = os.open(self.root / "record", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.argv = [program.name, *program.arguments]
            if not prove:  # three seconds, and it writes nothing
                proof.run_alone = lambda folder, *command: None
            self.library.watch_folder(os.fsencode(self.folder), record, *failure)
            code = run_with_report(program.main)
            (self.root / "modules").write_text("\n".join(sys.modules))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def calls(self) -> list[Call]:
        """What the last program did to the folder."""
        return read_record((self.root / "record").read_bytes(), self.folder)

    def meaning(self, name: str, content: bytes) -> str:
        """What the suite reads in a file: of a model or state all but the seconds in it, or why it is refused."""
        name, key = re.sub(r"\.[0-9a-f]{8}\.tmp$", "", name), hashlib.sha256(content).hexdigest()
        if name not in (MODEL, STATE):
            return key
        if (name, key) not in self.meanings:
            path = self.root / "opened.pth"
            path.write_bytes(content)
            try:
                (load_resume_state if name == STATE else load_checkpoint)(path)
                self.meanings[name, key] = fingerprint(path)
            except SuiteError as error:
                self.meanings[name, key] = f"refused: {error}"
        return self.meanings[name, key]

    def facts(self, files: Files) -> Facts:
        """What a folder's files mean, without temporary files, the lock, which names a process, and the metrics.

        The rows of metrics are appended without waiting for the disk, and the next run writes them anew.
        """
        left_out = (".tmp", ".lock", METRICS)
        return {name: self.meaning(name, files[name]) for name in files if not name.endswith(left_out)}
