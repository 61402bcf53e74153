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

    Such numbers cost a CPU a hundredfold. As for memory, a training step takes and frees more than a hundred MiB: if
    they go back to the system, every page is fetched and cleared anew in the next step, a tenth of its time
    (benchmarks/LOG.md). Up to 1 GiB is kept; blocks of 32 MiB and more still go back. Only glibc can be told so.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, limit in _MALLOC_LIMITS.items():
            mallopt(parameter, limit)
