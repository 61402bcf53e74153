"""What makes a device faster, and what happens where it is not to be had."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import types
from typing import Any, cast

import pytest

from charseq2seq import device
from encoder_decoder_transformer import Kernels
from tests.push_client import ROOT

# Takes and frees 80 MiB six times, in larger and larger blocks, so that what the C library learns of its own accord is
# of no help; prints the page faults of the last four times.
FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page is small
import torch

torch.set_num_threads(1)
for turn, mebibytes in enumerate((4, 5, 8, 10, 16, 20)):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(mebibytes << 18) for _ in range(80 // mebibytes)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HALF_THE_SMALLEST = "import torch; print((torch.tensor([2.0**-126]) / 2).item())"
TUNED = "from charseq2seq.device import tune_cpu; tune_cpu()\n"


def printed(program: str) -> float:
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_memory_that_was_freed_is_not_fetched_anew() -> None:
    usual = printed(FAULTS)
    assert usual > 3 * (80 << 20) / mmap.PAGESIZE, "what this test is for"
    assert printed(TUNED + FAULTS) < usual / 5


def test_numbers_too_small_to_matter_are_zero() -> None:
    assert printed(HALF_THE_SMALLEST) > 0
    assert printed(TUNED + HALF_THE_SMALLEST) == 0


def test_a_gpu_without_a_working_triton_uses_the_slower_operations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    found, module = object(), types.ModuleType("charseq2seq.gpu_kernels")
    module.__dict__["KERNELS"] = Kernels(normalize_and_rotate=cast("Any", broken))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setitem(sys.modules, "charseq2seq.gpu_kernels", module)
    monkeypatch.setattr("torch.ones", lambda *shape, device: shape)  # there is no GPU here
    assert device._triton_kernels.__wrapped__() is None
    assert "Triton does not work here (Failed to find C compiler.)" in capsys.readouterr().err
