"""Checkpoints to publish, and the command line that publishes them, run as a user runs it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charseq2seq.checkpoint import Checkpoint, library_versions, save_checkpoint
from charseq2seq.vocabulary import CharVocabulary
from data import SHA256
from tests.hub.server import WRITE, HubServer

ROOT = Path(__file__).resolve().parents[1]
NAME = "shakespeare-transformer"  # the default name of a repository
REPO = f"alice/{NAME}"
TEXT = "ROMEO: But soft, what light through yonder window breaks?\nJULIET|`é\n"
GUIDE_FILES = {
    "README.md",
    "config.json",
    "pytorch_model.bin",
    "vocab.json",
    "idx_to_vocab.json",
    "training_args.json",
    "requirements.txt",
    "usage_example.py",
    "encoder_decoder_transformer.py",
}
ALL_FILES = GUIDE_FILES | {"model.safetensors", "training_curve.png"}


PLAYS = SHA256["shakespeare"]


def tiny_checkpoint(loss: float = 1.5, *, sha256: str = PLAYS, seed: int = 0, **metrics: Any) -> Checkpoint:
    """A complete checkpoint of a tiny untrained model.

    Args:
        loss: its validation loss, nats per character.
        sha256: of its corpus; of another text than Shakespeare's plays its name is letters.txt.
        seed: of its weights.
        metrics: further ones, or others than the usual.
    """
    import torch

    from encoder_decoder_transformer import Transformer

    vocabulary = CharVocabulary(sorted(set(TEXT)))
    config: dict[str, Any] = {"vocab_size": len(vocabulary), "d_model": 16, "num_heads": 2, "num_encoder_layers": 1}
    config |= {"num_decoder_layers": 1, "d_ff": 32, "dropout": 0.0, "source_length": 8, "target_length": 12}
    torch.manual_seed(seed)
    model = Transformer(**config)
    with torch.no_grad():  # an untrained model's logits are all zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    name = "shakespeare.txt" if sha256 == PLAYS else "letters.txt"
    history = [
        {"step": step, "seconds": step / 10, "train_nats_per_char": loss + 2 / step, "nats_per_char": loss + 3 / step}
        for step in (1, 10, 100)
    ]
    return Checkpoint(
        model_state_dict=model.state_dict(),
        config=config,
        vocab=vocabulary.index_of_token(),
        training_args={
            "data": name,
            "batch_size": 4,
            "learning_rate": 0.02,
            "max_steps": 100,
            "max_minutes": None,
            "seed": 7,
            "device": "cpu",
            "compile": False,
            **{size: value for size, value in config.items() if size != "vocab_size"},
        },
        metrics={
            "nats_per_char": loss,
            "bits_per_char": loss / 0.6931471805599453,
            "perplexity": 2.718281828459045**loss,
            "characters": 1000,
            "max_context": 20,
            "protocol": "every validation character once",
            "step": 90,
            "steps": 100,
            "seconds": 12.5,
            "characters_per_second": 4000.0,
            "train_nats_per_char": loss - 0.1,
            "history": history,
            **metrics,
        },
        corpus={
            "name": name,
            "sha256": sha256,
            "characters": 10_000,
            "distinct_characters": len(vocabulary) - 1,
            "train_characters": 9_000,
            "validation_characters": 1_000,
        },
        environment=library_versions() | {"hardware": "CPU, 2 threads"},
    )


def titles(hub: HubServer, repo_id: str = REPO) -> list[str]:
    """The commits of main, oldest first, except the Hub's own."""
    return [commit.title for commit in hub.repo(repo_id).commits][::-1][1:]


def start_program(
    name: str, hub: HubServer, home: Path, *arguments: str, token: str | None, **environment: str
) -> subprocess.Popen[str]:
    """Start a program of the suite in a user's folder, with this HF_TOKEN."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *arguments],
        env=hub.environment(home, token) | {"OMP_NUM_THREADS": "1", **environment},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_and_signal(
    hub: HubServer, method: str, path: str, number: signal.Signals, start: Callable[[], subprocess.Popen[str]]
) -> subprocess.Popen[str]:
    """Start a program, and send it a signal when it makes this request, to which the Hub stays silent."""
    process: Future[subprocess.Popen[str]] = Future()
    hub.fail(method, path, call=lambda: process.result().send_signal(number), delay=math.inf)
    process.set_result(start())
    return process.result()


def fresh_python(requirements: Path, folder: Path) -> Path:
    """Make a virtual environment that holds what a requirements.txt names and nothing else.

    Returns:
        The folder of its programs: `python`, and what the libraries bring, e.g. `hf`.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    # Compiling all of PyTorch would take longer than installing it.
    install = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--no-compile", "-r", str(requirements)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return programs


# Forks of a process that has imported what takes seconds; not the Hub's client, which reads its settings at import.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch", "matplotlib.figure", "matplotlib.backends.backend_agg", "safetensors.torch", "charseq2seq.generation"]
)


def _push(home: Path, arguments: Sequence[str], environment: dict[str, str], out: Path, log: Path) -> None:
    """Become push_to_huggingface.py, in a fork."""
    os.chdir(home)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, out), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in environment else []
    sys.argv = [str(ROOT / "push_to_huggingface.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


@dataclass
class Push:
    """How a run of the command line ended."""

    code: int
    out: str
    log: str

    @property
    def json(self) -> dict[str, Any]:
        """The line that --json printed."""
        return dict(json.loads(self.out))


class Publisher:
    """A user's folder with a checkpoint in it, and the command line.

    Args:
        hub: the Hub on loopback.
        home: an empty folder for this user.
        checkpoint: what transformer_model.pth shall be.
    """

    def __init__(self, hub: HubServer, home: Path, checkpoint: Checkpoint | None = None) -> None:
        home.mkdir(exist_ok=True)
        self.hub = hub
        self.home = home
        self.save(checkpoint or tiny_checkpoint())

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        save_checkpoint(self.home / "transformer_model.pth", checkpoint)

    def start(self, *arguments: str, token: str | None = WRITE, **environment: str) -> subprocess.Popen[str]:
        """Start push_to_huggingface.py with these arguments and HF_TOKEN."""
        return start_program("push_to_huggingface.py", self.hub, self.home, *arguments, token=token, **environment)

    def push(self, *arguments: str, token: str | None = WRITE, **environment: str) -> Push:
        """Run push_to_huggingface.py to its end; it never shows a traceback, the token or control characters."""
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
            variables = {**self.hub.environment(self.home, token), "OMP_NUM_THREADS": "1", **environment}
            process = _FORKS.Process(target=_push, args=(self.home, arguments, variables, *streams))
            process.start()
            process.join()
            out, log = (path.read_text(encoding="utf-8") for path in streams)
        assert process.exitcode is not None
        assert "Traceback" not in log, log
        assert (out + log).replace("\n", "").isprintable(), log
        assert token is None or token not in out + log
        assert "X-Amz-Signature" not in log, "a signed address opens what it names"
        return Push(process.exitcode, out, log)
