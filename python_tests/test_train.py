"""Model, trainer and command line: what is trained how, exact resume, and errors before work."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    ExactDenoiser,
    LogitPath,
    TrainConfig,
    Trainer,
    data,
    evaluate,
)
from klflow_ext.path import IGNORE
from klflow_ext.run import FORMAT, Run, load_run
from klflow_ext.train import LossCurve
from klflow_ext.train import trainer as trainer_module

V = 40


def small_model(input="posterior", **options):
    torch.manual_seed(0)
    path = LogitPath(V)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "max_length": 32, **options}
    return Denoiser(DenoiserConfig(V, input=input, **shape), path), path


def trainer(steps, out=None, input="posterior", shape=None, **options):
    model, path = small_model(input, **(shape or {}))
    # Runs of the cyclic text 0 1 2 ... 9 0 1 ...: a context shows its neighbours exactly.
    stream = (np.arange(5000) % 10).astype(np.int32)
    return Trainer(model, path, stream, TrainConfig(steps=steps, batch_size=8, length=16, **options), out)


def cyclic_next(model, sequences=4):
    """The share of next tokens of the cyclic text that a causal model finds."""
    x = torch.arange(12)[None].add(torch.arange(sequences)[:, None]) % 10
    return (model(x, 0.0)[:, 1:-1].argmax(-1) == x[:, 2:]).float().mean().item()


def first_gradient(run):
    """(loss, gradients by name) of the run's next step, which changes no weight."""
    run.optimizers = []
    loss = run.train_step()
    return loss, {name: p.grad for name, p in run.model.named_parameters()}


def eager_backend(monkeypatch):
    """torch.compile without the code generation, which takes a minute; what it captures is the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


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
        assert torch.equal(torch.load(tmp_path / "checkpoint.pt")["model"][name], p)
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


def test_two_processes_are_one(tmp_path):
    process_run(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = """
import sys, torch, test_train
from pathlib import Path
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
make = test_train.small_model
def other_weights(*args, **options):
    model, path = make(*args, **options)
    if rank:
        torch.nn.init.ones_(model.embedding)
    return model, path
