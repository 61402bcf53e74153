"""What makes a CPU train faster, in processes of their own."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

from tests.push_client import ROOT

# Takes and frees 80 MiB six times, in larger and larger blocks, so that what the C library learns of its own accord is
# of no help; prints the page faults of the last four times, and the smallest number's half.
PROGRAM = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page is small
import torch
from charseq2seq.training.cpu import tune_cpu

torch.set_num_threads(1)
if sys.argv[1] == "tuned":
    tune_cpu()
for turn, mebibytes in enumerate((4, 5, 8, 10, 16, 20)):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(mebibytes << 18) for _ in range(80 // mebibytes)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, (torch.tensor([2.0**-126]) / 2).item())
"""


def faults_and_half(how: str) -> tuple[int, float]:
    command = [sys.executable, "-c", PROGRAM, how]
    words = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return int(words[0]), float(words[1])


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_memory_that_was_freed_is_not_fetched_anew() -> None:
    usual = faults_and_half("as it is")[0]
    assert usual > 3 * (80 << 20) // resource.getpagesize(), "what this test is for"
    assert faults_and_half("tuned")[0] < usual / 5


def test_numbers_too_small_to_matter_are_zero() -> None:
    assert faults_and_half("as it is")[1] > 0
    assert faults_and_half("tuned")[1] == 0
