"""Beyond one core: large text, two processes, and what more machines would do.

    python benchmarks/scaling.py                     # three tables, about ten minutes
    python benchmarks/scaling.py --megabytes 100     # a smaller text

Text: a synthetic text of so many megabytes is generated into a temporary folder (and removed with it), English-like,
with a rare non-ASCII character. Reading it for its hash and alphabet and turning it into ids are timed apart, in a
process that does nothing else; its peak of resident memory includes the interpreter and numpy. Training: steps of the
same model on the whole text and on its first megabyte take turns; resident memory is the whole process's, with what is
mapped of the ids' file, which the system may take back at any time.

Processes: torchrun with one and with two processes of one thread each, gloo on loopback, at the same global batch and
at the same batch a process, characters per second as the run itself reports them. All-reduce: seconds for several
sizes, fitted by least squares to `latency + bytes / bandwidth`.

Projection: a data-parallel step takes computing + communication. Computing is 6 FLOP a parameter and character at the
stated FLOP/s of a device. Communication is the ring all-reduce of bf16 gradients, 2 (n - 1) / n of their bytes over the
slowest link, and a latency for each of its 2 (n - 1) hops within a node and between nodes; half of computing (the
backward pass's later part) hides what it can. The links and devices are assumptions, printed with the table, not
measurements; only the first rows are measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import describe_machine, markdown_table, matrix_product_peak, timed
from charseq2seq.console import run
from charseq2seq.options import SIZES
from encoder_decoder_transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000
SIZES_OF_MESSAGES = [1 << power for power in range(12, 25, 2)]  # bytes

# Reads a text and makes its ids, in a process of its own; prints what that took.
READ = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from charseq2seq.corpus import read_text
from charseq2seq.vocabulary import CharVocabulary
start = time.perf_counter()
text = read_text(Path(sys.argv[2]))
read = time.perf_counter()
CharVocabulary(text.alphabet).encode_pieces(text.pieces)
encoded = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"read": read - start, "encode": encoded - read, "peak": peak}))
"""


def write_text(path: Path, megabytes: float) -> None:
    """A text of random words, the same every time."""
    generator = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    shares = 1 / np.arange(1, 27)
    words = [
        "".join(generator.choice(letters, size, p=shares / shares.sum())) for size in generator.integers(2, 9, 5000)
    ]
    words += ["\n", ".\nROMEO:", "café"]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * MEGABYTE:
            written += file.write(" ".join(words[index] for index in generator.integers(len(words), size=20_000)))


def child(command: Sequence[str], **environment: str) -> str:
    """The stdout of a process."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(launcher: Sequence[str], home: Path, *arguments: str) -> dict[str, Any]:
    """Train for some steps; returns what the model file says of it, with the peak of resident memory in bytes."""
    model = home / "model.pth"
    script = [str(ROOT / "train_transformer.py"), "--mode", "train", "--model_path", str(model), "--resume", "never"]
    measured = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
    measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
    printed = child([sys.executable, "-c", measured, *launcher, *script, *arguments], GLOO_SOCKET_IFNAME="lo")
    metrics = torch.load(model, weights_only=True)["metrics"]
    return dict(metrics) | {"peak": int(printed.split()[-1])}


def text_table(args: argparse.Namespace, home: Path) -> str:
    """How fast a large text is read, and what training on it takes."""
    large, small = home / "large.txt", home / "small.txt"
    write_text(large, args.megabytes)
    with large.open("rb") as file:
        small.write_bytes(file.read(MEGABYTE).decode(errors="ignore").encode())
    size = large.stat().st_size / MEGABYTE
    command = [sys.executable, "-c", READ, str(ROOT), str(large)]
    first, again = (json.loads(child(command).splitlines()[-1]) for _ in range(2))
    rows = [
        ["reading: hash, alphabet", f"{size / first['read']:,.0f} MB/s", f"{first['peak'] / MEGABYTE:,.0f} MB"],
        ["ids, the first time", f"{size / first['encode']:,.0f} MB/s", ""],
        ["both", f"{size / (first['read'] + first['encode']):,.0f} MB/s", ""],
        ["both, ids found beside the text", f"{size / (again['read'] + again['encode']):,.0f} MB/s", ""],
    ]
    speeds: dict[str, list[float]] = {"small.txt": [], "large.txt": []}
    peaks = dict.fromkeys(speeds, 0)
    for _ in range(args.rounds):
        for name, found in speeds.items():
            metrics = train([sys.executable], home, "--data_path", str(home / name), *args.train)
            found.append(metrics["characters_per_second"])
            peaks[name] = max(peaks[name], metrics["peak"])
    for name, label in (("small.txt", "training on 1 MB"), ("large.txt", f"training on {size:,.0f} MB")):
        speed = statistics.median(speeds[name])
        rows.append([label, f"{speed:,.0f} characters/s", f"{peaks[name] / MEGABYTE:,.0f} MB"])
    return markdown_table([f"text of {size:,.0f} MB", "speed", "peak of resident memory"], rows)


def launcher(processes: int, script: str | None = None) -> list[str]:
    """The command that starts so many processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return words + ([script] if script else [])


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Attributes:
        latency: seconds of each.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float


def measure_link(processes: int) -> tuple[Link, list[tuple[int, float]]]:
    """All-reduce between processes on this machine, and the figures it was fitted to: bytes, seconds."""
    printed = child([*launcher(processes, __file__), "--worker"], GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    figures = [(int(size), float(seconds)) for size, seconds in map(str.split, printed.splitlines())]
    sizes, seconds = np.array(figures).T
    # Relative errors count: the small messages tell of the latency, the large ones of the bandwidth.
    weights = 1 / seconds
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) * weights[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(sizes), rcond=None)
    return Link(max(float(latency), 0.0), 1 / float(per_byte)), figures


