"""The processes that train together: how they meet, part, and notice that one is lost."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 300.0  # seconds that a process is waited for


class LostProcess(ConnectionError):
    """Another process ended, or gave no answer in time; the text says what is kept. Nothing goes on without it."""


def join_processes(device: torch.device, timeout: float = TIMEOUT) -> tuple[int, int]:
    """(rank, number) of the processes that train together: torch.distributed's, started here under torchrun; else (0, 1).

    timeout: seconds that any of them is waited for, where the group is started here.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return 0, 1
        from torch.distributed.rendezvous import rendezvous

        seconds = timedelta(seconds=timeout)
        store, rank, processes = next(rendezvous("env://", timeout=seconds))
        # torchrun gives a process that is started again the store of before, with the addresses of those that are gone.
        store = dist.PrefixStore(f"start {restarts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=seconds)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # where nobody left
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """The end of training with several processes: all are here, then the group goes while its threads still can."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is process 0, or the only one; known before they meet."""
    return os.environ.get("RANK", "0") == "0"


def restarts() -> int:
    """How often `torchrun --max-restarts` has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def noticing_loss(kept: Callable[[], str]) -> Iterator[None]:
    """Within, what torch says of a lost process becomes a LostProcess.

    kept: says what of the training is kept.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_loss(error):
            raise
        raise LostProcess(f"a process was lost: it ended or gave no answer in time; {kept()}") from error


def _is_of_loss(error: RuntimeError) -> bool:
    """torch has a class for some of these; what gloo throws is a plain RuntimeError that names its source file."""
    return dist.is_available() and (isinstance(error, dist.DistError) or "gloo" in str(error))
