"""What loss so many minutes buy: train_transformer.py itself, several seeds, scored by two protocols.

    python benchmarks/time_to_loss.py --minutes 1.58 --nanogpt               # beside nanoGPT's CPU recipe
    python benchmarks/time_to_loss.py --minutes 10 --seeds 1 2 3 -- --d_model 256 --num_heads 4

Every run is the command line as a user gives it, in a process of its own; arguments after `--` are passed on. The
minutes are those of --max_minutes: of training, the run's own evaluations included; "command" is all of the process,
from its start to the sample. Columns of loss, in nats per character:

- all: the suite's protocol on the whole validation split (`evaluate`: every character once, given the `source_length`
  characters before its window);
- unseen half: the same on the second half of the split, no character of which took part in choosing the weights;
- random blocks: nanoGPT's protocol. A block of B + 1 characters starts at a random place of the split; the last B are
  scored, each given the 1 to B characters before it *in the block* and nothing else (B is 256, as in nanoGPT's GPU
  recipe). An encoder-decoder reads the same characters. The first ones are written after a source of one character;
  as soon as there is a full source in the block, it is read, and the next `target_length` are written; then the window
  moves on, and only what was not yet scored counts. So every character has for context all of the block that stands
  before it, but no more than `source_length` + `target_length` - 1 characters. Places are drawn with a fixed seed, one
  in each of equal stretches of the split: the mean of free draws, with less noise.

With --nanogpt, nanoGPT's CPU recipe (benchmarks/peers.py; blocks of 64) takes turns with ours, once a seed. Its
seconds are those of its training steps alone. It is scored by the same functions: every character once, given 33 to 64
characters, and random blocks of 64, its own protocol. Both are scored in the precision they were trained in.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import describe_machine, markdown_row
from benchmarks.peers import NanoGPTRecipe, count_parameters, train_nanogpt
from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.console import log, run
from charseq2seq.corpus import Corpus, Ids, load_corpus
from charseq2seq.device import torch_dtype, tune
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.evaluation import evaluate
from encoder_decoder_transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
TINY_SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
BLOCK = 256
_BATCH_SIZE = 32
_BLOCKS_SEED = 1337

HEADER = ["system", "seed", "parameters", "steps", "characters/s", "training s", "command s"]
LOSSES = ["all", "unseen half", "random blocks"]


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        system: whose.
        figures: steps, characters a second, seconds of training, seconds of the whole command (NaN: there is none).
        losses: in the order of `LOSSES`.
    """

    system: str
    seed: int
    parameters: int
    figures: tuple[int, float, float, float]
    losses: tuple[float, float, float]

    def cells(self) -> list[str]:
        """As the table gives it."""
        steps, speed, training, command = self.figures
        return [
            self.system,
            str(self.seed),
            f"{self.parameters:,}",
            f"{steps:,}",
            f"{speed:,.0f}",
            f"{training:.1f}",
            "" if math.isnan(command) else f"{command:.1f}",
            *(f"{loss:.4f}" for loss in self.losses),
        ]


# --- scoring


def block_windows(block: int, source_length: int, target_length: int) -> Iterator[tuple[int, int, int, int]]:
    """How an encoder-decoder scores the characters 1 to `block` of a block of `block` + 1.

    Yields:
        start, split, first, end: source is start..split, target split..end, and first..end is scored, ends exclusive.
    """
    first = 1
    while first <= block:
        end = min(first + target_length, block + 1)
        if first < source_length:  # a source of all there is, until it is full
            split, end = first, min(end, source_length)
        else:  # a full source as far back as the target allows
            split = max(source_length, end - target_length)
        yield max(0, split - source_length), split, first, end
        first = end


def random_block_loss(model: Transformer, ids: Ids, block: int, num_blocks: int) -> float:
    """nanoGPT's protocol; see the head of this file.

    Args:
        model: in the precision it was trained in; also a `NanoGPT`.
        ids: the validation split.
        block: characters scored in a block.
        num_blocks: blocks drawn.
    """
    generator = np.random.default_rng(_BLOCKS_SEED)
    places = len(ids) - block  # where a block can start
    starts = ((np.arange(num_blocks) + generator.random(num_blocks)) * places / num_blocks).astype(np.int64)
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for i in range(0, num_blocks, _BATCH_SIZE):
            rows = starts[i : i + _BATCH_SIZE, None] + np.arange(block + 1)
            total += _summed_loss(model, torch.from_numpy(ids[rows].astype(np.int64)).to(model.device))
    return total / (num_blocks * block)


def _summed_loss(model: Transformer, blocks: torch.Tensor) -> float:
    """Of all characters of blocks (batch, block + 1) but the first."""
    total = 0.0
    windows = block_windows(blocks.shape[1] - 1, model.source_length, model.target_length)
    for start, split, first, end in windows:
        logits = model(blocks[:, start:split], blocks[:, split:end])[:, first - split :]
        total += float(F.cross_entropy(logits.flatten(0, 1), blocks[:, first:end].flatten(), reduction="sum"))
    return total


def losses_of(model: Transformer, corpus: Corpus, block: int, num_blocks: int) -> tuple[float, float, float]:
    """What `LOSSES` names."""
    first = corpus.num_train
    middle = first + (len(corpus.ids) - first) // 2
    return (
        evaluate(model, corpus.ids, first).nats_per_char,
        evaluate(model, corpus.ids, middle).nats_per_char,
        random_block_loss(model, corpus.ids[first:], block, num_blocks),
    )


