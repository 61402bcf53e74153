"""Training speed beside busy programs: what no, one and two of them leave of it.

    python benchmarks/busy_machine.py --nanogpt
    python benchmarks/busy_machine.py --environment GOMP_SPINCOUNT=1000 --environment OMP_WAIT_POLICY=passive

A neighbour is a process that computes without end. Every run is a process of its own, because how threads wait for one
another is settled when PyTorch is loaded: the default training of train_transformer.py, once as it is and once in every
environment that is named, and nanoGPT's CPU recipe (benchmarks/peers.py). All systems and numbers of neighbours take
turns. A cell gives the median of the rounds in target characters per second of training steps, what fraction that is of
the same system's speed without neighbours, and the slowest and the fastest round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Measure, describe_machine, interleaved, markdown_table
from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.console import log, run
from data.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOUR = "while True: pass"
CHARACTERS = 300_000
NANOGPT = """
import sys
from pathlib import Path
from benchmarks.peers import NanoGPTRecipe, train_nanogpt
from charseq2seq.corpus import load_corpus
corpus, recipe = load_corpus(Path(sys.argv[1]), 256), NanoGPTRecipe(iterations=int(sys.argv[2]))
_, seconds = train_nanogpt(corpus.train_ids, len(corpus.vocabulary), recipe, 1)
print(recipe.iterations * recipe.batch_size * recipe.block / seconds)
"""


@contextlib.contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many busy programs, until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_command(words: Sequence[str], more: dict[str, str]) -> str:
    """Run Python to its end, with nothing but `more` to say how threads wait, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = kept | {"PYTHONPATH": str(ROOT)} | more
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {done.stderr[-500:]}")
    log("\n".join(line.partition(" threads ")[2] for line in done.stderr.splitlines() if " threads " in line))
    return done.stdout


def ours(text: Path, arguments: Sequence[str], more: dict[str, str]) -> float:
    """Characters per second of a training run with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pth"
        words = [str(ROOT / "train_transformer.py"), "--data_path", str(text), "--model_path", str(model), *arguments]
        run_command(words, more)
        return float(load_checkpoint(model).metrics["characters_per_second"])


def nanogpt(text: Path, iterations: int) -> float:
    """Characters per second of so many iterations of nanoGPT's recipe."""
    return float(run_command(["-c", NANOGPT, str(text), str(iterations)], {}))


def measures_of(args: argparse.Namespace, text: Path) -> dict[str, Measure]:
    """What is measured, by the name of the system and the number of its neighbours."""
    arguments = ["--max_steps", str(args.steps), *args.arguments]
    systems: dict[str, Measure] = {"ours": partial(ours, text, arguments, {})}
    for variable in args.environment:
        name, _, value = variable.partition("=")
        systems[f"ours, {variable}"] = partial(ours, text, arguments, {name: value})
    if args.nanogpt:
        systems["nanoGPT"] = partial(nanogpt, text, args.iterations)

    def beside(number: int, speed: Measure) -> float:
        with neighbours(number):
            return speed()

    return {
        f"{name}|{number}": partial(beside, number, speed)
        for number in args.neighbours
        for name, speed in systems.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns after one that is dropped (3)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of our training (%(default)s)")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=VALUE", help="train in this one too; repeatable"
    )
    parser.add_argument("--nanogpt", action="store_true", help="nanoGPT's CPU recipe takes turns too")
    parser.add_argument("--iterations", type=int, default=400, metavar="N", help="of nanoGPT's (%(default)s)")
    parser.add_argument("--data_path", type=Path, metavar="FILE", help="text to train on (the default text)")
    parser.add_argument(
        "--arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to train_transformer.py"
    )
    args = parser.parse_args(argv)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"  # the beginning, so that the run's last evaluation does not take minutes
        text.write_text((args.data_path or prepare()).read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
        figures = interleaved(measures_of(args, text), args.rounds)
    rows = []
    for name in dict.fromkeys(key.partition("|")[0] for key in figures):
        speeds = {number: figures[f"{name}|{number}"] for number in args.neighbours}
        quiet = statistics.median(speeds[args.neighbours[0]])
        rows.append([name])
        for speed in speeds.values():
            median = statistics.median(speed)
            rows[-1].append(f"{median:,.0f}, {median / quiet:.0%} ({min(speed):,.0f} to {max(speed):,.0f})")
    print(f"Training speed beside busy programs, target characters per second, median of {args.rounds} rounds;")
    print(f"{args.steps} steps of our training a turn; in brackets the slowest and the fastest round.\n")
    header = ["system", *(f"{number} neighbour{'s' * (number != 1)}" for number in args.neighbours)]
    print(markdown_table(header, rows))
    print(f"\n{machine}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
