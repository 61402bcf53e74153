"""What every benchmark needs: the machine in one line, its arithmetic limit, fair rounds, and Markdown tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Measures something once and returns a figure, mostly seconds.
Measure = Callable[[], float]

PRECISIONS = ("fp32", "bf16")
_PRODUCT_REPEATS = 20


def describe_machine() -> str:
    """Processor, cores, PyTorch, threads, how busy the machine is, and the date."""
    import torch

    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    kernels = os.environ.get("OPENBLAS_CORETYPE")  # numpy's, where they are not left to its choice
    load += f", OPENBLAS_CORETYPE={kernels}" if kernels else ""
    return (
        f"Machine: {_processor()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}{load}; {time.strftime('%Y-%m-%d')}."
    )


def _processor() -> str:
    """The processor's name and the instructions that decide how fast bf16 is."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    name = str(capabilities.get("cpu_name", ""))
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    instructions = [flag for flag in ("avx512_bf16", "amx_bf16") if capabilities.get(flag)]
    return f"{name or platform.processor() or 'unknown processor'} ({', '.join(instructions) or 'no bf16 products'})"


def timed(work: Callable[[], object]) -> Measure:
    """A measure of how many seconds `work` takes."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def interleaved(measures: dict[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Figures of A, B, C, A, B, C, ...: whatever disturbs the machine disturbs all of them; one round is dropped."""
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            figure = measure()
            if number:
                figures[name].append(figure)
    return figures


def matrix_product_peak(rows: int, d_model: int, d_ff: int) -> float:
    """FLOP/s of the fastest bf16 matrix product that a training step of this size has.

    Args:
        rows: positions in a batch.
        d_model, d_ff: of the layers.
    """
    import torch

    def random(*size: int) -> Tensor:
        return torch.randn(size).bfloat16()

    peak = 0.0
    for inputs, outputs in ((d_model, d_model), (d_model, d_ff), (d_ff, d_model)):
        x, weight, gradient = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
        # Forward, gradient of the input, gradient of the weights.
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            measure = timed(partial(torch.matmul, left, right))
            seconds = min(measure() for _ in range(_PRODUCT_REPEATS))
            peak = max(peak, 2 * rows * inputs * outputs / seconds)
    return peak


@dataclass(frozen=True)
class Contender:
    """A system in a comparison.

    Attributes:
        name: as the table gives it.
        parameters: how many it has.
        is_peer: whether it is somebody else's.
        seconds: what a unit of work takes, by the name of the precision it is done in; one measure for every
            alternative the system has.
    """

    name: str
    parameters: int
    is_peer: bool
    seconds: Mapping[str, tuple[Measure, ...]]


@dataclass(frozen=True)
class Result:
    """What a contender achieved, in characters per second.

    Attributes:
        medians: by precision, of all rounds; of the alternatives the fastest.
        best: the highest of the medians.
        fastest: the fastest round of all.
    """

    contender: Contender
    medians: dict[str, float]
    best: float
    fastest: float


def compete(
    contenders: Sequence[Contender], characters: int, rounds: int, more: dict[str, Measure] | None = None
) -> tuple[list[Result], dict[str, list[float]]]:
    """Let all contenders, in all their precisions, take turns.

    Args:
        contenders: who takes part.
        characters: in a unit of work.
        rounds: how often each has its turn.
        more: other figures to take in every round.

    Returns:
        What each achieved, and the figures of `more`.
    """
    measures = {
        f"{contender.name}|{precision}|{number}": measure
        for contender in contenders
        for precision, alternatives in contender.seconds.items()
        for number, measure in enumerate(alternatives)
    }
    figures = interleaved(measures | (more or {}), rounds)
    results = []
    for contender in contenders:
        medians, fastest = {}, 0.0
        for precision in contender.seconds:
            times = [t for name, t in figures.items() if name.startswith(f"{contender.name}|{precision}|")]
            medians[precision] = characters / min(map(statistics.median, times))
            fastest = max(fastest, characters / min(map(min, times)))
        results.append(Result(contender, medians, max(medians.values()), fastest))
    return results, {name: figures[name] for name in more or {}}


def best_peer(results: Iterable[Result]) -> Result:
    """The peer that is fastest in its best precision."""
    return max((result for result in results if result.contender.is_peer), key=lambda result: result.best)


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A whole table."""
    return "\n".join([markdown_row(header), markdown_row("---" for _ in header), *map(markdown_row, rows)])


def resident_memory(which: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most since the last reset ("VmHWM"); 0 where unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # Linux only
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def peak_memory(work: Callable[[], object]) -> int:
    """How many bytes more than before this process takes while it works."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free already must not be taken unseen
    before = resident_memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    return resident_memory("VmHWM") - before
