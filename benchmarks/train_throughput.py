"""Training throughput at the reference shape, against three peers.

    python benchmarks/train_throughput.py

Whole training steps (forward pass, loss, backward pass, optimizer) on the same random batches: ours with the suite's
own optimizers and working copy, as train_transformer.py runs them; every peer with fused AdamW, in fp32 and under
bf16 autocast, in the faster of its ways of attention. All of it takes turns in one process. A system counts by the
median of its rounds in its better precision; "fastest" is its fastest round. The limit is 6 floating point operations
a parameter and target character, at the rate of the fastest bf16 matrix product of this model's sizes, measured in the
same rounds. The row "products alone" repeats the matrix products of a step of ours, those of attention and of the
optimizer too, on the very numbers of that step, and nothing else: no step with these products is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import (
    PRECISIONS,
    Contender,
    Measure,
    Result,
    best_peer,
    compete,
    describe_machine,
    markdown_table,
    matrix_product_peak,
    timed,
)
from benchmarks.peers import Peer, Shape, add_shape_arguments, count_parameters, installed_peers, shape_of
from charseq2seq.console import run
from charseq2seq.device import torch_dtype, tune
from charseq2seq.training.mixed_precision import WorkingCopy
from charseq2seq.training.optimization import WARMUP_FRACTION, build_optimizers, set_learning_rates
from encoder_decoder_transformer import Transformer

# Does one training step on source and target, returns its loss.
Step = Callable[[Tensor, Tensor], float]


def our_step(model: Transformer, precision: str) -> Step:
    """What `Trainer._train_step` does, without the sampler."""
    optimizers = build_optimizers(model, learning_rate=0.04, weight_decay=0.1)
    working = WorkingCopy(model, torch_dtype(precision))

    def step(source: Tensor, target: Tensor) -> float:
        set_learning_rates(optimizers, WARMUP_FRACTION)
        logits = working.model(source, target)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        working.backward(loss)
        working.step(optimizers)
        return loss.item()

    return step


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the matrix products that are computed while it is entered.

    Attributes:
        calls: each of them, with what it was computed from.
    """

    OPERATORS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as ever; note the call if it is a product."""
        call = partial(func, *args, **(kwargs or {}))
        if func.overloadpacket in self.OPERATORS:
            self.calls.append(call)
        return call()


def products_of(step: Step, source: Tensor, target: Tensor) -> list[Callable[[], object]]:
    """The matrix products of one step."""
    step(source, target)  # the first one has zeros for weights
    with Products() as products:
        step(source, target)
    return products.calls


@torch.no_grad()
def compute(calls: Sequence[Callable[[], object]], times: int) -> None:
    """Make all calls, so many times."""
    for _ in range(times):
        for call in calls:
            call()


def peer_step(model: nn.Module, precision: str) -> Step:
    """Fused AdamW, in fp32 or under autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(source: Tensor, target: Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(source, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def steps_measure(step: Step, batches: Sequence[tuple[Tensor, Tensor]]) -> Measure:
    """Seconds for one step on every batch."""
    return timed(lambda: [step(source, target) for source, target in batches])


def our_contenders(shape: Shape, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Contender]:
    """Our model in both precisions, and nothing but its products."""
    models = {precision: Transformer(**shape.model()) for precision in PRECISIONS}
    steps = {name: our_step(model, name) for name, model in models.items()}
    products = {name: products_of(step, *batches[0]) for name, step in steps.items()}
    measures = {
        "**ours**": {name: (steps_measure(step, batches),) for name, step in steps.items()},
        "products alone": {name: (timed(partial(compute, calls, len(batches))),) for name, calls in products.items()},
    }
    return [Contender(name, count_parameters(models["fp32"]), False, seconds) for name, seconds in measures.items()]


def peer_contender(peer: Peer, shape: Shape, batches: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    """A peer in both precisions and every way it has."""
    seconds = {
        name: tuple(steps_measure(peer_step(build(shape), name), batches) for build in peer.builds)
        for name in PRECISIONS
    }
    return Contender(str(peer), count_parameters(peer.builds[0](shape)), True, seconds)


def table(results: Sequence[Result], peak: float) -> str:
    """One row a system."""
    peer = best_peer(results).best
    header = ["system", "parameters", "fp32", "bf16", "fastest", "of the limit", "× the best peer"]
    rows = (
        [
            result.contender.name,
            f"{result.contender.parameters:,}",
            *(f"{result.medians[precision]:,.0f}" for precision in PRECISIONS),
            f"{result.fastest:,.0f}",
            f"{6 * result.contender.parameters * result.best / peak:.0%}",
            f"{result.best / peer:.2f}",
        ]
        for result in results
    )
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of every system (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="training steps a turn (%(default)s)")
    add_shape_arguments(parser)
    args = parser.parse_args(argv)
    shape = shape_of(args)
    machine = describe_machine()
    torch.manual_seed(0)
    tune()  # as the suite's trainer does; the peers have it too
    batches = [shape.random_batch() for _ in range(args.steps)]
    contenders = our_contenders(shape, batches)
    contenders += [peer_contender(peer, shape, batches) for peer in installed_peers()]
    characters = args.steps * shape.batch_size * shape.target_length

    def measured_peak() -> float:
        return matrix_product_peak(shape.batch_size * shape.target_length, shape.d_model, shape.d_ff)

    results, more = compete(contenders, characters, args.rounds, {"peak": measured_peak})
    peak = statistics.median(more["peak"])
    print("Training throughput, target characters per second of whole training steps (forward, loss, backward,")
    print(
        f"optimizer), median of {args.rounds} interleaved rounds of {args.steps} steps; bf16 is autocast but for ours."
    )
    print(f"Shape: {shape}, batch {shape.batch_size}. Limit: {peak / 1e9:,.0f} GFLOP/s of bf16 matrix products.\n")
    print(table(results, peak))
    print(f"\n{machine}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
