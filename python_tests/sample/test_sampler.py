"""The promises of the Sampler about NFE, seeds, given tokens, draws and schedules, and its errors."""

import math

import pytest
import torch
from chains import EVERY, METHODS, Causal, Counting, name

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    LogitPath,
    MaskPath,
    Sampler,
    UniformPath,
    ops,
    register_sampler,
)
from klflow_ext.path import state
from klflow_ext.sample import samples


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
    seen.clear()
    sampler.sample((1, 3), steps=3, method="watching", times=[0, 0.3, 0.4])
    assert [s[1:] for s in seen] == [(0.0, 0.3), (0.3, 0.4)]


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
    seeds = [samples._sequence_seed(3, i) for i in range(6)]
    for i in (0, 1, 2, 5):
        alone = sampler.infill(
            torch.as_tensor(tokens[i])[None], torch.as_tensor(given[i])[None], steps=4, method="sampling",
            seed=seeds[i : i + 1], return_history=True,
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], result.tokens[i])
        assert all(torch.equal(a[0], r[i]) for a, r in zip(alone.history, result.history, strict=True))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(method="fast"), "method: got 'fast'"),
        (dict(steps=0), "steps: got 0"),
        (dict(top_p=0.0), "top_p: got 0.0"),
        (dict(top_k=0), "top_k: got 0"),
        (dict(temperature=-1), "temperature: got -1"),
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
        (dict(steps=2, times=[0]), "times: got 1 of .*, allowed are steps = 2, rising from 0 to below 1"),
        (dict(steps=2, times=[0.1, 0.2]), "times: got 2 of"),
        (dict(steps=2, times=[0, 1]), "times: got 2 of"),
        (dict(steps=3, times=[0, 0.2, 0.2]), "times: got 3 of"),
        (dict(steps=1, times=["a"]), "times: got .*, allowed are numbers"),
        (dict(layout="0 | 2"), "layout: got no 1"),
        (dict(layout=3), "layout: got 3, allowed is None"),
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
