"""Models that are larger than one device's memory: every process keeps a part of each weight (FSDP2).

`torch.distributed.fsdp.fully_shard` splits weights, gradients and with them the optimizers' state over the processes of
a group, and puts a layer's weights together while it computes (Zhao et al., 2023, arXiv:2304.11277). A tensor of which
each process holds a part is a `DTensor`; the functions here also take plain tensors, their own whole and part.

Files hold wholes: a model or resume state is the same whatever number of processes wrote it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from charseq2seq.device import torch_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer

    from encoder_decoder_transformer import Transformer


def shard(model: Transformer, device: str, processes: int, precision: str) -> None:
    """Split a model's weights over all processes; its layers compute in `precision`, embedding and head in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (processes,))
    policy = MixedPrecisionPolicy(param_dtype=torch_dtype(precision), reduce_dtype=torch.float32)
    for layer in [*model.encoder, *model.decoder]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def _is_split(value: Any) -> bool:
    """Whether it is a `DTensor`; told without importing that module, which takes longer than to start training."""
    return hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return cast("DTensor", tensor).full_tensor() if _is_split(tensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; changing it changes the tensor."""
    return cast("DTensor", tensor).to_local() if _is_split(tensor) else tensor


def whole_of_part(mine: Tensor, like: Tensor) -> Tensor:
    """All of a tensor that is split like another one, from every process's part."""
    if not _is_split(like):
        return mine
    from torch.distributed.tensor import DTensor

    like = cast("DTensor", like)
    split = DTensor.from_local(mine, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return split.full_tensor()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split like another one."""
    if not _is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", like)
    # No process needs to send anything: every one takes its part of what it has.
    return distribute_tensor(tensor.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def own_weights(model: Transformer) -> dict[str, Tensor]:
    """Copies on the CPU of what this process has of each weight."""
    return {name: part(weight.detach()).to("cpu", copy=True) for name, weight in model.state_dict().items()}


def set_own_weights(model: Transformer, own: Mapping[str, Tensor]) -> None:
    """Set what this process has of each weight."""
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            part(weight).copy_(own[name])


def split_weights(model: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of whole weights is this process's own.

    Raises:
        RuntimeError: the model has other names or shapes.
    """
    state = model.state_dict()
    if state.keys() != weights.keys() or any(state[name].shape != weights[name].shape for name in state):
        raise RuntimeError("its weights are those of another model")
    return {name: part(split_like(weights[name].to(like), like)).cpu() for name, like in state.items()}


def whole_weights(model: Transformer, own: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All of the weights of which every process has its own, on the CPU.

    Args:
        model: what they are weights of.
        own: as `own_weights` gives them.
        keep: where it is false, this process only helps the others and gets none: they may be more than it can hold.
    """
    kept = {}
    for name, weight in model.state_dict().items():
        tensor = whole_of_part(own[name].to(weight.device), weight).cpu() if _is_split(weight) else own[name]
        if keep:
            kept[name] = tensor
    return kept


def whole_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` of an optimizer of whole weights; see `whole_weights` for `keep`."""
    state = optimizer.state_dict()
    entries: dict[int, dict[str, Any]] = {}
    for number, one in state["state"].items():
        wholes = {name: whole(value).cpu() if _is_split(value) else value for name, value in one.items()}
        entries[number] = wholes if keep else {}
    return {**state, "state": entries}


def load_whole_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """The opposite of `whole_optimizer_state`; the optimizer gets tensors of its own: `state` can serve again."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    entries = {
        number: {
            name: split_like(value.to(weights[number].device), weights[number])
            if isinstance(value, Tensor) and value.shape == weights[number].shape
            else value
            for name, value in copy.deepcopy(one).items()
        }
        for number, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
