"""Two settings of the process that training on a CPU is much faster with."""

from __future__ import annotations

import ctypes
import sys

import torch

# Of glibc's malloc.h: how much free memory at the heap's end is kept, and from which size on a block has pages of its
# own, which are given back as soon as it is freed. 32 MiB is the most that the second may be.
_MALLOC_LIMITS = {-1: 1 << 30, -3: 32 << 20}


def tune_cpu() -> None:
    """Let this process take numbers too small to matter for zero, and keep the memory that it frees.

    The first cost a CPU a hundredfold. Of the second a training step takes and frees more than a hundred MiB; given
    back to the system, every page of them is fetched and cleared anew, a tenth of a step's time (benchmarks/LOG.md).
    Where the C library is not glibc, its memory stays as it is.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, limit in _MALLOC_LIMITS.items():
            mallopt(parameter, limit)
