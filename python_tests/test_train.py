"""Model, trainer and command line: what is trained how, exact resume, and errors before work."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from klflow_ext import Denoiser, DenoiserConfig, ExactDenoiser, LogitPath, TrainConfig, Trainer, data, evaluate
from klflow_ext.path import IGNORE
from klflow_ext.train import RUN_FORMAT, load_run, read_config

V = 40


def small_model(input="posterior", **options):
    torch.manual_seed(0)
    path = LogitPath(V)
    return Denoiser(
        DenoiserConfig(V, n_layer=2, n_head=2, n_embd=32, max_length=32, input=input, **options), path
    ), path


def trainer(steps, out=None, input="posterior"):
    model, path = small_model(input)
    # Runs of the cyclic text 0 1 2 ... 9 0 1 ...: a context shows its neighbours exactly.
    stream = (np.arange(5000) % 10).astype(np.int32)
    return Trainer(model, path, stream, TrainConfig(steps=steps, batch_size=8, length=16), out)


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_training_learns_and_resumes_bit_for_bit(tmp_path, input):
    whole = trainer(30, tmp_path / "whole", input)
    whole.fit(progress=False)
    first = trainer(30, tmp_path / "parts", input)
    for _ in range(13):
        first.train_step()
    first.out.mkdir()
    first.save()
    second = trainer(30, tmp_path / "parts", input)
    second.load()
    second.fit(progress=False)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_muon_has_the_hidden_matrices_only():
    run = trainer(1)
    adam, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in run.optimizers)
    names = {id(p): n for n, p in run.model.named_parameters()}
    assert {names[i].split(".")[0] for i in muon} == {"blocks"}
    assert {names[i] for i in adam} == {"embedding", "time_in.weight", "time_out.weight", "head.weight"}


def test_output_projections_start_at_zero():
    model, _ = small_model()
    assert not model.head.weight.any()
    for block in model.blocks:
        assert not block.attention_out.weight.any() and not block.mlp_out.weight.any()
    assert torch.equal(model(torch.full((1, 3, V), 1 / V), 0.1), torch.zeros(1, 3, V))


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
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=f"has format 0, allowed is {RUN_FORMAT}"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "checkpoint.pt"])
@pytest.mark.parametrize("broken", [False, True])
def test_incomplete_run_folders(tmp_path, name, broken):
    run = trainer(1, tmp_path)
    run.fit(progress=False)
    data.train_tokenizer(["some text"], 257).save(str(tmp_path / "tokenizer.json"))
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


def klflow(*arguments):
    return subprocess.run([sys.executable, "-m", "klflow_ext", *arguments], capture_output=True, text=True)


def test_command_line(tmp_path):
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    run = tmp_path / "run"
    small = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "300", "--length", "16"]
    done = klflow("train", "--data", str(tmp_path / "t.txt"), "--out", str(run), "--steps", "3", *small)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout
    done = klflow("train", "--resume", str(run), "--steps", "2", "--seconds", "50")
    assert done.returncode == 0 and "from step 3" in done.stdout, done.stderr
    for command in (
        ["sample", str(run), "--steps", "3", "--length", "8", "--count", "2"],
        ["complete", str(run), "--steps", "3", "--length", "8", "--prompt", "one two"],
        ["infill", str(run), "--steps", "3", "--text", "one {?2} three"],
    ):
        done = klflow(*command)
        assert done.returncode == 0 and "3 passes" in done.stdout, done.stderr
    for command, message in (
        (["sample", str(tmp_path)], "no run folder"),
        (["train", "--data", str(tmp_path / "none.txt")], "cannot be read"),
        (["infill", str(run), "--text", "no hole"], "text: got 'no hole'"),
        (["sample", str(run), "--method", "fast"], "method: got 'fast'"),
        (["sample", str(run), "--length", "999"], "length: got 999"),
        (["train", "--vocab-size", "100"], "vocab_size: got 100"),
        (["train", "--out", str(tmp_path / "t.txt")], "t.txt cannot be written"),
        (["eval", str(run), "--judge", str(tmp_path)], "has no stories260K.bin"),
    ):
        done = klflow(*command)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert klflow("info").returncode == 0
