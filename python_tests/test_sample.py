"""The samplers against the exact denoiser, which knows the answer, and the promises about NFE, seeds and given tokens."""

import itertools
import math

import pytest
import torch

from klflow_ext import Denoiser, DenoiserConfig, ExactDenoiser, LogitPath, Sampler, ops, register_sampler
from klflow_ext.oracle import log_evidence
from klflow_ext.path import state

V, L = 4, 4


def sticky_chain():
    """All 256 sequences of a Markov chain that stays with probability 0.8, and their probabilities."""
    sequences = torch.tensor(list(itertools.product(range(V), repeat=L)))
    weights = torch.full((len(sequences),), 0.25, dtype=torch.float64)
    for i in range(L - 1):
        weights *= torch.where(sequences[:, i] == sequences[:, i + 1], 0.8, 0.2 / 3)
    return sequences, weights


def total_variation(tokens, weights):
    index = (tokens * (V ** torch.arange(L - 1, -1, -1))).sum(-1)
    return 0.5 * (torch.bincount(index, minlength=V**L) / len(tokens) - weights).abs().sum().item()


def test_golden_posterior():
    path = LogitPath(3, beta=0.2, t_max=0.5)
    posterior = ExactDenoiser(torch.tensor([0.5, 0.3, 0.2]), path)(torch.tensor([1.0, 0, 0]).softmax(-1), 0.35).exp()
    torch.testing.assert_close(
        posterior, torch.tensor([0.8662, 0.0803, 0.0535], dtype=torch.float64), atol=5e-5, rtol=0
    )


def test_evidence_is_safe_near_one():
    log_x = torch.tensor([[0.0, -80.0, -90.0]], dtype=torch.float64)
    assert log_evidence(log_x, torch.tensor([0.9], dtype=torch.float64), 15.0).isfinite().all()


def test_calibration_matches_the_kernel():
    path = LogitPath(256)
    x = path.sample(torch.full((20000,), 7), path.t_max, 3)
    accuracy = (x.argmax(-1) == 7).float().mean().item()
    assert abs(accuracy - 0.985) < 0.004 and abs(path.t_max - 0.37) < 0.01
    assert abs(LogitPath(50258).t_max - 0.30) < 0.005


DRAWS = 40_000