# --- runs


def run_ours(args: argparse.Namespace, corpus: Corpus, seed: int, folder: Path) -> Row:
    """Train with the command line, then load and score the model file."""
    model_path = folder / f"seed_{seed}.pth"
    command = [sys.executable, str(ROOT / "train_transformer.py"), "--mode", "train", "--resume", "never"]
    command += ["--data_path", str(args.data_path), "--model_path", str(model_path), "--seed", str(seed)]
    command += ["--max_minutes", str(args.minutes), *args.arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SuiteError(f"the run of seed {seed} ended with status {done.returncode}.", ExitCode.BAD_DATA)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    checkpoint = load_checkpoint(model_path)
    model = checkpoint.build_model().set_precision(torch_dtype(str(checkpoint.training_args["precision"])))
    metrics = checkpoint.metrics
    losses = losses_of(model, corpus, args.block, args.blocks)
    if abs(losses[0] - metrics["nats_per_char"]) > 1e-3:
        log(f"note: the run itself reports {metrics['nats_per_char']:.4f}, scored again it is {losses[0]:.4f}.")
    return Row(
        "**ours**",
        seed,
        count_parameters(model),
        (metrics["steps"], metrics["characters_per_second"], metrics["seconds"], report["duration_seconds"]),
        losses,
    )


def run_nanogpt(args: argparse.Namespace, corpus: Corpus, seed: int) -> Row:
    """Train nanoGPT's CPU recipe here, and score it."""
    recipe = NanoGPTRecipe(iterations=args.nanogpt_steps)
    log(f"nanoGPT's CPU recipe, seed {seed}: {recipe.iterations:,} iterations")
    model, seconds = train_nanogpt(corpus.train_ids, len(corpus.vocabulary), recipe, seed)
    characters = recipe.iterations * recipe.batch_size * recipe.block
    return Row(
        "nanoGPT",
        seed,
        count_parameters(model),
        (recipe.iterations, characters / seconds, seconds, math.nan),
        losses_of(cast("Transformer", model), corpus, recipe.block, args.blocks),
    )


def summary(system: str, rows: Sequence[Row]) -> str:
    """Mean and standard deviation, one line of the table."""
    losses = list(zip(*(row.losses for row in rows), strict=True))
    cells = [f"{statistics.mean(row.figures[i] for row in rows):,.0f}" for i in (0, 1)]
    cells += [f"{statistics.mean(row.figures[2] for row in rows):,.1f}"]
    cells += [f"{statistics.mean(row.figures[3] for row in rows):,.1f}".replace("nan", "")]
    spreads = [f"{statistics.mean(loss):.4f} ± {_deviation(loss):.4f}".replace(" ± nan", "") for loss in losses]
    return markdown_row([f"{system}, mean of {len(rows)}", "", "", *cells, *spreads])


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what stands after `--` becomes `arguments`."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- arguments of train_transformer.py]",
    )
    parser.add_argument("--data_path", type=Path, default=TINY_SHAKESPEARE, metavar="FILE", help="(tiny Shakespeare)")
    parser.add_argument("--minutes", type=float, default=95 / 60, metavar="M", help="of training (default: 95 seconds)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    parser.add_argument("--block", type=int, default=BLOCK, metavar="N", help="of our random blocks (%(default)s)")
    parser.add_argument("--blocks", type=int, default=400, metavar="N", help="random blocks (%(default)s)")
    parser.add_argument("--nanogpt", action="store_true", help="nanoGPT's CPU recipe beside every run")
    parser.add_argument("--nanogpt_steps", type=int, default=2000, metavar="N", help="of its recipe (%(default)s)")
    args = parser.parse_args(words[:end])
    args.arguments = words[end + 1 :]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run, score, and print the table line by line."""
    args = parse_arguments(argv)
    machine = describe_machine()
    tune()  # as the suite's trainer does; nanoGPT has it too
    corpus = load_corpus(args.data_path, 1)
    validation = len(corpus.ids) - corpus.num_train
    ours: list[Row] = []
    nanogpt: list[Row] = []
    print(f"Loss in nats per character on {corpus.name} (split 90/10, {validation:,} characters to validate on) after")
    print(
        f"{args.minutes:.3g} minutes of train_transformer.py{' '.join(['', *args.arguments])}. Protocols: all = every"
    )
    print("validation character once, the suite's `evaluate`; unseen half = its second half, which chose no weights;")
    print(
        f"random blocks = nanoGPT's, {args.blocks} blocks of {args.block} (nanoGPT: of 64), context inside the block.\n"
    )
    print(markdown_row([*HEADER, *LOSSES]))
    print(markdown_row("---" for _ in [*HEADER, *LOSSES]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            ours.append(run_ours(args, corpus, seed, Path(folder)))
            print(markdown_row(ours[-1].cells()), flush=True)
            if args.nanogpt:
                nanogpt.append(run_nanogpt(args, corpus, seed))
                print(markdown_row(nanogpt[-1].cells()), flush=True)
    print(summary("**ours**", ours))
    if nanogpt:
        print(summary("nanoGPT", nanogpt))
        ratio = statistics.mean(row.figures[2] for row in ours) / statistics.mean(row.figures[2] for row in nanogpt)
        print(f"\nOur training took {ratio:.2f} × as long as nanoGPT's.")
    print(f"\n{machine}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
