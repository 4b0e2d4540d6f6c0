"""Options from a file, and how long a run is said to take."""

import json
import sys
from types import ModuleType

import pytest

from klflow_ext.cli.options import with_config
from klflow_ext.cli.terminal import printable
from klflow_ext.run import Run

SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 300, "length": 16, "batch_size": 4}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    return str(path)


def test_a_file_of_options(tmp_path):
    file = tmp_path / "o.json"
    file.write_text(
        json.dumps({"steps": 5, "slices": True, "overwrite": False, "data": ["a", "b"], "max_seconds": None})
    )
    flags = ["--steps", "5", "--slices", "--no-overwrite", "--data", "a", "b", "--max-seconds", "None"]
    own = ["--config", str(file), "--steps", "7"]
    assert with_config(["train", *own]) == ["train", *flags, *own]
    assert with_config(["demo", f"--config={file}"]) == ["demo", *flags, f"--config={file}"]
    assert with_config(["sample", *own]) == ["sample", *own] and with_config([]) == []
    for content, message in (
        ("[1]", "allowed is an object"),
        ('{"resume": "x"}', "config: .* has 'resume'"),
        ("{", "o.json"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            with_config(["train", *own])


@pytest.mark.slow
def test_training_by_files(klflow, tmp_path, text):
    file = tmp_path / "o.json"
    file.write_text(
        json.dumps({**SMALL, "steps": 9, "lr": 0.001, "optimizer": "adamw", "heldout_every": 2, "t_max": 0.5})
    )
    first, second = tmp_path / "first", tmp_path / "second"
    done = klflow(
        "train", "--data", text, "--out", str(first), "--config", str(file), "--steps", "4", "--show-every", "4"
    )
    assert done.returncode == 0, done.stderr
    assert "4 steps of " in done.stderr and "held-out loss" in done.stdout and "--- step 4: " in done.stdout
    assert "warning: in fewer than 100 steps" in done.stderr
    samples = {record["step"]: record["sample"] for record in Run(first).read_log() if "sample" in record}
    assert list(samples) == [4] and f"--- step 4: {printable(samples[4])}" in done.stdout
    config = Run(first).config()
    assert (config["train"]["steps"], config["train"]["optimizer"], config["path"]["t_max"]) == (4, "adamw", 0.5)
    given = next(first.glob("checkpoint-*")) / "config.json"
    done = klflow("train", "--data", text, "--vocab-size", "300", "--out", str(second), "--config", str(given))
    assert done.returncode == 0, done.stderr
    again = Run(second).config()
    assert {**again, "heldout_loss": 0} == {**config, "heldout_loss": 0}
    done = klflow("train", "--data", text, "--out", str(first), "--config", str(tmp_path / "none.json"))
    assert done.returncode == 1 and "none.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_clock_that_ends_too_early_is_warned_of(klflow, tmp_path, text):
    small = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
    done = klflow(
        "train", "--data", text, "--out", str(tmp_path / "run"), *small, "--steps", "500000", "--seconds", "0.5"
    )
    assert done.returncode == 0 and "so --seconds 0.5 ends the run at about step " in done.stderr, done.stderr
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < 10000


@pytest.mark.slow
def test_tensorboard_by_an_option(klflow, tmp_path, text, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    run = tmp_path / "run"
    small = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
    words = ["train", "--data", text, "--out", str(run), *small, "--steps", "2", "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = klflow(*words)
    assert done.returncode == 1 and "tensorboard is missing: pip install tensorboard" in done.stderr
    assert not run.exists()
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert klflow(*words).returncode == 0
    assert klflow("train", "--resume", str(run), "--more-steps", "1", "--tensorboard", "--quiet").returncode == 0
    folder = str(run / "tensorboard")
    assert [w for w in written if w[0] in ("loss", folder)] == [
        (folder, None),
        ("loss", 1),
        ("loss", 2),
        (folder, 3),
        ("loss", 3),
    ]
    assert written[-1] == "closed"
