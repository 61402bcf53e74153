"""The command lines again, fast: forks of one process that has already imported what takes seconds to import.

Every run is a process of its own that executes the entry point's file with its own arguments, folder, environment and
streams; only the imports are done, and the interpreter is not taken down, which takes as long again. So is every Python
that such a command starts, the proof of a push above all; it knows nothing of the suite. Where root runs the tests, it
runs them without its power to ignore permissions, so that a file that may not be read cannot be read.
"""

from __future__ import annotations

import atexit
import functools
import gc
import io
import json
import os
import resource
import runpy
import select
import shutil
import socket
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

# Not the Hub's client, which reads its settings at import, but what it imports.
_PREPARED = (
    "numpy torch torch._dynamo tqdm yaml jinja2 httpx2 hf_xet fsspec matplotlib.figure safetensors.torch "
    "matplotlib.backends.backend_agg charseq2seq.training.run charseq2seq.publishing.publish charseq2seq.generation "
    "data.prepare"
)

# What a command finds as sys.executable: it asks for a fork with the arguments, folder, environment and streams it has.
_PYTHON = """\
#!{python} -IS
import json, os, socket, sys
program, *arguments = [word for word in sys.argv[1:] if not word.startswith("-")]
orders = {{"home": os.getcwd(), "program": program, "arguments": arguments, "environment": dict(os.environ)}}
orders |= {{name: f"/proc/{{os.getpid()}}/fd/{{number}}" for number, name in enumerate(("stdin", "out", "log"))}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    connection.sendall(json.dumps(orders).encode() + b"\\n")
    sys.exit(int(connection.recv(9)))
"""


class WarmClient:
    """A process whose forks run `train_transformer.py` and `push_to_huggingface.py`, several at once if need be."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-client-")
        self._address = f"{self._folder.name}/orders"
        environment = {"PATH": os.environ["PATH"], "HOME": self._folder.name, "LANG": "C.UTF-8"}
        self._process = subprocess.Popen(
            [*(WITHOUT_POWERS or []), sys.executable, "-m", "tests.warm_client", self._address],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stdout.readline(), "it could not start"
        self._python = Path(self._folder.name) / "python"
        self._python.write_text(_PYTHON.format(python=sys.executable, address=self._address))
        self._python.chmod(0o700)

    def close(self) -> None:
        """End it: it goes when its stdin is closed."""
        self._process.communicate()
        self._folder.cleanup()

    def run(
        self,
        home: Path,
        *arguments: str,
        program: str = "train_transformer.py",
        memory: int = 0,
        stdin: str = os.devnull,
        **environment: str,
    ) -> Done:
        """Run a command line in a folder to its end, with so much memory (bytes; 0: all); it shows no traceback."""
        with tempfile.TemporaryDirectory(dir=self._folder.name) as streams, socket.socket(socket.AF_UNIX) as connection:
            out, log = Path(streams) / "stdout", Path(streams) / "stderr"
            orders: dict[str, Any] = {"home": str(home), "program": str(ROOT / program), "arguments": arguments}
            orders |= {"out": str(out), "log": str(log), "stdin": stdin, "python": str(self._python)}
            orders |= {"memory": memory, "environment": environment}
            connection.connect(self._address)
            connection.sendall(json.dumps(orders).encode() + b"\n")
            done = Done(int(connection.recv(9)), out.read_bytes().decode(), log.read_bytes().decode())
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


@functools.cache
def warm_client() -> WarmClient:
    """The one of this process, until that ends."""
    client = WarmClient()
    atexit.register(client.close)
    return client


def _forget_the_suite(program: str) -> None:
    """Know the folder one is in instead."""
    sys.path[:] = [str(Path(program).resolve().parent), *(path for path in sys.path if path != str(ROOT))]
    sys.dont_write_bytecode = True
    for module in list(sys.modules):
        name = module.partition(".")[0]
        if name in ("charseq2seq", "data") or Path(f"{name}.py").exists():
            del sys.modules[module]


def _play(orders: dict[str, Any]) -> None:
    """Become the command; ends by SystemExit, where it has one, or by what went wrong."""
    os.chdir(orders["home"])
    os.environ.update({"HOME": orders["home"], **orders["environment"]})
    tempfile.tempdir = None  # an import has asked already
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for stream, path, how in ((0, orders["stdin"], os.O_RDONLY), (1, orders["out"], flags), (2, orders["log"], flags)):
        opened = os.open(path, how, 0o600)
        os.dup2(opened, stream)
        os.close(opened)
    if orders.get("memory"):
        resource.setrlimit(resource.RLIMIT_AS, (orders["memory"], orders["memory"]))
    if "python" in orders:
        sys.executable = orders["python"]
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    else:
        _forget_the_suite(orders["program"])
    sys.argv = [orders["program"], *orders["arguments"]]
    runpy.run_path(orders["program"], run_name="__main__")


def _attend(connection: socket.socket) -> None:
    """Do what one connection orders, a line of JSON, in a fork, and answer with its exit code."""
    orders = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        code: int = ExitCode.UNEXPECTED
        try:
            _play(orders)
            code = ExitCode.OK
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = 1 if isinstance(end.code, str) else int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _serve(address: str) -> None:
    """Take orders until stdin is closed."""
    for module in _PREPARED.split():
        __import__(module)
    from matplotlib.figure import Figure

    Figure().savefig(io.BytesIO())  # matplotlib finds its fonts
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    _attend(connection)


if __name__ == "__main__":
    _serve(sys.argv[1])
