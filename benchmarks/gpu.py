"""How fast the suite trains and generates on an NVIDIA GPU, and how good its default run is, in seven minutes.

    python benchmarks/gpu.py                                     # all parts, tables as they come
    python benchmarks/gpu.py --parts speed target --nanogpt ../nanoGPT

Every part has a time limit of its own, and one that fails or runs out of time leaves the others alone. nanoGPT is its
own repository where `--nanogpt` names a checkout (github.com/karpathy/nanoGPT), else the model of benchmarks/peers.py
with bf16 autocast and `torch.compile`; its GPU recipe is config/train_shakespeare_char.py: 64 blocks of 256 characters.
Losses are nats per character on tiny Shakespeare, ours by the suite's protocol unless it says random blocks.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_machine, markdown_table
from benchmarks.peers import NanoGPT, NanoGPTRecipe
from benchmarks.time_to_loss import random_block_loss
from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.corpus import Corpus, load_corpus
from charseq2seq.device import torch_dtype
from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.options import read_settings, resolve_settings
from charseq2seq.training.cuda_graph import GraphedStep
from charseq2seq.training.resume import State
from charseq2seq.training.text_defaults import with_text_defaults
from charseq2seq.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.4697  # nanoGPT's published loss, random blocks
TARGET_RUN = ["--size", "tiny", "--batch_size", "32", "--max_epochs", "8"]
GPU_RECIPE = NanoGPTRecipe(num_layers=6, num_heads=6, d_model=384, block=256, batch_size=64, iterations=5000)


class PartTimeoutError(Exception):
    """A part of this benchmark took longer than it may."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End a block by an exception when its time is over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise PartTimeoutError(f"more than {seconds} seconds")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


# --- speed of a step


def trainer_of(corpus: Corpus, text: Path, *arguments: str) -> Trainer:
    """A trainer as the command line makes it, whose files nobody keeps."""
    model_path = Path(tempfile.mkdtemp()) / "model.pth"
    flags = ["--data_path", str(text), "--model_path", str(model_path), "--device", "cuda", *arguments]
    settings = with_text_defaults(resolve_settings(read_settings(flags), text), corpus)
    return Trainer(settings, corpus, State(identity={}))


def kernels(work: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds of the kernels that `work` starts, and how many there are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    events = record.key_averages()
    return sum(event.self_device_time_total for event in events) / 1e3, sum(event.count for event in events)


def speed(args: argparse.Namespace) -> Iterable[list[str]]:
    """Training steps, every source length captured before the clock starts."""
    corpus = load_corpus(args.data_path, 256)
    yield ["size", "batch", "ms a step", "kernels, ms", "step ÷ kernels", "launches", "characters/s"]
    for size, batch in (("tiny", 128), ("small", 128), ("small", 256), ("base", 128), ("base", 256)):
        trainer = trainer_of(corpus, args.data_path, "--size", size, "--batch_size", str(batch), "--max_steps", "9999")
        assert isinstance(trainer.step, GraphedStep)
        while len(trainer.step.graphs) < 6:
            trainer.train_step()
        torch.cuda.synchronize()
        started, steps = time.perf_counter(), 100
        for _ in range(steps):
            trainer.train_step()
        torch.cuda.synchronize()
        ms = (time.perf_counter() - started) / steps * 1e3
        graph, _ = trainer.step.graphs[trainer.master.source_length]
        kernel_ms, launches = kernels(graph.replay)
        characters = batch * trainer.master.target_length / ms * 1e3
        figures = [f"{ms:.2f}", f"{kernel_ms:.2f}", f"{ms / kernel_ms:.2f}", f"{launches:,}", f"{characters:,.0f}"]
        yield [size, str(batch), *figures]
        del trainer, graph
        torch.cuda.empty_cache()


def nanogpt(args: argparse.Namespace) -> Iterable[list[str]]:
    """nanoGPT's GPU recipe, compiled; milliseconds an iteration after the first hundred."""
    yield ["nanoGPT", "ms an iteration", "characters/s"]
    name = "its own code" if args.nanogpt else "benchmarks/peers.py"
    milliseconds = own_nanogpt(args) if args.nanogpt else peer_nanogpt()
    for which, ms in (("median", statistics.median(milliseconds)), ("fastest", min(milliseconds))):
        yield [f"{name}, {which}", f"{ms:.2f}", f"{GPU_RECIPE.batch_size * GPU_RECIPE.block / ms * 1e3:,.0f}"]


def own_nanogpt(args: argparse.Namespace) -> list[float]:
    """Run train.py of a checkout on the same text."""
    corpus = load_corpus(args.data_path, 256)
    folder = args.nanogpt / "data" / "shakespeare_char"
    folder.mkdir(parents=True, exist_ok=True)
    ids = corpus.ids.astype(np.uint16) - 1  # there is no start token there
    ids[: corpus.num_train].tofile(folder / "train.bin")
    ids[corpus.num_train :].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(corpus.vocabulary) - 1}))
    flags = ["--max_iters=500", "--eval_interval=100000", "--eval_iters=1", "--log_interval=10", "--compile=True"]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
    done = subprocess.run(command, cwd=args.nanogpt, capture_output=True, text=True, check=False)
    times = [float(found) for found in re.findall(r"iter \d+: .* time ([\d.]+)ms", done.stdout)]
    if len(times) < 20:
        raise RuntimeError(f"nanoGPT ended with {done.returncode}: {done.stderr[-300:]}")
    return times[10:]


