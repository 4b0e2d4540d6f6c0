"""What makes the gradient of a step: one process, or several by torch's DistributedDataParallel or fully_shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as PathOnDisk
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from klflow_ext.files import TEMPORARY, remove
from klflow_ext.parts import write_parts
from klflow_ext.path import Network, Path, as_network
from klflow_ext.path.network import device_of, load_own_state, own_state
from klflow_ext.sharding import is_sharded, sharded_like
from klflow_ext.train.config import TrainConfig
from klflow_ext.train.objective import Objective


class Engine:
    """A model and its path where there is one process. `loss` is the module whose call is the loss of a part of a batch.

    Attributes:
        processes: how many compute a batch together.
        shards: whether parameters are split over them.
    """

    processes, shards = 1, False

    def __init__(self, model: nn.Module, path: Path, config: TrainConfig):
        self.model = model
        objective = Objective(model, path, config.dtype)
        if config.compile:
            objective.compile(fullgraph=True)
        self.loss: nn.Module = self._wrapped(objective, config)

    def _wrapped(self, objective: Objective, config: TrainConfig) -> nn.Module:
        return objective

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a part of the batch; last: no other part follows."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the sum over all processes of their losses."""
        (loss * self.processes).backward()  # the engines give the mean over the processes

    def sum(self, *tensors: Tensor) -> None:
        """Replaces each by its sum over all processes."""

    def likeness(self, optimizers: list[torch.optim.Optimizer]) -> Callable[[str], Tensor | None] | None:
        """What `Checkpoint.training` is told of how its tensors are split here; None: not."""
        return None

    @contextmanager
    def parts(self, folder: PathOnDisk | None, tensors: dict[str, Tensor]) -> Iterator[PathOnDisk | None]:
        """A folder with the parts of the sharded tensors, within the run's `folder` as process 0 has it; None where nothing is
        sharded. All processes must ask."""
        yield None

    def load_model(self, state: dict[str, Tensor]) -> None:
        """Takes up whole weights, the same on every process."""
        now = own_state(self.model)
        load_own_state(
            self.model, {name: sharded_like(x, now[name]) if name in now else x for name, x in state.items()}
        )

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Takes up the whole state of an optimizer, the same on every process."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        entries = {
            i: {name: sharded_like(x, params[i]) if _is_like(x, params[i]) else x for name, x in values.items()}
            for i, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


class Group(Engine):
    """Several processes, which start from the weights of process 0."""

    def __init__(self, model: nn.Module, path: Path, config: TrainConfig):
        self.processes = dist.get_world_size()
        super().__init__(model, path, config)

    def sum(self, *tensors: Tensor) -> None:
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))


class Replicas(Group):
    """Every process has the whole model; buckets of gradients are averaged while the backward pass goes on."""

    def _wrapped(self, objective: Objective, config: TrainConfig) -> nn.Module:
        return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        if last:
            yield
            return
        with self.loss.no_sync():  # type: ignore[operator]
            yield


class Shards(Group):
    """Every process has a part of each parameter, its gradient and its optimizer's state; a block's parameters are gathered before
    its passes. Gradients are reduced in every part of a batch: no process need have room for all of them.

    With dtype bfloat16 the parameters of the network's sharded_units are gathered in that, as autocast would cast them. Embedding and head stay in
    float32: their gradients are sums over many rows.
    """

    shards = True

    def _wrapped(self, objective: Objective, config: TrainConfig) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for value in objective.state_dict().values():
            dist.broadcast(value, 0)
        size = config.shard_size or self.processes
        device = device_of(self.model).type
        if size == self.processes:
            mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(device, (self.processes // size, size), mesh_dim_names=("replicate", "shard"))
        narrow = torch.bfloat16 if config.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        for unit in as_network(self.model, objective.path).sharded_units():
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        return objective

    def likeness(self, optimizers: list[torch.optim.Optimizer]) -> Callable[[str], Tensor | None] | None:
        weights = self.model.state_dict()
        params = [[p.detach() for group in o.param_groups for p in group["params"]] for o in optimizers]

        def like(name: str) -> Tensor | None:
            kind, *rest = name.split("/")
            if kind == "optimizers":  # optimizers/<number>/state/<parameter>/<moment>
                return params[int(rest[0])][int(rest[2])]
            return weights.get(rest[-1]) if kind in ("model", "average") else None

        return like

    @contextmanager
    def parts(self, folder: PathOnDisk | None, tensors: dict[str, Tensor]) -> Iterator[PathOnDisk | None]:
        first = dist.get_rank() == 0
        where: list[Any] = [None]
        if first and folder is not None:
            where[0] = str(folder / f"parts{TEMPORARY}")
            remove(PathOnDisk(where[0]))
        dist.broadcast_object_list(where, 0)
        parts = PathOnDisk(where[0])
        try:
            parts.mkdir(exist_ok=True)
            write_parts(parts, {name: x for name, x in tensors.items() if is_sharded(x)})
            yield parts
        finally:
            if first:
                remove(parts)


ENGINES: dict[str, type[Engine]] = {"ddp": Replicas, "fsdp": Shards}


def make_engine(model: nn.Module, path: Path, config: TrainConfig, processes: int) -> Engine:
    """The engine that a config asks for; one process needs none.

    Raises:
        ValueError: the processes do not divide as the config says; the message names the setting.
    """
    size = config.shard_size
    if size is not None and processes > 1 and processes % size:
        raise ValueError(f"shard_size: got {size}, allowed is a divisor of the {processes} processes")
    network = as_network(model, path)
    if isinstance(network, Network) and network.recompute is not None:
        network.recompute = config.recompute
    elif config.recompute:
        raise ValueError("recompute: got True, allowed is False for a network that cannot (Network.recompute is None)")
    return (Engine if processes == 1 else ENGINES[config.engine or "ddp"])(model, path, config)
