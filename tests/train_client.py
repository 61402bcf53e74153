"""The training command line, run as a user runs it, with models so small that a run takes a second or two."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from charseq2seq.corpus import load_corpus
from charseq2seq.errors import ExitCode
from charseq2seq.options import read_settings, resolve_settings
from charseq2seq.training.resume import new_state, run_identity
from charseq2seq.training.text_defaults import with_text_defaults
from charseq2seq.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]

TINY_SIZES = {"d_model": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "d_ff": 32}
TINY_SIZES |= {"source_length": 8, "target_length": 16, "batch_size": 4}
TINY = [word for name, value in TINY_SIZES.items() for word in (f"--{name}", str(value))]


def tiny_text(repeats: int = 60) -> str:
    """A text of about 90 characters a repeat, with something to learn in it."""
    return "".join(
        f"FIRST CITIZEN:\nSpeak to the {number % 7} ships, speak.\n\nALL:\nWe sail, we sail {number}!\n\n"
        for number in range(repeats)
    )


@dataclass
class Done:
    """How a run of the command line ended."""

    code: int
    out: str
    log: str

    @property
    def report(self) -> dict[str, Any]:
        """The last line of stdout, which is JSON."""
        return dict(json.loads(self.out.splitlines()[-1]))


class Trainee:
    """A user's folder with a text in it, and the command line.

    Args:
        home: an empty folder for this user.
        text: what `text.txt` there shall be.
    """

    def __init__(self, home: Path, text: str | bytes | None = None) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.text = home / "text.txt"
        self.model = home / "transformer_model.pth"
        self.resume = home / "transformer_model.resume.pth"
        text = tiny_text() if text is None else text
        self.text.write_bytes(text.encode() if isinstance(text, str) else text)

    def environment(self, **more: str) -> dict[str, str]:
        """A clean environment, one thread."""
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"}
        kept |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES") if name in os.environ}
        return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | more

    def start(
        self,
        *arguments: str,
        program: str = "train_transformer.py",
        launcher: Sequence[str] = (),
        redirected: str = "",
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Start a program of the suite in this folder; `launcher` runs it, `redirected` as in a shell."""
        words = [sys.executable, *launcher, str(ROOT / program), *arguments]
        return subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$0" "$@" {redirected}', *words],
            env=self.environment(**environment),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, program: str = "train_transformer.py", **environment: str) -> Done:
        """Run a program of the suite to its end; it never shows a traceback."""
        return finish(self.start(*arguments, program=program, **environment))

    def train(self, *arguments: str, **environment: str) -> Done:
        """Train a tiny model on text.txt."""
        return self.run("--mode", "train", "--data_path", "text.txt", *TINY, *arguments, **environment)


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a run; it never shows a traceback."""
    out, log = process.communicate()
    assert "Traceback" not in log, log
    return Done(process.returncode, out, log)


def torchrun(trainee: Trainee, launcher: list[str], *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start train_transformer.py as a group of processes in a user's folder; `launcher`: torchrun's arguments."""
    launcher = ["-m", "torch.distributed.run", *launcher]
    return trainee.start(*arguments, launcher=launcher, **{"GLOO_SOCKET_IFNAME": "lo"} | environment)


def contents(path: Path) -> dict[str, Any]:
    """What is in a model file or a resume state."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the last bit, but for what a clock told."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours.keys() - {"seconds", "characters_per_second"}:
            assert_same(ours[name], theirs[name], f"{where}/{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert ours == theirs, where


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Read the log until a line has these words; returns what was read."""
    assert process.stderr is not None
    seen = ""
    while words not in seen and (line := process.stderr.readline()):
        seen += line
    return seen


def strike_at(process: subprocess.Popen[str], step: int, number: signal.Signals) -> Done:
    """Send a signal when the log says that a step is done."""
    seen = read_until(process, f" step {step} (")
    process.send_signal(number)
    done = finish(process)
    return Done(done.code, done.out, seen + done.log)


def see(done: Done, code: ExitCode, says: str) -> None:
    """Check how a command line ended: with this code and, where that is not 0, with one sentence that matches.

    A sentence says what is wrong and, after a semicolon, what to do.
    """
    assert done.code == code, done.log
    flat = " ".join(done.log.split())
    assert re.search(says, flat), done.log
    if code != ExitCode.OK:
        assert len(re.findall(r"\berror: |❌", done.log)) == 1, done.log
        assert done.log.replace("\n", "").isprintable() and len(re.split(r"\berror: |❌", flat)[1]) < 1000, done.log


def see_refused(done: Done, code: ExitCode, says: str) -> None:
    """As `see`, for a training run: its last line of stdout tells the same."""
    see(done, code, says)
    assert done.report["outcome"] == "failed" and done.report["exit_code"] == code
    assert re.search(says, " ".join(done.report["message"].split())), done.report


def tiny_trainer(trainee: Trainee, *flags: str, **changes: Any) -> Trainer:
    """What trains a tiny model on text.txt, in this process.

    Args:
        trainee: whose text.
        flags: of train_transformer.py.
        changes: other fields of the settings than the flags give.
    """
    asked = read_settings([*TINY, "--device", "cpu", "--num_threads", "1", "--model_path", str(trainee.model), *flags])
    settings = replace(resolve_settings(asked, trainee.text), **changes)
    corpus = load_corpus(trainee.text, settings.source_length + settings.target_length)
    settings = with_text_defaults(settings, corpus)
    return Trainer(settings, corpus, new_state(run_identity(settings, corpus.sha256), None))
