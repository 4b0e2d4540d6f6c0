"""The Trainer: what is trained how, exact resume, several processes, and settings that are refused."""

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import V, cyclic_next, eager_backend, first_gradient, saved, trainer

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    LogitPath,
    TrainConfig,
    Trainer,
)
from klflow_ext.run import Run, load_run
from klflow_ext.train import make_optimizers
from klflow_ext.train import trainer as trainer_module


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_training_learns_and_resumes_bit_for_bit(tmp_path, input):
    whole = trainer(30, tmp_path / "whole", input, given_share=0.2)
    whole.fit(progress=False)
    first = trainer(30, tmp_path / "parts", input, given_share=0.2)
    for _ in range(13):
        first.train_step()
    first.save()
    second = trainer(30, tmp_path / "parts", input, given_share=0.2)
    second.load()
    second.fit(progress=False)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("time", ["token", "add", "adaln"])
def test_muon_has_the_hidden_matrices_only(time):
    run = trainer(1, shape={"time": time, "self_conditioning": True})
    adam, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in run.optimizers)
    names = {id(p): n for n, p in run.model.named_parameters()}
    layers = ("qkv", "attention_out", "mlp_in", "mlp_out")
    hidden = {f"blocks.{i}.{name}.weight" for i in range(2) for name in layers} | {"self_in.weight"}
    assert {names[i] for i in muon} == hidden
    assert {names[i] for i in adam} == set(names.values()) - hidden


def test_the_average_is_what_a_run_gives(tmp_path):
    run = trainer(6, tmp_path, ema=0.3)
    expected = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(6):
        run.train_step()
        decay = min(0.3, (1 + step) / (10 + step))
        for name, p in run.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    run.save()
    loaded, averaged = load_run(tmp_path)[0], run.averaged_model()
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(run.average[name], expected[name])
        assert torch.equal(loaded.state_dict()[name], run.average[name])
        assert torch.equal(averaged.state_dict()[name], run.average[name])
        assert torch.equal(saved(tmp_path)["model"][name], p)
    assert not torch.equal(run.model.head.weight, averaged.head.weight)
    plain = trainer(1)
    assert plain.averaged_model() is plain.model
    plain.averaged_model().eval()
    plain.train_step()
    assert plain.model.training


@pytest.mark.parametrize("fast", [False, True])
def test_slow_bfloat16_is_warned_of(monkeypatch, fast):
    monkeypatch.setattr(trainer_module, "multiplies_bfloat16", lambda device: fast)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(1)
        assert not seen
        trainer(1, dtype="bfloat16")
    assert [str(w.message)[:21] for w in seen] == ["dtype: got 'bfloat16'"] * (not fast)


def test_bfloat16_learns_what_float32_learns():
    runs = {dtype: trainer(30, dtype=dtype) for dtype in ("float32", "bfloat16")}
    losses = {dtype: torch.tensor([run.train_step() for _ in range(30)]) for dtype, run in runs.items()}
    assert not torch.equal(losses["float32"], losses["bfloat16"])
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0)
    assert losses["bfloat16"][-5:].mean() < 0.8 * losses["bfloat16"][:3].mean()
    assert all(p.dtype == torch.float32 for p in runs["bfloat16"].model.parameters())
    seen = []
    runs["bfloat16"].model.blocks[0].mlp_in.register_forward_hook(lambda layer, x, y: seen.append(y.dtype))
    runs["bfloat16"].train_step()
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("sampling", ["middle", "learned"])
@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_batch_in_parts_is_the_batch(accumulate, sampling):
    """Different numbers of free tokens in each part, the noise of each row by its number in the whole batch."""
    runs = [trainer(4, accumulate=n, time_sampling=sampling, given_share=0.9) for n in (1, accumulate)]
    for run in runs:  # away from the zero weights, behind which there are no gradients
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in run.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    (loss, gradients), (parts_loss, parts) = map(first_gradient, runs)
    assert parts_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert gradient.any()
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if sampling == "learned":
        torch.testing.assert_close(runs[1].batches.curve.sums, runs[0].batches.curve.sums, rtol=1e-5, atol=0)
        generator = np.random.default_rng((0, 0, 1))
        runs[0].batches.times(generator)
        given, blank = runs[0].batches.given_mask(generator)
        tokens = (~given).sum(1)
        assert (
            blank.any() and runs[0].batches.curve.sums[1].sum() == tokens[~blank].sum()
        )  # at t = 0, but not for its noise
        assert 0 < runs[0].batches.curve.sums[0].sum().item() < loss * tokens.sum().item()


