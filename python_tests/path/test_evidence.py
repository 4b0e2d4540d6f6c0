"""Evidence: what is allowed, its posterior beside the whole row, and what a network hears of it."""

import math

import numpy as np
import pytest
import torch

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, MaskPath, Sampler, ops
from klflow_ext.path import Evidence, as_network
from klflow_ext.train.channel import confuse

VOCAB, LENGTH = 40, 6


def some_evidence(batch=2, count=5, other=-math.inf, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:count] for _ in range(batch * LENGTH)])
    ids = ids.view(batch, LENGTH, count)
    ids[0, 0, 1:] = -1
    ids[0, 1] = -1
    return Evidence(ids, torch.randn(ids.shape, generator=generator), other)


def dense_likelihood(evidence):
    """(B, L, V), slot by slot."""
    b, length, count = evidence.ids.shape
    rows = evidence.other[..., None].repeat(1, 1, VOCAB)
    for i in range(b):
        for j in range(length):
            for n in range(count):
                if evidence.ids[i, j, n] >= 0:
                    rows[i, j, evidence.ids[i, j, n]] = evidence.log_likelihood[i, j, n]
    return rows


@pytest.mark.parametrize("other", [-math.inf, -2.0])
def test_the_posterior_is_that_of_whole_rows(other):
    evidence = some_evidence(other=other)
    log_prior = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    expected = (log_prior + dense_likelihood(evidence)).softmax(-1)
    ids, q, rest = evidence.posterior(log_prior)
    assert all(len(set(row.tolist())) == row.numel() for row in ids.flatten(0, 1))
    torch.testing.assert_close(q.sum(2) + rest, torch.ones(2, LENGTH))
    prior = log_prior.exp()
    listed = torch.zeros(2, LENGTH, VOCAB, dtype=torch.bool).scatter(2, ids, True)
    unlisted = prior.masked_fill(listed, 0.0)
    found = (rest[..., None] * unlisted / unlisted.sum(2, keepdim=True)).scatter(2, ids, q)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    logits = torch.randn(2, LENGTH, VOCAB)
    torch.testing.assert_close(evidence.add_to(logits), logits + dense_likelihood(evidence))


def test_parts_of_evidence():
    evidence = some_evidence(other=-1.0)
    places = torch.tensor([[3, 0], [5, 1]])
    assert torch.equal(evidence.at(places).ids[1], evidence.ids[1, [5, 1]])
    assert torch.equal(evidence.at(places).other[0], evidence.other[0, [3, 0]])
    shown = torch.zeros(2, LENGTH, dtype=torch.bool)
    shown[1, 2] = True
    assert evidence.observed.sum() == 2 * LENGTH - 1 and not evidence.without(shown).observed[1, 2]
    wide, narrow = some_evidence(1), some_evidence(1, count=2)
    both = Evidence.stack([wide, narrow])
    assert torch.equal(both.ids[0], wide.ids[0]) and torch.equal(both.ids[1, :, :2], narrow.ids[0])
    torch.testing.assert_close(dense_likelihood(both[1:]), dense_likelihood(narrow))
    lists = Evidence.of_lists([[[(3, 0.5), (7, -1.0)], None, [(1, 0.0)]]])
    assert lists.ids.tolist() == [[[3, 7], [-1, -1], [1, -1]]] and lists.observed.tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("ids", "values", "other", "message"),
    [
        ([[[3, 3]]], [[[0.0, 0.0]]], -math.inf, "token 3 twice at position 0 of sequence 0"),
        ([[[3, 4]]], [[[-math.inf, -math.inf]]], -math.inf, "excludes every token at position 0 of sequence 0"),
        ([[[3, 4]]], [[[math.nan, 0.0]]], -math.inf, "log_likelihood: got a NaN"),
        ([[[3, 4]]], [[[0.0, 0.0]]], math.inf, "other: got a NaN or inf"),
        ([[[3, 4]]], [[[0.0]]], -math.inf, "log_likelihood: got shape"),
        ([[3, 4]], [[0.0, 0.0]], -math.inf, "ids: got"),
        ([[[3.0, 4.0]]], [[[0.0, 0.0]]], -math.inf, "ids: got"),
        ([[[3, 4]]], [[[0.0, 0.0]]], torch.zeros(2), "other: got shape"),
    ],
)
def test_what_is_no_evidence(ids, values, other, message):
    with pytest.raises(ValueError, match=message):
        Evidence(torch.tensor(ids), torch.tensor(values), other)


def network(path=None, slices=True):
    torch.manual_seed(0)
    path = path or LogitPath(VOCAB)
    reads = "tokens" if path.reads == "tokens" else "posterior"
    model = Denoiser(DenoiserConfig(VOCAB, 2, 2, 16, 16, input=reads, time="none", slices=slices, top=None), path)
    for name, p in model.named_parameters():
        if name != "embedding":
            torch.nn.init.normal_(p, std=0.3)
    return model.eval(), path


