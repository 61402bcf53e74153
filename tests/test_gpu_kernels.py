"""The GPU's kernels beside the model's own functions, on a CPU: Triton interprets them, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.push_client import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROGRAM = """
import sys
import torch
from charseq2seq import gpu_kernels
import encoder_decoder_transformer as model


def compare(ours, theirs, *inputs):
    results = [of(*inputs) for of in (ours, theirs)]
    assert results[0].shape == results[1].shape and results[0].dtype == results[1].dtype
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    wanted = [x for x in inputs if x.requires_grad and x.numel()]
    if not wanted:
        return  # an empty source is read without gradients
    gradient = torch.randn(results[0].shape)
    for one, other in zip(*(torch.autograd.grad(result, wanted, gradient) for result in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert one.any()


torch.manual_seed(0)
size = int(sys.argv[1])
table = model.rotary_table(9, size)
for batch, length, heads in ((2, 9, 3), (3, 4, 1), (1, 1, 5), (7, 5, 2), (2, 0, 3)):
    x = (torch.randn(batch, length, heads, size) * 3 + 1).requires_grad_()
    first = 9 - length  # tables are slices of the whole one
    compare(gpu_kernels.normalize_and_rotate, model.normalize_and_rotate, x, table[:, first:])
parts = torch.randn(2, 4, 3, 2 * size).requires_grad_()  # not contiguous, as a split product is
compare(lambda x, t: gpu_kernels.normalize_and_rotate(x[..., :size], t),
        lambda x, t: model.normalize_and_rotate(x[..., :size], t), parts, table[:, :4])
for shape in ((2, 5, size), (1, size), (3, 700, size)):
    up, down = (torch.randn(*wide).requires_grad_() for wide in ((11, size), (size, 11)))
    compare(gpu_kernels.feed_forward, model.feed_forward, torch.randn(*shape).requires_grad_(), up, down)
for dtype in (torch.float32, torch.bfloat16):
    vectors = torch.randn(24, size, dtype=dtype).requires_grad_()
    for shape in ((4, 9), (2, 0)):
        ids = torch.randint(24, shape)
        ours, theirs = gpu_kernels.embedding(ids, vectors), torch.nn.functional.embedding(ids, vectors)
        assert torch.equal(ours, theirs) and ours.dtype == dtype
        gradient = torch.randn(theirs.shape).to(dtype)
        one, other = (torch.autograd.grad(result, vectors, gradient)[0] for result in (ours, theirs))
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
sizes = {"d_model": 4 * size, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "source_length": 6, "target_length": 5}
whole = model.Transformer(11, num_encoder_layers=1, num_decoder_layers=1, **sizes)
for weight in whole.parameters():
    torch.nn.init.normal_(weight, std=0.3)
source, target = torch.randint(1, 11, (2, 6)), torch.randint(1, 11, (2, 5))
for given in (source, source[:, :0]):
    results, gradients = [], []
    for kernels in (gpu_kernels.KERNELS, model.Kernels()):
        whole.use_kernels(kernels)
        logits = whole(given, target)
        results.append(logits)
        gradients.append(torch.autograd.grad(logits.square().mean(), list(whole.parameters()), allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-3 * other.norm() + 1e-5
print("all the same")
"""


@pytest.mark.parametrize("head_size", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 6))])
def test_kernels_compute_what_the_model_computes(head_size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(head_size)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "all the same\n", done.stderr[-3000:]