def process_run(out):
    """What one of several processes does in the next test; all but process 0 start from other weights."""
    run = trainer(5, out, accumulate=2, ema=0.5, time_sampling="learned", max_seconds=1000.0, seed=3)
    run.fit(progress=False)
    return run


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    process_run(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = """
import sys, torch, test_trainer
from pathlib import Path
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
import runs
make = runs.small_model
def other_weights(*args, **options):
    model, path = make(*args, **options)
    if rank:
        torch.nn.init.ones_(model.embedding)
    return model, path
runs.small_model = other_weights
run = test_trainer.process_run(folder / "two")
assert (run.rank, run.processes) == (rank, 2)
torch.save({"weights": run.model.state_dict(), "curve": run.batches.curve.sums}, folder / f"{rank}.pt")
from klflow_ext.train import leave_processes
leave_processes()
"""
    workers = []
    for rank in range(2):
        settings = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        settings["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        command = [sys.executable, "-c", code, str(rank), str(tmp_path)]
        workers.append(subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.PIPE))
    for worker in workers:
        errors = worker.communicate(timeout=120)[1]
        assert worker.returncode == 0, errors.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    one = saved(tmp_path / "one")
    two = saved(tmp_path / "two")
    for name, weight in one["model"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert (two["model"][name] - weight).norm() < 0.03 * weight.norm(), name  # Muon may round to bfloat16
        assert torch.equal(two["model"][name], first["weights"][name]), name
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [torch.tensor([json.loads(line)["loss"] for line in log]) for log in logs]
    assert len(losses[1]) == 5
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_compiled_is_eager(monkeypatch):
    eager_backend(monkeypatch)
    options = {"accumulate": 2, "dtype": "bfloat16", "shape": {"n_layer": 1}}
    runs = [trainer(4, compile=compile, **options) for compile in (False, True)]
    assert [run.engine.loss._compiled_call_impl is not None for run in runs] == [False, True]
    losses = [torch.tensor([run.train_step() for _ in range(4)]) for run in runs]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_resumes_bit_for_bit_with_everything_on(tmp_path, monkeypatch):
    eager_backend(monkeypatch)
    options = {
        "ema": 0.9, "dtype": "bfloat16", "accumulate": 2, "time_sampling": "learned", "compile": True, "input": "simplex",
        "shape": {"time": "adaln", "n_layer": 1},
    }  # fmt: skip
    whole = trainer(9, **options)
    for _ in range(9):
        whole.train_step()
    first = trainer(9, tmp_path, **options)
    for _ in range(5):
        first.train_step()
    first.save()
    second = trainer(9, tmp_path, **options)
    second.load()
    for _ in range(4):
        second.train_step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert whole.average.keys() == second.average.keys()
    assert all(torch.equal(value, second.average[name]) for name, value in whole.average.items())
    assert torch.equal(whole.batches.curve.sums, second.batches.curve.sums) and whole.batches.curve.sums.any()


def test_an_average_begins_with_a_resumed_run(tmp_path):
    first = trainer(3, tmp_path)
    first.train_step()
    first.save()
    second = trainer(3, tmp_path, ema=0.9, time_sampling="learned")
    second.load()
    assert all(torch.equal(value, first.model.state_dict()[name]) for name, value in second.average.items())


@pytest.mark.parametrize("accumulate,dtype", [(1, "float32"), (4, "bfloat16")])
def test_a_causal_model_of_tokens_learns(accumulate, dtype):
    torch.manual_seed(0)
    config = DenoiserConfig(V, 2, 2, 32, 32, input="tokens", causal=True, time="none")
    run = Trainer(
        Denoiser(config, Autoregressive(V)), Autoregressive(V), (np.arange(5000) % 10).astype(np.int32),
        TrainConfig(steps=40, batch_size=8, length=16, accumulate=accumulate, dtype=dtype, ema=0.8),
    )  # fmt: skip
    assert run.batches.time_sampling == "uniform"
    before = cyclic_next(run.averaged_model())
    run.fit(progress=False)
    assert before < 0.5 and cyclic_next(run.averaged_model()) > 0.95


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: TrainConfig(seed=-1), "seed: got -1"),
        (lambda: DenoiserConfig(1), "vocab_size: got 1"),
        (lambda: DenoiserConfig(10, n_embd=30), "n_embd: got 30"),
        (lambda: DenoiserConfig(10, input="x"), "input: got 'x'"),
        (lambda: DenoiserConfig(10, top=0), "top: got 0"),
        (lambda: TrainConfig(steps=0), "steps: got 0"),
        (lambda: TrainConfig(ema=1.0), r"ema: got 1.0, allowed is a number in \[0, 1\)"),
        (lambda: TrainConfig(dtype="float16"), "dtype: got 'float16', allowed is one of"),
        (lambda: TrainConfig(compile="yes"), "compile: got 'yes'"),
        (lambda: TrainConfig(time_sampling="late"), "time_sampling: got 'late'"),
        (lambda: TrainConfig(accumulate=0), "accumulate: got 0"),
        (lambda: TrainConfig(batch_size=8, accumulate=3), "accumulate: got 3, allowed is a divisor of batch_size = 8"),
        (lambda: TrainConfig(lr=0), "lr: got 0"),
        (lambda: TrainConfig(keep=0), "keep: got 0"),
        (lambda: TrainConfig(batch_size=2**40), "batch_size: got 1099511627776 sequences of 64 tokens, allowed are"),
        (lambda: DenoiserConfig(2**31), "vocab_size: got 2147483648, allowed is an integer from 2 to 2147483647"),
        (lambda: DenoiserConfig(10, n_layer=10**9), "n_layer: got 1000000000, allowed is an integer from 1 to 4096"),
        (lambda: DenoiserConfig(10, max_length=10**12), "max_length: got 1000000000000"),
        (lambda: TrainConfig(given_share=2), "given_share: got 2"),
        (lambda: LogitPath(1), "vocab_size"),
        (lambda: LogitPath(10, beta=1.0), "beta"),
        (lambda: LogitPath(10, t_max=1.5), "t_max"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_heldout_text_is_measured_and_its_best_checkpoint_stays(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(trainer_module, "loss_by_time", lambda *a: {0.1: next(losses)})
    path, records = LogitPath(V), []
    model = Denoiser(DenoiserConfig(V, 1, 1, 8, 16), path)
    config = TrainConfig(steps=8, batch_size=2, length=8, heldout_every=2, heldout_count=3)
    stream = np.arange(300) % V
    run = Trainer(model, path, stream, config, tmp_path, heldout=stream[::-1].copy())
    assert run.heldout_texts.shape == (3, 8)
    run.fit(progress=False, callback=records.append)
    assert [r["heldout_loss"] for r in records] == [None, 3.0, None, 1.0, None, 2.0, None, 2.5]
    assert [r["lr"] for r in records] == [config.learning_rate(i / 8) for i in range(8)]
    assert all(r["tokens_per_second"] > 0 and r["gradient_norm"] > 0 for r in records)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == records
    assert [c.step for c in Run(tmp_path).checkpoints()] == [8, 4] and Run(tmp_path).best().step == 4
    assert load_run(tmp_path, best=True)[0] is not None
    with pytest.raises(ValueError, match="heldout: got None, allowed with heldout_every = 2"):
        Trainer(model, path, stream, config)


def test_measuring_changes_nothing(tmp_path):
    def weights(**options):
        torch.manual_seed(0)
        path = LogitPath(V)
        model = Denoiser(DenoiserConfig(V, 1, 1, 8, 16), path)
        config = TrainConfig(steps=5, batch_size=2, length=8, ema=0.5, **options)
        stream = np.arange(300) % V
        run = Trainer(model, path, stream, config, heldout=stream)
        if options:
            assert run.time_step() > 0
        run.fit(progress=False)
        return [p.detach() for p in (*model.parameters(), *run.averaged_model().parameters())]

    for a, b in zip(weights(), weights(heldout_every=1), strict=True):
        assert torch.equal(a, b)


def test_optimizers_by_name():
    path = LogitPath(V)
    model = Denoiser(DenoiserConfig(V, 1, 1, 8, 16), path)
    config = TrainConfig(optimizer="adamw", beta1=0.8, beta2=0.9, weight_decay=0.25)
    rest, hidden = make_optimizers(model, path, config)
    assert type(rest) is type(hidden) is torch.optim.AdamW
    assert [o.param_groups[0]["weight_decay"] for o in (rest, hidden)] == [0.0, 0.25]
    assert [o.param_groups[0]["betas"] for o in (rest, hidden)] == [(0.8, 0.9)] * 2
    muon = make_optimizers(model, path, TrainConfig(momentum=0.5))[1]
    assert muon.param_groups[0]["momentum"] == 0.5


def test_schedules():
    line, cosine = (TrainConfig(lr=1.0, warmup=0.1, decay=0.5, schedule=name) for name in ("linear", "cosine"))
    assert [round(line.learning_rate(p), 3) for p in (0.3, 0.625, 0.75, 1.0)] == [1.0, 0.75, 0.5, 0.0]
    assert [round(cosine.learning_rate(p), 3) for p in (0.3, 0.625, 0.75, 1.0)] == [1.0, 0.854, 0.5, 0.0]


def test_the_compiler_costs_no_training_time(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the wait for it is the sleep below
    run = trainer(3, compile=True)
    step = run.train_step
    monkeypatch.setattr(run, "train_step", lambda: (time.sleep(0.3 if run.step == 0 else 0), step())[1])
    records = []
    run.fit(progress=False, callback=records.append)
    assert records[0]["seconds"] == 0.0


def test_a_look_at_heldout_text_costs_no_training_time(monkeypatch):
    monkeypatch.setattr(trainer_module, "loss_by_time", lambda *a: (time.sleep(0.5), {0.1: 1.0})[1])
    path, stream, records = LogitPath(V), np.arange(300) % V, []
    model = Denoiser(DenoiserConfig(V, 1, 1, 8, 16), path)
    run = Trainer(model, path, stream, TrainConfig(steps=3, batch_size=2, length=8, heldout_every=1), heldout=stream)
    begin = time.perf_counter()
    run.fit(progress=False, callback=records.append)
    whole = time.perf_counter() - begin
    assert (
        len(records) == 3 and records[-1]["seconds"] < whole - 0.9
    )  # of three looks the last is after the last record