test_train.small_model = other_weights
run = test_train.process_run(folder / "two")
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
    one = torch.load(tmp_path / "one" / "checkpoint.pt")
    two = torch.load(tmp_path / "two" / "checkpoint.pt")
    for name, weight in one["model"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert (two["model"][name] - weight).norm() < 0.03 * weight.norm(), name  # Muon may round to bfloat16
        assert torch.equal(two["model"][name], first["weights"][name]), name
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [torch.tensor([json.loads(line)["loss"] for line in log]) for log in logs]
    assert len(losses[1]) == 5
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_compiled_is_eager(monkeypatch):
    eager_backend(monkeypatch)
    options = {"accumulate": 2, "dtype": "bfloat16", "shape": {"n_layer": 1}}
    runs = [trainer(4, compile=compile, **options) for compile in (False, True)]
    assert hasattr(runs[1]._loss, "_torchdynamo_orig_callable") and not hasattr(
        runs[0]._loss, "_torchdynamo_orig_callable"
    )
    losses = [torch.tensor([run.train_step() for _ in range(4)]) for run in runs]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


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


@pytest.mark.parametrize("sampling", [None, "middle", "uniform", "learned"])
def test_times(sampling):
    run = trainer(1, time_sampling=sampling, middle_share=0.8)
    run.batches.config = dataclasses.replace(run.config, batch_size=4000)
    shares = run.batches.times(np.random.default_rng(0)).sort().values / run.path.t_max
    middle = ((shares > 0.2) & (shares < 0.8)).float().mean().item()
    assert shares.min() >= 0 and shares.max() <= 1
    if sampling in ("uniform", "learned"):  # nothing is learned yet; one time in each cell
        assert (shares - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.01 / 4000
    else:
        assert abs(middle - (0.8 + 0.2 * 0.6)) < 0.02
    path = LogitPath(V)
    path.t_max = 1.0
    others = Trainer(run.model, path, run.stream, TrainConfig(length=16, time_sampling=sampling))
    assert others.batches.time_sampling == (sampling or "uniform")


def test_what_is_given_in_training():
    """Segments from their beginnings, scattered tokens, prefixes, holes; half of them with nothing else to be seen."""
    run = trainer(1, given_share=0.6)
    run.batches.config = dataclasses.replace(run.config, batch_size=8000, length=64)
    given, blank = run.batches.given_mask(np.random.default_rng(0))
    assert abs(given.any(1).float().mean() - 0.6) < 0.06  # segments and scattered masks may be empty by chance
    assert abs(blank.float().mean() - 0.3) < 0.02
    assert not given.all(1).any()
    changes = (given[:, 1:] != given[:, :-1]).sum(1)
    prefix = given[:, 0] & (changes == 1)
    assert prefix.float().mean() > 0.6 / 8
    periodic = torch.zeros(8000, dtype=torch.bool)
    for size in range(4, 33):
        repeats = (given[:, size:] == given[:, :-size]).all(1) & given.any(1)
        first = (given[:, 1:size] <= given[:, : size - 1]).all(1)  # once free, free until the next segment
        periodic |= repeats & first
    assert 0.15 < periodic.float().mean() < 0.3
    nothing = trainer(1, given_share=0.0).batches.given_mask(np.random.default_rng(0))
    assert not nothing[0].any() and not nothing[1].any()


def test_blank_sequences_are_trained_at_time_zero(monkeypatch):
    run = trainer(1, given_share=1.0)
    found = []
    loss = run.path.loss
    monkeypatch.setattr(run.path, "loss", lambda *a, **k: found.append((a[2], k["given"])) or loss(*a, **k))
    for _ in range(8):
        run.train_step()
    times = torch.cat([t for t, _ in found])
    assert abs((times == 0).float().mean() - 0.5) < 0.2 and ((times > 0).sum() > 0)


def test_times_are_drawn_where_the_loss_falls():
    curve = LossCurve(0.3)
    edges = np.linspace(0, 1, curve.BINS + 1)
    assert np.allclose(curve.times(edges, 1.0), 0.3 * edges)  # nothing measured: uniform
    t = torch.linspace(0, 0.3, 3201)[:-1]
    losses = 4 - 3 * ((t - 0.15) / 0.06).clamp(0, 1)  # falls from .15 to .21 only
    for _ in range(3):
        curve.add(curve.measurement(t, 5 * losses, torch.full_like(t, 5)))
    assert curve.sums[1].sum() == pytest.approx(5 * 3200 * (1 + curve.KEEP + curve.KEEP**2))
    times = curve.times((np.arange(10000) + 0.5) / 10000, 0.8)
    inside = (times > 0.15 - 0.3 / 32) & (times < 0.21 + 0.3 / 32)
    assert inside.mean() == pytest.approx(0.8 + 0.2 * (0.06 + 0.6 / 32) / 0.3, abs=0.01)
    steps = np.diff(curve.times((np.arange(100) + 0.5) / 100, 1.0))  # alone, it cuts the fall into equal pieces
    assert np.allclose(steps[25:75], 0.06 / 100, rtol=0.01)
    flat = LossCurve(0.3)
    flat.add(flat.measurement(t, torch.ones_like(t), torch.ones_like(t)))
    assert np.allclose(flat.density(), 1 / 32)


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_positions_matter(input):
    run = trainer(20, input=input)
    run.fit(progress=False)
    x = run.path.sample(torch.arange(6)[None], 0.2, 1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        assert (run.model(x, 0.2)[:, order] - run.model(x[:, order], 0.2)).abs().max() > 1e-3


def test_loss_counts_free_rows_only():
    _, path = small_model()
    target = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(0))
    target[0, 4:] = IGNORE
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[1, :3] = True
    logits = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(1))
    seen = []

    def model(x, t):
        seen.append(x)
        return logits

    loss = path.loss(model, target, torch.tensor([0.1, 0.2]), 5, given=given)
    free = (target != IGNORE) & ~given
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[free], target[free]))
    assert torch.equal(seen[0][given], torch.nn.functional.one_hot(target[given], V).float())
    assert not torch.equal(seen[0][0, 4].argmax(), seen[0][0, 4].argmin())  # padding is noise, not a token in the clear
    assert seen[0][0, 4].max() < 1


@pytest.mark.parametrize("vocab,t", [(40, 0.05), (40, 0.3), (2000, 0.2)])
def test_posterior_input_is_the_exact_posterior(vocab, t):
    path = LogitPath(vocab)
    prior = torch.rand(vocab, generator=torch.Generator().manual_seed(2)) + 0.01
    prior /= prior.sum()
    model = Denoiser(DenoiserConfig(vocab, 1, 1, 8, 8), path, prior.log())
    x = path.sample(torch.randint(vocab, (2, 8), generator=torch.Generator().manual_seed(3)), t, 4)
    expected = ExactDenoiser(prior, path)(x, t).exp()
    torch.testing.assert_close(model.posterior(x, torch.full((2,), t)).double(), expected, rtol=2e-3, atol=1e-5)
    clear = torch.eye(vocab)[None, :4]
    assert torch.equal(model.posterior(clear, torch.zeros(1)), clear)


