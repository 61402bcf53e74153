"""Muon with batched products and per-neuron normalisation.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes updates of equal size in every direction of a
matrix: the momentum is brought close to the nearest orthogonal matrix by a few Newton-Schulz iterations. A small
Transformer has many small matrices, and thirty loops of small products keep two cores half busy; matrices of one shape
are stacked, which takes less than half of the time.

The update is equal in all directions, but not for all neurons: some rows of a tall matrix get far longer updates than
others, and so do some columns of a wide one. NorMuon (Li et al., 2025, arXiv:2510.05491) divides each by its running
RMS. Both are measured in benchmarks/LOG.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_BETA2 = 0.99  # the running mean of squares is over about 1 / (1 - _BETA2) steps


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, with its arguments, batched Newton-Schulz iterations and per-neuron normalisation.

    `lr` may be a tensor, which a captured step needs. The state of a weight has, besides the momentum, `squares`: the
    running mean squares of its rows' updates, or of its columns' if the weight is not tall.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; there is no `closure` here."""
        for options in self.param_groups:
            weights = [weight for weight in options["params"] if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                    state["squares"] = torch.zeros(max(weight.shape), device=weight.device)
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - options["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, options["momentum"])  # Nesterov momentum
            torch._foreach_mul_(weights, 1 - options["lr"] * options["weight_decay"])
            of_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for index, weight in enumerate(weights):
                of_shape[weight.shape].append(index)
            for stack in of_shape.values():
                self._update([weights[index] for index in stack], [updates[index] for index in stack], options)

    def _update(self, weights: list[Tensor], updates: list[Tensor], options: dict[str, Any]) -> None:
        """Orthogonalise, normalise and apply the updates of matrices of one shape."""
        rows, columns = weights[0].shape
        tall = rows > columns
        stack = torch.stack([update.T for update in updates] if tall else updates)
        stack = orthogonalize(stack, options["ns_coefficients"], options["ns_steps"], options["eps"])
        factors = neuron_factors(stack, [self.state[weight]["squares"] for weight in weights])
        factors = factors * (options["lr"] * math.sqrt(max(1, rows / columns)))
        stack = stack * factors.to(stack.dtype)
        torch._foreach_sub_(weights, list((stack.mT if tall else stack).unbind()))


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices (batch, rows <= columns) close to 1, in bfloat16."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the largest singular value is now at most 1
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def neuron_factors(updates: Tensor, squares: list[Tensor]) -> Tensor:
    """Factors that divide every column of matrices by its running RMS, but keep the norm of each matrix.

    Args:
        updates: (matrices, rows, columns).
        squares: running mean squares of the columns, (columns,) for each matrix; they are updated.

    Returns:
        (matrices, 1, columns), in float32.
    """
    now = updates.square().sum(1, dtype=torch.float32)
    torch._foreach_lerp_(squares, list(now), 1 - _BETA2)
    divisors = torch.stack(squares).clamp(min=1e-8)  # a column's updates may all have been zero
    normalized = (now / divisors).sum(1, keepdim=True).clamp(min=1e-8)
    return (now.sum(1, keepdim=True) / normalized / divisors).sqrt().unsqueeze(1)
