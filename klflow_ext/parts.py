"""Tensors of which each process writes its part, and any number of processes read what they need: torch.distributed.checkpoint on
safetensors files. No pickle is written or read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klflow_ext.sharding import local


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes sharded tensors to a folder that all processes see, a file for each process. All must call it.

    Raises:
        ValueError: a number is not finite, or a file cannot be written; on every process.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    names = sorted(tensors)
    bad = torch.tensor([not bool(local(tensors[name]).isfinite().all()) for name in names], dtype=torch.int64)
    bad = bad.to(local(tensors[names[0]]).device)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    if bad.any():
        name = names[int(bad.argmax())]
        raise ValueError(f"{name}: got numbers that are not finite, which are never saved")
    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        raise ValueError(f"{folder} cannot be written by process {rank}: {failure}") from error


def read_parts(folder: Path, names: Iterable[str], like: Callable[[str], Any]) -> dict[str, Tensor]:
    """Tensors by name from all safetensors files of a folder, whether whole there or in parts.

    like: for a name None, or a tensor: one of its shape is read split as that is, every other whole, to the CPU.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in stored:
            raise ValueError(f"it holds no {name}")
        other = like(name)
        if other is not None and other.shape == stored[name].size:
            tensors[name] = torch.empty_like(other)
        else:
            tensors[name] = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant
        load(tensors, storage_reader=reader, no_dist=True)  # each process reads for itself: an error is its own
    return tensors