@pytest.mark.parametrize("input,top", [("posterior", None), ("posterior", 512), ("simplex", 512)])
def test_training_without_rows_is_training_with_them(input, top):
    """The loss from tokens and seeds, and the dense twin (x_t, logits): the same losses, step by step, to rounding."""
    runs = []
    for dense in (False, True):
        run = trainer(12, input=input)
        run.model.config = dataclasses.replace(run.model.config, top=top)
        if dense:
            loss = run.path.loss
            run.path.loss = lambda model, *a, loss=loss, **k: loss(lambda x, t: model(x, t), *a, **k)
        runs.append([run.train_step() for _ in range(12)])
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=2e-4, atol=0)


def test_the_embedding_of_noise_is_that_of_its_rows():
    path = LogitPath(3000)
    prior = 1 / torch.arange(2.7, 3002.7)  # Zipf's law, as in texts: few tokens hold most of a posterior
    target = torch.multinomial(prior, 12, generator=torch.Generator().manual_seed(3)).view(2, 6)
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[0, 3] = True
    t = torch.tensor([0.05, 0.2])
    x = path.sample(target, t[:, None], 4, given=given)
    for input, top, tolerance in (("simplex", 512, 1e-4), ("posterior", None, 1e-3), ("posterior", 700, 0.03)):
        model = Denoiser(DenoiserConfig(3000, 1, 1, 32, 8, input=input, top=top), path, (prior / prior.sum()).log())
        with torch.no_grad():
            rows, noise = model.embed(x, t), model.embed_noise(target, t, 4, given=given)
        assert (rows - noise).norm(dim=-1).div(rows.norm(dim=-1)).max() < tolerance, (input, top)


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_times_per_position(input):
    run = trainer(10, input=input)
    run.fit(progress=False)
    x = run.path.sample(torch.arange(6)[None].expand(2, 6), 0.2, 1)
    with torch.no_grad():
        expected = run.model(x, torch.tensor([0.2, 0.2]))
        assert torch.equal(run.model(x, torch.full((2, 6), 0.2)), expected)
        x[:, 2] = torch.eye(V)[2]
        later = torch.full((2, 6), 0.2)
        later[:, 2] = 1.0  # a given row is at t = 1: it says the same as a given row at t
        assert torch.equal(run.model(x, later), run.model(x, 0.2))
    with pytest.raises(ValueError, match=r"t: got shape \(3,\)"):
        run.model(x, torch.zeros(3))


def test_judge_tells_text_from_shuffled_words(data_folder):
    judge = evaluate.Judge(data_folder / "stories260K")
    text = (data_folder / "tinystories" / "tinystories_heldout.txt").read_text()
    stories = [s[:300] for s in text.split(f"\n{data.END}\n")[:6]]
    generator = np.random.default_rng(0)
    shuffled = [" ".join(generator.permutation(s.split())) for s in stories]
    assert 0.7 < judge.bits_per_byte(stories) < 1.3 and judge.bits_per_byte(shuffled) > 2.3


def test_tokenizer_round_trip_and_documents(tmp_path):
    text = "\n<|endoftext|>\n".join(f"Story {i}: the café naïve ☃ {i * i}\n" * 5 for i in range(40))
    (tmp_path / "t.txt").write_text(text)
    train, held = data.documents(tmp_path / "t.txt")
    assert len(train) == 38 and len(held) == 2
    tokenizer = data.train_tokenizer(train, 400)
    stream = data.encode(tokenizer, train)
    assert tokenizer.decode(stream.tolist(), skip_special_tokens=False).split(data.END)[:-1] == train
    assert torch.equal(data.batch(stream, 4, 8, 1, 2), data.batch(stream, 4, 8, 1, 2))


def test_removed_lines():
    tokenizer = data.train_tokenizer(["some text"], 257)  # a token a byte
    text = "\n".join(["a = 1", "", "b = 2", "", "c = 3", "d", "call(e)", "f", "g", "h", "i"])
    long = "\n".join(["x" * 40] * 3 + ["call(e)"] + ["y"] * 3)
    (found,) = data.removed_lines([long, "a\n" * 6, text], tokenizer, 60)
    tokens, given, (before, line, after) = found
    assert (before, line, after) == ("b = 2\nc = 3\nd\n", "call(e)", "\nf\ng\nh")
    assert tokenizer.decode(tokens[0].tolist()) == before + line + after
    assert tokenizer.decode(tokens[~given].tolist()) == line and given.shape == tokens.shape == (1, 27)


