"""The optimizers beside PyTorch's own, and what changes in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from charseq2seq.training import muon
from charseq2seq.training.muon import BatchedMuon, even_out
from charseq2seq.training.optimization import learning_rate_factor, suitable_weight_decay

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def moved_by(kind: Callable[..., Any], **options: Any) -> list[torch.Tensor]:
    """Weights after five steps with gradients that are always the same ones."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(weights, **OPTIONS | options)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        weights[3].grad = None  # some take no part in a step
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("largest_stack", [130, 1])
def test_matrices_move_alike_however_they_are_stacked(largest_stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_stacks = moved_by(BatchedMuon)
    monkeypatch.setattr(muon, "_LARGEST_STACK", largest_stack)
    for apart, stacked in zip(moved_by(BatchedMuon), whole_stacks, strict=True):
        torch.testing.assert_close(apart, stacked, atol=2e-3, rtol=0)  # bf16 products, in another order


def test_matrices_move_nearly_as_torch_moves_them_and_as_far() -> None:
    start = moved_by(torch.optim.Muon, lr=0.0)
    for before, ours, theirs in zip(start, moved_by(BatchedMuon), moved_by(torch.optim.Muon), strict=True):
        our_move, their_move = (ours - before).flatten(), (theirs - before).flatten()
        assert torch.cosine_similarity(our_move, their_move, dim=0) > 0.97 or not their_move.any()
        assert our_move.norm().item() == pytest.approx(their_move.norm().item(), rel=0.1)


def test_the_first_step_moves_every_neuron_equally_far() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((24, 8), (8, 24))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    BatchedMuon(weights, **OPTIONS).step()
    for lengths in (weights[0].norm(dim=1), weights[1].norm(dim=0)):
        torch.testing.assert_close(lengths, lengths.mean().expand(24), atol=0, rtol=0.02)  # bf16


def test_neurons_come_to_move_equally_far_and_the_matrix_as_far_as_before() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([0.01, 0.5, 1.0, 3.0, 0.0])
    usual = [torch.zeros(5), torch.zeros(5)]
    for _ in range(300):
        moves = torch.randn(2, 64, 5, generator=generator) * lengths
        evened = even_out(moves, usual)
        torch.testing.assert_close(evened.norm(dim=(1, 2)), moves.norm(dim=(1, 2)))
    evened_lengths = evened.norm(dim=1)[:, :4]
    assert (evened_lengths / evened_lengths.mean(dim=1, keepdim=True) - 1).abs().max() < 0.4
    assert not evened[:, :, 4].any() and not even_out(torch.zeros(2, 64, 5), usual).any(), "what stands still, stays"


def test_a_state_without_usual_lengths_goes_on() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = BatchedMuon([weight], **OPTIONS)
    weight.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][0]["squares"]
    optimizer.load_state_dict(state)
    optimizer.step()
    assert weight.isfinite().all() and optimizer.state[weight]["squares"].all()


def test_the_schedule_warms_up_and_comes_down_to_nothing() -> None:
    assert learning_rate_factor(0.0) == learning_rate_factor(1.0) == learning_rate_factor(1.5) == 0.0
    assert learning_rate_factor(0.01) == pytest.approx(0.5) and learning_rate_factor(0.02) == pytest.approx(1.0)
    assert learning_rate_factor(0.51) == pytest.approx(0.5)


@pytest.mark.parametrize(("learning_rate", "steps_a_pass"), [(0.04, 327), (0.04, 100), (0.001, 1e6)])
def test_a_pass_over_the_text_leaves_a_quarter_of_a_weight(learning_rate: float, steps_a_pass: float) -> None:
    decay = suitable_weight_decay(learning_rate, steps_a_pass)
    assert (1 - learning_rate * decay) ** steps_a_pass == pytest.approx(0.27, abs=0.01)
    assert decay == float(f"{decay:.3g}"), "what is shown is what is done"


def test_no_step_decays_a_weight_by_much() -> None:
    assert suitable_weight_decay(0.04, 0.1) == suitable_weight_decay(0.04, 10) == 0.5
    assert 5e-324 * suitable_weight_decay(5e-324, 10) <= 0.02
