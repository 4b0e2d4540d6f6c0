"""Several processes on one machine, as torchrun would start them, for the tests of what they do together."""

import contextlib
import gc
import os
import socket

import torch
import torch.distributed as dist


def together(count, folder, function, *arguments):
    """function(rank, *arguments) in each of `count` new processes of one gloo group; an error in one is raised here."""
    torch.multiprocessing.spawn(_process, (count, folder / "rendezvous", function, arguments), nprocs=count)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _process(rank, count, rendezvous, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    function(rank, *arguments)
    # All here, what holds the group gone, then the group: otherwise gloo's threads may outlive it, and the process aborts.
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


@contextlib.contextmanager
def alone(folder):
    """This process as a group of one."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
