"""What a Reader makes of noise without rows is what it makes of the rows; the Denoiser reads the same."""

import pytest
import torch
from own_networks import Tied

from klflow_ext import Denoiser, DenoiserConfig, LinearPath, LogitPath, MaskPath, Reader, Sampler
from klflow_ext.path import State, as_network

V = 40


def prior():
    return torch.randn(V, generator=torch.Generator().manual_seed(0)).log_softmax(0)


@pytest.mark.parametrize("reads,top", [("posterior", None), ("posterior", 6), ("simplex", None)])
def test_noise_without_rows(reads, top):
    path = LogitPath(V)
    torch.manual_seed(0)
    model = Tied(path)
    Reader.__init__(plain := Tied(path), path, reads, top, prior())
    for name in ("embedding", "mix", "inner", "head"):
        setattr(plain, name, getattr(model, name))
    target, t = torch.randint(V, (3, 9)), torch.tensor([0.05, 0.15, 0.3])
    given = torch.rand(3, 9) < 0.3
    x = path.sample(target, t[:, None], 3, given=given)
    times = path.model_times(t, given, True)
    a = plain.embed(x, times)
    b = plain.embed_noise(target, t, 3, given=given)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 if top else 1e-4)
    torch.testing.assert_close(a[given], plain.embed_certain(target)[given], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.embed_certain(target)[~given], a[~given], atol=0.1)


def test_the_denoiser_reads_scaled_rows():
    path = LogitPath(V)
    model = Denoiser(DenoiserConfig(V, 1, 2, 16, 16, input="simplex"), path)
    x = path.sample(torch.randint(V, (2, 5)), 0.1, 0)
    torch.testing.assert_close(model.embed(x, 0.1), path.scaled(x) @ model.embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [LogitPath(V), LogitPath(V, alpha=0.5), LinearPath(V), MaskPath(V)], ids=repr)
def test_every_path(path):
    torch.manual_seed(0)
    model = Tied(path)
    assert model.input == ("tokens" if path.reads == "tokens" else "posterior" if path.closed_form else "simplex")
    target = torch.randint(V, (2, 7))
    given = torch.rand(2, 7) < 0.3
    path.loss(model, target, torch.full((2,), 0.2), 0, given=given).backward()
    assert model.embedding.weight.grad.any()
    for method in ("basic", "sampling", "segments"):
        assert Sampler(model, path).infill(target, given, steps=3, method=method).tokens[given].equal(target[given])


def test_no_rows_are_made():
    path = LogitPath(V)
    state = path.noisy(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 1), 0.1), 0)
    as_network(Tied(path), LogitPath(V)).predict(state, torch.full((2,), 0.1))
    assert not state.is_made


def test_what_is_refused():
    path = LogitPath(V)
    for make, message in (
        (lambda: Reader(path, "tokens"), r"input: got 'tokens', allowed is one of \('posterior', 'simplex'\)"),
        (lambda: Reader(LinearPath(V), "posterior"), r"input: got 'posterior', allowed is one of \('simplex',\)"),
        (lambda: Reader(path, top=0), "top: got 0"),
        (lambda: Reader(path, log_prior=torch.zeros(V + 1)), r"log_prior: got shape \(41,\), allowed is \(40,\)"),
        (lambda: Tied(path).embed(torch.zeros(1, 33, V), 0.1), r"x: got shape \(1, 33, 40\), allowed is \(B, L <= 32"),
        (lambda: Tied(path).embed_noise(torch.zeros(1, 33, dtype=torch.int64), 0.1, 0), r"target: got shape \(1, 33\)"),
        (lambda: Tied(path).embed(torch.zeros(1, 3, V + 1), 0.1), r"x: got shape \(1, 3, 41\)"),
        (lambda: Tied(path).embed(torch.zeros(1, 3, V), torch.zeros(2)), r"t: got shape \(2,\), allowed is a number"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make()


def test_the_prior_stays_in_float32():
    model = Tied(LogitPath(V)).bfloat16()
    assert model.log_prior.dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
    x = model.path.sample(torch.zeros(2, 5, dtype=torch.int64), 0.1, 0)
    assert as_network(model, LogitPath(V)).predict(State(x), torch.full((2,), 0.1)).hidden.dtype == torch.bfloat16
