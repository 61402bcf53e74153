"""Mixed precision without autocast: a working copy of the model computes, the float32 master weights learn.

Forward and backward pass run in a copy of the model in bf16 or fp16, made anew after every step; its gradients are
converted once, all together ("Mixed Precision Training", Micikevicius et al., 2018, arXiv:1710.03740). On CPUs this is
faster than autocast, which converts every weight at every use (benchmarks/LOG.md).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim import Optimizer

from encoder_decoder_transformer import Transformer


class WorkingCopy:
    """A model in the precision in which it is computed.

    Args:
        master: float32 weights, on their device.
        dtype: float32, bfloat16 or float16; loss scaling keeps float16's small gradients from vanishing.

    Attributes:
        model: what forward and backward pass use; in float32 the master itself.
        scaler: float16's loss scaling; does nothing for other types.
    """

    def __init__(self, master: Transformer, dtype: torch.dtype) -> None:
        self.master = master
        self.model = master if dtype == torch.float32 else copy.deepcopy(master).set_precision(dtype)
        self.scaler = torch.amp.GradScaler(master.device.type, enabled=dtype == torch.float16)
        self.gradient_norm = torch.zeros((), device=master.device)  # of the last step
        self._masters: list[Tensor] = list(master.parameters())
        self._copies: list[Tensor] = list(self.model.parameters())
        self._gradients = [] if self.model is master else [torch.empty_like(weight) for weight in self._masters]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the copy's."""
        torch.autograd.backward(self.scaler.scale(loss))

    def step(self, optimizers: list[Optimizer]) -> None:
        """Optimizer steps on the master weights, by the copy's gradients, and a new working copy."""
        if self.model is not self.master:
            self._convert_gradients()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        gradients = [weight.grad for weight in self._masters if weight.grad is not None]
        # In place, as a captured step needs it; and only now, because the scaler's step has undone its scaling.
        self.gradient_norm.copy_(torch.stack(torch._foreach_norm(gradients)).norm())
        self.model.zero_grad(set_to_none=True)
        self.refresh()

    @torch.no_grad()
    def _convert_gradients(self) -> None:
        """Hand the copy's gradients to the master; after an empty source the encoder has none."""
        for weight, gradient, copied in zip(self._masters, self._gradients, self._copies, strict=True):
            weight.grad = None if copied.grad is None else gradient
        computed = [copied.grad for copied in self._copies if copied.grad is not None]
        torch._foreach_copy_([weight.grad for weight in self._masters if weight.grad is not None], computed)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights into the working copy."""
        if self.model is not self.master:
            torch._foreach_copy_(self._copies, self._masters)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the master weights, on their device."""
        return {name: weight.detach().clone() for name, weight in self.master.state_dict().items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the master weights, and the working copy by them."""
        self.master.load_state_dict(weights)
        self.refresh()
