"""Nothing is lost: full disks, folders that go, two processes in one, runs over old runs, and checkpoints that stay."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import contents, saved, trainer

from klflow_ext import TrainConfig, Trainer, data
from klflow_ext.checkpoint import Checkpoint
from klflow_ext.lock import Lock
from klflow_ext.run import Run, check_out, load_run

TOKENIZER, TOKENS = data.train_tokenizer(["some text"], 257), np.arange(50, dtype=np.int32)


def create(out, overwrite=False):
    return Run.create(out, overwrite=overwrite, tokenizer=TOKENIZER, stream=TOKENS, heldout=TOKENS)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_a_new_run_takes_the_place_of_an_old_one_whole(tmp_path):
    out, run = tmp_path / "run", trainer(3)
    with create(out) as run.run:
        run.save()
        assert not out.exists()
    assert run.run.folder == out and names(tmp_path) == ["run"]
    before = contents(out)
    with pytest.raises(ValueError, match="holds a run already; --overwrite replaces it"), create(out):
        pass
    with pytest.raises(RuntimeError), create(out, True) as run.run:
        run.save()
        raise RuntimeError
    assert contents(out) == before and names(tmp_path) == ["run"]
    run.step = 2
    with create(out, True) as run.run:
        run.save()
    assert names(out) == ["checkpoint-0001-step-2", "heldout.npy", "tokenizer.json", "train.npy"]
    assert names(tmp_path) == ["run"]
    load_run(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files than a run's"):
        check_out(tmp_path / "mine", True)


def test_a_run_of_an_older_format_may_be_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="has format 1, allowed is 2: train it again with this version"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        check_out(tmp_path, False)
    check_out(tmp_path, True)


def test_two_new_runs_in_one_place(tmp_path):
    """The second is refused while the first is being made, and again where the first came to stand there meanwhile."""
    out, first, second = tmp_path / "run", trainer(3), trainer(3)
    with create(out) as first.run:
        first.save()
        with pytest.raises(ValueError, match=r"run.new, which process \d+ on .* writes to"), create(out):
            pass
    saved_first = contents(out)
    os.rename(out, tmp_path / "aside")
    with pytest.raises(ValueError, match="holds a run already"), create(out) as second.run:
        second.save()
        os.rename(tmp_path / "aside", out)
    assert contents(out) == saved_first and names(tmp_path) == ["run"]


def test_one_process_trains_in_a_folder(tmp_path):
    run = trainer(3, tmp_path)
    run.save()
    lock = Lock(tmp_path)
    before = contents(tmp_path)
    for use in (lambda: run.fit(progress=False), run.save, lambda: check_out(tmp_path, True)):
        with pytest.raises(
            ValueError, match=rf"run: got {tmp_path}, which process {os.getpid()} on .* writes to, allowed is a"
        ):
            use()
    assert contents(tmp_path) == before
    load_run(tmp_path), run.load(), Run(tmp_path).streams  # readers need none
    lock.release()
    run.fit(progress=False)
    assert "lock" not in names(tmp_path)


def test_keep(tmp_path):
    run = trainer(9, tmp_path, keep=3)
    for _ in range(5):
        run.train_step()
        run.save()
    assert [(c.number, c.step) for c in Run(tmp_path).checkpoints()] == [(5, 5), (4, 4), (3, 3)]
    run.save()  # the same step again
    assert [(c.number, c.step) for c in Run(tmp_path).checkpoints()] == [(6, 5), (5, 5), (4, 4)]
    again = trainer(9, tmp_path)  # an earlier step, in the same folder
    again.load(Run(tmp_path).checkpoints()[-1])
    again.save()
    assert [(c.number, c.step) for c in Run(tmp_path).checkpoints()] == [(7, 4)]
    assert names(tmp_path) == ["checkpoint-0007-step-4", "train.npy"]


def test_the_run_of_another_trainer_is_replaced_only_when_asked(tmp_path):
    first = trainer(3, tmp_path / "run", keep=3)
    first.fit(progress=False)
    first.save()  # its own goes on
    trainer(1, tmp_path / "other").save()
    (tmp_path / "run" / "mine").write_text("not a run's")
    before = contents(tmp_path / "run")
    second = trainer(2, tmp_path / "run", keep=3)
    elsewhere = trainer(2, tmp_path / "run", keep=3)
    elsewhere.load(Run(tmp_path / "other").last())
    for one in (second, elsewhere):
        for use in (lambda one=one: one.fit(progress=False), one.save):
            with pytest.raises(
                ValueError, match=r"^out: .*run holds a run already; .*overwrite=True.*load\(\) goes on"
            ):
                use()
    assert contents(tmp_path / "run") == before and second.step == 0
    new = Trainer(second.model, second.path, second.stream[:900], second.config, tmp_path / "run", overwrite=True)
    new.fit(progress=False)
    assert names(tmp_path / "run") == ["checkpoint-0001-step-2", "log.jsonl", "mine", "train.npy"]
    assert [record["step"] for record in Run(tmp_path / "run").read_log()] == [1, 2]
    again = trainer(3, tmp_path / "run")
    assert len(np.load(tmp_path / "run" / "train.npy")) == 900
    again.load()
    again.fit(progress=False)
    assert Run(tmp_path / "run").last().step == 3


def test_what_a_killed_process_left_goes(tmp_path):
    run = trainer(2, tmp_path)
    run.save()
    (tmp_path / "checkpoint-0002-step-5.tmp").mkdir()
    (tmp_path / "checkpoint-0002-step-5.tmp" / "config.json").write_text("half")
    (tmp_path / "train.npy.tmp").write_text("half")
    (tmp_path / "mine.tmp").write_text("not a run's")
    run.fit(progress=False)
    assert names(tmp_path) == ["checkpoint-0002-step-2", "log.jsonl", "mine.tmp", "train.npy"]


@pytest.mark.parametrize("room", [0, 100, 2000, 20_000, 100_000])
def test_a_disk_that_is_full(tmp_path, room):
    """No file may grow beyond `room` bytes: the kernel's refusal at each of the files."""
    run = trainer(3, tmp_path)
    run.train_step()
    run.save()
    before = contents(tmp_path)
    run.train_step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written: .*File too large") as refused:
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    assert "lock cannot" in str(refused.value) or str(refused.value).endswith(
        "the last checkpoint is " + str(Run(tmp_path).last().folder)
    )
    run.save()
    assert saved(tmp_path)["step"] == 2


