"""Losses and samples of models of every kind, in every dtype, and of models that have diverged."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import every_model

from klflow_ext import (
    Autoregressive,
    Denoiser,
    LinearPath,
    LogitPath,
    MaskPath,
    Sampler,
)

ALL = [f"{path.kind} {model.config.input} {model.config.top}" for path, model in every_model()]


def use(path, model, method="sampling"):
    """The loss, with its gradients made, and samples."""
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(1))
    given = torch.rand(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float32) < 0.3
    loss = path.loss(model, tokens, torch.full((3,), 0.1, dtype=torch.float32), 0, given=given)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return loss.detach(), Sampler(model, path).infill(tokens, given, steps=4, method=method).tokens


@pytest.mark.parametrize("method", ["basic", "sampling", "hybrid", "segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_models_in_16_bits(number, dtype, method):
    path, model = list(every_model())[number]
    want, _ = use(path, model)
    path, model = list(every_model())[number]
    model.to(dtype)
    assert model.log_prior.dtype == model.cos.dtype == torch.float32 and model.head.weight.dtype == dtype
    loss, _ = use(path, model, method)
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.02 * want


@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_default_dtype_and_device_change_nothing(number):
    want = use(*list(every_model())[number])
    for default in (torch.float64, torch.bfloat16):
        path, model = list(every_model())[number]
        torch.set_default_dtype(default)
        try:
            got = use(path, model)
            made = Denoiser(model.config, path)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert made.embedding.dtype == (torch.float32 if default == torch.float64 else default)
    path, model = list(every_model())[number]
    with torch.device("meta"):
        tokens, given = (
            torch.zeros(3, 9, dtype=torch.int64, device="cpu"),
            torch.zeros(3, 9, dtype=torch.bool, device="cpu"),
        )
        path.loss(model, tokens, torch.full((3,), 0.1, device="cpu"), 0, given=given)
        assert Sampler(model, path).infill(tokens, given, steps=3).tokens.device.type == "cpu"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["basic", "sampling", "hybrid", "segments"])
@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_a_diverged_model_is_an_error(number, method, bad):
    path, model = list(every_model())[number]
    for steps in (1, 4):
        for whole in (True, False):
            with torch.no_grad():
                model.head.weight.fill_(math.nan)
            network = model if whole else lambda x, t: torch.full((*x.shape[:2], 50), bad)  # noqa: B023
            with pytest.raises(ValueError, match=r"^logits: got a NaN or no finite maximum in pass 1, sequence 0"):
                Sampler(network, path).sample((2, 6), steps=steps, method=method)


def test_the_pass_and_the_sequence_of_what_diverged():
    calls = 0

    def model(x, t):
        nonlocal calls
        calls += 1
        logits = torch.zeros(*x.shape[:2], 50)
        logits[1, 2, 7] = math.nan if calls == 3 else 0.0
        return logits

    with pytest.raises(ValueError, match="in pass 3, sequence 1"):
        Sampler(model, MaskPath(50)).sample((2, 6), steps=5, method="sampling")


@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_a_bias_of_the_head(number):
    """In the loss, with its gradient, and in every draw."""
    path, model = list(every_model())[number]
    plain = list(every_model())[number][1]
    model.head = torch.nn.Linear(16, 50)
    with torch.no_grad():
        model.head.weight.copy_(plain.head.weight)
        model.head.bias.zero_()
    assert torch.equal(use(path, model)[1], use(path, plain)[1])
    assert model.head.bias.grad.abs().sum() > 0
    with torch.no_grad():
        model.head.bias[17] = 1e4
    given = torch.zeros(2, 7, dtype=torch.bool)
    for method in ("basic", "sampling", "segments"):
        found = Sampler(model, path).infill(
            torch.zeros(2, 7, dtype=torch.int64), given, steps=3, method=method, final="argmax"
        )
        assert (found.tokens == 17).all()
    with torch.no_grad():
        target = torch.full((2, 7), 17)
        assert path.loss(model, target, torch.full((2,), 0.1), 0) < 1e-3


@pytest.mark.parametrize("fails", [False, True])
def test_sampling_in_evaluation_mode(fails):
    path, model = list(every_model())[0]
    model.extra = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Dropout(0.9))
    model.extra[0].eval()
    plain, seen = model.hidden, []

    def hidden(h, t, **options):
        seen.append(any(m.training for m in model.modules()))
        if fails:
            raise RuntimeError("no more")
        return plain(h, t, **options)

    model.hidden = hidden
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            Sampler(model, path).sample((1, 4), steps=2)
    else:
        Sampler(model, path).sample((1, 4), steps=2)
    assert seen and not any(seen)
    assert model.training and model.extra.training and model.extra[1].training and not model.extra[0].training


def test_a_layer_by_the_name_of_hidden_is_a_layer():
    """A plain module is known by how it is called, whatever its layers are named."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = (torch.nn.Linear(*s) for s in ((50, 8), (8, 8), (8, 50)))
            self.config, self.cache = SimpleNamespace(causal=False, max_length=2), 3

        def forward(self, x, t):
            return self.head(torch.tanh(self.hidden(self.embed(x))))

    for path in (LogitPath(50), LinearPath(50)):
        model, tokens, t = Plain(), torch.zeros(2, 5, dtype=torch.int64), torch.full((2,), 0.1)
        want = path.loss(lambda x, t: model(x, t), tokens, t, 0)  # noqa: B023
        assert torch.equal(path.loss(model, tokens, t, 0), want)
        found = Sampler(model, path).sample((2, 5), steps=3).tokens
        assert torch.equal(found, Sampler(lambda x, t: model(x, t), path).sample((2, 5), steps=3).tokens)  # noqa: B023