def peer_nanogpt() -> list[float]:
    """The recipe's steps with the model of benchmarks/peers.py, without the dropout of 0.2 that it has."""
    torch.manual_seed(0)
    model = NanoGPT(65, GPU_RECIPE).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=GPU_RECIPE.betas, fused=True)
    logits_of = torch.compile(model.logits)
    blocks = torch.randint(65, (GPU_RECIPE.batch_size, GPU_RECIPE.block + 1), device="cuda")
    times = []
    for _ in range(300):
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            logits = logits_of(blocks[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GPU_RECIPE.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return times[100:]


# --- generating


def generation(args: argparse.Namespace) -> Iterable[list[str]]:
    """Base, one stream and 64, on the GPU; one stream on the CPU beside it."""
    corpus = load_corpus(args.data_path, 256)
    yield ["base generates", "characters/s"]
    model = trainer_of(corpus, args.data_path, "--size", "base", "--max_steps", "10").master
    sampling, length = Sampling(), 1200
    for name, device, streams in (("one stream", "cuda", 1), ("64 streams", "cuda", 64), ("one stream, CPU", "cpu", 1)):
        generator = TextGenerator(model.to(device), corpus.vocabulary)
        characters = length if device == "cuda" else 200
        for timed in (False, True):
            started = time.perf_counter()
            list(generator.samples("ROMEO:", characters if timed else 50, sampling, streams))
            seconds = time.perf_counter() - started
        yield [name, f"{streams * characters / seconds:,.0f}"]


# --- whole runs


def train(args: argparse.Namespace, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run train_transformer.py; its report, with the seconds that the whole command took."""
    command = [sys.executable, str(ROOT / "train_transformer.py"), "--mode", "train", "--resume", "never"]
    started = time.perf_counter()
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1])) | {"whole_command": seconds}


def target(args: argparse.Namespace) -> Iterable[list[str]]:
    """Seconds from the command to nanoGPT's published loss by nanoGPT's protocol."""
    yield ["run", f"random blocks (nanoGPT: {TARGET})", "ours", "training, s", "whole command, s"]
    corpus = load_corpus(args.data_path, 256)
    with tempfile.TemporaryDirectory() as folder:
        report = train(args, Path(folder), "--data_path", str(args.data_path), *TARGET_RUN)
        checkpoint = load_checkpoint(Path(folder) / "transformer_model.pth")
    model = checkpoint.build_model().set_precision(torch_dtype(str(checkpoint.training_args["precision"]))).cuda()
    loss = random_block_loss(model, corpus.ids[corpus.num_train :], 256, 1000)
    seconds = [f"{report[name]:.1f}" for name in ("training_seconds", "whole_command")]
    yield [f"`{' '.join(TARGET_RUN)}`", f"{loss:.4f}", f"{report['nats_per_char']:.4f}", *seconds]


def defaults(args: argparse.Namespace) -> Iterable[list[str]]:
    """The run that needs no flag."""
    yield ["text", "seed", "nats per character", "best step", "training, s", "whole command, s"]
    for text in (args.data_path, args.plays):
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                where = ["--data_path", str(text)] if text else []
                report = train(args, Path(folder), *where, "--seed", str(seed))
            best = f"{report['best_step']:,} of {report['steps']:,}"
            seconds = [f"{report[name]:.1f}" for name in ("training_seconds", "whole_command")]
            yield [text.name if text else "the plays", str(seed), f"{report['nats_per_char']:.4f}", best, *seconds]


def tests(args: argparse.Namespace) -> Iterable[list[str]]:
    """The CUDA tests."""
    yield ["tests", "result"]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-n", "8", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    failures = [line[:200] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield ["tests/test_cuda.py", "; ".join([done.stdout.strip().splitlines()[-1], *failures])]


# Each with the most seconds that it may take.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterable[list[str]]], int]] = {
    "speed": (speed, 60),
    "nanogpt": (nanogpt, 90),
    "generation": (generation, 30),
    "target": (target, 40),
    "defaults": (defaults, 240),
    "tests": (tests, 90),
}


def run_part(name: str, args: argparse.Namespace) -> None:
    """Print a part's table, or as much of it as there is."""
    work, seconds = PARTS[name]
    rows: list[list[str]] = []
    try:
        with time_limit(seconds):
            for row in work(args):
                rows.append(row)
                print("   ".join(row), flush=True)
    except Exception as error:  # the other parts are still of use
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
    torch.cuda.empty_cache()
    if len(rows) > 1:
        print(f"\n{markdown_table(rows[0], rows[1:])}\n", flush=True)


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_text = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    parser.add_argument("--data_path", type=Path, default=default_text, help="tiny Shakespeare")
    parser.add_argument("--plays", type=Path, help="the default text, if it is not to be prepared")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; data/shakespeare_char in it is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="of the default runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here")
    args.data_path = args.data_path.resolve()
    args.plays, args.nanogpt = (path and path.resolve() for path in (args.plays, args.nanogpt))
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}. {describe_machine()}", flush=True)
    for name in args.parts:
        run_part(name, args)


if __name__ == "__main__":
    main()
