"""Several processes train as one does, whatever the engine, and go on from each other's checkpoints."""

import json
import os
import time

import pytest
import torch
from processes import free_port, together
from runs import small_model, trainer

from klflow_ext import Run, TrainConfig, Trainer, load_run, muon
from klflow_ext.train import LostProcess

WIDE = {"time": "adaln", "n_layer": 1}  # parameters of many shapes
ENGINES = {"ddp": {}, "fsdp": {"engine": "fsdp"}, "hsdp": {"engine": "fsdp", "shard_size": 1}}


def make(out, steps=4, **options):
    return trainer(steps, out, shape=WIDE, accumulate=2, ema=0.5, time_sampling="learned", keep=9, seed=3, **options)


def losses(out):
    return torch.tensor([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])


def near(found, expected, limit=1e-3):
    """With Muon in float32 (`in_float32`); the first steps of AdamW have the size of the learning rate, whatever the gradient's."""
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= limit * (weight.norm() + 1e-3), name


def in_float32(device):
    """Of Muon. In bfloat16 it makes some percent of a rounding of the gradient, on processors where that is fast."""
    return False


def train_with_each(rank, folder):
    muon.multiplies_bfloat16 = in_float32  # this process ends with the function
    for name, options in ENGINES.items():
        run = make(folder / name, recompute=name == "fsdp", **options)
        assert (run.rank, run.processes) == (rank, 2)
        run.fit(progress=False)
        averaged = run.averaged_model()
        torch.save(averaged.state_dict(), folder / f"{name}-{rank}.pt")
    # From one process's checkpoint, on two; and from two shards' on two without.
    for name, source in (("fsdp", "first"), ("ddp", "fsdp-half"), ("hsdp", "fsdp-half")):
        run = make(folder / f"{source}-{name}", **ENGINES[name])
        run.load(Run(folder / source).checkpoints()[0])
        assert run.step == 2
        run.fit(progress=False)


def train_half(rank, folder):
    muon.multiplies_bfloat16 = in_float32
    run = make(folder / "fsdp-half", engine="fsdp")
    for _ in range(2):
        run.train_step()
    run.save()
    run.save()  # over what is there
    with torch.no_grad():
        run.model.head.weight.to_local()[:] = float("nan") if rank else 0
    with pytest.raises(ValueError, match=r"head.weight: got numbers that are not finite"):
        run.save()
    assert len(Run(folder / "fsdp-half").checkpoints()) == 2


@pytest.mark.slow
def test_two_processes_are_one_with_every_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bfloat16", in_float32)
    one = make(tmp_path / "one")
    one.fit(progress=False)
    expected = load_run(tmp_path / "one")[0].state_dict()
    first = make(tmp_path / "first")
    for _ in range(2):
        first.train_step()
    first.save()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    together(2, tmp_path / "a", train_half, tmp_path)
    together(2, tmp_path / "b", train_with_each, tmp_path)

    alone = make(tmp_path / "fsdp-half-one")  # two processes' shards, on one
    alone.load(Run(tmp_path / "fsdp-half").checkpoints()[0])
    alone.fit(progress=False)
    resumed = ("first-fsdp", "fsdp-half-ddp", "fsdp-half-hsdp", "fsdp-half-one")
    for name in (*ENGINES, *resumed):
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "one")[-len(losses(tmp_path / name)):],
                                   rtol=2e-5, atol=0)  # fmt: skip
        near(load_run(tmp_path / name)[0].state_dict(), expected)
    for name in ENGINES:
        both = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        assert all(torch.equal(value, both[1][key]) for key, value in both[0].items())
        assert all(torch.equal(value, load_run(tmp_path / name)[0].state_dict()[key]) for key, value in both[0].items())

    checkpoint = Run(tmp_path / "fsdp").checkpoints()[0]
    shards = sorted(file.name for file in checkpoint.folder.glob("training-*"))
    assert shards == [f"training-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sizes = [(checkpoint.folder / name).stat().st_size for name in shards]
    whole = (Run(tmp_path / "one").checkpoints()[0].folder / "training.safetensors").stat().st_size
    assert max(sizes) < 0.6 * whole  # each process wrote its part alone
    torn = checkpoint.folder / shards[1]
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"training-00002-of-00002.safetensors cannot be read: it has \d+ bytes"):
        make(tmp_path / "fsdp").load(checkpoint)


# ---- what differs, and who is lost


def differing(rank, folder):
    for name, options, message in (
        ("lr", {"lr": 0.1 + rank}, r"^lr: got 0.1 on process 0, 1.1 on process 1, allowed is the same on all$"),
        ("ema", {"ema": 0.5 * rank}, "^ema: got 0.0 on process 0, 0.5 on process 1"),
        ("batch", {"accumulate": 1 + 7 * rank}, "^accumulate: got 1 on process 0, 8 on process 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(4, folder / name, **options)
    stream = torch.arange(5000).numpy() % 10
    stream[77] += rank
    model, path = small_model()
    with pytest.raises(
        ValueError, match='^data: got ".*" on process 0, ".*" on process 1, allowed is the same on all$'
    ):
        Trainer(model, path, stream, TrainConfig(length=16))
    with pytest.raises(ValueError, match=r'^model: got .*"n_layer": 1.* on process 0, .*"n_layer": 2.* on process 1'):
        trainer(4, None, shape={"n_layer": 1 + rank})
    trainer(4, None)  # and together they go on


@pytest.mark.slow
def test_differences_are_refused_before_the_first_step(tmp_path):
    together(2, tmp_path, differing, tmp_path)
    assert not any((tmp_path / name).exists() for name in ("lr", "ema", "batch"))


def losing(rank, port, folder, ends):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = trainer(9, folder, timeout=4.0, checkpoint_seconds=1e-3)
    step = run.train_step

    def train_step():
        if run.step == 3 and rank == 1:
            if ends:
                os._exit(0)
            time.sleep(12)
            os._exit(0)
        return step()

    run.train_step = train_step
    begin = time.monotonic()
    with pytest.raises(
        LostProcess, match="a process was lost: it ended or gave no answer in time; the last checkpoint is"
    ) as e:
        run.fit(progress=False)
    assert e.value.args[0].endswith("-step-3") and "\n" not in e.value.args[0]
    assert (time.monotonic() - begin < 4) if ends else (4 <= time.monotonic() - begin < 11)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False])
def test_a_lost_process_ends_the_others_in_time(tmp_path, ends):
    torch.multiprocessing.spawn(losing, (free_port(), tmp_path, ends), nprocs=2)
    assert Run(tmp_path).last_good().step == 3
