"""The optimizers beside PyTorch's own, and what changes in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from charseq2seq.training import muon
from charseq2seq.training.muon import BatchedMuon
from charseq2seq.training.optimization import dropout_share, learning_rate_factor

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def moved_by(kind: Callable[..., Any]) -> list[torch.Tensor]:
    """Weights after five steps with gradients that are always the same ones."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(weights, **OPTIONS)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        weights[3].grad = None  # some take no part in a step
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("largest_stack", [1 << 26, 130, 1])
def test_stacked_matrices_move_as_torch_moves_each(largest_stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_LARGEST_STACK", largest_stack)
    for ours, theirs in zip(moved_by(BatchedMuon), moved_by(torch.optim.Muon), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # bf16 products, in another order


def test_the_schedule_warms_up_and_comes_down_to_nothing() -> None:
    assert learning_rate_factor(0.0) == learning_rate_factor(1.0) == learning_rate_factor(1.5) == 0.0
    assert learning_rate_factor(0.01) == pytest.approx(0.5) and learning_rate_factor(0.02) == pytest.approx(1.0)
    assert learning_rate_factor(0.51) == pytest.approx(0.5)


def test_dropout_grows_with_what_was_read_before() -> None:
    shares = [dropout_share(10 * progress, progress, 0.1) for progress in (0, 0.1, 0.25, 1)]
    assert shares[0] == 0 and 0 < shares[1] < shares[2] < 0.1 == shares[3]
    assert dropout_share(1, 0.5, 0.1) < shares[1], "a run of two passes needs less"
    assert dropout_share(100, 1, 0) == 0
