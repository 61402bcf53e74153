"""Mixed precision without autocast: a working copy computes, the master weights learn.

The optimizers keep float32 master weights. Forward and backward pass run in a copy of the model in bf16 or fp16, made
afresh after every step; its gradients are converted once, as a whole. On CPUs this is faster than autocast, which
converts every weight at every use (benchmarks/LOG.md). The idea is that of "Mixed Precision Training" (Micikevicius et
al., 2018, arXiv:1710.03740). In fp32 the working copy is the master itself.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

from charseq2seq.device import torch_dtype
from charseq2seq.training.optimization import copy_values

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from encoder_decoder_transformer import Transformer


class WorkingCopy:
    """A model in the precision in which it is computed.

    Args:
        master: float32 weights, on their device.
        precision: "fp32", "bf16" or "fp16"; fp16's small gradients are kept from vanishing by loss scaling.

    Attributes:
        model: what forward and backward pass use.
    """

    def __init__(self, master: Transformer, precision: str) -> None:
        import torch

        self.master = master
        self.model = master if precision == "fp32" else copy.deepcopy(master).set_precision(torch_dtype(precision))
        device_type = master.device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")
        self._masters = list(master.parameters())
        self._copies = list(self.model.parameters())
        self._gradients = [] if self.model is master else [torch.empty_like(weight) for weight in self._masters]

    def backward(self, loss: Tensor) -> None:
        """Add to the copy's gradients those of a loss."""
        import torch

        torch.autograd.backward(self.scaler.scale(loss))

    def step(self, optimizers: list[Optimizer]) -> None:
        """Optimizer steps on the master weights, by the copy's gradients, and a fresh working copy."""
        if self.model is not self.master:
            self._hand_over_gradients()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.refresh()

    def _hand_over_gradients(self) -> None:
        """Convert the copy's gradients; what took no part in this step (an encoder without a source) has none."""
        taking_part = [copied.grad is not None for copied in self._copies]
        for weight, gradient, takes_part in zip(self._masters, self._gradients, taking_part, strict=True):
            weight.grad = gradient if takes_part else None
        gradients = [copied.grad for copied in self._copies if copied.grad is not None]
        copy_values(list(itertools.compress(self._gradients, taking_part)), gradients)

    def refresh(self) -> None:
        """Bring the working copy up to the master weights."""
        if self.model is not self.master:
            copy_values(self._copies, self._masters)

    def state(self) -> dict[str, Any]:
        """The loss scale, for resuming."""
        return self.scaler.state_dict()
