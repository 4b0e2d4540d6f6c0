"""Tensors of which each process holds a part (torch's DTensor, as `fully_shard` makes them), and whole ones made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; asked without its class, which a torch without torch.distributed has not."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """The part of this process, in the same memory; of a plain tensor all."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tree: Any) -> Any:
    """The same dicts and lists with every sharded tensor gathered. All processes must ask, in the same order."""
    return tree_map(lambda x: x.full_tensor() if is_sharded(x) else x, tree)


def gathered(tensors: dict[str, Tensor], here: bool) -> dict[str, Tensor]:
    """Whole tensors by name; of sharded ones copies on the CPU, only where `here`, one after another. All processes must ask."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if here:
            found[name] = value.cpu() if is_sharded(tensor) else value
    return found


def sharded_like(tensor: Tensor, other: Any) -> Tensor:
    """A whole tensor, that every process has, as `other` is: on its device and split as it is. Nothing is sent. A tensor that is
    split already stays so."""
    tensor = tensor.to(other.device)
    if is_sharded(tensor) or not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def map_items(function: Any, tensor: Any) -> Any:
    """function((M, ...)) -> (M, ...) of the items of a tensor (N, ...): of a sharded one, each process has some of the items whole,
    and the result is split as the tensor was."""
    if not is_sharded(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor, Shard

    items = _redistributed(tensor, [Shard(0) if p.is_shard() else p for p in tensor.placements])
    done = function(items.to_local())
    shape, stride = tensor.shape, torch.empty(tensor.shape, device="meta").stride()
    result = DTensor.from_local(done, items.device_mesh, items.placements, shape=shape, stride=stride, run_check=False)
    return _redistributed(result, tensor.placements)


def _redistributed(tensor: Any, placements: Any) -> Any:
    from torch.distributed.tensor import Replicate

    if tensor.device.type == "cpu":  # gloo has no all-to-all, which torch would say in a warning and do this
        tensor = tensor.redistribute(placements=[Replicate() for _ in placements])
    return tensor.redistribute(placements=placements)


def stack_like(parts: Sequence[Tensor], other: Any) -> Any:
    """The stack of N tensors that are split as `other` is, from the parts of this process."""
    stacked = torch.stack(tuple(parts))
    if not is_sharded(other):
        return stacked
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(p.dim + 1) if p.is_shard() else p for p in other.placements]
    shape = torch.Size([len(parts), *other.shape])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(stacked, other.device_mesh, placements, shape=shape, stride=stride, run_check=False)