@pytest.fixture(scope="module")
def variations():
    sequences, weights = sticky_chain()
    path = LogitPath(V, t_max=0.8)
    exact = ExactDenoiser((sequences, weights), path)

    def model(x, t):  # all draws lie end to end in one long row, so that a step is one call of an op
        return exact(x.view(-1, L, V), t.expand(x.shape[1] // L)).view_as(x)

    sampler = Sampler(model, path)
    runs = {
        "basic": dict(method="basic"),
        "hybrid": dict(method="hybrid", t_split=0.5 * 0.8),
        "sampling": dict(method="sampling"),
        "argmax": dict(method="sampling", top_k=1),
    }
    options = dict(top_k=None, final="draw")
    return {
        (name, n): total_variation(
            sampler.sample((1, DRAWS * L), steps=n + 1, seed=n, **{**options, **run}).tokens.view(DRAWS, L), weights
        )
        for name, run in runs.items()
        for n in (4, 16, 64)
    }


def test_samplers_reach_the_joint_distribution(variations):
    _, weights = sticky_chain()
    # The mean total variation of as many draws of the truth itself: sum_i sqrt(p_i (1 - p_i) / (2 pi n)).
    floor = (weights * (1 - weights) / (2 * math.pi * DRAWS)).sqrt().sum().item()
    for name in ("basic", "hybrid"):
        assert variations[name, 64] < floor + 0.010
        assert variations[name, 16] + 0.05 < variations["sampling", 16]
        assert variations[name, 64] + 0.005 < variations["sampling", 64]  # the tokens of a step are drawn independently
    assert variations["sampling", 64] < floor + 0.03
    for n in (4, 16, 64):
        assert variations["sampling", n] + 0.05 < variations["argmax", n]
    for name in ("basic", "hybrid", "sampling", "argmax"):
        assert variations[name, 4] > 1.5 * variations[name, 16] > 2.0 * variations[name, 64], variations


@pytest.mark.parametrize("method", ["basic", "sampling", "hybrid"])
def test_one_token_marginals(method):
    path, draws = LogitPath(V, t_max=0.8), 40_000
    prior = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    sampler = Sampler(ExactDenoiser(prior, path), path)
    tokens = sampler.sample((1, draws), steps=33, method=method, top_k=None, final="draw", seed=1).tokens
    found = torch.bincount(tokens[0], minlength=V) / draws
    # sampling is exact for one token at any number of steps (chi-square, p = 1e-6 at three degrees of freedom); the ODE
    # has a step error on top.
    if method == "sampling":
        assert (draws * (found - prior).square() / prior).sum() < 30.7
    else:
        assert 0.5 * (found - prior).abs().sum() < 0.02


def test_exact_denoiser_keeps_to_what_is_given():
    sequences, weights = sticky_chain()
    model = ExactDenoiser((sequences, weights), LogitPath(V, t_max=0.8))
    x = torch.full((1, L, V), 1 / V)
    x[0, 0] = torch.nn.functional.one_hot(torch.tensor(2), V)
    marginals = model(x, 0.0).exp()
    # At t = 0 the other rows say nothing: p(k | first = 2) by the chain's powers.
    chain = torch.full((V, V), 0.2 / 3, dtype=torch.float64).fill_diagonal_(0.8)
    for i in range(L):
        torch.testing.assert_close(marginals[0, i], torch.linalg.matrix_power(chain, i)[2], atol=1e-7, rtol=0)
    certain = ExactDenoiser((sequences[:1], weights[:1]), LogitPath(V))
    with pytest.raises(ValueError, match="zero probability"):
        certain(x, 0.0)


class Counting:
    def __init__(self, vocab):
        self.calls, self.weight = 0, torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, x, t):
        self.calls += 1
        return (x @ self.weight) * 30


@pytest.mark.parametrize("method", ["basic", "sampling", "hybrid"])
def test_nfe_given_tokens_and_batch_independence(method):
    path, model = LogitPath(50), Counting(50)
    sampler = Sampler(model, path)
    tokens = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    for steps in (1, 2, 9):
        model.calls = 0
        result = sampler.infill(tokens, given, steps=steps, method=method, seed=[1, 2, 3, 4, 5])
        assert result.nfe == model.calls == steps
        assert torch.equal(result.tokens[given], tokens[given]) and (result.tokens >= 0).all()
    alone = sampler.infill(tokens[3:4], given[3:4], steps=9, method=method, seed=[4])
    assert torch.equal(alone.tokens[0], result.tokens[3])
    other = sampler.infill(tokens[3:4], given[3:4], steps=9, method=method, seed=[5])
    assert not torch.equal(other.tokens, alone.tokens)
    done = sampler.infill(tokens, torch.ones_like(given), method=method)
    assert torch.equal(done.tokens, tokens) and done.nfe == 0


@pytest.mark.parametrize("method", ["basic", "sampling", "hybrid"])
def test_a_denoiser_samples_from_tokens_and_seeds_as_from_rows(method):
    """Of a Denoiser neither noisy rows nor whole logits are built; the tokens are those of the same network on rows."""
    torch.manual_seed(0)
    path = LogitPath(60)
    model = Denoiser(DenoiserConfig(60, 1, 2, 16, 8), path).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokens = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    results = [
        Sampler(m, path).infill(tokens, given, steps=6, method=method, top_k=5, return_history=True)
        for m in (model, lambda x, t: model(x, t))
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert all(torch.equal(a, b) for a, b in zip(results[0].history, results[1].history, strict=True))
    if method == "sampling":
        built = []
        original = ops.noise_interpolate
        ops.noise_interpolate = lambda *a, **k: built.append(1) or original(*a, **k)
        try:
            Sampler(model, path).sample((2, 5), steps=4, method="sampling")
        finally:
            ops.noise_interpolate = original
        assert not built


def test_draws_from_tiles_of_logits_are_those_of_all_logits(monkeypatch):
    hidden, weight = torch.randn(5, 4, 8), torch.randn(300, 8)
    rng = torch.stack([torch.arange(5), torch.full((5,), 3)], 1)
    whole = state.Prediction((hidden @ weight.T).float()).draw(20, rng)
    monkeypatch.setattr(state, "LOGIT_BYTES", 4 * 4 * 300 * 2)  # two sequences at a time
    assert torch.equal(state.Prediction(None, hidden, weight).draw(20, rng), whole)


def test_complete_history_and_registered_sampler():
    @register_sampler("nothing")
    def nothing(state, logits, move):
        return state

    path = LogitPath(50)
    sampler = Sampler(Counting(50), path)
    result = sampler.complete([[1, 2, 3], [4], []], 6, steps=4, method="nothing", return_history=True)
    assert result.tokens[0, :3].tolist() == [1, 2, 3] and result.tokens[1, 0] == 4 and len(result.history) == 4


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(method="fast"), "method: got 'fast'"),
        (dict(steps=0), "steps: got 0"),
        (dict(top_p=0.0), "top_p: got 0.0"),
        (dict(top_k=0), "top_k: got 0"),
        (dict(temperature=0), "temperature: got 0"),
        (dict(final="mode"), "final: got 'mode'"),
        (dict(seed=[1]), "seed: got 1 seeds"),
    ],
)
def test_bad_options(options, message):
    path = LogitPath(50)
    with pytest.raises(ValueError, match=message):
        Sampler(Counting(50), path).sample((2, 3), **options)
    with pytest.raises(ValueError, match="prompts: number 1 has 4"):
        Sampler(Counting(50), path).complete([[1], [1, 2, 3, 4]], 3)
