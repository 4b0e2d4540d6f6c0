"""SIGKILL at any moment: the run goes on bit for bit, and its log has every step once. KLFLOW_KILLS says how many kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from runs import contents, saved, trainer

from klflow_ext import Run, load_run

KILLS = int(os.environ.get("KLFLOW_KILLS", "6"))
STEPS = 200
SHAPE = {"n_layer": 1, "n_embd": 32, "max_length": 16}


def make(folder):
    """A run that is within a checkpoint for most of its time."""
    return trainer(STEPS, folder, shape=SHAPE, checkpoint_seconds=0.02, keep=2, ema=0.9, time_sampling="learned")


def many_kills(place):
    """Kills the run again and again, until KILLS are done and the last run has come to its end."""
    torch.set_num_threads(1)  # a child of a fork has no others
    whole = make(place / "whole")
    whole.config = type(whole.config)(**{**vars(whole.config), "checkpoint_seconds": 1e6})
    whole.fit(progress=False)
    generator, kills, runs, within, beyond = random.Random(0), 0, 0, 0, 0
    while kills < KILLS:
        folder, status = place / str(runs), None
        runs += 1
        while status != 0:
            child = os.fork()
            if not child:
                go_on(folder)
            if kills < KILLS:
                time.sleep(generator.uniform(0.0, 1.0))
                os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL)
            kills += status != 0
            if status and Run(folder).checkpoints():
                within += any(folder.glob("checkpoint-*.tmp"))
                log = folder / "log.jsonl"
                beyond += log.exists() and log.read_text().count("\n") > saved(folder)["step"]
                load_run(folder)  # at any moment
        check(folder, place / "whole")
    print(
        f"{kills} kills in {runs} runs, {within} of them within a checkpoint, {beyond} with steps beyond it in the log"
    )


def go_on(folder):
    try:
        run = make(folder)
        if run.run.checkpoints():
            run.load()
        else:
            run.save()
        run.fit(progress=False)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def driver(function, *arguments):
    """What a function of this file prints, in a process that may fork and be killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = f"import test_kills, sys; test_kills.{function}(test_kills.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_kills(tmp_path):
    said = driver("many_kills", tmp_path)
    print(said)
    assert int(said.split()[0]) >= KILLS


def check(folder, expected):
    files = {name.split("/")[-1]: content for name, content in contents(folder).items() if f"step-{STEPS}" in name}
    assert sorted(f.name for f in folder.iterdir() if f.name.startswith("checkpoint"))[-1].endswith(f"-step-{STEPS}")
    assert not list(folder.glob("*.tmp")) and not (folder / "lock").exists() and len(Run(folder).checkpoints()) == 2
    there = {name.split("/")[-1]: content for name, content in contents(expected).items() if f"step-{STEPS}" in name}
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
    seen = json.loads(driver("every_call", tmp_path))
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 2 and len(seen) > 15
    print(f"{len(seen) - 1} kills, {seen.count(1)} with the old one whole, {seen.count(2) - 1} with the new one")
