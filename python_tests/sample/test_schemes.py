"""The schemes with the exact denoiser, which knows the answer: what they draw is the distribution of the data."""

import itertools
import math

import pytest
import torch
from chains import SMALL, name, small_chain, small_variation, sticky_chain

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    ExactDenoiser,
    LinearPath,
    LogitPath,
    MaskPath,
    Sampler,
    SpherePath,
    UniformPath,
)
from klflow_ext.path.logit import log_evidence

V, L = 4, 4


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


DRAWS = 10_000


@pytest.fixture(scope="module")
def variations():
    sequences, weights = sticky_chain(V, L)
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


@pytest.mark.slow
def test_samplers_reach_the_joint_distribution(variations):
    _, weights = sticky_chain(V, L)
    # The mean total variation of as many draws of the truth itself: sum_i sqrt(p_i (1 - p_i) / (2 pi n)).
    floor = (weights * (1 - weights) / (2 * math.pi * DRAWS)).sqrt().sum().item()
    for scheme in ("basic", "hybrid"):
        assert variations[scheme, 64] < floor + 0.010
        assert variations[scheme, 16] + 0.05 < variations["sampling", 16]
        assert (
            variations[scheme, 64] + 0.005 < variations["sampling", 64]
        )  # the tokens of a step are drawn independently
    assert variations["sampling", 64] < floor + 0.03
    for n in (4, 16, 64):
        assert variations["sampling", n] + 0.05 < variations["argmax", n]
    for scheme in ("basic", "hybrid", "sampling", "argmax"):
        assert variations[scheme, 4] > 1.5 * variations[scheme, 16] > 2.0 * variations[scheme, 64], variations


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
    sequences, weights = sticky_chain(V, L)
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


OTHERS = [
    LogitPath(SMALL, t_max=0.8, alpha=0.3), LinearPath(SMALL), SpherePath(SMALL), MaskPath(SMALL), MaskPath(SMALL, "cosine"),
    UniformPath(SMALL),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=name)
def test_every_path_reaches_the_joint_distribution(path):
    draws, (_, weights) = 5000, small_chain()
    floor = (weights * (1 - weights) / (2 * math.pi * draws)).sqrt().sum().item()
    sampler = Sampler(ExactDenoiser(small_chain(), path), path)
    for method in ("basic", "sampling"):
        found = {
            n: small_variation(
                sampler.sample((draws, 3), steps=n, method=method, top_k=None, final="draw", seed=n).tokens, draws
            )
            for n in (3, 12, 48)
        }
        assert found[3] > 1.3 * found[12] and found[12] + 0.01 > found[48], (method, found)
        assert found[48] < floor + (0.03 if method == "basic" else 0.07), (method, found, floor)


@pytest.mark.parametrize("path", [LogitPath(SMALL, t_max=0.8), *OTHERS], ids=name)
def test_segments_of_one_pass_a_token_are_exact(path):
    """Given all that stands, one token at a time: the chain rule. Two at once are drawn as if they did not know each other."""
    draws, (sequences, weights) = 5000, small_chain()
    floor = (weights * (1 - weights) / (2 * math.pi * draws)).sqrt().sum().item()
    sampler = Sampler(ExactDenoiser(small_chain(), path), path)
    options = dict(method="segments", top_k=None, seed=3)
    assert small_variation(sampler.sample((draws, 3), steps=3, **options).tokens, draws) < floor + 0.01
    two = sampler.sample((draws, 3), steps=2, **options).tokens  # the first with the third, then the second
    joint = torch.zeros(SMALL, SMALL).double()
    joint.index_put_((two[:, 0], two[:, 2]), torch.tensor(1 / draws, dtype=torch.float64), accumulate=True)
    assert (joint - 1 / SMALL**2).abs().sum() / 2 < 0.03
    same = (two[:, 1] == two[:, 0]) | (two[:, 1] == two[:, 2])
    weight = torch.where(sequences[:, 1:] == sequences[:, :-1], 0.8, 0.1).double().prod(-1).view(SMALL, SMALL, SMALL)
    expected = (weight / weight.sum(1, keepdim=True))[0, :, 0][0]  # the second, where its neighbours agree
    agree = two[:, 0] == two[:, 2]
    assert abs(same[agree].double().mean() - expected) < 0.03


def test_segments_go_from_left_to_right_over_what_is_free():
    """Free positions 1 4 5 6 8 9 10 of the first, 0 to 11 of the second: every third (fourth) of them is drawn in a pass."""
    seen = []

    def model(x, t):
        seen.append((x.amax(-1) > 0.999).clone())  # which rows say their token
        return torch.zeros(*x.shape)

    given = torch.zeros(2, 12, dtype=torch.bool)
    given[0, [0, 2, 3, 7, 11]] = True
    path = LogitPath(50)
    result = Sampler(model, path).infill(torch.full((2, 12), 7), given, steps=3, method="segments", return_history=True)
    new = [now & ~before for before, now in itertools.pairwise([given, *seen[1:], torch.ones_like(given)])]
    assert torch.equal(seen[0], given)
    assert [row[0].nonzero().flatten().tolist() for row in new] == [[1, 6, 10], [4, 8], [5, 9]]
    assert [row[1].nonzero().flatten().tolist() for row in new] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    for before, after in itertools.pairwise(result.history):  # what stands is not drawn again
        stands = given | new[0]
        assert torch.equal(before[stands], after[stands])
    assert torch.equal(result.history[-1], result.tokens) and result.tokens[given].eq(7).all()


def test_segments_do_not_see_what_is_not_drawn_yet():
    """Rows of free positions are pure noise: a Denoiser that reads posteriors says the same whatever that noise is."""
    torch.manual_seed(0)
    path = LogitPath(60)
    model = Denoiser(DenoiserConfig(60, 1, 2, 16, 8), path).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    sampler, seeds = Sampler(model, path), list(range(40))
    tokens = sampler.sample((40, 8), steps=4, method="segments", top_k=1, seed=seeds).tokens
    assert torch.equal(tokens, tokens[:1].expand(40, 8))


@pytest.mark.parametrize("path", OTHERS, ids=name)
def test_one_pass_draws_each_position_by_itself(path):
    """NFE 1 gives the product of the marginals: all that the tokens have of the chain comes from the passes counted."""
    sampler = Sampler(ExactDenoiser(small_chain(), path), path)
    tokens = sampler.sample((5000, 3), steps=1, top_k=None, final="draw").tokens
    assert abs((tokens[:, 1:] == tokens[:, :-1]).float().mean() - 1 / 3) < 0.025
