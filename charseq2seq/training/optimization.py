"""What is optimised by what, and how fast.

Hidden matrices (inside encoder and decoder layers) are optimised by Muon (see `muon`); embedding, head and bigram table
by `torch.optim.AdamW`. Learning rates are tensors on the weights' device: a captured step reads them anew.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.optim import Optimizer

from charseq2seq.training.muon import BatchedMuon
from encoder_decoder_transformer import Transformer

# AdamW's learning rate divided by Muon's: an update of Muon has the size of its learning rate in every direction of
# a matrix, one of AdamW in every entry. Measured in benchmarks/LOG.md.
ADAMW_RATIO = 0.15

WARMUP_FRACTION = 0.02


def learning_rate_factor(progress: float) -> float:
    """What the learning rates are multiplied by after this fraction of the budget (steps, epochs or minutes).

    A short warm-up, then a straight line to zero at the end.
    """
    return max(0.0, min(progress / WARMUP_FRACTION, (1.0 - progress) / (1.0 - WARMUP_FRACTION)))


def build_optimizers(model: Transformer, learning_rate: float, weight_decay: float) -> list[Optimizer]:
    """Muon for the hidden matrices and AdamW for everything else.

    Args:
        model: float32 parameters, on their device.
        learning_rate: of Muon; AdamW's is `ADAMW_RATIO` times that.
        weight_decay: of the hidden matrices, per unit of learning rate.
    """
    hidden = [*model.encoder.parameters(), *model.decoder.parameters()]
    others = [p for name, p in model.named_parameters() if not name.startswith(("encoder.", "decoder."))]

    def rate(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device=model.device)

    muon = BatchedMuon(hidden, lr=cast("float", rate(learning_rate)), momentum=0.95, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(
        others,
        lr=rate(learning_rate * ADAMW_RATIO),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
        capturable=model.device.type == "cuda",
    )
    muon.param_groups[0]["full_lr"], adamw.param_groups[0]["full_lr"] = learning_rate, learning_rate * ADAMW_RATIO
    return [muon, adamw]


def check_state(optimizer: Optimizer) -> None:
    """Raise ValueError for a loaded state of other sizes: AdamW would write beyond the end of a smaller tensor."""
    for weight in optimizer.param_groups[0]["params"]:
        expected = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        if isinstance(optimizer, torch.optim.Muon):
            expected = {"momentum_buffer": weight.shape, "squares": (max(weight.shape),)}
        state = optimizer.state.get(weight, {})
        contiguous = all(tensor.is_contiguous() for tensor in state.values())
        if not contiguous or (state and {name: tensor.shape for name, tensor in state.items()} != expected):
            raise ValueError("the state of its optimizer has other sizes")


def set_learning_rates(optimizers: list[Optimizer], progress: float, scale: float = 1.0) -> None:
    """Set every learning rate, in place, to what the schedule has at `progress`, times `scale`."""
    factor = learning_rate_factor(progress) * scale
    for options in (optimizer.param_groups[0] for optimizer in optimizers):
        options["lr"].fill_(options["full_lr"] * factor)
