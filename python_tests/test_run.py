"""Nothing is lost: interrupts, full disks, steps that are not finite, runs over old runs, and folders that lie."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import saved

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    LogitPath,
    TrainConfig,
    Trainer,
)

V = 64


STREAM = np.random.default_rng(0).integers(0, V, 5000).astype(np.int32)


def trainer_of(out=None, **options):
    path = LogitPath(V)
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(V, 1, 2, 32, 32), path)
    return Trainer(model, path, STREAM, TrainConfig(**{"steps": 12, "batch_size": 4, "length": 16, **options}), out)


TEXT = "\n\n".join(f"the cat {i} sat on the mat and the dog ran home again " * 40 for i in range(60))


SMALL = "--vocab-size 300 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 4 --length 16".split()


def klflow(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "klflow_ext", *arguments], capture_output=True, text=True, **options)


@pytest.mark.slow
def test_a_run_is_finished_and_lengthened_by_name(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    run, one = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--data", str(tmp_path / "t.txt"), "--out", str(run), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "klflow_ext", "train", *options, "--steps", "100000", "--seconds", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not process.stdout.readline().startswith("model:"):
        pass
    while not (run / "log.jsonl").exists():
        pass
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "is saved: klflow train --resume" in said, said
    step = saved(run)["step"]
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = step + 2
    (run / "config.json").write_text(json.dumps(config))
    done = klflow("train", "--resume", str(run), env=one)
    assert done.returncode == 0 and f"from step {step}" in done.stdout, done.stderr
    assert saved(run)["step"] == step + 2
    done = klflow("train", "--resume", str(run), env=one)
    assert done.returncode == 1 and f"is finished, at step {step + 2}" in done.stderr
    done = klflow("train", "--resume", str(run), "--more-steps", "3", env=one)
    assert done.returncode == 0 and saved(run)["step"] == step + 5, done.stderr
    for encoding in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}):
        done = klflow(
            "complete", str(run), "--prompt", "hi 😀", "--length", "16", "--steps", "2", env={**one, **encoding}
        )
        assert done.returncode == 0 and "\\U0001f600" in done.stdout, done.stderr


def test_what_is_printed_does_nothing_to_a_terminal():
    from klflow_ext.cli import printable

    assert printable("a\tb\n\x1b[31mred\x07 \x9b0m\u202e é 春\r") == "a\tb\n\\x1b[31mred\\x07 \\x9b0m\\u202e é 春\\r"


@pytest.mark.slow
def test_info_needs_no_extra(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ImportError('no tyro')")
    from klflow_ext import __path__ as paths

    source = SimpleNamespace(root=os.path.dirname(list(paths)[0]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), source.root, os.environ.get("PYTHONPATH", "")])}
    done = klflow("info", env=env)
    assert done.returncode == 0 and "CPU kernels" in done.stdout, done.stderr
    done = klflow("sample", "x", env=env)
    assert done.returncode == 1 and "needs the train extra" in done.stderr
