"""What is optimised by what, and how fast.

Hidden matrices (inside encoder and decoder layers) are optimised by Muon (Jordan et al., 2024,
kellerjordan.github.io/posts/muon), which moves every direction of a matrix equally far, as `muon` has it: batched, and
every neuron equally far too; embedding, head and bigram table by `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from charseq2seq.training.parallel import ALONE, Group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from encoder_decoder_transformer import Transformer

# AdamW's learning rate as a share of Muon's: a step of Muon has the size of its learning rate in every direction of
# a matrix, one of AdamW in every entry. Measured in benchmarks/LOG.md.
ADAMW_SHARE = 0.15

WARMUP_SHARE = 0.02

# A pass over the text at the full learning rate leaves exp(-1.3) of a hidden matrix, were nothing added to it. So much
# for each pass, not for each step, suits texts of all sizes (Wang and Aitchison, 2024, arXiv:2405.13698): what was
# learnt from a character should have faded before the character comes again (benchmarks/LOG.md).
DECAY_A_PASS = 1.3
_MOST_DECAY_A_STEP = 0.02


def learning_rate_factor(progress: float) -> float:
    """The schedule: a short warm-up, then a straight line to zero at the end of the budget.

    Args:
        progress: share of the budget (steps or minutes) that is spent, 0 to 1.

    Returns:
        What the learning rates are multiplied by, 0 to 1.
    """
    return max(0.0, min(progress / WARMUP_SHARE, (1.0 - progress) / (1.0 - WARMUP_SHARE)))


def suitable_weight_decay(learning_rate: float, steps_a_pass: float) -> float:
    """The weight decay, per unit of learning rate, for a text that is read once in so many steps.

    Rounded to three digits, as it is shown.
    """
    decay_a_step = min(DECAY_A_PASS / steps_a_pass, _MOST_DECAY_A_STEP)
    return float(f"{decay_a_step / max(learning_rate, 1e-36):.3g}")  # finite, however small the learning rate


def build_optimizers(
    model: Transformer, learning_rate: float, weight_decay: float, group: Group = ALONE
) -> list[Optimizer]:
    """Muon for the hidden matrices and AdamW for everything else.

    Args:
        model: float32 parameters, on their device.
        learning_rate: of Muon; AdamW's is `ADAMW_SHARE` of it.
        weight_decay: of the hidden matrices, per unit of learning rate.
        group: the processes that make the same steps.
    """
    import torch

    from charseq2seq.training.muon import BatchedMuon

    hidden = [p for layers in (model.encoder, model.decoder) for p in layers.parameters()]
    in_hidden = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in in_hidden]
    muon = BatchedMuon(hidden, group, lr=learning_rate, momentum=0.95, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(
        others,
        lr=learning_rate * ADAMW_SHARE,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=others[0].device.type in {"cpu", "cuda", "mps"} and type(others[0]) is torch.nn.Parameter,
    )
    for optimizer in (muon, adamw):
        for options in optimizer.param_groups:
            options["full_lr"] = options["lr"]
    return [muon, adamw]


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times its full value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor


def copy_values(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors one to one, converting their types, in one call."""
    import torch

    with torch.no_grad():
        torch._foreach_copy_(list(targets), list(sources))
