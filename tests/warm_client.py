"""The command lines again, fast: forks of one process that has already imported what takes seconds to import.

Every run is a process of its own that executes the entry point's file with its own arguments, folder and streams; only
the imports are done, and the interpreter is not taken down, which takes as long again. Where root runs the tests, it
runs them without its power to ignore permissions, so that a file that may not be read cannot be read.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from charseq2seq.errors import ExitCode
from tests.train_client import ROOT, TINY, Done, Trainee

# What a command starts with to be bound by permissions; None where that is not to be had.
WITHOUT_POWERS: list[str] | None = []
if hasattr(os, "geteuid") and os.geteuid() == 0:
    setpriv = shutil.which("setpriv")
    WITHOUT_POWERS = [setpriv, "--bounding-set=-dac_override,-dac_read_search"] if setpriv else None

_PREPARED = (
    "numpy torch torch._dynamo huggingface_hub tqdm charseq2seq.training.run charseq2seq.publishing.publish "
    "charseq2seq.generation data.prepare"
)


class WarmClient:
    """A process whose forks run `train_transformer.py` and `push_to_huggingface.py`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-client-")
        environment = {"PATH": os.environ["PATH"], "HOME": self._folder.name, "LANG": "C.UTF-8"}
        self._process = subprocess.Popen(
            [*(WITHOUT_POWERS or []), sys.executable, "-m", "tests.warm_client"],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End it: it goes when no more orders come."""
        self._process.communicate()
        self._folder.cleanup()

    def run(
        self, home: Path, *arguments: str, program: str = "train_transformer.py", memory: int = 0, **environment: str
    ) -> Done:
        """Run a command line in a folder to its end, with so much memory (bytes; 0: all); it shows no traceback."""
        out, log = Path(self._folder.name) / "stdout", Path(self._folder.name) / "stderr"
        orders: dict[str, Any] = {"home": str(home), "program": str(ROOT / program), "arguments": arguments}
        orders |= {"out": str(out), "log": str(log), "memory": memory, "environment": environment}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        done = Done(code, out.read_bytes().decode(), log.read_bytes().decode())
        assert "Traceback" not in done.log, done.log
        return done

    @property
    def size(self) -> int:
        """Bytes of address space that a command has before it begins."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize:"))

    def train(self, trainee: Trainee, *arguments: str) -> Done:
        """Train a tiny model on text.txt."""
        return self.run(trainee.home, "--mode", "train", "--data_path", "text.txt", *TINY, *arguments)


def _play(orders: dict[str, Any]) -> None:
    """Become the command; runs in the fork and ends by SystemExit or by what went wrong."""
    os.chdir(orders["home"])
    os.environ.update({"HOME": orders["home"], **orders["environment"]})
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for stream, path, how in ((0, os.devnull, os.O_RDONLY), (1, orders["out"], flags), (2, orders["log"], flags)):
        opened = os.open(path, how, 0o600)
        os.dup2(opened, stream)
        os.close(opened)
    if orders["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (orders["memory"], orders["memory"]))
    sys.argv = [orders["program"], *orders["arguments"]]
    runpy.run_path(orders["program"], run_name="__main__")


def _serve() -> None:
    """Do what stdin orders, one line of JSON a run, and answer each with its exit code."""
    for module in _PREPARED.split():
        __import__(module)
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = ExitCode.UNEXPECTED
            try:
                _play(json.loads(line))
            except SystemExit as end:
                code = ExitCode(int(end.code or 0))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
