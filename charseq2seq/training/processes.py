"""Several processes that train one model together, started by torchrun (PyTorch's own launcher).

Every process has the whole model, takes its portion of each batch, and gets the mean of all gradients from
DistributedDataParallel (Li et al., 2020, arXiv:2006.15704); so all of them hold the same weights after every step.
Rank 0 alone logs, writes and publishes. A run that torchrun did not start is a group of one, for which nothing here
does anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from charseq2seq.console import STOP_SIGNALS
from charseq2seq.errors import ExitCode, SuiteError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


def started_by_torchrun() -> bool:
    """Whether this process is one of a group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def is_rank_0() -> bool:
    """Whether this process logs and writes: rank 0 of a group, or the only one."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it."""

    rank: int = 0
    size: int = 1

    def sum(self, *numbers: float) -> list[float]:
        """All-reduce: the sum of each number over all processes, the same everywhere."""
        if self.size == 1:
            return list(numbers)
        import torch

        tensor = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        return list(tensor.tolist())

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """Broadcast: what `make` returns on rank 0, or the `SuiteError` it raises there, everywhere."""
        if self.size == 1:
            return make()
        import torch

        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except SuiteError as error:
                box[1] = (str(error), error.exit_code)
        torch.distributed.broadcast_object_list(box)
        if box[1] is not None:
            raise SuiteError(*box[1])
        return cast("T", box[0])

    def synchronize(
        self, stopped_by: signal.Signals | None, *figures: float
    ) -> tuple[signal.Signals | None, list[float]]:
        """The signal that stopped any process, and rank 0's figures; the same everywhere.

        A signal that comes after this is seen the next time: else one process would end and another wait for it.
        """
        if self.size == 1:
            return stopped_by, list(figures)
        mine = [float(stopped_by == number) for number in _SIGNALS]
        summed = self.sum(*mine, *(figure * (self.rank == 0) for figure in figures))
        return next((n for n, count in zip(_SIGNALS, summed, strict=False) if count), None), summed[len(mine) :]

    def check(self, batch_size: int, accumulation_steps: int, text: str, sha256: str) -> None:
        """Refuse a batch that has too few windows for all processes, and processes that read different texts."""
        parts = self.size * accumulation_steps
        if batch_size < parts:
            raise SuiteError(
                f"--batch_size {batch_size} cannot be divided into {parts} parts ({self.size} processes, "
                f"--accumulation_steps {accumulation_steps}); give at least {parts}.",
                ExitCode.USAGE,
            )
        if self.from_rank_0(lambda: sha256) != sha256:
            problem = f"process {self.rank} reads another text than rank 0; give all machines the same {text}."
            raise SuiteError(problem, ExitCode.BAD_DATA)

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass leaves the mean of all processes' gradients."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # An empty source leaves the encoder without gradients, in all processes at once.
        return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=True)


ALONE = Group()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the other processes of this run, if there are any, until the block ends.

    A SuiteError says that there is no GPU for this process, or that another process has gone: torchrun then ends those
    that it started, and may start them again.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    import torch

    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            problem = f"process {rank} would need a GPU of its own, and this machine has {gpus}; start it with "
            raise SuiteError(f"{problem}--nproc_per_node {gpus}, or give --device cpu.", ExitCode.USAGE)
        torch.cuda.set_device(local_rank)
    try:
        _join(device, rank, size)
        try:
            yield (group := Group(rank, size))
            group.sum(0.0)  # no process leaves while another still sends
        finally:
            gc.collect()  # DistributedDataParallel refers to the group in circles, and must not outlive it
            torch.distributed.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise SuiteError(
            f"process {rank} of {size} lost another one, whose own message says why; start them again to go on from "
            "the last saved state (torchrun --max-restarts does so by itself).",
            ExitCode.UNAVAILABLE,
        ) from error


def _join(device: str, rank: int, size: int) -> None:
    """Wait for the other processes."""
    import torch
    from torch.distributed.rendezvous import rendezvous

    # Python runs no signal handler while this waits; without one a signal ends the process at once.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        store, _, _ = next(rendezvous("env://"))
        # torchrun keeps the store when it restarts the processes (github.com/pytorch/pytorch/issues/135712): without a
        # prefix of their own they would look for each other where the dead ones were.
        store = torch.distributed.PrefixStore(  # type: ignore[attr-defined]
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
        )
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
