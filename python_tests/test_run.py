"""Nothing is lost: interrupts, full disks, steps that are not finite, runs over old runs, and folders that lie."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import trainer

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    LogitPath,
    TrainConfig,
    Trainer,
    data,
)
from klflow_ext.run import FORMAT, Run, check_out, load_run, new_folder, write_files

V = 64


STREAM = np.random.default_rng(0).integers(0, V, 5000).astype(np.int32)


def trainer_of(out=None, **options):
    path = LogitPath(V)
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(V, 1, 2, 32, 32), path)
    return Trainer(model, path, STREAM, TrainConfig(**{"steps": 12, "batch_size": 4, "length": 16, **options}), out)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def poison(trainer, steps, value=float("inf")):
    """From now on these steps have one bad number in a gradient."""
    plain = trainer._gradients

    def gradients(*arguments):
        found = plain(*arguments)
        if trainer.step in steps:
            trainer.model.embedding.grad.view(-1)[0] = value
        return found

    trainer._gradients = gradients


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, value):
    trainer = trainer_of(tmp_path)
    poison(trainer, {5, 8}, value)
    before = {}
    plain = trainer.train_step

    def step():
        if trainer.step == 5:
            before.update(weights(trainer), count=trainer.optimizers[0].state[trainer.model.embedding]["step"].item())
        loss = plain()
        if trainer.step == 6:
            assert all(torch.equal(w, before[name]) for name, w in weights(trainer).items())
            assert trainer.optimizers[0].state[trainer.model.embedding]["step"].item() == before["count"]
        return loss

    trainer.train_step = step
    trainer.fit(progress=False)
    assert trainer.step == 12 and trainer.skipped == 2 and before
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in log] == [0] * 5 + [1] * 3 + [2] * 4
    assert all(v.isfinite().all() for v in torch.load(tmp_path / "checkpoint.pt")["model"].values())
    again = trainer_of(tmp_path)
    again.load()
    assert again.skipped == 2


def test_a_run_that_stays_bad_stops(tmp_path):
    trainer = trainer_of(tmp_path, steps=100)
    poison(trainer, range(10, 100))
    with pytest.raises(ValueError, match=r"loss: got [\d.]+ with a gradient of norm inf in step 30, the last of 20"):
        trainer.fit(progress=False)
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 30 and all(v.isfinite().all() for v in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.fit(progress=False)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with torch.no_grad():
        trainer.model.head.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="head.weight: got numbers that are not finite"):
        trainer.save()
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.fixture
def heeded():
    """SIGINT as a terminal gives it, whatever the tests were started from."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path, heeded):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = trainer_of(tmp_path, steps=2)
    plain = trainer.train_step
    trainer.train_step = lambda: (os.kill(os.getpid(), signal.SIGINT), plain())[1]
    trainer.fit(progress=False)
    assert trainer.step == 2 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_ends_after_the_step_and_saves(tmp_path, heeded):
    trainer = trainer_of(tmp_path, steps=1000)
    plain = trainer.train_step

    def step():
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return plain()

    trainer.train_step = step
    with pytest.raises(KeyboardInterrupt, match="step 8 is saved: klflow train --resume"):
        trainer.fit(progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole, resumed = trainer_of(steps=1000), trainer_of(tmp_path, steps=1000)
    resumed.load()
    assert resumed.step == 8
    for _ in range(8):
        whole.train_step()
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.train_step()
    trainer.save()
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    trainer.train_step()
    for module, name in ((torch, "save"), (safetensors.torch, "save_file")):

        def full(thing, path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(ValueError, match=r"(checkpoint.pt|model.safetensors) cannot be written: No space left"):
                trainer.save()
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_files_follow_the_umask(tmp_path):
    trainer, mask = trainer_of(tmp_path), os.umask(0o027)
    try:
        trainer.save()
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o640}


def test_a_new_run_takes_the_place_of_an_old_one_whole(tmp_path):
    out = tmp_path / "run"
    with new_folder(out, False) as folder:
        write_files(folder, {"config.json": lambda p: p.write_text("old"), "log.jsonl": lambda p: p.write_text("old")})
    with pytest.raises(ValueError, match="holds a run already; --overwrite replaces it"), new_folder(out, False):
        pass
    with pytest.raises(RuntimeError), new_folder(out, True) as folder:
        write_files(folder, {"config.json": lambda p: p.write_text("new")})
        raise RuntimeError
    assert sorted(f.read_text() for f in out.iterdir()) == ["old", "old"]
    with new_folder(out, True) as folder:
        write_files(folder, {"config.json": lambda p: p.write_text("new")})
    assert [f.name for f in out.iterdir()] == ["config.json"] and (out / "config.json").read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files than a run's"):
        check_out(tmp_path / "mine", True)


def test_a_config_that_lies_takes_no_memory(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.save()
    text = (tmp_path / "config.json").read_text()
    for old, new in ((f'"vocab_size": {V}', '"vocab_size": 1000000000'), ('"n_layer": 1', '"n_layer": 100000')):
        (tmp_path / "config.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read: it holds an embedding of \[64, 32\]"):
            load_run(tmp_path)


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
    step = torch.load(run / "checkpoint.pt")["step"]
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = step + 2
    (run / "config.json").write_text(json.dumps(config))
    done = klflow("train", "--resume", str(run), env=one)
    assert done.returncode == 0 and f"from step {step}" in done.stdout, done.stderr
    assert torch.load(run / "checkpoint.pt")["step"] == step + 2
    done = klflow("train", "--resume", str(run), env=one)
    assert done.returncode == 1 and f"is finished, at step {step + 2}" in done.stderr
    done = klflow("train", "--resume", str(run), "--more-steps", "3", env=one)
    assert done.returncode == 0 and torch.load(run / "checkpoint.pt")["step"] == step + 5, done.stderr
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


def test_bad_run_folders(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        Run(tmp_path).config()
    (tmp_path / "config.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=f"has format 0, allowed is {FORMAT}"):
        Run(tmp_path).config()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "checkpoint.pt"])
@pytest.mark.parametrize("broken", [False, True])
def test_incomplete_run_folders(tmp_path, name, broken):
    run = trainer(1, tmp_path)
    data.train_tokenizer(["some text"], 257).save(str(tmp_path / "tokenizer.json"))
    run.fit(progress=False)
    load_run(tmp_path), run.load()
    (tmp_path / name).unlink()
    if broken:
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{name} cannot be read" if broken else f"it has no {name}"):
        load_run(tmp_path), run.load()
