"""Faster operations for a GPU: what PyTorch does in many passes over memory, in one (`Transformer.use_kernels`).

The two Triton kernels are compiled when they are first used, in about a second, and kept on disk by Triton. Each is
written with its own backward pass. Measured on one H200 (benchmarks/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from encoder_decoder_transformer import Kernels

_EPSILON = 1e-5  # of torch.nn.functional.layer_norm
_ROWS = 32  # heads that one program of a kernel normalises
_BLOCK = 4096  # numbers that one program of a kernel squares
_LARGEST_ONE_HOT = 512  # token ids


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """`F.embedding` as a product with one-hot rows, whose backward pass is a product too; the library's sorts."""
    if len(table) > _LARGEST_ONE_HOT or table.dtype == torch.float32:  # whose products may be rounded to TF32
        return F.embedding(ids, table)
    one_hot = ids[..., None] == torch.arange(len(table), device=ids.device)
    return one_hot.to(table.dtype) @ table


@triton.jit(do_not_specialize=["rows", "length", "heads"])  # one compilation for all lengths
def _rotate_kernel(
    x_ptr, gradient_ptr, cos_ptr, sin_ptr, out_ptr, rows, length, heads,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    partner = (column + SIZE // 2) % SIZE
    inside = (row < rows) & (column < SIZE)
    base = row * SIZE
    table = (row // heads % length) * SIZE + column
    x = tl.load(x_ptr + base + column, inside, 0.0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / SIZE
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / SIZE + EPSILON)
    cos = tl.load(cos_ptr + table, inside, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, inside, 0.0).to(tl.float32)
    if BACKWARD:
        gradient = tl.load(gradient_ptr + base + column, inside, 0.0).to(tl.float32)
        other = tl.load(gradient_ptr + base + partner, inside, 0.0).to(tl.float32)
        gradient = gradient * cos - other * sin  # the inverse rotation
        normal = centred * scale
        along = tl.sum(gradient * normal, 1)[:, None] / SIZE
        result = scale * (gradient - tl.sum(gradient, 1)[:, None] / SIZE - normal * along)
    else:
        other = tl.load(x_ptr + base + partner, inside, 0.0).to(tl.float32)
        result = centred * scale * cos + (other - mean) * scale * sin
    tl.store(out_ptr + base + column, result.to(out_ptr.dtype.element_ty), inside)


def _launch_rotate(x: Tensor, gradient: Tensor, table: Tensor, *, backward: bool) -> Tensor:
    _, length, heads, size = x.shape
    rows = x.numel() // size
    out = torch.empty_like(x)
    _rotate_kernel[(triton.cdiv(rows, _ROWS),)](
        x, gradient, table[0], table[1], out, rows, length, heads,
        SIZE=size, PADDED=triton.next_power_of_2(size), ROWS=_ROWS, EPSILON=_EPSILON, BACKWARD=backward,
    )  # fmt: skip
    return out


class _NormalizeAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        x, table = x.contiguous(), table.contiguous()
        ctx.save_for_backward(x, table)
        return _launch_rotate(x, x, table, backward=False) if x.numel() else x.clone()  # an empty source has no rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, table = ctx.saved_tensors
        return _launch_rotate(x, gradients[0].contiguous(), table, backward=True), None


def normalize_and_rotate(x: Tensor, table: Tensor) -> Tensor:
    """The model's function of this name."""
    return _NormalizeAndRotate.apply(x, table)


@triton.jit(do_not_specialize=["numbers"])
def _square_kernel(wide_ptr, gradient_ptr, out_ptr, numbers, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numbers
    positive = tl.maximum(tl.load(wide_ptr + index, inside, 0.0).to(tl.float32), 0.0)
    if BACKWARD:
        result = 2.0 * positive * tl.load(gradient_ptr + index, inside, 0.0).to(tl.float32)
    else:
        result = positive * positive
    tl.store(out_ptr + index, result.to(out_ptr.dtype.element_ty), inside)


def _launch_square(wide: Tensor, gradient: Tensor, *, backward: bool) -> Tensor:
    out = torch.empty_like(wide)
    grid = (triton.cdiv(wide.numel(), _BLOCK),)
    _square_kernel[grid](wide, gradient, out, wide.numel(), BLOCK=_BLOCK, BACKWARD=backward)
    return out


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        return _launch_square(wide, wide, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (wide,) = ctx.saved_tensors
        return _launch_square(wide, gradients[0].contiguous(), backward=True)


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The model's function of this name."""
    return F.linear(_SquaredReLU.apply(F.linear(x, up)), down)


KERNELS = Kernels(embedding, normalize_and_rotate, feed_forward)
