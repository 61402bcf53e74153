"""Checkpoints to publish, and the command line that publishes them, run as a user runs it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from charseq2seq.checkpoint import Checkpoint, library_versions, save_checkpoint
from charseq2seq.vocabulary import CharVocabulary
from data import SHA256
from tests.hub.server import WRITE, HubServer
from tests.train_client import Done, Trainee
from tests.warm_client import warm_client

ROOT = Path(__file__).resolve().parents[1]
NAME = "shakespeare-transformer"  # the default name of a repository
REPO = f"alice/{NAME}"
TEXT = "ROMEO: But soft, what light through yonder window breaks?\nJULIET|`é\n"
GUIDE_FILES = {"README.md", "config.json", "pytorch_model.bin", "vocab.json", "idx_to_vocab.json", "training_args.json"}
GUIDE_FILES |= {"requirements.txt", "usage_example.py", "encoder_decoder_transformer.py"}
ALL_FILES = GUIDE_FILES | {"model.safetensors", "training_curve.png", "notebook.ipynb"}
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
    training_args: dict[str, Any] = {"data": name, "batch_size": 4, "learning_rate": 0.02, "max_steps": 100}
    training_args |= {"max_minutes": None, "seed": 7, "device": "cpu", "compile": False}
    training_args |= {size: value for size, value in config.items() if size != "vocab_size"}
    measured: dict[str, Any] = {"nats_per_char": loss, "bits_per_char": loss / math.log(2)}
    measured |= {"train_nats_per_char": loss - 0.1, "perplexity": math.exp(loss)}
    measured |= {"characters": 1000, "max_context": 20, "protocol": "every validation character once"}
    measured |= {"step": 90, "steps": 100, "seconds": 12.5, "characters_per_second": 4000.0}
    measured["history"] = [
        {"step": step, "seconds": step / 10, "train_nats_per_char": loss + 2 / step, "nats_per_char": loss + 3 / step}
        for step in (1, 10, 100)
    ]
    corpus = {"name": name, "sha256": sha256, "characters": 10_000, "distinct_characters": len(vocabulary) - 1}
    return Checkpoint(
        model_state_dict=model.state_dict(),
        config=config,
        vocab=vocabulary.index_of_token(),
        training_args=training_args,
        metrics=measured | metrics,
        corpus=corpus | {"train_characters": 9_000, "validation_characters": 1_000},
        environment=library_versions() | {"hardware": "CPU, 2 threads"},
    )


def titles(hub: HubServer, repo_id: str = REPO) -> list[str]:
    """The commits of main, oldest first, except the Hub's own."""
    return [commit.title for commit in hub.repo(repo_id).commits][::-1][1:]


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


class Push(Done):
    """How a run of push_to_huggingface.py ended."""

    @property
    def json(self) -> dict[str, Any]:
        """What --json printed: one line, and nothing else on stdout."""
        return dict(json.loads(self.out))


class Publisher:
    """A user's folder with a checkpoint in it, and the command line.

    Args:
        hub: the Hub on loopback.
        home: an empty folder for this user.
        checkpoint: what transformer_model.pth shall be.
    """

    def __init__(self, hub: HubServer, home: Path, checkpoint: Checkpoint | None = None) -> None:
        self.hub, self.home, self._user = hub, home, Trainee(home)
        self.save(checkpoint or tiny_checkpoint())

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        save_checkpoint(self.home / "transformer_model.pth", checkpoint)

    def start(self, *arguments: str, token: str | None = WRITE, **environment: str) -> subprocess.Popen[str]:
        """Start push_to_huggingface.py with these arguments and HF_TOKEN."""
        variables = self.hub.environment(self.home, token) | environment
        return self._user.start(*arguments, program="push_to_huggingface.py", **variables)

    def push(self, *arguments: str, token: str | None = WRITE, **environment: str) -> Push:
        """Run push_to_huggingface.py to its end; it never shows a traceback, the token or control characters."""
        variables: dict[str, Any] = self.hub.environment(self.home, token) | environment
        done = warm_client().run(self.home, *arguments, program="push_to_huggingface.py", **variables)
        assert (done.out + done.log).replace("\n", "").isprintable(), done.log
        assert token is None or token not in done.out + done.log
        assert "X-Amz-Signature" not in done.log, "a signed address opens what it names"
        return Push(done.code, done.out, done.log)