@pytest.mark.parametrize("width", [49, 51, 1])
@pytest.mark.parametrize("number", range(len(ALL)), ids=ALL)
def test_logits_of_another_width_are_refused(number, width):
    path, model = list(every_model())[number]
    tokens, t = torch.zeros(2, 5, dtype=torch.int64), torch.full((2,), 0.1)
    model.head = torch.nn.Linear(16, width)
    for network, message in (
        (model, f"head: got {width} outputs, allowed is V = 50"),
        (
            lambda x, t: torch.zeros(2, x.shape[1], width),
            r"model: got logits of shape \(2, \d, \d+\), allowed is \(B, L, V\)",
        ),
        (lambda x, t: torch.zeros(2, 50), r"model: got logits of shape \(2, 50\)"),
    ):
        with pytest.raises(ValueError, match=message):
            path.loss(network, tokens, t, 0)
        with pytest.raises(ValueError, match=message):
            Sampler(network, path).sample((2, 5), steps=2)


def test_numbers_and_token_ids_of_any_kind():
    path, model = list(every_model())[0]
    sampler = Sampler(model, path)
    want = sampler.sample((2, 6), steps=3, seed=5, temperature=0.5, top_k=7).tokens
    for i, f in ((np.int64, np.float32), (np.int32, np.float64), (torch.tensor, torch.tensor)):
        options = {"steps": i(3), "seed": i(5), "temperature": f(0.5), "top_k": i(7)}
        assert torch.equal(sampler.sample((2, 6), **options).tokens, want)
    seeds = [11, 12]
    want = sampler.sample((2, 6), steps=3, seed=seeds).tokens
    for kind in (np.array, torch.tensor, tuple):
        assert torch.equal(sampler.sample((2, 6), steps=3, seed=kind(seeds)).tokens, want)
    for wrong in (True, 1.5, "1", None, [1.5, 2], [True, False]):
        with pytest.raises((TypeError, ValueError), match="seed: got"):
            sampler.sample((2, 6), steps=3, seed=wrong)
    given = [[True, False, False]]
    for call in (
        lambda: sampler.complete([1, 2, 3], 8),
        lambda: sampler.complete([[1.7, 2.9]], 8),
        lambda: sampler.complete("abc", 8),
        lambda: sampler.complete([np.array([1.0])], 8),
        lambda: sampler.infill([[1.5, 0, 0]], given),
        lambda: sampler.infill(torch.tensor([[1.5, 0, 0]]), torch.tensor(given)),
    ):
        with pytest.raises(TypeError, match="^(prompts|tokens): "):
            call()
    for each in (path, MaskPath(50), LinearPath(50), Autoregressive(50), LogitPath(50, alpha=0.5)):
        with pytest.raises(TypeError, match="target: got torch.float32"):
            each.sample(torch.tensor([1.0, 2.0]), 0.1, 0)
    assert sampler.complete([np.array([1, 2], np.uint8), torch.tensor([3], dtype=torch.int32)], 4).tokens[
        0, :2
    ].tolist() == [1, 2]
    assert sampler.sample((0, 5)).tokens.shape == (0, 5) and sampler.sample((2, 0)).tokens.shape == (2, 0)
    for temperature in ((1.0, math.nan), lambda progress: math.nan, lambda progress: 0, math.nan, -1, (0, 1)):
        with pytest.raises(ValueError, match="temperature: got"):
            sampler.sample((1, 3), steps=2, temperature=temperature)