@pytest.mark.parametrize(
    "content,message", [(None, "cannot be read"), (b"", "is empty"), (b"ab\xff", "not UTF-8: byte 0xff at offset 2"),
                        (b"short", "at least 20 are needed")]
)  # fmt: skip
def test_bad_data(tmp_path, content, message):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.documents(path)


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
        (lambda: TrainConfig(given_share=2), "given_share: got 2"),
        (lambda: LogitPath(1), "vocab_size"),
        (lambda: LogitPath(10, beta=1.0), "beta"),
        (lambda: LogitPath(10, t_max=1.5), "t_max"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def klflow(monkeypatch, capsys, tmp_path):
    """klflow(*arguments): the command line in this process, in tmp_path; what it returned and printed."""
    from klflow_ext import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["klflow", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        message = code if isinstance(code, str) else ""
        return SimpleNamespace(returncode=int(bool(code)), stdout=printed.out, stderr=printed.err + message)

    return run


def test_command_line_as_a_program():
    done = subprocess.run([sys.executable, "-m", "klflow_ext", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and "CPU kernels" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "klflow_ext", "sample", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "no run folder" in done.stderr and "Traceback" not in done.stderr


def test_command_line(klflow, tmp_path):
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    run = tmp_path / "run"
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    done = klflow("train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "3", *small)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout
    done = klflow("train", "--resume", str(run), "--more-steps", "2")
    assert done.returncode == 0 and "from step 3" in done.stdout, done.stderr
    for command in (
        ["sample", str(run), "--steps", "3", "--length", "8", "--count", "2"],
        ["complete", str(run), "--steps", "3", "--length", "8", "--prompt", "one two"],
        ["infill", str(run), "--steps", "3", "--text", "one {?5} three"],
    ):
        done = klflow(*command)
        assert done.returncode == 0 and "3 passes" in done.stdout, done.stderr
    for command, message in (
        (["sample", str(tmp_path)], "no run folder"),
        (["train", "--data", str(tmp_path / "none.txt")], "cannot be read"),
        (["infill", str(run), "--text", "no hole"], "text: got 'no hole'"),
        (["sample", str(run), "--method", "fast"], "method: got 'fast', allowed is one of ['basic', 'hybrid', "),
        (["sample", str(run), "--temperature", "1", "0"], "temperature: got 0"),
        (["sample", str(run), "--device", "nothing"], "device: nothing cannot be used"),
        (["train", "--path", "mask", "--input", "simplex"], "input: got 'simplex', allowed on path mask is 'tokens'"),
        (["train", "--tokenizer", str(tmp_path / "t.txt")], "t.txt cannot be read"),
        (["train", "--ema", "1"], "ema: got 1.0"),
        (["sample", str(run), "--length", "999"], "length: got 999"),
        (["train", "--vocab-size", "100"], "vocab_size: got 100"),
        (["train", "--out", str(tmp_path / "t.txt")], "t.txt is a file, allowed is a folder"),
        (["eval", str(run), "--judge", str(tmp_path)], "has no stories260K.bin"),
        (
            ["train", "--data", str(tmp_path / "t.txt"), "--out", str(run)],
            "run holds a run already; --overwrite replaces",
        ),
        (
            ["train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--overwrite", "--length", "99999"],
            "length: got 99999, allowed is less than the",
        ),
        (["train", "--resume", str(run), "--steps", "5", "--lr=1e-9"], "resume: got --lr, --steps beside it"),
        (["train", "--resume", str(run)], "is finished, at step 5"),
        (["train", "--more-steps", "3"], "more_steps: got 3, allowed is only with --resume"),
        (["sample", str(run), "--count", "-1"], "count: got -1"),
        (["sample", str(run), "--device", "meta"], "device: meta cannot be used"),
        (["train", "--n-layer", "0"], "n_layer: got 0"),
        (["eval", str(run), "--count", "0"], "count: got 0"),
        (["eval", str(run), "--length", "0"], "length: got 0"),
        (["complete", str(run), "--prompt", "caf\udce9"], "prompt: got b'caf\\xe9', allowed is UTF-8"),
        (["infill", str(run), "--text", "a{?99999999999999999999}b"], "text: got the hole {?99999999999999999999}"),
    ):
        before = {file.name: file.read_bytes() for file in run.iterdir()}
        done = klflow(*command)
        assert done.returncode != 0 and message in done.stderr, command
        assert {file.name: file.read_bytes() for file in run.iterdir()} == before, command
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", ["mask", "uniform", "linear", "sphere", "autoregressive"])
def test_command_line_of_the_baselines(klflow, tmp_path, path):
    """Every baseline is one word; a tokenizer file serves another run."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    from klflow_ext import data

    tokenizer = data.train_tokenizer(["one two three four"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = tmp_path / "run"
    done = klflow(
        "train", "--path", path, "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "2", "--length", "16",
        "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--tokenizer", str(tmp_path / "tokenizer.json"),
        "--dtype", "bfloat16", "--ema", "0.9",
    )  # fmt: skip
    assert done.returncode == 0 and "unigram entropy" in done.stdout, done.stderr
    done = klflow("complete", str(run), "--steps", "3", "--length", "8", "--prompt", "one two")
    assert done.returncode == 0 and done.stdout.startswith("one two"), done.stderr
