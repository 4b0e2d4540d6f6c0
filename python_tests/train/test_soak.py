"""Many steps and calls in one process: memory and open files do not grow. KLFLOW_SOAK says how many (2,000 are a soak)."""

import gc
import os
import re
from pathlib import Path

import pytest
from runs import trainer

from klflow_ext import Run, Sampler

COUNT = int(os.environ.get("KLFLOW_SOAK", "200"))
SHAPE = {"n_layer": 1, "n_embd": 32, "max_length": 16}


def resident():
    """MB that this process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def handles():
    return len(os.listdir("/proc/self/fd"))


def grows(call, count):
    """(MB, handles) by which the process has grown from a fifth of the calls to the last."""
    for i in range(count):
        if i == count // 5:
            gc.collect()
            before = resident(), handles()
        call(i)
    gc.collect()
    return resident() - before[0], handles() - before[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_steps_and_calls(tmp_path):
    run = trainer(COUNT, tmp_path / "run", shape=SHAPE, time_sampling="learned", ema=0.9)

    def step(i):
        run.train_step()
        if i % 50 == 0:
            run.save()

    of_steps = grows(step, COUNT)
    model, path = Run(tmp_path / "run").model()
    sampler = Sampler(model, path)
    methods = ("basic", "sampling", "hybrid", "segments", "confidence")

    def sample(i):
        sampler.sample((1 + i % 3, 5 + i % 7), steps=2, method=methods[i % 5], seed=i)

    of_calls = grows(sample, COUNT)
    of_loads = grows(lambda i: Run(tmp_path / "run").model(), COUNT // 10)
    print(
        f"{COUNT} steps, {COUNT} calls, {COUNT // 10} loads: MB and handles grew by {of_steps}, {of_calls}, {of_loads}"
    )
    for memory, files in (of_steps, of_calls, of_loads):
        assert memory < 8 and files == 0
