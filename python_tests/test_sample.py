"""The samplers against the exact denoiser, which knows the answer, and the promises about NFE, seeds and given tokens."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    ExactDenoiser,
    LinearPath,
    LogitPath,
    MaskPath,
    Sampler,
    SpherePath,
    UniformPath,
    build_info,
    ops,
    register_sampler,
)
from klflow_ext.data import parse_holes
from klflow_ext.path import Network, ResolvedOptions, state
from klflow_ext.path.logit import log_evidence
from klflow_ext.sample import replay
from klflow_ext.sample import sampler as sampler_module

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


DRAWS = 20_000


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


# ---- the other paths, on a smaller chain

SMALL = 3
OTHERS = [
    LogitPath(SMALL, t_max=0.8, alpha=0.3), LinearPath(SMALL), SpherePath(SMALL), MaskPath(SMALL), MaskPath(SMALL, "cosine"),
    UniformPath(SMALL),
]  # fmt: skip
EVERY = [LogitPath(50), LogitPath(50, alpha=0.5), LinearPath(50), SpherePath(50), MaskPath(50), UniformPath(50)]
name = lambda path: f"{path.kind}-{getattr(path, 'alpha', getattr(path, 'schedule', ''))}"  # noqa: E731
METHODS = ["basic", "sampling", "hybrid", "segments"]


def small_chain():
    sequences = torch.tensor(list(itertools.product(range(SMALL), repeat=3)))
    stays = sequences[:, 1:] == sequences[:, :-1]
    return sequences, torch.where(stays, 0.8, 0.1).double().prod(-1) / SMALL


def small_variation(tokens, draws):
    index = (tokens * (SMALL ** torch.arange(2, -1, -1))).sum(-1)
    return 0.5 * (torch.bincount(index, minlength=SMALL**3) / draws - small_chain()[1]).abs().sum().item()


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


class Counting:
    """Fixed random logits of what a position shows; counts its calls."""

    def __init__(self, vocab):
        self.calls, self.weight = 0, torch.randn(vocab + 1, vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, x, t):
        self.calls += 1
        return self.weight[x] * 3 if x.dim() == 2 else (x @ self.weight[:-1]) * 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", EVERY, ids=name)
def test_nfe_given_tokens_and_batch_independence(path, method):
    model = Counting(50)
    sampler = Sampler(model, path)
    tokens = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    options = dict(method=method, t_split=path.t_max / 2)
    for steps in (1, 2, 9):
        model.calls = 0
        result = sampler.infill(tokens, given, steps=steps, seed=[1, 2, 3, 4, 5], **options)
        needed = int((~given).sum(1).max()) if method == "segments" else steps
        assert result.nfe == model.calls == min(steps, needed)
        assert torch.equal(result.tokens[given], tokens[given])
        assert (result.tokens >= 0).all() and (result.tokens < 50).all()
    other = torch.where(given, tokens, -7)  # what is not given must not be seen
    assert torch.equal(sampler.infill(other, given, steps=9, seed=[1, 2, 3, 4, 5], **options).tokens, result.tokens)
    alone = sampler.infill(tokens[3:4], given[3:4], steps=9, seed=[4], **options)
    assert torch.equal(alone.tokens[0], result.tokens[3])
    again = sampler.infill(tokens.flip(0), given.flip(0), steps=9, seed=[5, 4, 3, 2, 1], **options)
    assert torch.equal(again.tokens.flip(0), result.tokens)
    other = sampler.infill(tokens[3:4], given[3:4], steps=9, seed=[5], **options)
    assert not torch.equal(other.tokens, alone.tokens)
    done = sampler.infill(tokens, torch.ones_like(given), **options)
    assert torch.equal(done.tokens, tokens) and done.nfe == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", EVERY, ids=name)
def test_top_k_and_top_p_reach_every_draw(path, method):
    """The three likeliest tokens share 0.9: no other ever appears, in whatever place or pass it would be drawn."""
    p = torch.full((50,), 0.1 / 47)
    p[[7, 20, 33]] = torch.tensor([0.4, 0.3, 0.2])
    sampler = Sampler(lambda x, t: p.log().expand(*x.shape[:2], -1), path)
    options = dict(steps=6, method=method, t_split=path.t_max / 2, final="draw")
    free = sampler.sample((30, 40), top_k=None, **options).tokens
    assert len(free.unique()) > 20
    for limit in (dict(top_k=3), dict(top_k=None, top_p=0.85)):
        found = sampler.sample((30, 40), **limit, **options).tokens
        assert found.unique().tolist() == [7, 20, 33]
    assert sampler.sample((30, 40), top_k=1, **options).tokens.unique().tolist() == [7]
    cold = sampler.sample((30, 40), top_k=None, temperature=0.01, **options).tokens
    assert cold.unique().tolist() == [7]


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_samples_from_tokens_and_seeds_as_from_rows(method):
    """Of a Denoiser neither noisy rows nor whole logits are built; the tokens are those of the same network on rows."""
    torch.manual_seed(0)
    path = LogitPath(60)
    model = Denoiser(DenoiserConfig(60, 1, 2, 16, 8), path).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokens = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    results = [
        Sampler(m, path).infill(tokens, given, steps=6, method=method, top_k=5, boosts=None, return_history=True)
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


@pytest.mark.parametrize("method, top", [("basic", 512), ("basic", 10), ("hybrid", 512)])
def test_the_basic_scheme_in_evidence_form_is_the_dense_one(method, top):
    """Noise made again plus the sum of all of p gives the tokens of the state of rows; a sparse sum nearly all of them."""
    torch.manual_seed(0)
    path = LogitPath(60)
    model = Denoiser(DenoiserConfig(60, 2, 2, 16, 16, top=top), path, torch.randn(60).log_softmax(0)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokens = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(1))
    given = torch.rand(4, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    built, original = [], ops.noise_interpolate

    def found(boosts):
        built.clear()
        ops.noise_interpolate = lambda *a, **k: built.append(1) or original(*a, **k)
        try:
            options = dict(steps=8, method=method, top_k=5, t_split=0.2, return_history=True)
            return Sampler(model, path).infill(tokens, given, boosts=boosts, **options)
        finally:
            ops.noise_interpolate = original

    dense = found(None)
    assert built
    for boosts, least in ((60, 1.0), (16, 0.9)):
        sparse = found(boosts)
        assert not built
        same = [(a == b).float().mean() for a, b in zip(dense.history, sparse.history, strict=True)]
        assert min(same) >= least, (boosts, same)
        assert torch.equal(sparse.tokens[given], tokens[given])
    assert not torch.equal(found(1).tokens, dense.tokens)  # one entry is too few: the sum matters


def test_the_largest_entries_of_a_prediction():
    hidden, weight = torch.randn(5, 4, 8), torch.randn(300, 8)
    ids, p = state.Prediction(None, hidden, weight).largest(7, temperature=0.5)
    expected = (hidden @ weight.T / 0.5).softmax(-1).topk(7)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(p, expected.values)


def test_draws_from_tiles_of_logits_are_those_of_all_logits(monkeypatch):
    hidden, weight = torch.randn(5, 4, 8), torch.randn(300, 8)
    rng = torch.stack([torch.arange(5), torch.full((5,), 3)], 1)
    whole = state.Prediction((hidden @ weight.T).float()).draw(20, rng)
    monkeypatch.setattr(state, "LOGIT_BYTES", 4 * 4 * 300 * 2)  # two sequences at a time
    assert torch.equal(state.Prediction(None, hidden, weight).draw(20, rng), whole)


def test_complete_history_and_registered_sampler():
    @register_sampler("nothing")
    def nothing(path, state, prediction, move):
        return state

    path = LogitPath(50)
    sampler = Sampler(Counting(50), path)
    result = sampler.complete([[1, 2, 3], [4], []], 6, steps=4, method="nothing", return_history=True)
    assert result.tokens[0, :3].tolist() == [1, 2, 3] and result.tokens[1, 0] == 4 and len(result.history) == 4


@pytest.mark.parametrize("method", METHODS)
def test_shown_tokens_of_a_mask_path_are_kept(method):
    """What the model says of a position that shows its token is never asked: it is trained on masks only."""
    sampler = Sampler(lambda x, t: torch.eye(50)[torch.where(x == 50, 7, 9)] * 100, MaskPath(50, t_split=0.5))
    result = sampler.sample((4, 20), steps=8, method=method, return_history=True)
    assert (result.tokens == 7).all() and all((tokens == 7).all() for tokens in result.history)


def test_schedules_of_temperature_and_time():
    seen = []

    @register_sampler("watching")
    def watching(path, state, prediction, move):
        seen.append((move.temperature, move.t, move.t_next))
        return state

    path = LogitPath(50, t_max=0.5)
    sampler = Sampler(Counting(50), path)
    for temperature, expected in (
        (0.7, [0.7] * 4),
        ((1.0, 0.2), [1.0, 0.8, 0.6, 0.4]),
        (lambda progress: 1 + progress**2, [1 + (i / 4) ** 2 for i in range(4)]),
    ):
        seen.clear()
        sampler.sample((1, 3), steps=5, method="watching", temperature=temperature, grid_power=0.5)
        assert [s[0] for s in seen] == pytest.approx(expected)
    times = [0.0] + [1 - 0.5 ** ((i / 4) ** 0.5) for i in range(1, 5)]
    assert [s[1] for s in seen] == pytest.approx(times[:4]) and [s[2] for s in seen] == pytest.approx(times[1:])


def test_the_last_temperature_is_that_of_the_last_pass():
    sampler = Sampler(lambda x, t: torch.arange(50.0).expand(*x.shape[:2], -1), LogitPath(50))
    for steps in (1, 2, 5):
        options = dict(steps=steps, method="hybrid", top_k=None, final="draw")
        assert (sampler.sample((4, 9), temperature=(100.0, 0.01), **options).tokens == 49).all()
        assert not (sampler.sample((4, 9), temperature=(0.01, 100.0), **options).tokens == 49).all()


@pytest.mark.parametrize("path", [LogitPath(50), UniformPath(50)], ids=name)
def test_hybrid_turns_at_t_split(path):
    sampler = Sampler(Counting(50), path)

    def run(method, **options):
        return sampler.sample((4, 9), steps=6, method=method, seed=2, **options).tokens

    basic, sampling = run("basic"), run("sampling")
    assert torch.equal(run("hybrid", t_split=0.0), sampling) and torch.equal(run("hybrid", t_split=1.0), basic)
    middle = run("hybrid", t_split=path.t_max / 4)
    assert torch.equal(run("hybrid"), middle)
    assert not torch.equal(middle, basic) and not torch.equal(middle, sampling)


def test_self_conditioning_reads_the_pass_before():
    class Remembering(Causal):
        def __init__(self):
            super().__init__(50, False)
            self.self_conditions, self.previous, self.found = True, [], []

        def embed(self, x, t):
            return self.table[x]

        def hidden(self, h, t, previous=None):
            self.previous.append(previous)
            self.found.append(torch.sin(h))
            return self.found[-1]

    model = Remembering()
    Sampler(model, MaskPath(50)).sample((2, 3), steps=4, method="basic")
    assert model.previous[0] is None and len(model.previous) == 4
    assert all(torch.equal(a, b) for a, b in zip(model.previous[1:], model.found, strict=False))


def test_final_argmax_or_draw():
    logits = torch.linspace(0, 1, 50)
    for path, default in ((LogitPath(50), "argmax"), (MaskPath(50), "draw")):
        sampler = Sampler(lambda x, t: logits.expand(*x.shape[:2], -1), path)
        results = {
            final: sampler.sample((4, 9), steps=1, method="basic", final=final).tokens
            for final in ("argmax", "draw", None)
        }
        assert (results["argmax"] == 49).all() and not (results["draw"] == 49).all()
        assert torch.equal(results[None], results[default])


@pytest.mark.parametrize("path", [LogitPath(50), MaskPath(50)], ids=name)
def test_ragged_infill_is_each_sequence_alone(path):
    sampler = Sampler(Counting(50), path)
    tokens = [[1, 2, 3, 4], [5], [6, 7, 8, 9], [], [1, 2], torch.tensor([3, 4, 5, 6])]
    given = [
        [True, False, False, True],
        [False],
        [False] * 4,
        [],
        [True, True],
        torch.tensor([False, True, True, True]),
    ]
    result = sampler.infill(tokens, given, steps=4, method="sampling", seed=3, return_history=True)
    assert [len(x) for x in result.tokens] == [4, 1, 4, 0, 2, 4] and result.nfe == 4 and len(result.history) == 4
    assert result.tokens[4].tolist() == [1, 2] and result.tokens[5][1:].tolist() == [4, 5, 6]
    seeds = [sampler_module._sequence_seed(3, i) for i in range(6)]
    for i in (0, 1, 2, 5):
        alone = sampler.infill(
            torch.as_tensor(tokens[i])[None], torch.as_tensor(given[i])[None], steps=4, method="sampling",
            seed=seeds[i : i + 1], return_history=True,
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], result.tokens[i])
        assert all(torch.equal(a[0], r[i]) for a, r in zip(alone.history, result.history, strict=True))


class Letters:
    """A tokenizer of single characters, a = 1 and so on; it would put a 0 before a whole text."""

    def encode(self, text, add_special_tokens=True):
        return SimpleNamespace(ids=[0] * add_special_tokens + [ord(letter) % 32 for letter in text])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + i) for i in ids if i or not skip_special_tokens)


def test_holes():
    tokens, given = parse_holes("ab{?2}c{?1}{?1}", Letters())
    assert tokens == [1, 2, 0, 0, 3, 0, 0] and given == [True, True, False, False, True, False, False]
    for text in ("abc", "", "{?}", "{?x}", "{?-1}"):
        with pytest.raises(ValueError, match="text: got .* allowed is a text with a hole such as"):
            parse_holes(text, Letters())
    with pytest.raises(ValueError, match=r"text: got the hole \{\?0\}, allowed are holes of 1 to 1,000,000 tokens"):
        parse_holes("a{?0}{?2}", Letters())
    tokens, given = parse_holes("{?3}", Letters())  # a hole with nothing around it
    assert (tokens, given) == ([0, 0, 0], [False] * 3)
    assert len(Sampler(Counting(50), LogitPath(50)).infill([tokens], [given], steps=2).tokens[0]) == 3


# ---- left to right


class Causal(Network):
    """Reads the sum of all that came before; with a cache, which is that sum."""

    def __init__(self, vocab, cached):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.randn(vocab + 1, 16), torch.nn.Linear(16, vocab, bias=False)
        self.causal, self.caches, self.max_length, self.read = True, cached, 9, []
        if cached:
            self.cache = lambda batch: SimpleNamespace(length=0, total=torch.zeros(batch, 1, 16))

    def embed(self, x, t):
        assert (t == 0).all()
        self.read.append(x.shape[1])
        return self.table[x]

    def hidden(self, h, t, cache=None):
        h = h.cumsum(1)
        if cache is not None:
            h = h + cache.total
            cache.total, cache.length = h[:, -1:], cache.length + h.shape[1]
        return torch.sin(h)

    def forward(self, x, t):
        return self.head(self.hidden(self.embed(x, t), t))


def test_autoregression_draws_from_the_joint_distribution():
    draws, path, (_, weights) = 20_000, Autoregressive(SMALL), small_chain()
    sampler = Sampler(ExactDenoiser(small_chain(), path), path)
    result = sampler.sample((draws, 3), top_k=None)
    assert result.nfe == 3
    index = (result.tokens * (SMALL ** torch.arange(2, -1, -1))).sum(-1)
    found = torch.bincount(index, minlength=SMALL**3)
    assert ((found - draws * weights).square() / (draws * weights)).sum() < 80  # chi-square of 26 degrees, p = 2e-7
    prompted = sampler.complete([[2]] * draws, 3, top_k=None)
    assert prompted.nfe == 2 and (prompted.tokens[:, 0] == 2).all()
    assert abs((prompted.tokens[:, 1] == 2).float().mean() - 0.8) < 0.015


def test_cached_decoding_of_ragged_prompts():
    prompts, path = [[1, 2, 3], [4, 5], [], [6] * 7], Autoregressive(50)
    results = {}
    for cached in (True, False):
        model = Causal(50, cached)
        results[cached] = Sampler(model, path).complete(prompts, 8, seed=[1, 2, 3, 4], return_history=True)
        assert results[cached].nfe == 8 == len(results[cached].history)
        if cached:
            assert model.read == [1] * 8  # each pass reads one new position
    tokens = results[True].tokens
    assert torch.equal(tokens, results[False].tokens)
    for i, prompt in enumerate(prompts):
        alone = Sampler(Causal(50, True), path).complete([prompt], 8, seed=[i + 1])
        assert alone.nfe == 8 - len(prompt) and torch.equal(alone.tokens[0], tokens[i])
        assert tokens[i, : len(prompt)].tolist() == prompt
    # greedy decoding is the argmax of the model on its own output; a token given later takes its place, unseen before
    model = Causal(50, True)
    holes = torch.tensor([[0, 9, 0, 0, 17, 0]])
    result = Sampler(model, path).infill(holes, holes > 0, final="argmax")
    inputs = torch.cat([torch.tensor([[50]]), result.tokens[:, :-1]], 1)
    greedy = model(inputs, torch.zeros(1)).argmax(-1)
    assert torch.equal(result.tokens, torch.where(holes > 0, holes, greedy)) and result.nfe == 6
    blind = Sampler(model, path).infill(holes * 0, holes < 0, final="argmax")
    assert blind.tokens[0, 0] == result.tokens[0, 0]


def test_autoregression_needs_a_causal_model():
    with pytest.raises(ValueError, match="model: got one whose config.causal is False"):
        model = Causal(5, False)
        model.causal = False
        Sampler(model, Autoregressive(5))


def test_top_k_of_autoregression():
    sampler = Sampler(lambda x, t: torch.arange(50.0).mul(0.01).expand(*x.shape[:2], -1), Autoregressive(50))
    assert set(sampler.sample((30, 9), top_k=3).tokens.unique().tolist()) == {47, 48, 49}
    assert len(sampler.sample((30, 9), top_k=None).tokens.unique()) > 30


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(method="fast"), "method: got 'fast'"),
        (dict(steps=0), "steps: got 0"),
        (dict(top_p=0.0), "top_p: got 0.0"),
        (dict(top_k=0), "top_k: got 0"),
        (dict(temperature=0), "temperature: got 0"),
        (dict(final="mode"), "final: got 'mode'"),
        (dict(seed=[1]), "seed: got 1 seeds, allowed is one or 2"),
        (dict(seed=[1, 2**63]), "seed: got 9223372036854775808"),
        (dict(steps=2.0), "steps: got 2.0"),
        (dict(steps=True), "steps: got True"),
        (dict(top_p=1.5), "top_p: got 1.5"),
        (dict(temperature=(1.0, 0.0)), "temperature: got 0.0,"),
        (dict(temperature=(1.0, 0.5, 0.2)), "temperature: got .* allowed is a number, .first, last. or a function"),
        (dict(temperature=lambda progress: math.inf), "temperature: got inf"),
        (dict(t_split=-0.1), "t_split: got -0.1"),
        (dict(grid_power=0), "grid_power: got 0"),
        (dict(euler="fast"), "euler: got 'fast'"),
    ],
)
@pytest.mark.parametrize("path", [LogitPath(50), MaskPath(50), Autoregressive(50)], ids=name)
def test_bad_options(path, options, message):
    model = Counting(50)
    with pytest.raises((ValueError, TypeError), match=message):
        Sampler(model, path).sample((2, 3), **options)
    assert model.calls == 0


def test_bad_sequences():
    path = LogitPath(50)
    model = Denoiser(DenoiserConfig(50, n_layer=1, n_head=2, n_embd=16, max_length=12), path)
    model.hidden = None  # it is never asked
    sampler = Sampler(model, path)
    row, free = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)
    for call, message in (
        (lambda: sampler.complete([[1], [1, 2, 3, 4]], 3), "prompts: number 1 has 4 tokens"),
        (lambda: sampler.complete([[1]], 13), "length: got a length of 13, allowed is at most the model's max_length, 12"),
        (lambda: sampler.complete([[1]], -1), "length: got -1"),
        (lambda: sampler.complete([[50]], 3), "tokens: got 50 where given, allowed is 0 to V - 1 = 49"),
        (lambda: sampler.sample((1, 13)), "tokens: got a length of 13"),
        (lambda: sampler.infill(row, free[:, :2]), r"given: got torch.bool of shape \(1, 2\)"),
        (lambda: sampler.infill(row, row), "given: got torch.int64"),
        (lambda: sampler.infill(row[0], free[0]), r"tokens: got shape \(3,\)"),
        (lambda: sampler.infill([[1, 2], [3]], [[True, False]]), "given: got 1 sequences"),
        (lambda: sampler.infill([[1, 2], [3]], [[True, False], [False, False]]), "given: number 1 has shape"),
        (lambda: sampler.infill([[1], [99, 2]], [[False], [True, False]]), "tokens: got 99 where given"),
        (lambda: sampler.infill([[1] * 13], [[False] * 13]), "tokens: got a length of 13"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    nothing = sampler.sample((0, 5))
    assert nothing.tokens.shape == (0, 5) and nothing.nfe == 0


# ---- steps recorded as CUDA graphs


def small_denoiser(device="cpu", vocab=60, **config):
    """Of random weights, at V = 60 with a posterior of 4 entries, which is the sparse one."""
    torch.manual_seed(0)
    path = LogitPath(vocab)
    model = Denoiser(DenoiserConfig(vocab, 1, 2, 16, 8, **{"top": 4, **config}), path).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    return model.to(device), path


class CallsAgain:
    """In place of replay.Recorder: a replay is a call of the function. Counts what is recorded."""

    def __init__(self, device):
        self.count = 0

    def record(self, function):
        self.count += 1
        function()  # as a warm-up does, it leaves something in the buffers
        return function


@pytest.fixture
def calling_again(monkeypatch):
    """Sampler(model, path, cuda_graph=True) with steps that are called again instead of replayed."""
    monkeypatch.setattr(replay, "Recorder", CallsAgain)
    monkeypatch.setattr(Sampler, "_recordable", lambda self: self.network)
    return lambda model, path: Sampler(model, path, cuda_graph=True)


@pytest.mark.parametrize(
    "config",
    [{}, {"top": None}, {"input": "simplex", "time": "adaln"}, {"self_conditioning": True}],
    ids=["sparse", "dense", "simplex", "self-conditioning"],
)
def test_recorded_steps_give_the_tokens_of_the_sampler(config, calling_again):
    model, path = small_denoiser(**config)
    ordinary, recorded = Sampler(model, path), calling_again(model, path)
    tokens = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    seen = []
    for flags in (given, torch.zeros_like(given), ~given):
        for options in (
            dict(steps=1),
            dict(steps=2, top_k=None, seed=[5, 6, 7]),
            dict(steps=6, top_k=5, top_p=0.9, seed=9, grid_power=0.5),
            dict(steps=6, top_k=5, temperature=(1.5, 0.5), final="draw"),
        ):
            expected, found = (s.infill(tokens, flags, method="sampling", **options) for s in (ordinary, recorded))
            assert torch.equal(found.tokens, expected.tokens) and found.nfe == expected.nfe
            assert found.tokens.data_ptr() != recorded._replays.buffers[3, 7].tokens.data_ptr()
            seen.append(expected.tokens)
    assert len(torch.stack(seen).unique(dim=0)) == len(seen)
    prompts = [[1, 2], [], [3] * 6, [4] * 8]
    expected, found = (s.complete(prompts, 8, steps=3, method="sampling") for s in (ordinary, recorded))
    assert torch.equal(found.tokens, expected.tokens)
    ragged = [[0] * n for n in (3, 5, 3)]
    expected, found = (
        s.infill(ragged, [[False] * len(x) for x in ragged], steps=3, method="sampling") for s in (ordinary, recorded)
    )
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, expected.tokens, strict=True))


def test_what_is_recorded_anew(calling_again):
    model, path = small_denoiser()
    sampler = calling_again(model, path)
    count = lambda: sampler._replays.recorder.count  # noqa: E731

    def new(shape=(2, 5), **options):
        before = count()
        options = {"steps": 4, "method": "sampling", "final": "draw", **options}
        tokens = sampler.sample(shape, **options).tokens
        assert torch.equal(tokens, Sampler(model, path).sample(shape, **options).tokens)
        return count() - before

    with torch.inference_mode():  # its tensors must not stay behind in the buffers
        assert new() == 1
    assert new() == new(seed=3) == new(steps=9) == new(grid_power=0.5) == 0
    assert new(top_k=5) == new(top_p=0.5) == new(temperature=0.5) == new(shape=(1, 5)) == new(final="argmax") == 1
    assert new(temperature=(1.0, 2.0)) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert new() == 1
    torch.nn.init.normal_(model.head.weight)
    assert new() == 0
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    assert new() == new(shape=(1, 5)) == 1


class LooksAtNothing(TorchFunctionMode):
    """Python numbers become no tensors, which on CUDA is a copy that waits; that values are read the meta device forbids."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor) or isinstance(args[0], torch.Tensor), args
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("input", ["posterior", "simplex"])
@pytest.mark.parametrize("time", ["token", "add", "adaln", "none"])
def test_a_recorded_step_looks_at_no_value(input, time):
    model, path = small_denoiser("meta", input=input, time=time, self_conditioning=True)
    buffers = replay.Buffers.allocate((3, 7), model, torch.device("meta"))
    with torch.no_grad(), LooksAtNothing():
        replay.sampling_step_in_place(model, path, buffers, ResolvedOptions(top_p=0.9), 5, 0.7)


