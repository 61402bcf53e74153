"""A whole training step as one CUDA graph: captured once, then replayed.

A step of a small model is a thousand kernels of a few microseconds, and starting each from Python takes longer than
running it: the GPU waits for the host. A CUDA graph records what a step starts and starts it again in one call
(PyTorch's notes on CUDA semantics describe the method). What this asks of a step:

- every tensor stays where it is: inputs are copied into fixed buffers, weights and optimizer state change in place;
- nothing is read back to the host, and learning rates are tensors, or the first ones would be replayed for ever;
- shapes never change: there is a graph for each variant (here: for each source length), all in one pool of memory.

The first call of a variant is an uncaptured step: it sets up libraries and optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from charseq2seq.console import log
from charseq2seq.options import Settings


class GraphedStep:
    """Runs `step(inputs, variant)` by replaying a CUDA graph of it.

    Args:
        step: takes a tensor on the GPU, of one shape in every call, and a variant, which decides shapes inside;
            returns a tensor, the loss. Everything else that it changes, it changes in place.
    """

    def __init__(self, step: Callable[[Tensor, Any], Tensor]) -> None:
        self._step = step
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._inputs: Tensor | None = None
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # of each variant, with its loss
        self._warm: set[Any] = set()

    def __call__(self, inputs: Tensor, variant: Any) -> Tensor:
        """One step; returns a copy of the loss, which later steps do not change."""
        if self._inputs is None:
            self._inputs = torch.empty_like(inputs, device="cuda")
        self._inputs.copy_(inputs, non_blocking=True)
        if variant not in self._warm:
            self._warm.add(variant)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = self._step(self._inputs, variant).clone()
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if variant not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss = self._step(self._inputs, variant)
            self.graphs[variant] = (graph, loss)
            self._pool = graph.pool()
        graph, loss = self.graphs[variant]
        graph.replay()
        return loss.clone()


def captured_where_possible(
    step: Callable[[Tensor, Any], Tensor], settings: Settings, processes: int
) -> Callable[[Tensor, Any], Tensor]:
    """A step as a CUDA graph, or as it is where a run's steps cannot be captured; a GPU's log says why."""
    if settings.device != "cuda":
        return step
    reasons = {
        "fp16's loss scaling reads the gradients back": settings.precision == "fp16",
        "gradient checkpointing saves random states": settings.gradient_checkpointing,
        "several processes exchange gradients while they are computed": processes > 1,
    }
    if obstacles := [reason for reason, applies in reasons.items() if applies]:
        log(f"steps are not captured as a CUDA graph: {'; '.join(obstacles)}")
        return step
    return GraphedStep(step)
