"""The optimizers beside PyTorch's own, and what changes in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from charseq2seq.training.muon import BatchedMuon, neuron_factors
from charseq2seq.training.optimization import ADAMW_RATIO, build_optimizers, learning_rate_factor, set_learning_rates
from charseq2seq.training.text_defaults import suitable_weight_decay
from encoder_decoder_transformer import Transformer

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def updated_by(kind: Callable[..., Any], **options: Any) -> list[torch.Tensor]:
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


def test_updates_are_nearly_those_of_torch_and_as_large() -> None:
    start = updated_by(torch.optim.Muon, lr=0.0)
    for before, ours, theirs in zip(start, updated_by(BatchedMuon), updated_by(torch.optim.Muon), strict=True):
        our_update, their_update = (ours - before).flatten(), (theirs - before).flatten()
        assert torch.cosine_similarity(our_update, their_update, dim=0) > 0.97 or not their_update.any()
        assert our_update.norm().item() == pytest.approx(their_update.norm().item(), rel=0.1)


def test_neurons_come_to_be_updated_equally_and_the_matrix_as_much_as_before() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0.01, 0.5, 1.0, 3.0, 0.0])
    squares = [torch.zeros(5), torch.zeros(5)]
    for _ in range(300):
        updates = torch.randn(2, 64, 5, generator=generator) * sizes
        normalized = updates * neuron_factors(updates, squares)
        torch.testing.assert_close(normalized.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))
    lengths = normalized.norm(dim=1)[:, :4]
    assert (lengths / lengths.mean(dim=1, keepdim=True) - 1).abs().max() < 0.4
    assert not normalized[:, :, 4].any(), "a neuron without an update gets none"
    factors = neuron_factors(torch.zeros(2, 64, 5), squares)
    assert factors.shape == (2, 1, 5) and factors.dtype == torch.float32 and factors.isfinite().all()


def test_learning_rates_are_tensors_that_are_set_in_place() -> None:
    """A captured step reads them anew, so they must stay where they are."""
    optimizers = build_optimizers(Transformer(9, d_model=8, num_heads=2, d_ff=8), learning_rate=0.04, weight_decay=0.1)
    rates = [options["lr"] for optimizer in optimizers for options in optimizer.param_groups]
    for progress, scale in ((0.02, 1.0), (0.5, 0.5), (0.01, 1.0), (1.0, 1.0)):
        set_learning_rates(optimizers, progress, scale)
        factor = learning_rate_factor(progress) * scale
        assert [float(rate) for rate in rates] == pytest.approx([0.04 * factor, 0.04 * ADAMW_RATIO * factor])
    assert all(a is b for a, b in zip(rates, (o["lr"] for opt in optimizers for o in opt.param_groups), strict=True))


def test_every_weight_has_one_optimizer() -> None:
    model = Transformer(9, d_model=8, num_heads=2, d_ff=8)
    muon_, adamw = build_optimizers(model, learning_rate=0.04, weight_decay=0.1)
    by_muon, by_adamw = ({id(w) for o in optimizer.param_groups for w in o["params"]} for optimizer in (muon_, adamw))
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert by_muon | by_adamw == set(names) and not by_muon & by_adamw
    assert all(names[weight].startswith(("encoder.", "decoder.")) for weight in by_muon)
    assert (muon_.defaults["momentum"], adamw.defaults["betas"]) == (0.95, (0.9, 0.95)), "measured: benchmarks/LOG.md"


def test_the_schedule_warms_up_and_comes_down_to_zero() -> None:
    assert learning_rate_factor(0.0) == learning_rate_factor(1.0) == learning_rate_factor(1.5) == 0.0
    assert learning_rate_factor(0.01) == pytest.approx(0.5) and learning_rate_factor(0.02) == pytest.approx(1.0)
    assert learning_rate_factor(0.51) == pytest.approx(0.5)


@pytest.mark.parametrize(("learning_rate", "steps_per_epoch"), [(0.04, 327), (0.04, 100), (0.001, 1e6)])
def test_an_epoch_leaves_a_quarter_of_a_weight(learning_rate: float, steps_per_epoch: float) -> None:
    decay = suitable_weight_decay(learning_rate, steps_per_epoch)
    assert (1 - learning_rate * decay) ** steps_per_epoch == pytest.approx(0.27, abs=0.01)
    assert decay == float(f"{decay:.3g}"), "what is shown is what is done"


def test_no_step_decays_a_weight_by_much() -> None:
    assert suitable_weight_decay(0.04, 0.1) == suitable_weight_decay(0.04, 10) == 0.5
    assert 5e-324 * suitable_weight_decay(5e-324, 10) <= 0.02
