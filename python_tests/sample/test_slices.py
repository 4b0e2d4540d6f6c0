"""Slices: who sees whom, the cache beside no cache, what is drawn, and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import SMALL, small_chain, small_variation

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    LogitPath,
    MaskPath,
    Network,
    Sampler,
    TrainConfig,
    Trainer,
    UniformPath,
)
from klflow_ext.path import Prediction, Streams
from klflow_ext.path.network import as_network
from klflow_ext.sample import Passes

VOCAB, LENGTH = 60, 12
PATHS = [LogitPath(VOCAB), MaskPath(VOCAB), UniformPath(VOCAB)]
kind = lambda path: path.kind  # noqa: E731


def slices_model(path=PATHS[0], time="none", **options):
    """Every layer does something, so that whoever is seen is noticed."""
    torch.manual_seed(0)
    reads = "tokens" if path.reads == "tokens" else options.pop("input", "posterior")
    config = DenoiserConfig(path.vocab_size, 3, 2, 16, 16, input=reads, time=time, slices=True, **options)
    model = Denoiser(config, path).eval()
    for name, p in model.named_parameters():
        if name != "embedding":
            torch.nn.init.normal_(p, std=0.3)
    return model


def logits_in_order(model, path, tokens, order, t=0.0):
    times = torch.full((len(tokens),), t)
    state = path.noisy(tokens, times[:, None], 5)
    with torch.no_grad():
        return path.predict(as_network(model, path), state, tokens, times, None, order).logits


class Exact(Network):
    """The distribution of the small chain, given the clean tokens that it is shown: in the cache, or of earlier slices."""

    slices = True
    caches = True

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, SMALL)
        self.sequences, self.weights = small_chain()
        self.passes = []

    def cache(self, batch):
        return SimpleNamespace(tokens=torch.full((batch, 3), -1))

    def predict(self, state, times, *, previous=None, cache=None, streams=None):
        count = streams.tokens.shape[1]
        clean, query = streams.places[:, :count], streams.places[:, count:]
        cache.tokens.scatter_(1, clean, streams.tokens)
        self.passes.append((clean, query))
        agrees = ((cache.tokens[:, None] == self.sequences) | (cache.tokens[:, None] < 0)).all(-1)  # (B, S)
        joint = agrees * self.weights
        onehot = torch.nn.functional.one_hot(self.sequences, SMALL).double()
        marginals = torch.einsum("bs,slv->blv", joint / joint.sum(1, keepdim=True), onehot)
        return Prediction(marginals.gather(1, query[..., None].expand(-1, -1, SMALL)).log())


def test_one_slice_a_position_is_the_chain_rule():
    draws, weights = 4000, small_chain()[1]
    floor = (weights * (1 - weights) / (2 * math.pi * draws)).sqrt().sum().item()
    model = Exact()
    sampler = Sampler(model, LogitPath(SMALL))
    result = sampler.sample((draws, 3), steps=3, top_k=None)
    assert result.nfe == 3 and small_variation(result.tokens, draws) < floor + 0.01
    assert [(clean.shape[1], query.shape[1]) for clean, query in model.passes] == [(0, 1), (1, 1), (1, 1)]
    sequences = small_chain()[0]
    exact = sampler.likelihood(sequences, steps=3)
    assert exact.exact and exact.tokens.eq(3).all()
    torch.testing.assert_close(exact.nats, -weights.log(), rtol=1e-6, atol=1e-6)
    two = sampler.likelihood(sequences, steps=2).nats  # the first with the third, then the second
    w = weights.view(SMALL, SMALL, SMALL)
    expected = 2 * math.log(SMALL) - (w / w.sum(1, keepdim=True)).flatten().log()
    torch.testing.assert_close(two, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=kind)
@pytest.mark.parametrize("time", ["none", "add", "adaln"])
def test_a_question_sees_what_stands_before_its_slice_and_nothing_else(path, time):
    """Any other token may change: neither its own, nor one of its slice, nor a later one is seen; and each earlier one is."""
    model = slices_model(path, time)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=generator)
    order = torch.randint(0, 5, (1, LENGTH), generator=generator)
    before = logits_in_order(model, path, tokens, order)
    for place in range(LENGTH):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 7) % VOCAB
        differs = (logits_in_order(model, path, changed, order) != before).any(-1)[0]
        assert torch.equal(differs, order[0, place] < order[0]), place


def test_questions_of_a_slice_see_each_other():
    """Those of one slice share what their noise says; those of others do not hear of it."""
    path = PATHS[0]
    model = slices_model(path)
    tokens, order = torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[1, 2, 1, 2, 3, 3]])
    t = torch.tensor([[0.0, 0.0, path.t_max, 0.0, 0.0, 0.0]])
    network, quiet = as_network(model, LogitPath(VOCAB)), path.noisy(tokens, torch.zeros(1, 1), 5)
    streams = Streams.of_text(tokens, order)
    with torch.no_grad():
        silent = network.predict(quiet, torch.zeros(1), streams=streams).logits
        heard = network.predict(path.noisy(tokens, t, 5), torch.zeros(1), streams=streams).logits
    assert torch.equal((silent != heard).any(-1)[0], order[0] == 1)


@pytest.mark.parametrize("path", PATHS, ids=kind)
@pytest.mark.parametrize("steps", [1, 3, 5, LENGTH])
def test_the_cache_says_what_a_whole_pass_says(path, steps):
    """The passes of the sampler, over a text that is there, beside one pass of two whole streams: to rounding."""
    model = slices_model(path, "add")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (5, LENGTH), generator=generator)
    given = torch.zeros(5, LENGTH, dtype=torch.bool)
    given[1:3, :4] = True
    given[3, [0, 5, 11]] = True
    free = ~given
    count = free.sum(1, keepdim=True).clamp_max(steps)
    order = torch.where(free, (free.cumsum(1) - 1) % count + 1, 0)
    if path.kind == "uniform":  # its questions are random tokens, which the passes draw anew
        tokens[:] = tokens[:1]
        model.embedding.data[:] = model.embedding.data[:1]
    with torch.no_grad():
        whole = path.loss(model, tokens, torch.zeros(5), 3, order=order, reduction="none").double().sum(1)
    passes = Sampler(model, path).likelihood(tokens, given, steps=steps)
    assert torch.equal(passes.tokens, free.sum(1))
    torch.testing.assert_close(passes.nats, whole, rtol=2e-6, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=kind)
@pytest.mark.parametrize("slice_steps", [1, 2])
def test_samples_of_any_prompts_do_not_depend_on_the_batch(path, slice_steps):
    model = slices_model(path)
    sampler = Sampler(model, path)
    prompts, seeds = [[], [3], [5, 6, 7], [9]], [4, 5, 6, 7]
    options = dict(steps=6, slice_steps=slice_steps)
    together = sampler.complete(prompts, LENGTH, seed=seeds, return_history=True, **options)
    assert together.tokens.shape == (4, LENGTH) and together.history[-1].shape == (4, LENGTH)
    assert torch.equal(together.history[-1], together.tokens)
    for prompt, seed, tokens in zip(prompts, seeds, together.tokens, strict=True):
        alone = sampler.complete([prompt], LENGTH, seed=[seed], **options)
        assert torch.equal(alone.tokens[0], tokens) and tokens[: len(prompt)].tolist() == prompt
        assert alone.nfe == 6
    tokens = torch.full((2, LENGTH), 8)
    given = torch.zeros_like(tokens, dtype=torch.bool)
    given[:, [0, 4, 11]] = True  # a hole with both sides
    filled = sampler.infill(tokens, given, steps=4).tokens
    assert filled[given].eq(8).all()


def test_steps_within_a_slice_are_those_of_the_sampling_scheme(monkeypatch):
    """A slice begins as noise, its draws are re-noised to the next time, and its last draw is as `final` says."""
    path, asked, drawn = PATHS[0], [], []
    predict, draw = Passes.predict, Passes.draw
    monkeypatch.setattr(
        Passes, "predict", lambda self, state, t, *a, **k: asked.append((t, state)) or predict(self, state, t, *a, **k)
    )
    monkeypatch.setattr(
        Passes, "draw", lambda self, p, places, k, *a: drawn.append((k, draw(self, p, places, k, *a))) or drawn[-1][1]
    )
    sampler = Sampler(slices_model(path), path)
    result = sampler.sample((2, LENGTH), steps=12, slice_steps=3, top_k=7)
    grid = path.time_grid(2).tolist()
    assert result.nfe == 12 and [t for t, _ in asked] == grid * 4 and [k for k, _ in drawn] == [7, 7, 1] * 4
    for number, ((t, state), (_, tokens)) in enumerate(zip(asked[1:], drawn, strict=False)):
        assert state.t == t and torch.equal(state.tokens, tokens if number % 3 < 2 else torch.zeros_like(tokens))
    drawn.clear()
    sampler.sample((1, LENGTH), steps=6, slice_steps=3, top_k=7, final="draw")
    assert [k for k, _ in drawn] == [7] * 6


def test_every_scheme_takes_what_is_given_as_slice_zero():
    """In one stream a given row would see the noise: for a network with slices it stands beside it."""
    path = PATHS[0]
    model = slices_model(path)
    sampler, seen = Sampler(model, path), []
    predict = model.predict
    model.predict = lambda *a, **k: seen.append(k["streams"]) or predict(*a, **k)
    given = torch.zeros(1, LENGTH, dtype=torch.bool)
    sampler.infill(torch.zeros(1, LENGTH, dtype=torch.int64), given, steps=2, method="sampling")
    assert seen == [None, None]
    given[0, :2] = True
    sampler.infill(torch.full((1, LENGTH), 3), given, steps=2, method="sampling")
    assert torch.equal(seen[-1].slices[0, :LENGTH], (~given[0]).long())
    assert seen[-1].tokens[0, :2].tolist() == [3, 3]


def test_padding_is_seen_by_nobody():
    path, model = PATHS[0], slices_model()
    tokens = torch.randint(VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.full((1, 3), -100)], 1)
    order = torch.arange(11)[None] % 4 + 1
    whole, cut = (
        path.loss(model, x, torch.zeros(1), 3, order=order[:, : x.shape[1]].contiguous(), reduction="none")
        for x in (padded, tokens)
    )
    assert whole[0, 8:].eq(0).all()
    alone = torch.tensor([0, 1, 2, 3])  # their slices: those of the padding are asked together with later ones
    torch.testing.assert_close(whole[0, alone], cut[0, alone], rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("path", [LogitPath(12), MaskPath(12)], ids=kind)
def test_training_on_slices_learns_what_the_sampler_asks(path):
    """Of the cyclic text 0 1 2 .. 9 0 1 .. the first token of the first slice says all: its other ones are guessed, no more."""
    torch.manual_seed(0)
    reads = "tokens" if path.reads == "tokens" else "posterior"
    model = Denoiser(DenoiserConfig(12, 2, 2, 32, 16, input=reads, time="none", slices=True), path)
    stream = (np.arange(4000) % 10).astype(np.int32)
    Trainer(model, path, stream, TrainConfig(steps=300, batch_size=16, length=16, given_share=0.1)).fit(progress=False)
    sampler, text = Sampler(model, path), (torch.arange(16)[None] + torch.arange(10)[:, None]) % 10
    for steps in (16, 8, 4):
        first = 16 // steps  # positions of the first slice
        least = first * math.log(10) / 16
        assert least - 0.02 < sampler.likelihood(text, steps=steps).per_token < least + 0.04
    tokens = sampler.sample((40, 16), steps=16, seed=1).tokens
    assert ((tokens[:, 1:] - tokens[:, :-1]) % 10 == 1).float().mean() > 0.95


def test_orders_in_training():
    """Slices of what asks by what stands alone, of what carries noise, and of what was observed; given ones are slice 0."""
    path, length = PATHS[0], 64
    model = Denoiser(DenoiserConfig(VOCAB, 1, 2, 16, 64, time="none", slices=True), path)
    stream = np.arange(5000, dtype=np.int32) % VOCAB
    config = TrainConfig(batch_size=4000, length=length, given_share=0.5, flow_share=0.3, evidence_share=0.2)
    batch = Trainer(model, path, stream, config).batches.batch(0)
    order, given = batch.order, batch.given
    assert torch.equal(order == 0, given) and 0.4 < given.any(1).float().mean() < 0.55
    observed, noisy = batch.evidence.observed.any(1), batch.t > 0
    assert abs(observed.float().mean() - 0.2) < 0.02 and abs(noisy.float().mean() - 0.3 * 0.8) < 0.03
    assert torch.equal(batch.evidence.without(given).observed, ~given & observed[:, None])
    whole = ~given.any(1)
    blank = order[whole & ~observed & ~noisy]
    count = blank.amax(1)
    assert count.min() == 4 and 0.31 < (count == length).float().mean() < 0.4
    for row, n in zip(blank[:50], count[:50].tolist(), strict=True):
        assert torch.equal(row, torch.arange(length) % n + 1)
    scattered = order[whole & observed]
    for row in scattered[:50]:
        sizes = row.bincount()[1:]
        assert sizes.min() > 0 and sizes.max() - sizes.min() <= 1
    assert (scattered.amax(1) == 1).any() and (scattered[:, 0] > 1).float().mean() > 0.5
    counts = (~given).sum(1)
    assert torch.equal(batch.counts, counts) and counts.min() >= 1
    with pytest.raises(ValueError, match="^evidence_share: got 0.2, allowed is 0 for a model that reads no posteriors"):
        Trainer(slices_model(PATHS[1]), PATHS[1], stream, TrainConfig(length=16, evidence_share=0.2))


def test_what_is_refused():
    path = PATHS[0]
    model, plain = slices_model(path), Denoiser(DenoiserConfig(VOCAB, 1, 2, 16, 16), path)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    order = torch.ones_like(tokens)
    with pytest.raises(ValueError, match="^method: got 'slices'"):
        Sampler(plain, path).sample((1, 4), method="slices")
    with pytest.raises(ValueError, match="^order: got one, allowed is None"):
        path.loss(plain, tokens, torch.zeros(2), 0, order=order)
    for bad in (order[:, :3], order.int()):
        with pytest.raises(ValueError, match="^order: got torch.int"):
            path.loss(model, tokens, torch.zeros(2), 0, order=bad)
    for options, name in (
        ({"time": "token"}, "time"),
        ({"causal": True}, "slices"),
        ({"self_conditioning": True}, "slices"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            DenoiserConfig(VOCAB, **{"time": "none", "slices": True, **options})
    with pytest.raises(ValueError, match="^slice_steps: got 9"):
        Sampler(model, path).sample((1, 4), steps=8, slice_steps=9)
    for options in ({"method": "hybrid"}, {"slice_steps": 2}):
        with pytest.raises(ValueError, match="^method: got .* allowed where a likelihood is asked for"):
            Sampler(model, path).likelihood(tokens, **options)
    streams = Streams(tokens, torch.zeros(2, LENGTH + 1, dtype=torch.int64), None)
    state = path.noisy(tokens[:, :1], torch.zeros(2, 1), 0)
    with pytest.raises(ValueError, match="^cache: got one of 3 sequences"):
        model.predict(state, torch.zeros(2), streams=streams, cache=model.cache(3))
    with pytest.raises(ValueError, match="^streams: got places"):
        model.predict(state, torch.zeros(2), streams=streams)
    full = model.cache(2)
    full.length = 10
    with pytest.raises(ValueError, match="^cache: got 10 rows and 12 more"):
        model.predict(state, torch.zeros(2), streams=streams, cache=full)
    with pytest.raises(ValueError, match="^streams: got some"):
        plain.hidden(torch.zeros(2, LENGTH + 1, 16), 0.0, streams=streams)
    with pytest.raises(ValueError, match="^cache: got one, allowed is None"):
        model.hidden(torch.zeros(2, 1, 16), 0.0, cache=model.cache(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("time", ["none", "add", "adaln"])
def test_attention_in_blocks_is_attention_under_a_mask(time, monkeypatch):
    """Given tokens, and slices of all sizes. FlexAttention has no backward pass on a CPU, so the loss is all there is to see."""
    path = PATHS[0]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    order = torch.randint(0, 5, (3, LENGTH), generator=generator)
    t, found = torch.tensor([0.0, 0.1, 0.2]), []
    for blocks in (False, True):
        monkeypatch.setattr(Denoiser, "_in_blocks", staticmethod(lambda h, blocks=blocks: blocks))
        with torch.no_grad():
            found.append(path.loss(slices_model(path, time), tokens, t, 3, order=order, reduction="none"))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
