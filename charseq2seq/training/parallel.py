"""Several processes that train one model together, started by torchrun (PyTorch's own launcher).

Every process has the whole model, takes its share of each batch, and gets the mean of all gradients from
DistributedDataParallel (Li et al., 2020, arXiv:2006.15704); so all of them hold the same weights after every step.
The first process, the leader, alone speaks, writes and publishes. A run that torchrun did not start is a group of one,
for which nothing here does anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from charseq2seq.errors import ExitCode, SuiteError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from charseq2seq.training.stopping import StopRequest

T = TypeVar("T")


def started_by_torchrun() -> bool:
    """Whether this process is one of a group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def is_follower() -> bool:
    """Whether this process leaves speaking and writing to another one."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: this process, 0 to size - 1.
        size: how many there are.
        local_rank: this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this process writes, logs and publishes."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums of each number over all processes, the same everywhere."""
        if self.size == 1:
            return list(numbers)
        import torch

        tensor = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        return list(tensor.tolist())

    def join(self, mine: Tensor) -> Tensor:
        """Every process's tensor, all of one shape, one after the other along the first dimension."""
        if self.size == 1:
            return mine
        import torch

        joined = mine.new_empty(self.size * len(mine), *mine.shape[1:])
        torch.distributed.all_gather_single(joined, mine)
        return joined

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes, or the `SuiteError` it raises, everywhere."""
        if self.size == 1:
            return make()
        import torch

        box: list[Any] = [None, None]
        if self.is_leader:
            try:
                box[0] = make()
            except SuiteError as error:
                box[1] = (str(error), error.exit_code)
        torch.distributed.broadcast_object_list(box)
        if box[1] is not None:
            raise SuiteError(*box[1])
        return cast("T", box[0])

    def after_first(self, make: Callable[[], T]) -> T:
        """What each process makes: the leader, then the first of every other machine, then the others.

        Who comes later may find the files of who came before, be it on a folder that machines share.
        """
        mine = 0 if self.is_leader else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == mine:
                made = make()
            self.sum(0.0)
        return made

    def agree(self, seconds: float, stop: StopRequest) -> tuple[float, bool]:
        """The leader's time, and whether any process was asked to stop; the same everywhere.

        A signal that comes after this is seen the next time: else one process would end and another wait for it.
        """
        if self.size == 1:
            return seconds, stop.signal is not None
        wishes = [float(stop.signal == number) for number in (signal.SIGINT, signal.SIGTERM)]
        seconds, interrupted, terminated = self.sum(seconds if self.is_leader else 0.0, *wishes)
        if interrupted or terminated:
            stop.signal = signal.SIGTERM if terminated else signal.SIGINT
        return seconds, bool(interrupted or terminated)

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

    Args:
        device: "cuda" for one GPU a process and nccl, "cpu" for gloo.

    Raises:
        SuiteError: there is no GPU for this process; or another one has gone: what torchrun started then ends, and may
            be started again.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    import torch

    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda":
        _take_gpu(rank, local_rank)
    try:
        _join(device, rank, size)
        try:
            yield (group := Group(rank, size, local_rank))
            group.sum(0.0)  # nobody leaves while another still speaks
            if device == "cpu":
                # gloo's thread lets go of an operation's tensors after the operation, and outlives the group: with one
                # of Python's in hand it would abort when the interpreter ends. A barrier has none.
                torch.distributed.barrier()
        finally:
            # What still refers to the group in circles (DistributedDataParallel does) must not outlive it: the group's
            # threads would then end with the interpreter, by an abort.
            gc.collect()
            torch.distributed.destroy_process_group()
    except RuntimeError as error:
        if not _is_about_a_peer(error):
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

    # Whoever waits here is deaf to handlers in Python; without one a signal ends the process at once.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        store, _, _ = next(rendezvous("env://"))
        # torchrun keeps the store when it starts the processes again (pytorch/pytorch issue 135712): without a part of
        # their own there they would look for each other where the dead ones were.
        store = torch.distributed.PrefixStore(  # type: ignore[attr-defined]
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
        )
        gloo = _one_thread_gloo()
        backend = f"cpu:{gloo},cuda:nccl" if device == "cuda" else gloo
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _one_thread_gloo() -> str:
    """The name of a backend that is gloo with one worker thread.

    Its usual two both note the name of what they did last, without a lock (`ProcessGroupGloo::runLoop` in PyTorch
    2.13): now and then that corrupts the heap, and the process aborts.
    """
    import torch

    name = "gloo1"
    if name in torch.distributed.Backend.backend_list:
        return name

    def make(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        gloo: Any = torch.distributed.ProcessGroupGloo
        options = gloo._Options()
        options._threads, options._timeout = 1, timeout
        interfaces = [one for one in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if one]
        options._devices = [gloo.create_device(interface=one) for one in interfaces] or [gloo.create_default_device()]
        return gloo(store, rank, size, options)

    torch.distributed.Backend.register_backend(name, make, devices=["cpu"])
    return name


def _take_gpu(rank: int, local_rank: int) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise SuiteError(
            f"process {rank} would need a GPU of its own, and this machine has {gpus}; start it with --nproc_per_node "
            f"{gpus}, or give --device cpu.",
            ExitCode.USAGE,
        )
    torch.cuda.set_device(local_rank)


def _is_about_a_peer(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
