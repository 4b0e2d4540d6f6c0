"""SIGKILL at any moment: the run goes on bit for bit, and its log has every step once. KLFLOW_KILLS says how many kills."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import contents, saved, trainer

from klflow_ext import Run, load_run

KILLS = int(os.environ.get("KLFLOW_KILLS", "10"))
STEPS = 400
SHAPE = {"n_layer": 1, "n_embd": 32, "max_length": 16}
PROGRAM = """
import sys
from pathlib import Path
import test_kills
run = test_kills.make(Path(sys.argv[1]))
if run.run.checkpoints():
    run.load()
else:
    run.save()
print("begins", run.step, flush=True)
run.fit(progress=False)
"""


def make(folder):
    """A run that is within a checkpoint for most of its time."""
    return trainer(STEPS, folder, shape=SHAPE, checkpoint_seconds=0.02, keep=2, ema=0.9, time_sampling="learned")


@pytest.mark.slow
def test_kills(tmp_path):
    whole = make(tmp_path / "whole")
    whole.config = type(whole.config)(**{**vars(whole.config), "checkpoint_seconds": 1e6})
    whole.fit(progress=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    generator, kills, within, cut = random.Random(0), 0, 0, 0
    folder = number = None
    while kills < KILLS or folder is not None:
        if folder is None:
            number, folder = (number or 0) + 1, tmp_path / f"run-{number or 0}"
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        begins = process.stdout.readline()
        assert begins.startswith("begins"), process.stderr.read()
        try:
            process.wait(generator.uniform(0.0, 1.0) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            within += any(folder.glob("checkpoint-*.tmp"))
            lines = (folder / "log.jsonl").read_text().split("\n") if (folder / "log.jsonl").exists() else [""]
            cut += lines[-1] != "" or len(lines) - 1 > saved(folder)["step"]
            load_run(folder)  # at any moment
            continue
        finally:
            process.stdout.close(), process.stderr.close()
        assert process.returncode == 0
        check(folder, whole, tmp_path / "whole")
        folder = None
    print(f"{kills} kills in {number} runs, {within} of them within a checkpoint, {cut} with lines beyond it")


def check(folder, whole, expected):
    files = {name.split("/")[-1]: content for name, content in contents(folder).items() if "step-400" in name}
    assert sorted(f.name for f in folder.iterdir() if f.name.startswith("checkpoint"))[-1].endswith("-step-400")
    assert not list(folder.glob("*.tmp")) and not (folder / "lock").exists() and len(Run(folder).checkpoints()) == 2
    there = {name.split("/")[-1]: content for name, content in contents(expected).items() if "step-400" in name}
    assert files["model.safetensors"] == there["model.safetensors"]
    found, right = saved(folder), saved(expected)
    for name, value in right["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert torch.equal(found["curve"], right["curve"])
    log, lines = (
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()] for place in (folder, expected)
    )
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in log] == [record["loss"] for record in lines]


CALLS = ("fsync", "rename", "replace", "mkdir", "chmod", "unlink", "rmdir", "open")


def every_call(place):
    """Saves twice, in a process of its own that is killed at its first, second, third, ... call; what is left each time."""
    torch.set_num_threads(1)
    run, seen, status = make(place), [], None
    run.config = type(run.config)(**{**vars(run.config), "keep": 1})
    while status != 0:
        folder = place / str(len(seen))
        run.run, run.step = Run(folder), 1
        run.save()
        child = os.fork()
        if not child:
            save_and_die(run, len(seen))
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        found = Run(folder).last().check()
        load_run(folder)
        seen.append(found.step)
        again = make(folder)
        again.load()
        assert again.step == found.step
        again.save()
        kept = {checkpoint.folder.name for checkpoint in Run(folder).checkpoints()}
        assert {f.name for f in folder.iterdir()} == {"train.npy", *kept} and len(kept) == 2
    print(json.dumps(seen))


def save_and_die(run, at):
    count = 0

    def counted(plain):
        def call(*arguments, **options):
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return plain(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        run.step = 2
        run.save()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_a_kill_at_every_call(tmp_path):
    """Killed before each of the calls by which a checkpoint comes and the one before it goes: one is whole at each moment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = f"import test_kills, pathlib; test_kills.every_call(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 2 and len(seen) > 15
    print(f"{len(seen) - 1} kills, {seen.count(1)} with the old one whole, {seen.count(2) - 1} with the new one")
