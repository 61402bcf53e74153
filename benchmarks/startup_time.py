"""How soon the suite answers: --help, a wrong argument, the first training step, an evaluation.

    python benchmarks/startup_time.py

Everything but the evaluation is a fresh process, timed from its start: to its end, or, for the training step, to the
line of the log that tells of step 1 (the process is then killed). The corpus is prepared before. The evaluation is the
suite's `evaluate` on 111,540 random characters at the reference shape, in the precision that training would choose.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import Measure, describe_machine, interleaved, markdown_table, timed
from benchmarks.peers import Shape, add_shape_arguments, shape_of
from charseq2seq.console import run
from charseq2seq.device import choose_precision, torch_dtype, tune
from charseq2seq.training.evaluation import evaluate
from data.prepare import prepare
from encoder_decoder_transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
VALIDATION_CHARACTERS = 111_540
FIRST_STEP = re.compile(r"\bstep 1 \(")

# What is aimed at, in seconds.
LIMITS = {"--help": 0.2, "a wrong argument": 0.2, "push --help": 0.2, "first training step": 5.0, "evaluation": 5.0}


def command(script: str, *arguments: str, status: int = 0) -> Measure:
    """Seconds of a whole process."""

    def work() -> None:
        done = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, check=False)
        assert done.returncode == status, done.stderr.decode()

    return timed(work)


def first_step(arguments: Sequence[str]) -> Measure:
    """Seconds from the start of a training process to its first step."""

    def seconds() -> float:
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, str(ROOT / "train_transformer.py"), "--mode", "train", "--log_interval", "1"]
            words += ["--model_path", str(Path(folder) / "model.pth"), *arguments]
            start = time.perf_counter()
            with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                for line in process.stderr:
                    lines.append(line)
                    if FIRST_STEP.search(line):
                        taken = time.perf_counter() - start
                        process.kill()
                        return taken
        raise AssertionError("no first step:\n" + "".join(lines))

    return seconds


def evaluation(shape: Shape, characters: int) -> Measure:
    """Seconds of scoring a text of random characters."""
    precision, _ = choose_precision("auto", "cpu")
    model = Transformer(**shape.model()).to(torch_dtype(precision))
    ids = np.random.default_rng(0).integers(1, shape.vocab_size, characters + shape.source_length, dtype=np.int32)
    return timed(lambda: evaluate(model, ids, shape.source_length))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of everything (%(default)s)")
    parser.add_argument("--data_path", type=Path, metavar="FILE", help="text to train on (the default corpus)")
    parser.add_argument(
        "--characters", type=int, default=VALIDATION_CHARACTERS, metavar="N", help="to evaluate on (%(default)s)"
    )
    add_shape_arguments(parser)
    args = parser.parse_args(argv)
    if args.data_path is None:
        prepare()
    machine = describe_machine()
    torch.manual_seed(0)
    tune()
    text = [] if args.data_path is None else ["--data_path", str(args.data_path)]
    measures = {
        "--help": command("train_transformer.py", "--help"),
        "a wrong argument": command("train_transformer.py", "--max_steps", "none", status=2),
        "push --help": command("push_to_huggingface.py", "--help"),
        "first training step": first_step(text),
        "evaluation": evaluation(shape_of(args), args.characters),
    }
    figures = interleaved(measures, args.repeats)
    print(
        f"Seconds, of {args.repeats} interleaved turns after one that is dropped. First training step: from the command"
    )
    print(f"to step 1, corpus prepared. Evaluation: {args.characters:,} characters, {shape_of(args)}.\n")
    rows = (
        [name, f"{statistics.median(times):.3f}", f"{min(times):.3f}", f"≤ {LIMITS[name]:g}"]
        for name, times in figures.items()
    )
    print(markdown_table(["what", "median", "fastest", "aim"], rows))
    print(f"\n{machine}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
