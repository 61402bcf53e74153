"""The device, its precision, and every setting that holds for the whole process: threads, allocator, denormals."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError

if TYPE_CHECKING:
    import torch

    from encoder_decoder_transformer import Kernels, Transformer

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h: the free memory that is kept, and the size from which on a
# block has pages of its own, which go back when it is freed (at most 32 MiB).
_MALLOC_LIMITS = {-1: 1 << 30, -3: 32 << 20}


def choose_device(asked: str) -> tuple[str, str]:
    """The device to use, and why.

    Raises:
        SuiteError: the device asked for is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        device = next(name for name in there if there[name])
        return device, f"device {device}: {'no GPU found' if device == 'cpu' else 'found, and faster than the CPU'}"
    if there[asked]:
        return asked, f"device {asked}: asked for"
    raise SuiteError(
        f"--device {asked}: this PyTorch ({torch.__version__}) finds no such device; use --device auto, or install a "
        "PyTorch built for it (pytorch.org/get-started).",
        ExitCode.USAGE,
    )


def choose_precision(asked: str, device: str) -> tuple[str, str]:
    """The precision of the forward and backward pass, and why.

    Raises:
        SuiteError: fp16 was asked for on a CPU, where it has no fast arithmetic and would overflow.
    """
    import torch

    if asked == "fp16" and device == "cpu":
        raise SuiteError("--precision fp16 is for GPUs; on a CPU use bf16 or fp32.", ExitCode.USAGE)
    if asked != "auto":
        return asked, f"precision {asked}: asked for"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "precision bf16: this GPU computes in it"
        return "fp16", "precision fp16 with loss scaling: this GPU has no bf16"
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16", "precision bf16: this CPU has bf16 matrix products"
        return "fp32", "precision fp32: this CPU has no bf16 matrix products"
    return "fp32", "precision fp32: the safe choice on this device"


def describe_hardware(device: str) -> str:
    """The kind of hardware, without the machine's name."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "mps":
        return "Apple GPU (MPS)"
    name = torch.cpu.get_capabilities().get("cpu_name", "unknown CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def torch_dtype(precision: str) -> torch.dtype:
    """The torch type of a precision's name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def use_threads(number: int | None) -> None:
    """Compute with so many CPU threads, in PyTorch and in numpy; None: as many as they find."""
    if number is not None:
        import threadpoolctl  # type: ignore[import-untyped]
        import torch

        torch.set_num_threads(number)
        threadpoolctl.threadpool_limits(number, user_api="blas")  # numpy's, loaded together with torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread until the block ends: then the order of sums does not depend on the machine."""
    import torch

    threads = torch.get_num_threads()
    use_threads(1)
    try:
        yield
    finally:
        use_threads(threads)


def allow_tf32() -> None:
    """Let GPUs that have TF32 use it for products of float32."""
    import torch

    torch.set_float32_matmul_precision("high")


def tune_cpu() -> None:
    """Treat denormal numbers as zero, and keep the memory that this process frees.

    A CPU computes with denormals a hundred times slower. A training step frees more than 100 MiB; to fetch and clear
    the pages again takes a tenth of its time (benchmarks/LOG.md). Only glibc has these settings.
    """
    import torch

    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, limit in _MALLOC_LIMITS.items():
            mallopt(parameter, limit)


def use_suitable_kernels(model: Transformer) -> None:
    """Let a model use what is fastest where it lies: on an NVIDIA GPU Triton's kernels, if Triton works there."""
    from encoder_decoder_transformer import Kernels

    model.use_kernels((_triton_kernels() if model.device.type == "cuda" else None) or Kernels())


@functools.cache
def _triton_kernels() -> Kernels | None:
    """Those of `gpu_kernels`, tried once: Triton needs a C compiler, Python's headers and a GPU of 2017 or later."""
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from charseq2seq.gpu_kernels import KERNELS

        KERNELS.normalize_and_rotate(torch.ones(1, 1, 1, 2, device="cuda"), torch.ones(2, 1, 2, device="cuda"))
    # Which error it is depends on what is missing; all of it means the same.
    except Exception as error:
        log(f"note: Triton does not work here ({' '.join(str(error).split()):.200}); PyTorch's slower operations do.")
        return None
    return KERNELS