def test_a_folder_that_goes_while_a_run_trains(tmp_path):
    for replaced in (False, True):
        folder = tmp_path / f"run-{replaced}"
        run = trainer(9, folder, checkpoint_seconds=1e-9)
        plain = run.train_step

        def step(run=run, plain=plain, folder=folder, replaced=replaced):
            if run.step == 4:
                os.rename(folder, tmp_path / f"gone-{replaced}")
                if replaced:
                    folder.mkdir()
            return plain()

        run.train_step = step
        with pytest.raises(ValueError, match=f"{folder} has gone, or another took its place"):
            run.fit(progress=False)
        assert folder.exists() == replaced and (not replaced or names(folder) == [])
        assert saved(tmp_path / f"gone-{replaced}")["step"] == 4
        assert not list((tmp_path / f"gone-{replaced}").glob("*.tmp"))


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    run = trainer(9, tmp_path)
    run.save()
    plain = run.train_step

    def step():
        if run.step == 4:
            run._log._file = open("/dev/full", "ab", buffering=0)
        return plain()

    run.train_step = step
    with pytest.raises(ValueError, match="log.jsonl cannot be written: No space left on device"):
        run.fit(progress=False)
    assert saved(tmp_path)["step"] == 0


def test_a_reader_follows_a_run_that_trains(tmp_path, monkeypatch):
    """The checkpoint that it was about to read is replaced by the next: it reads that one."""
    run = trainer(9, tmp_path)
    run.save()
    plain, moved = Checkpoint.check, []

    def check(self, *names):
        if not moved:
            moved.append(run.train_step())
            run.save()
        return plain(self, *names)

    monkeypatch.setattr(Checkpoint, "check", check)
    model = load_run(tmp_path)[0]
    assert moved and torch.equal(model.embedding, run.model.embedding)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "training.safetensors", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("broken", [False, True])