def test_a_noisy_row_as_evidence_says_what_the_row_says():
    """The posterior of a row of the path, told as a likelihood of every token, in place of the row."""
    model, path = network(slices=False)
    tokens, t = torch.arange(LENGTH)[None], torch.full((1,), path.t_max / 2)
    prior = model.log_prior.log_softmax(0)
    ids, q, _ = ops.noise_posterior(tokens, t[:, None], 3, prior, top=VOCAB, beta=path.beta)
    evidence = Evidence(ids.long(), q.log() - prior[ids.long()])
    asked = as_network(model, LogitPath(VOCAB))
    with torch.no_grad():
        noisy = asked.predict(path.noisy(tokens, t[:, None], 3), t).logits
        blank = path.noisy(tokens, torch.zeros(1, 1), 3)
        silent = asked.predict(blank, t).logits
        blank.evidence = evidence
        heard = asked.predict(blank, t).logits
    torch.testing.assert_close(heard, noisy, rtol=1e-4, atol=1e-4)
    assert (heard - silent).abs().max() > 0.01


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("method", ["slices", "segments", "confidence"])
@pytest.mark.parametrize("kind", [LogitPath, MaskPath])
def test_only_what_can_be_is_drawn_and_what_is_given_stays(kind, method, slices):
    if method == "slices" and not slices:
        pytest.skip("for networks with slices")
    model, path = network(kind(VOCAB), slices)
    evidence, sampler = some_evidence(), Sampler(model, path)
    tokens, given = torch.full((2, LENGTH), 39), torch.zeros(2, LENGTH, dtype=torch.bool)
    given[:, 3] = True
    for steps in (1, 3, LENGTH):
        result = sampler.infill(tokens, given, evidence=evidence, method=method, steps=steps, top_k=None)
        found = result.tokens
        assert found[:, 3].eq(39).all() and result.nfe == min(steps, 5)
        listed = (evidence.ids == found[..., None]).any(2) | given | ~evidence.observed
        assert listed.all()
        each = [evidence[i : i + 1] for i in range(2)]
        ragged = sampler.infill(list(tokens), list(given), evidence=each, method=method, steps=steps, top_k=None)
        assert torch.equal(torch.stack(ragged.tokens), found)
    alone = sampler.infill(tokens[1:], given[1:], evidence=evidence[1:], method=method, steps=3, top_k=None, seed=[7])
    batch = sampler.infill(tokens, given, evidence=evidence, method=method, steps=3, top_k=None, seed=[5, 7])
    assert torch.equal(alone.tokens[0], batch.tokens[1])


@pytest.mark.parametrize("method", ["slices", "segments", "confidence"])
def test_what_comes_later_is_heard(method):
    """What is drawn depends on what was observed of the last position, where nothing stands yet."""
    model, path = network()
    sampler, given = Sampler(model, path), torch.zeros(1, LENGTH, dtype=torch.bool)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    draws = set()
    for token in range(8):
        evidence = Evidence.of_lists([[None] * (LENGTH - 1) + [[(token, 0.0)]]])
        result = sampler.infill(
            tokens, given, evidence=evidence, method=method, steps=LENGTH, return_history=True, top_k=1
        )
        first = result.history[0] if method != "confidence" else result.tokens  # which draws the certain one first
        draws.add(tuple(first[0, :-1].tolist()))
        assert result.tokens[0, -1] == token
    assert len(draws) > 1


