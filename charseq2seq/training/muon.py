"""Muon, batched and evened out: torch.optim.Muon with all matrices of one shape in one product.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) moves every direction of a matrix equally far: the
momentum is brought close to the nearest orthogonal matrix by a few Newton-Schulz iterations. A small Transformer has
many small matrices, and thirty loops of small products keep two cores half busy; stacked, they take less than half
of the time. Processes that train together share the stacks out.

What comes out moves all directions alike, but not all neurons: some rows of a tall matrix are far longer than others,
and so are some columns of a wide one. NorMuon (Li et al., 2025, arXiv:2510.05491) divides each by its usual length.
Both are measured in benchmarks/LOG.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from charseq2seq.training.parallel import ALONE, Group
from charseq2seq.training.sharding import part, split_like, whole_of_part

# Entries of matrices that are stacked at most: what a stack takes in passing, some 14 bytes each, stays below a GiB.
_LARGEST_STACK = 1 << 26

# A neuron's usual length is a mean over about 1 / (1 - _MEMORY) steps.
_MEMORY = 0.99


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` (its further arguments) with batched Newton-Schulz iterations and neurons that move alike.

    Its state has, besides the momentum, the usual squares of the lengths of the rows of a weight's moves, or of their
    columns if the weight is not tall.

    Args:
        weights: to optimise; may be split over the group (see `sharding`).
        group: the processes that make the same step, each of which orthogonalises its share of the matrices.
    """

    def __init__(self, weights: Sequence[Tensor], group: Group = ALONE, **arguments: Any) -> None:
        super().__init__(weights, **arguments)
        self.group = group

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; there is no `closure` here."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [part(weight.grad) for weight in weights]
            for weight in weights:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                if "squares" not in state:  # in runs that were begun before there were any, too
                    state["squares"] = torch.zeros(max(weight.shape), device=weight.device)
            momenta = [part(self.state[weight]["momentum_buffer"]) for weight in weights]
            if not weights:
                continue
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
            torch._foreach_mul_([part(weight) for weight in weights], 1 - group["lr"] * group["weight_decay"])
            for stack in _stacks(weights):
                wide = [_wide(whole_of_part(updates[index], weights[index])) for index in stack]
                usual = [self.state[weights[index]]["squares"] for index in stack]
                moves = even_out(self._orthogonalize(wide, group), usual)
                for index, move in zip(stack, moves, strict=True):
                    rows, columns = weights[index].shape
                    step = group["lr"] * math.sqrt(max(1, rows / columns))
                    mine = part(split_like(move.T if rows > columns else move, weights[index]))
                    part(weights[index]).add_(mine, alpha=-step)

    def _orthogonalize(self, matrices: list[Tensor], options: dict[str, Any]) -> Tensor:
        """All of them, (matrices, rows, columns), a share by each process."""
        share = -(-len(matrices) // self.group.size)
        first = self.group.rank * share
        # The last ones, which may have too few, repeat a matrix: every share must have the same shape.
        mine = [matrices[min(index, len(matrices) - 1)] for index in range(first, first + share)]
        moves = orthogonalize(torch.stack(mine), options["ns_coefficients"], options["ns_steps"], options["eps"])
        return self.group.join(moves)[: len(matrices)]


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices (batch, rows <= columns) close to 1, in bfloat16."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the largest singular value is now at most 1
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def even_out(moves: Tensor, usual: list[Tensor]) -> Tensor:
    """Divide every column of matrices by its usual length; each matrix as a whole stays as long as it is.

    Args:
        moves: (matrices, rows, columns).
        usual: running means of the columns' squares, (columns,) for each matrix; they are brought up to date.
    """
    squares = moves.square().sum(1, dtype=torch.float32)
    torch._foreach_lerp_(usual, list(squares), 1 - _MEMORY)
    divisors = torch.stack(usual).clamp(min=1e-8)  # a column may never have moved
    evened = (squares / divisors).sum(1, keepdim=True).clamp(min=1e-8)
    factors = (squares.sum(1, keepdim=True) / evened / divisors).sqrt()
    return moves * factors.unsqueeze(1).to(moves.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the matrices that can be stacked once they lie wide."""
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        same[tuple(sorted(matrix.shape))].append(index)
    for (rows, columns), indices in same.items():
        most = max(1, _LARGEST_STACK // (rows * columns))
        yield from (indices[first : first + most] for first in range(0, len(indices), most))