def test_incomplete_run_folders(tmp_path, name, broken):
    run = trainer(1, tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    run.fit(progress=False)
    load_run(tmp_path), run.load()
    path = (tmp_path if name == "tokenizer.json" else Run(tmp_path).last().folder) / name
    path.unlink()
    if broken:
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"{name} cannot be read" if broken else f"it has no {name}"):
        load_run(tmp_path), run.load()


TEXT = "\n\n".join(f"the cat {i} sat on the mat and the dog ran home again " * 40 for i in range(60))


SMALL = "--vocab-size 300 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 4 --length 16".split()


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "klflow_ext", *arguments], capture_output=True, text=True, **options)


def shorten(folder, steps):
    """The run as it were if it had been meant to end at that step."""
    run = Run(folder)
    config = TrainConfig(**{**vars(TrainConfig.of(run.last())), "steps": steps})
    model, path = run.model()
    stream, held = run.streams()
    trainer = Trainer(model.train(), path, stream, config, run, heldout=held)
    trainer.load()
    trainer.save()


def test_refused_and_fallen_back_by_name(klflow, tmp_path):
    """The command line: a folder in use, and one whose last checkpoint is damaged."""
    (tmp_path / "t.txt").write_text(TEXT)
    run = tmp_path / "run"
    done = klflow("train", "--data", str(tmp_path / "t.txt"), "--out", str(run), *SMALL, "--steps", "3", "--keep", "2")
    assert done.returncode == 0, done.stderr
    lock = Lock(run)
    before = contents(run)
    for command in (
        ["--resume", str(run), "--more-steps", "3"],
        ["--data", str(tmp_path / "t.txt"), "--out", str(run), "--overwrite", *SMALL],
    ):
        done = klflow("train", *command)
        assert done.returncode != 0 and f"which process {os.getpid()} on" in done.stderr
        assert contents(run) == before
    assert klflow("sample", str(run), "--steps", "2", "--length", "8").returncode == 0
    lock.release()
    (Run(run).last().folder / "training.safetensors").write_bytes(b"torn")
    done = klflow("train", "--resume", str(run), "--more-steps", "4")
    assert done.returncode == 0 and "from step 0\n" in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if "going back" in line]
    assert (
        len(said) == 1
        and said[0].endswith("going back to checkpoint-0001-step-0")
        and "training.safetensors" in said[0]
    )
    assert [json.loads(line)["step"] for line in open(run / "log.jsonl")] == [1, 2, 3, 4]


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
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "after the signal: klflow train --resume" in said, said
    step = saved(run)["step"]
    shorten(run, step + 2)
    done = command("train", "--resume", str(run), env=one)
    assert done.returncode == 0 and f"from step {step}" in done.stderr, done.stderr
    assert saved(run)["step"] == step + 2
    done = command("train", "--resume", str(run), env=one)
    assert done.returncode == 1 and f"is finished, at step {step + 2}" in done.stderr
    done = command("train", "--resume", str(run), "--more-steps", "3", env=one)
    assert done.returncode == 0 and saved(run)["step"] == step + 5, done.stderr
    for encoding in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}):
        done = command(
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
    done = command("info", env=env)
    assert done.returncode == 0 and "CPU kernels" in done.stdout, done.stderr
    done = command("sample", "x", env=env)
    assert done.returncode == 1 and "needs the train extra" in done.stderr