def test_the_likelihood_under_evidence_is_that_of_the_draws():
    """One free position: -log of the share with which each token is drawn; and all shares are one."""
    model, path = network()
    sampler, evidence = Sampler(model, path), Evidence.of_lists([[[(3, 0.5), (7, -1.0), (9, 0.0)]] + [None] * 5])
    given = torch.ones(1, LENGTH, dtype=torch.bool)
    given[0, 0] = False
    texts = torch.zeros(3, LENGTH, dtype=torch.int64)
    texts[:, 0] = torch.tensor([3, 7, 9])
    some = Evidence.stack([evidence] * 3)
    found = sampler.likelihood(texts, given.expand(3, -1), evidence=some, method="slices", steps=1)
    torch.testing.assert_close((-found.nats).exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)
    ids, p = sampler.posterior(texts[:1], given, evidence=evidence, top=4)
    order = ids[0, 0, :3].argsort()
    assert sorted(ids[0, 0, :3].tolist()) == [3, 7, 9] and p[0, 0, 3] == 0
    torch.testing.assert_close(p[0, 0, order].double(), (-found.nats).exp(), rtol=1e-5, atol=1e-7)
    assert ids[0, 1].tolist() == [0, -1, -1, -1] and p[0, 1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("slices", [True, False])
def test_the_loss_is_that_of_the_posterior(slices):
    """-log p of a text whose positions are asked for together, some of them observed; padding and given ones count nothing."""
    model, path = network(slices=slices)
    evidence = some_evidence()
    texts = torch.where(
        evidence.observed, evidence.ids.gather(2, torch.tensor([0, 1])[:, None, None].expand(2, 6, 1))[..., 0], 7
    )
    texts[0, 0], texts[1, 5] = evidence.ids[0, 0, 0], -100
    given = torch.zeros(2, LENGTH, dtype=torch.bool)
    given[:, 3] = True
    losses = path.loss(model, texts, torch.zeros(2), 0, given=given, evidence=evidence, reduction="none")
    shown = torch.where(texts == -100, 0, texts)
    evidence_of_text = evidence.without(texts == -100)
    ids, p = Sampler(model, path).posterior(shown, given, evidence=evidence_of_text, top=VOCAB)
    expected = -(p * (ids == shown[..., None])).sum(2).log().masked_fill(texts == -100, 0)
    assert losses[0, 3] == 0 and losses[1, 5] == 0
    rows = [0] if slices else [0, 1]  # what sees padding differs
    torch.testing.assert_close(losses[rows], expected[rows], rtol=1e-4, atol=1e-5)
    losses[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    total = path.loss(model, texts, torch.zeros(2), 0, given=given, evidence=evidence, reduction="sum")
    torch.testing.assert_close(total, losses.sum())
    mean = path.loss(model, texts, torch.zeros(2), 0, given=given, evidence=evidence)
    torch.testing.assert_close(mean, losses.sum() / 9)
    with pytest.raises(ValueError, match="evidence: got one that excludes the true token"):
        path.loss(model, texts.masked_fill(evidence.observed, 39), torch.zeros(2), 0, evidence=evidence)
    with pytest.raises(ValueError, match="evidence: got one whose unlisted tokens can be"):
        path.loss(model, texts, torch.zeros(2), 0, evidence=some_evidence(other=-2.0))


def test_a_network_that_does_not_hear_is_weighed():
    """p is proportional to its own times the likelihood."""
    model, path = network(MaskPath(VOCAB))
    sampler, evidence = Sampler(model, path), some_evidence(other=-1.0)
    tokens, given = torch.zeros(2, LENGTH, dtype=torch.int64), torch.zeros(2, LENGTH, dtype=torch.bool)
    ids, own = sampler.posterior(tokens, given, top=VOCAB)
    _, p = sampler.posterior(tokens, given, evidence=evidence, top=VOCAB)
    weighed = torch.zeros(2, LENGTH, VOCAB).scatter(2, ids, own) * dense_likelihood(evidence).exp()
    expected = (weighed / weighed.sum(2, keepdim=True)).sort(2, descending=True).values
    torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


def test_refusals():
    model, path = network()
    sampler, evidence = Sampler(model, path), some_evidence()
    tokens, given = torch.zeros(2, LENGTH, dtype=torch.int64), torch.zeros(2, LENGTH, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"method: got 'sampling' with evidence, allowed with it is one of \['confidence'"
    ):
        sampler.infill(tokens, given, evidence=evidence, method="sampling")
    with pytest.raises(
        ValueError, match=r"evidence: got one of \(2, 6\) positions, allowed is that of tokens, \(2, 5\)"
    ):
        sampler.infill(tokens[:, :5], given[:, :5], evidence=evidence)
    with pytest.raises(ValueError, match="evidence: got the token 40, allowed is 0 to V - 1 = 39"):
        sampler.posterior(tokens[:1, :1], given[:1, :1], evidence=Evidence.of_lists([[[(40, 0.0)]]]))
    with pytest.raises(TypeError, match="evidence: got list, allowed is an Evidence"):
        sampler.infill(tokens, given, evidence=[evidence])
    with pytest.raises(ValueError, match="evidence: got 1, allowed is a list of as many as tokens has, 2"):
        sampler.infill(list(tokens), list(given), evidence=[evidence[:1]])
    with pytest.raises(ValueError, match="slice_steps: got 2 with evidence"):
        sampler.infill(tokens, given, evidence=evidence, steps=4, slice_steps=2)
    with pytest.raises(ValueError, match="evidence: got some, allowed is None for a network that reads no posteriors"):
        mask, masks = network(MaskPath(VOCAB))
        masks.loss(mask, tokens, torch.zeros(2), 0, evidence=evidence)


def test_the_channel_is_calibrated():
    """Of all tokens that have the posterior q, a share of q is true."""
    generator = np.random.default_rng(0)
    prior = np.random.default_rng(1).dirichlet(np.ones(VOCAB))
    tokens = torch.from_numpy(generator.choice(VOCAB, (400, 50), p=prior))
    evidence = confuse(tokens, np.full(tokens.shape, 1.5), prior, generator)
    ids, q, rest = evidence.posterior(torch.from_numpy(prior).log().float())
    assert rest.max() < 1e-6
    hit = (ids == tokens[..., None]).double()
    for low, high in ((0.01, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        some = (q >= low) & (q < high)
        error = (q[some] * (1 - q[some])).sum().sqrt() / some.sum()
        assert abs(hit[some].mean() - q[some].mean()) < 4 * error, (low, some.sum())