def test_bad_uses_of_cuda_graph(calling_again, monkeypatch):
    model, path = small_denoiser()
    sampler = calling_again(model, path)
    for options in ({}, {"method": "basic"}, {"method": "hybrid"}, {"method": "sampling", "return_history": True}):
        with pytest.raises(ValueError, match="cuda_graph: got True with method=.* are 'sampling' and False"):
            sampler.sample((2, 5), **options)
    assert sampler._replays.recorder.count == 0
    monkeypatch.undo()
    for m, p in ((lambda x, t: x, path), (model, LogitPath(60, alpha=0.5)), (model, MaskPath(60))):
        with pytest.raises(
            ValueError, match="cuda_graph: got True with a .* allowed with it is a Denoiser on a LogitPath"
        ):
            Sampler(m, p, "cuda", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: got True with device cpu, allowed with it is a CUDA device"):
        Sampler(model, path, cuda_graph=True)
    monkeypatch.setattr(sampler_module, "DEBUG_CHECK", True)
    with pytest.raises(ValueError, match="cuda_graph: got True with KLFLOW_CHECK=1"):
        Sampler(model, path, "cuda", cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available() or not build_info()["cuda"], reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [{"vocab": 5003, "top": 64}, {"input": "simplex"}, {"self_conditioning": True}])
def test_replay_on_cuda_gives_the_tokens_of_the_sampler(config, autocast):
    model, path = small_denoiser("cuda", **config)
    ordinary, recorded = (Sampler(model, path, "cuda", cuda_graph=flag) for flag in (False, True))
    for seed, prompts in enumerate(([[1, 2], [], [3] * 6], [[5], [6] * 7, []], [[7]])):  # the shapes come in turn
        for options in (dict(steps=1), dict(steps=7, top_k=5), dict(steps=7, temperature=(1.5, 0.5), final="draw")):
            for _ in range(2):
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    expected, found = (
                        s.complete(prompts, 8, method="sampling", seed=seed, **options) for s in (ordinary, recorded)
                    )
                assert torch.equal(found.tokens, expected.tokens)
                torch.nn.init.normal_(model.head.weight, std=0.5)


# ---- models of every kind


def every_model(vocab=50):
    """(path, Denoiser) of every input, time and path."""
    kinds = [
        (LogitPath(vocab), "posterior", {}),
        (LogitPath(vocab), "posterior", {"top": 5}),
        (LogitPath(vocab), "simplex", {}),
        (LogitPath(vocab, alpha=0.5, t_max=0.4), "simplex", {}),
        (LinearPath(vocab), "simplex", {}),
        (SpherePath(vocab), "simplex", {}),
        (MaskPath(vocab), "tokens", {}),
        (UniformPath(vocab), "tokens", {}),
        (Autoregressive(vocab), "tokens", {"causal": True, "time": "none"}),
    ]
    for i, (path, reads, options) in enumerate(kinds):
        options = {"time": ("token", "add", "adaln", "none")[i % 4], "self_conditioning": i % 2 == 1} | options
        options["self_conditioning"] &= not options.get("causal", False)
        torch.manual_seed(0)
        model = Denoiser(DenoiserConfig(vocab, 2, 2, 16, 16, input=reads, **options), path)
        torch.nn.init.normal_(model.head.weight, std=0.1)
        yield path, model


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
