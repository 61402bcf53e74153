"""The device, its precision, and every setting that holds for the whole process: threads, allocator, denormals.

Also how many CPUs and how much memory a container or a scheduler leaves to this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from charseq2seq.console import log

if TYPE_CHECKING:
    import torch

    from encoder_decoder_transformer import Kernels

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h: the free memory that is kept, and the size from which on a
# block has pages of its own, which go back when it is freed (at most 32 MiB).
_MALLOC_LIMITS = {-1: 1 << 30, -3: 32 << 20}

_SPINS = "1000"  # how often a waiting thread of GNU's OpenMP looks before it sleeps; by default 300,000 times

_ROOT = Path("/")  # of /proc and /sys


def choose_device(asked: str) -> tuple[str, str]:
    """The device to use, and why; `device_problems` says whether it can be used."""
    if asked != "auto":
        return asked, f"device {asked}: asked for"
    device = next(name for name, there in _devices().items() if there)
    return device, f"device {device}: {'no GPU found' if device == 'cpu' else 'found, and faster than the CPU'}"


def _devices() -> dict[str, bool]:
    """The kinds of device, the best first, and whether this machine has them."""
    import torch

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def device_problems(device: str, precision: str = "auto") -> Iterator[str]:
    """What keeps this machine from computing on this device in this precision."""
    import torch

    if not _devices()[device]:
        remedy = "use --device auto, or install a PyTorch built for it (pytorch.org/get-started)."
        yield f"--device {device}: this PyTorch ({torch.__version__}) finds no such device; {remedy}"
    if precision == "fp16" and device == "cpu":
        yield "--precision fp16 is for GPUs; on a CPU use bf16 or fp32."


def choose_precision(asked: str, device: str) -> tuple[str, str]:
    """The precision of the forward and backward pass, and why."""
    import torch

    if asked != "auto":
        return asked, f"precision {asked}: asked for"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "precision bf16: this GPU computes in it"
        return "fp16", "precision fp16 with loss scaling: this GPU has no bf16"
    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "bf16", "precision bf16: this CPU has bf16 matrix products"
    return "fp32", f"precision fp32: this {'CPU' if device == 'cpu' else 'device'} has no fast bf16"


def describe_hardware(device: str) -> str:
    """The kind of hardware, without the machine's name."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name() if device == "cuda" else "Apple GPU (MPS)"
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'unknown CPU')}, {torch.get_num_threads()} threads"


def torch_dtype(precision: str) -> torch.dtype:
    """The torch type of a precision's name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_threads(asked: int | None) -> tuple[int, str]:
    """The number of CPU threads to compute with, and why: as many as there are CPUs for this process.

    How they wait is decided here too, so this comes before torch is imported.
    """
    cpus, reason = available_cpus()
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": a number for each level
    threads = asked or (int(variable) if variable.isdecimal() else 0)
    waiting = _choose_waiting(threads or math.ceil(cpus), cpus)
    if threads:
        reason = "asked for" if asked else "OMP_NUM_THREADS"
    else:
        import torch

        threads = min(torch.get_num_threads(), math.ceil(cpus))  # PyTorch may want only one a core
    return threads, f"threads {threads}: {'; '.join(filter(None, [reason, waiting]))}"


def available_cpus() -> tuple[float, str]:
    """How many CPUs this process may use, and what says so: the affinity that it was started with, a cgroup's quota."""
    machine = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = [quota / period for quota, period in _limits("cpu", "cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us")]
    if quotas and min(quotas) < ours:
        return min(quotas), f"the limit of this container or job is {min(quotas):g} CPUs"
    return ours, f"this process may use {ours} of {machine} CPUs" if ours < machine else f"{machine} CPUs"


def available_memory() -> int | None:
    """Bytes of memory for this process: the machine's, or the limit of its cgroup; None where nothing says it."""
    limits = [int(limit) for (limit,) in _limits("memory", "memory.max", "memory.limit_in_bytes")]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not to be had on this system
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _limits(controller: str, *files: str) -> Iterator[list[float]]:
    """The limits of this process's cgroups, as these files have them; "a b" stands for two files that make one limit.

    A group also has the limits of all that it lies in. Version 2 has one tree of groups, version 1 one a controller; in
    a container the path may be the one that the machine sees, then the tree's root is the container's own group.
    """
    groups: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                parts = Path(path).parts[1:]
                for tree in [controllers, controller] if controllers else ["", "unified"]:
                    top = _ROOT / "sys/fs/cgroup" / tree
                    groups += [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    for group in groups:
        for names in files:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                numbers = [float(word) for name in names.split() for word in (group / name).read_text().split()]
                if min(numbers) > 0:  # -1: no limit
                    yield numbers


def _choose_waiting(threads: int, cpus: float) -> str:
    """Let threads sleep while they wait for one another if other programs need the CPUs; returns that in words, or "".

    Threads that spin are faster, but elsewhere they take the CPU from the very thread for which they wait. GNU's OpenMP
    reads the setting when it is loaded, so this comes before torch is imported. What the user has set stays.
    """
    if threads == 1 or "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return ""
    others = _others_running()
    if threads <= cpus and others + threads <= (os.cpu_count() or 1):
        return ""
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return f"they sleep while they wait, because the CPUs are not enough for all ({others:.1f} other threads run)"


def _others_running() -> float:
    """How many threads of other programs run or wait for a CPU now; 0 where the kernel does not say it."""
    seen = []
    with contextlib.suppress(OSError):
        for _ in range(10):
            seen += re.findall(r"^procs_running (\d+)", (_ROOT / "proc/stat").read_text(), re.MULTILINE)
            time.sleep(0.005)
    return sum(map(int, seen)) / len(seen) - 1 if seen else 0.0  # this thread runs while it looks


def use_threads(number: int) -> None:
    """Compute with so many CPU threads, in PyTorch and in numpy."""
    import threadpoolctl  # type: ignore[import-untyped]
    import torch

    torch.set_num_threads(number)
    threadpoolctl.threadpool_limits(number, user_api="blas")  # numpy's, loaded together with torch


def tune() -> None:
    """Let GPUs use TF32 for products of float32, treat denormal numbers as zero, and keep the memory that is freed.

    A CPU computes with denormals a hundred times slower. A training step frees more than 100 MiB; to fetch and clear
    the pages again takes a tenth of its time (benchmarks/LOG.md). Only glibc has these settings.
    """
    import torch

    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, limit in _MALLOC_LIMITS.items():
            mallopt(parameter, limit)


@functools.cache
def suitable_kernels(device: str) -> Kernels:
    """The fastest kernels for a device: on an NVIDIA GPU Triton's, if Triton works there.

    It needs a C compiler, Python's headers and a GPU of 2017 or later.
    """
    import torch

    from encoder_decoder_transformer import Kernels

    if device == "cuda" and find_spec("triton"):
        try:
            from charseq2seq.gpu_kernels import KERNELS

            KERNELS.normalize_and_rotate(torch.ones(1, 1, 1, 2, device="cuda"), torch.ones(2, 1, 2, device="cuda"))
            return KERNELS
        # Which error it is depends on what is missing; all of it means the same.
        except Exception as error:
            why = f"{' '.join(str(error).split()):.200}"
            log(f"note: Triton does not work here ({why}); PyTorch's slower operations do.")
    return Kernels()