def worker() -> None:
    """One of the processes of `measure_link`; the first prints."""
    torch.distributed.init_process_group("gloo")
    for size in SIZES_OF_MESSAGES:
        message, times = torch.zeros(size // 4), []
        for _ in range(11):
            torch.distributed.barrier()
            times.append(timed(partial(torch.distributed.all_reduce, message))())
        if torch.distributed.get_rank() == 0:
            print(size, statistics.median(times[1:]), flush=True)
    torch.distributed.destroy_process_group()


def process_table(args: argparse.Namespace, home: Path) -> str:
    """One process and two, as the runs report themselves."""
    text = ["--data_path", str(home / "small.txt"), "--num_threads", "1", *args.train]
    batch = args.batch_size
    plans = {
        "1 process": (1, batch),
        "2 processes, same batch": (2, batch),
        "2 processes, twice the batch": (2, 2 * batch),
    }
    speeds: dict[str, list[float]] = {name: [] for name in plans}
    losses = dict.fromkeys(plans, 0.0)
    for _ in range(args.rounds):
        for name, (processes, windows) in plans.items():
            metrics = train(launcher(processes), home, *text, "--batch_size", str(windows))
            speeds[name].append(metrics["characters_per_second"])
            losses[name] = metrics["nats_per_char"]
    one = statistics.median(speeds["1 process"])
    rows = (
        [
            name,
            str(plans[name][1]),
            f"{(speed := statistics.median(found)):,.0f}",
            f"{speed / one:.2f}",
            f"{losses[name]:.4f}",
        ]
        for name, found in speeds.items()
    )
    return markdown_table(["one thread each", "windows a step", "characters/s", "× one process", "loss"], rows)


@dataclass(frozen=True)
class Cluster:
    """Assumed hardware."""

    name: str
    devices: int
    nodes: int
    flops: float
    inside: Link
    between: Link


# Assumptions: 40 % of an H100's 990 TFLOP/s of dense bf16, half of NVLink 4's 450 GB/s a direction, and for each node
# eight 400 Gb/s adapters at 80 %.
GPU = 0.4 * 990e12
NVLINK, NETWORK = Link(5e-6, 225e9), Link(15e-6, 8 * 50e9 * 0.8)
CLUSTERS = [
    Cluster("1 GPU", 1, 1, GPU, NVLINK, NETWORK),
    Cluster("8 GPUs, one node", 8, 1, GPU, NVLINK, NETWORK),
    Cluster("512 GPUs, 64 nodes", 512, 64, GPU, NVLINK, NETWORK),
]


def step_seconds(cluster: Cluster, parameters: int, characters: int) -> float:
    """Of a data-parallel step with so many characters on each device."""
    computing = 6 * parameters * characters / cluster.flops
    within, nodes = cluster.devices // cluster.nodes, cluster.nodes
    size = 2 * parameters  # bytes of bf16 gradients
    communication = 0.0
    for members, link in ((within, cluster.inside), (nodes, cluster.between)):
        if members > 1:
            communication += 2 * (members - 1) * link.latency + 2 * (members - 1) / members * size / link.bandwidth
    return computing + max(0.0, communication - computing / 2)


def projection_table(link: Link, flops: float, windows: int) -> str:
    """What more devices would do, for every size."""
    here = [Cluster(f"{n} process{'es' * (n > 1)} of this machine", n, 1, flops, link, link) for n in (1, 2)]
    rows = []
    for size, shape in SIZES.items():
        with torch.device("meta"):
            config: dict[str, Any] = {"vocab_size": 70, **shape}
            parameters = sum(weight.numel() for weight in Transformer(**config).parameters())
        for cluster in [*here, *CLUSTERS]:
            characters = windows * 192
            seconds = step_seconds(cluster, parameters, characters)
            alone = step_seconds(dataclasses.replace(cluster, devices=1, nodes=1), parameters, characters)
            rows.append(
                [
                    size,
                    f"{parameters:,}",
                    cluster.name,
                    f"{cluster.devices * characters / seconds:,.0f}",
                    f"{alone / seconds:.0%}",
                ]
            )
    return markdown_table(["size", "parameters", "on", "characters/s", "efficiency"], rows)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what stands after `--` goes to train_transformer.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, metavar="N", help="of text (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of every run (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of a training run (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="windows a step (%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("train", nargs="*", help="arguments for train_transformer.py, after --")
    args = parser.parse_args(argv)
    args.train += ["--max_steps", str(args.steps), "--eval_interval", str(args.steps)]
    return args


def sections(args: argparse.Namespace, home: Path) -> Iterator[str]:
    """The tables, one after the other."""
    yield text_table(args, home)
    yield process_table(args, home)
    link, figures = measure_link(2)
    yield markdown_table(
        ["all-reduce of bytes", "milliseconds"], ([f"{size:,}", f"{1e3 * s:.3f}"] for size, s in figures)
    )
    yield f"Fit: {1e6 * link.latency:.0f} µs and {link.bandwidth / 1e9:.2f} GB/s (2 processes, gloo, loopback)."
    torch.set_num_threads(1)
    flops = 0.6 * matrix_product_peak(3072, 192, 768)
    yield projection_table(link, flops, args.batch_size)
    yield (
        f"Assumed: {flops / 1e9:,.0f} GFLOP/s a process here (60 % of the measured bf16 product), 396 TFLOP/s a GPU, "
        f"225 GB/s within and 320 GB/s between nodes, {args.batch_size} windows of 192 characters a device; optimizer "
        "and reading left out. Small models on many devices need larger batches a device: compare the efficiencies."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse_arguments(argv)
    if args.worker:
        worker()
        return 0
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for section in sections(args, Path(folder)):
            print(section + "\n", flush=True)
    print(machine)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
