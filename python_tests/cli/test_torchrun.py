"""torchrun around `klflow train`: a process is killed, and all start again and finish the run as it would have been."""

import json
import os
import subprocess
import sys

import pytest
import torch

from klflow_ext import Run
from klflow_ext.cli.terminal import choose_device

# klflow, of which process 1 is killed in step 5 of its first start.
KILLED = """
import os, sys
from klflow_ext.train.trainer import Trainer
step = Trainer.train_step
def train_step(self):
    if self.step == 5 and self.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return step(self)
Trainer.train_step = train_step
from klflow_ext.cli import main
main()
"""


@pytest.mark.slow
def test_a_killed_process_is_started_again(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join("the cat sat on the mat and went away. " * 30 for _ in range(80)))
    (tmp_path / "killed.py").write_text(KILLED)
    options = "--vocab-size 280 --steps 8 --seconds 10000 --batch-size 4 --length 16 --n-layer 1 --n-head 2 --n-embd 16"
    options = ["train", "--data", str(tmp_path / "text.txt"), *options.split(), "--checkpoint-seconds", "1e-6"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--max-restarts",
        "1",
    ]
    command = [*torchrun, str(tmp_path / "killed.py"), *options, "--engine", "fsdp", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("klflow:")]
    # the other process says what it noticed, where torchrun does not end it before
    assert len(said) <= 1 and all("a process was lost" in line and line.endswith("-step-5") for line in said)
    assert f"going on with {tmp_path / 'two'} from step 5\n" in done.stderr and "Traceback" not in done.stderr
    alone = [sys.executable, "-m", "klflow_ext", *options, "--out", str(tmp_path / "one")]
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == list(range(1, 9)) and Run(tmp_path / "two").last_good().step == 8
    losses = [torch.tensor([line["loss"] for line in lines]) for lines in (one, two)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=0)


def test_each_process_has_its_gpu(monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("klflow_ext.cli.terminal.check_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert choose_device("cuda") == torch.device("cuda", 3) and chosen == [torch.device("cuda", 3)]
    assert choose_device("cuda:1") == torch.device("cuda", 1) and choose_device("cpu") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert choose_device("cuda") == torch.device("cuda") and len(chosen) == 1
