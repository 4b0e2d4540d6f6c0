"""The posterior of dense states and of boosted noise, and its embedding: against the oracle's closed form in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import assert_close, case_of, logits_of, prior_of, targets_of, to64, weight_of

from klflow_ext import ops, reference
from klflow_ext.ops import embedding
from klflow_ext.oracle import log_evidence

TIMES = [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.95]
SHAPES = [(18, 2), (18, 3), (18, 31), (9, 1000), (9, 2500), (9, 50257)]


def times_of(rows, device):
    return torch.tensor(TIMES, device=device).repeat(rows // len(TIMES) + 1)[:rows]


def posterior_of(log_x, t, log_prior):
    """(q, the largest evidence of an entry that matters, at least 60) of each row in float64: the oracle of this file."""
    vocab = log_x.shape[-1]
    evidence = log_evidence(to64(log_x), to64(t), reference.gap(vocab, 0.01))
    onehot = ((evidence > -math.inf).sum(-1, keepdim=True) == 1) & (evidence.amax(-1, keepdim=True) == 0)
    q = (torch.where(onehot, 0.0, to64(log_prior)) + evidence).softmax(-1)
    return q, torch.where(q > 1e-10, evidence, 0.0).amax(-1, keepdim=True).clamp(min=60)


def assert_largest_entries(entries, posterior, top):
    """(ids, q, rest) are the top largest of posterior_of; z is right to 1e-6 of the evidence that decides."""
    (ids, q, rest), (full, scale) = entries, posterior
    rows, vocab = full.shape
    assert ids.dtype == torch.int32 and ids.shape == q.shape == (rows, top) and rest.shape == (rows,)
    assert (ids[:, 1:] > ids[:, :-1]).all() and ids.min() >= 0 and ids.max() < vocab
    want = full.gather(1, ids.long().cpu())
    assert_close(q, want, torch.float32, scale=scale, absolute=1e-10)
    bound = full.sort(-1, descending=True).values[:, top - 1]
    assert (want.amin(-1) >= bound * (1 - 2e-6 * scale[:, 0])).all()  # near-ties aside
    assert_close(rest, full.scatter(1, ids.long().cpu(), 0.0).sum(-1), torch.float32, scale[:, 0], 6e-7)


# ---- token_posterior


def states_of(rows, vocab, t, device, dtype=torch.float32, layout="plain"):
    """log x_t up to constants: noise moved towards one or several tokens, some entries -inf, each eleventh row onehot."""
    state = logits_of(rows, vocab, dtype, device, layout=layout)
    values = reference.noise_interpolate(
        targets_of(rows, vocab), to64(t), 3, vocab_size=vocab, dtype=torch.float64, log=True
    )
    pull = logits_of(rows, vocab, std=2.0, seed=8).double().clamp(min=0)
    mixed = torch.arange(rows) % 3 == 1
    values[mixed] += (pull.square() * to64(t)[:, None])[mixed]
    if vocab > 3:
        values[::4, ::5] = -math.inf
    values[::2] += 100
    values[5::11] = torch.full((vocab,), -math.inf).index_fill(0, torch.tensor([vocab // 2]), -3.0).double()
    return state.copy_(values)


@pytest.mark.parametrize(
    "dtype,layout",
    [(torch.float32, "plain"), (torch.float32, "shifted"), (torch.bfloat16, "strided"), (torch.float16, "shifted")],
)
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_token_posterior(rows, vocab, dtype, layout, device):
    t = times_of(rows, device)
    log_x, log_prior = states_of(rows, vocab, t, device, dtype, layout), prior_of(vocab, device, never=True)
    for top in {1, min(20, vocab), min(512, vocab)}:
        assert_largest_entries(
            ops.token_posterior(log_x, t, log_prior, top=top), posterior_of(log_x, t, log_prior), top
        )


@pytest.mark.parametrize("distance", [2.0, 4.0, 6.0, 8.0, 12.0])
def test_the_evidence_of_a_nearly_certain_row(distance, device):
    """One entry far above the others: 1 - u is their sum, where 1 minus a rounded u would be 0."""
    log_x, t = torch.zeros(1, 64, device=device), torch.tensor([0.8], device=device)
    log_x[0, 7] = distance
    evidence = log_evidence(to64(log_x), to64(t), reference.gap(64, 0.01))[0, 7].item()
    log_prior = torch.zeros(64, device=device)
    log_prior[7] = 4 - evidence  # the entry is as likely as the others together: an error of its evidence shows
    ids, q, rest = ops.token_posterior(log_x, t, log_prior, top=64)
    want, _ = posterior_of(log_x, t, log_prior)
    assert 0.1 < want[0, 7] < 0.9 and (rest == 0).all()
    torch.testing.assert_close(q.double().cpu(), want, rtol=1.5e-6 * evidence, atol=0)


def test_a_dense_state_is_the_noise_that_made_it(device):
    rows, vocab = 30, 1500
    target, t = targets_of(rows, vocab, device), torch.linspace(0.0, 0.4, rows, device=device)
    log_prior = prior_of(vocab, device)
    log_x = ops.noise_interpolate(target, t, 5, vocab_size=vocab, log=True)
    ids, q, rest = ops.token_posterior(log_x, t, log_prior, top=vocab)
    noise_ids, noise_q, _ = ops.noise_posterior(target, t, 5, log_prior, top=vocab)
    assert torch.equal(ids, noise_ids) and (rest == 0).all()
    torch.testing.assert_close(q, noise_q, rtol=2e-3, atol=1e-6)


def test_rows_too_long_for_shared_memory(device):
    """On CUDA rows of that many columns wait in a scratch tensor, of fewer rows than there are here."""
    vocab, rows = 450_001, 3
    log_x, log_prior = logits_of(rows, vocab, device=device, std=2.0), prior_of(vocab, device)
    t = torch.full((rows,), 0.1, device=device)
    entries = ops.token_posterior(log_x, t, log_prior, top=600)
    assert_largest_entries(entries, posterior_of(log_x, t, log_prior), 600)
    target, boost = torch.tensor([[5], [450_000], [7]], device=device), torch.full((rows, 1), 1.5, device=device)
    m = reference.noise_interpolate(
        target[:, 0].cpu(), 0.0, 4, vocab_size=vocab, dtype=torch.float64, log=True
    ).scatter_add_(1, target.cpu(), to64(boost))
    entries = ops.noise_posterior(target, t, 4, log_prior, top=5, boost=boost)
    assert_largest_entries(entries, posterior_of(m * (1 - to64(t))[:, None], t, log_prior), 5)


def test_certain_states_and_states_that_are_none(device):
    log_x = torch.full((9, 2500), -math.inf, device=device)
    log_x[0, 0], log_x[1, 3], log_x[2, 2499] = 0.0, -50.0, 20.0
    log_x[3], log_x[3, 1200], log_x[3, 1900] = 0.0, 2.0, 2.0  # at t = 1
    log_x[4, 100] = math.nan
    log_x[5, 100], log_x[5, 7] = math.inf, 1.0
    log_x[7] = math.nan
    log_x[8], log_x[8, 1:5] = 0.0, math.nan
    t = torch.tensor([0.0, 0.1, 0.9, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1], device=device)
    ids, q, rest = ops.token_posterior(log_x, t, prior_of(2500, device), top=4)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 2499], [0, 1, 2, 1200]] + 5 * [[0, 1, 2, 3]]
    assert q[:4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]] and rest[:4].tolist() == [0] * 4
    assert q[4:].isnan().all() and rest[4:].isnan().all()


def test_late_times_and_ties(device):
    """Up to the last float32 below 1: the largest entry, or the largest shared between equals."""
    log_x = torch.zeros(4, 40, device=device)
    log_x[:, 11] = 3.0
    log_x[2:, 30] = 3.0
    t = torch.tensor([0.999, 1 - 2.0**-24, 0.999, 1 - 2.0**-24], device=device)
    ids, q, rest = ops.token_posterior(log_x, t, torch.zeros(40, device=device), top=40)
    want = torch.zeros(4, 40, device=device)
    want[:2, 11] = 1.0
    want[2:, 11] = want[2:, 30] = 0.5
    assert torch.equal(ids.cpu(), torch.arange(40).int().expand(4, -1)) and (rest == 0).all()
    torch.testing.assert_close(q, want, rtol=1e-5, atol=1e-9)


# ---- boosts


def boosts_of(rows, vocab, slots, device, seed=0):
    """Different tokens in each row, some slots unused; boosts of both signs, up to 12."""
    generator = torch.Generator().manual_seed(seed + slots)
    target = torch.stack([torch.randperm(vocab, generator=generator)[:slots] for _ in range(rows)])
    boost = torch.randn(rows, slots, generator=generator) * 4
    target[torch.rand(rows, slots, generator=generator) < 0.2] = -1
    target[0] = -1
    return target.to(device), boost.to(device)


def test_unused_slots_alone_are_the_noise(device):
    vocab = 2500
    target = torch.full((2, 3), -1, device=device)
    log_prior = prior_of(vocab, device)
    entries = ops.noise_posterior(target, 0.2, 5, log_prior, top=9, boost=torch.ones(2, 3, device=device))
    log_x = reference.simplex_noise(2, vocab, 5).log() * 0.8
    assert_largest_entries(entries, posterior_of(log_x, torch.full((2,), 0.2), log_prior), 9)


@pytest.mark.parametrize("slots", [1, 2, 40, 1024])
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_noise_posterior_of_boosts(rows, vocab, slots, device):
    slots = min(slots, vocab)
    target, boost = boosts_of(rows, vocab, slots, device)
    t, rng = times_of(rows, device), torch.tensor([3, 4], device=device)
    given = (torch.arange(rows, device=device) % 5 == 2) & (target[:, 0] >= 0)
    log_prior, top = prior_of(vocab, device, never=True), min(40, vocab)
    for tokens in (target, target.int()):
        entries = ops.noise_posterior(
            tokens, t, rng, log_prior, top=top, boost=boost, given=given, row_offset=9, beta=0.01
        )
        m = reference.simplex_noise(rows, vocab, to64(rng), row_offset=9).log()
        m.scatter_add_(1, to64(target).clamp(min=0), torch.where(to64(target) < 0, 0.0, to64(boost)))
        log_x = m * (1 - to64(t))[:, None]
        onehot = torch.full_like(log_x, -math.inf).scatter(1, to64(target)[:, :1].clamp(min=0), 0.0)
        full = posterior_of(torch.where(to64(given)[:, None], onehot, log_x), t, log_prior)
        assert_largest_entries(entries, full, top)
        twin = reference.noise_posterior(
            to64(tokens),
            to64(t),
            to64(rng),
            to64(log_prior),
            top=top,
            boost=to64(boost),
            given=to64(given),
            row_offset=9,
        )
        torch.testing.assert_close(twin[1], full[0].gather(1, twin[0].long()), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("low,high", [(-60.0, 0.0), (-100.0, -40.0), (-20.0, 30.0), (30.0, 60.0)])
@pytest.mark.parametrize("vocab", [2, 4, 31, 1000, 2500])
def test_boosts_of_every_sign(vocab, low, high, device):
    """All columns boosted, or all but one: with negative boosts their noise is far more than what is left of it."""
    generator = torch.Generator().manual_seed(vocab)
    rows, log_prior = 12, prior_of(vocab, device)
    boost = (torch.rand(rows, vocab, generator=generator) * (high - low) + low).to(device)
    target = torch.arange(vocab, device=device).expand(rows, -1).clone()
    target[::2, vocab // 2] = -1
    t = torch.linspace(0.0, 1.0, rows, device=device)
    ids, q, rest = ops.noise_posterior(target, t, 3, log_prior, top=vocab, boost=boost)
    m = (
        reference.simplex_noise(rows, vocab, 3).log()
        + torch.where(target < 0, 0.0, boost.clamp(-60, 60)).double().cpu()
    )
    s = reference.gap(vocab, 0.01) * to64(t) / (1 - to64(t))
    # log(1 - (1 - e^-s) u) is that of the others' share and e^-s of the own.
    others = torch.stack([m.index_fill(1, torch.tensor([j]), -math.inf).logsumexp(-1) for j in range(vocab)], -1)
    evidence = -vocab * (torch.logaddexp(others, m - s[:, None]) - m.logsumexp(-1, keepdim=True))
    want = (to64(log_prior) + evidence).softmax(-1)
    scale = torch.where(want > 1e-10, evidence, 0.0).amax(-1, keepdim=True).clamp(min=60)
    assert torch.equal(ids.cpu(), torch.arange(vocab).int().expand(rows, -1)) and (rest == 0).all()
    assert_close(q, want, torch.float32, scale=scale, absolute=1e-10)


def test_stats_mean_the_same_everywhere(device):
    """(sum of E, the largest z, the sum of exp(z - largest)); of a onehot row (0, 0, 1); NaN of a row at no time."""
    rows, vocab, log_prior = 8, 500, prior_of(500, device)
    target, t = (
        targets_of(rows, vocab, device),
        torch.tensor([0, 0.1, 0.2, 0.1, 1, 0.999, math.nan, 1.5], device=device),
    )
    given = torch.arange(rows, device=device) == 3
    empty = torch.empty(rows, 0, device=device)
    rest, stats = torch.empty(rows, device=device), torch.empty(rows, 3, device=device)
    seed = torch.tensor([3, 0], device=device)
    arguments = target, t, seed, given, None, log_prior, 0.01, 0, empty.int(), empty, rest, stats
    torch.ops.klflow.noise_posterior(*arguments)
    noise = reference.simplex_noise(rows, vocab, 3)
    assert stats[3:6].tolist() == 3 * [[0, 0, 1]] and stats[6:].isnan().all() and rest[6:].isnan().all()
    s = (reference.gap(vocab, 0.01) * to64(t) / (1 - to64(t)))[:3, None]
    m = noise[:3].log() + s * torch.nn.functional.one_hot(target[:3].cpu(), vocab)
    z = to64(log_prior) - vocab * torch.log1p(torch.expm1(-s) * m.softmax(-1))
    largest = z.amax(-1)
    want = torch.stack([noise[:3].sum(-1), largest, (z - largest[:, None]).exp().sum(-1)], -1)
    torch.testing.assert_close(stats[:3].double().cpu(), want, rtol=2e-5, atol=2e-5)


def test_one_boost_is_the_target(device, request):
    """boost = c t / (1 - t) of one slot: the form without boosts, on CUDA bit for bit."""
    rows, vocab = 40, 2500
    target, t, rng, given = case_of(rows, vocab, device)
    log_prior = prior_of(vocab, device)
    boost = reference.gap(vocab, 0.01) * t / (1 - t)
    plain = ops.noise_posterior(target, t, rng, log_prior, top=60, given=given)
    boosted = ops.noise_posterior(target[:, None], t, rng, log_prior, top=60, given=given, boost=boost[:, None])
    unsure = boost < 60  # the certain rows of the old form have the lowest ids, those of the new the likeliest
    if request.node.callspec.params["device"] != "cpu":
        assert all(torch.equal(a[unsure], b[unsure]) for a, b in zip(plain, boosted, strict=True))
    dense = [torch.zeros(rows, vocab, device=device).scatter(1, i.long(), q) for i, q, _ in (plain, boosted)]
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(plain[2], boosted[2], rtol=1e-4, atol=1e-7)


def test_boosts_are_the_basic_sampler(device):
    """Steps of euler_step from the noise, and the same steps as boosts of all tokens."""
    rows, vocab, steps = 12, 300, 6
    c, log_prior = reference.gap(vocab, 0.01), prior_of(vocab, device)
    times = torch.linspace(0.0, 0.4, steps + 1).tolist()
    log_x = ops.noise_interpolate(
        torch.zeros(rows, dtype=torch.int64, device=device), 0.0, 5, vocab_size=vocab, log=True
    )
    ids = torch.arange(vocab, device=device).expand(rows, -1)
    target, boost = ids[:, :1], torch.zeros(rows, 1, device=device)
    for step, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        logits = logits_of(rows, vocab, device=device, seed=step)
        log_x, _ = ops.euler_step(log_x, logits, 1 - (1 - t_next) / (1 - t))
        gain = c * (t_next / (1 - t_next) - t / (1 - t))
        target, boost = ops.merge_boosts(target, boost, ids, gain * logits.softmax(-1), vocab)
        dense = ops.token_posterior(log_x, t_next, log_prior, top=20)
        sparse = ops.noise_posterior(target, t_next, 5, log_prior, top=20, boost=boost)
        assert_largest_entries(sparse, posterior_of(log_x, torch.full((rows,), t_next), log_prior), 20)
        torch.testing.assert_close(sparse[1], dense[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocab", [31, 2500, 50257])
def test_slices_have_the_same_bits(vocab, device):
    rows, width = 9, 20
    target, boost = boosts_of(rows, vocab, 20, device)
    t, log_prior, weight = times_of(rows, device), prior_of(vocab, device), weight_of(vocab, width, device)
    log_x = states_of(rows, vocab, t, device)
    part = slice(5, 8)
    calls = [
        lambda s: ops.noise_posterior(target[s], t[s], 4, log_prior, top=9, boost=boost[s], row_offset=s.start or 0),
        lambda s: ops.token_posterior(log_x[s], t[s], log_prior, top=9),
        lambda s: [ops.posterior_embedding(*ops.token_posterior(log_x[s], t[s], log_prior, top=9), weight, log_prior)],
    ]
    for call in calls:
        for all_rows, own in zip(call(slice(None)), call(part), strict=True):
            assert torch.equal(all_rows[part], own)


def test_shapes_and_states_for_each_sequence(device):
    b, length, vocab = 3, 4, 500
    target, boost = boosts_of(b * length, vocab, 5, device)
    target, boost = target.view(b, length, 5), boost.view(b, length, 5)
    log_prior, weight = prior_of(vocab, device), weight_of(vocab, 6, device)
    states = torch.tensor([[7, 1], [7, 2], [8, 1]], device=device)
    t = torch.tensor([[0.1], [0.2], [0.3]], device=device)
    whole = ops.noise_posterior(target, t, states, log_prior, top=9, boost=boost)
    assert whole[0].shape == whole[1].shape == (b, length, 9) and whole[2].shape == (b, length)
    for i in range(b):
        one = ops.noise_posterior(target[i], t[i], states[i], log_prior, top=9, boost=boost[i].double())
        assert all(torch.equal(a[i], b) for a, b in zip(whole, one, strict=True))
    out = ops.noise_embedding(target, t, weight, states, log_prior=log_prior, top=9, boost=boost)
    assert out.shape == (b, length, 6)
    assert torch.equal(out, ops.posterior_embedding(*whole, weight, log_prior))
    want = reference.noise_embedding(
        to64(target), to64(t), to64(weight), to64(states), log_prior=to64(log_prior), top=9, boost=to64(boost)
    )
    torch.testing.assert_close(out.double().cpu(), want, rtol=2e-5, atol=3e-5)
    log_x = states_of(b * length, vocab, t.expand(b, length).reshape(-1), device).view(b, length, vocab)
    whole = ops.token_posterior(log_x, t, log_prior, top=9)
    assert whole[0].shape == (b, length, 9) and whole[2].shape == (b, length)
    assert torch.equal(whole[1][1], ops.token_posterior(log_x[1], 0.2, log_prior, top=9)[1])
    assert ops.token_posterior(log_x[:0], 0.2, log_prior, top=9)[1].shape == (0, length, 9)
    assert ops.noise_posterior(target[:0], 0.1, 0, log_prior, top=9, boost=boost[:0])[1].shape == (0, length, 9)


# ---- merge_boosts


@pytest.mark.parametrize("keep", [1, 7, 100])
def test_merge_boosts(keep, device):
    vocab, rows = 30, 50
    (a, x), (b, y) = boosts_of(rows, vocab, 12, device), boosts_of(rows, vocab, 9, device, seed=5)
    a, b = a.view(5, 10, 12), b.view(5, 10, 9)
    x, y = x.view(5, 10, 12).double(), y.view(5, 10, 9).double()
    ids, boost = ops.merge_boosts(a, x, b, y, keep)
    assert ids.shape == boost.shape == (5, 10, min(keep, 21)) and ids.dtype == a.dtype and boost.dtype == x.dtype
    dense = torch.zeros(5, 10, vocab + 1, dtype=torch.float64, device=device)  # the last column: unused
    held = torch.zeros_like(dense, dtype=torch.bool)
    for i, v in ((a, x), (b, y)):
        dense.scatter_add_(-1, torch.where(i < 0, vocab, i), v)
        held.scatter_(-1, torch.where(i < 0, vocab, i), True)
    dense, held = dense[..., :vocab], held[..., :vocab]
    want, order = torch.where(held, dense, -math.inf).sort(dim=-1, descending=True, stable=True)
    size = min(keep, 21)
    want, order = want[..., :size], order[..., :size]
    used = want > -math.inf
    assert torch.equal(ids, torch.where(used, order, -1))
    torch.testing.assert_close(boost, torch.where(used, want, 0.0), rtol=1e-12, atol=1e-12)


def test_merging_puts_equal_boosts_in_order_of_their_ids():
    ids, boost = ops.merge_boosts(
        torch.tensor([[9, 2, -1]]), torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[5, 2, 1]]), torch.ones(1, 3), 4
    )
    assert ids.tolist() == [[2, 1, 5, 9]] and boost.tolist() == [[4, 1, 1, 1]]


# ---- posterior_embedding


def test_posterior_embedding_and_its_gradient(device):
    rows, vocab, width = 18, 400, 33
    t, log_prior = times_of(rows, device), prior_of(vocab, device)
    log_x = states_of(rows, vocab, t, device)
    weight = weight_of(vocab, width, device).requires_grad_()
    weight64 = to64(weight).requires_grad_()
    upstream = weight_of(rows, width, device, seed=3)
    for top in (9, vocab):
        entries = ops.token_posterior(log_x, t, log_prior, top=top)
        out = ops.posterior_embedding(*entries, weight, log_prior)
        exact = reference.token_posterior(to64(log_x), to64(t), to64(log_prior), top=top)
        want = reference.posterior_embedding(*exact, weight64, to64(log_prior))
        torch.testing.assert_close(out.double().cpu(), want.detach(), rtol=2e-5, atol=5e-5)
        (grad,) = torch.autograd.grad((out * upstream).sum(), weight)
        (want,) = torch.autograd.grad((want * to64(upstream)).sum(), weight64)
        torch.testing.assert_close(grad.double().cpu(), want, rtol=2e-5, atol=5e-5)
    assert torch.equal(out[5], weight[vocab // 2])  # the onehot row


def test_noise_embedding_is_the_embedding_of_noise_posterior(device):
    target, t, rng, given = case_of(20, 300, device)
    log_prior, weight = prior_of(300, device), weight_of(300, 24, device, torch.bfloat16).requires_grad_()
    out = ops.noise_embedding(target, t, weight, rng, log_prior=log_prior, top=30, given=given)
    ids, q, rest = ops.noise_posterior(target, t, rng, log_prior, top=30, given=given)
    same = ops.posterior_embedding(ids.long(), q, rest, weight, log_prior)
    assert torch.equal(out, same)
    grads = [torch.autograd.grad(o.float().square().sum(), weight)[0] for o in (out, same)]
    assert torch.equal(*grads)


def test_opcheck_and_gradients_compile_as_one_graph(device):
    target, boost = boosts_of(6, 64, 3, device)
    t, rng, log_prior = torch.full((6,), 0.2, device=device), torch.tensor([1, 2], device=device), prior_of(64, device)
    log_x = logits_of(6, 64, device=device)
    ids = torch.empty(6, 5, dtype=torch.int32, device=device)
    q, rest = torch.empty(6, 5, device=device), torch.empty(6, device=device)
    klflow = torch.ops.klflow
    torch.library.opcheck(klflow.noise_posterior, (target, t, rng, None, boost, log_prior, 0.01, 0, ids, q, rest, None))
    torch.library.opcheck(klflow.token_posterior, (log_x, t, log_prior, 0.01, ids, q, rest))
    torch._dynamo.reset()

    def step(weight):
        dense = ops.posterior_embedding(*ops.token_posterior(log_x, t, log_prior, top=5), weight, log_prior)
        sparse = ops.noise_embedding(target, t, weight, rng, log_prior=log_prior, top=5, boost=boost)
        return (dense * sparse).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = weight_of(64, 8, device).requires_grad_()
        loss = function(weight)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    torch.testing.assert_close(*results)


def test_an_id_that_is_no_token_is_nan_where_nobody_looks(device, monkeypatch):
    monkeypatch.setattr(embedding, "looks_at_values", lambda device: False)
    ids = torch.tensor([[0, 9], [0, 10], [-1, 3]], device=device)
    out = ops.posterior_embedding(ids, torch.rand(3, 2), torch.rand(3), weight_of(10, 4, device), prior_of(10, device))
    assert out[0].isfinite().all() and out[1:].isnan().all()
    if device.type == "cpu":  # the operator itself reads no row that is not there
        rest, mean = torch.zeros(3), torch.zeros(4)
        with pytest.raises(IndexError, match=r"ids.flatten\(\): row 3 holds 10"):
            torch.ops.klflow.gather_rows(ids.int(), torch.rand(3, 2), rest, weight_of(10, 4), mean, torch.empty(3, 4))


SCRIPT = """
import torch
from klflow_ext import build_info, ops
log_x, log_prior, target, boost = torch.load("{path}")
dense = ops.token_posterior(log_x, 0.2, log_prior, top=20)
half = ops.token_posterior(log_x.half(), 0.2, log_prior, top=20)
torch.save((build_info()["cpu_capability"], dense, half,
            ops.noise_posterior(target, 0.2, 7, log_prior, top=20, boost=boost)), "{path}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    rows, vocab, path = 6, 5003, tmp_path / "x.pt"
    t, log_prior = torch.full((rows,), 0.2), prior_of(vocab)
    log_x, (target, boost) = states_of(rows, vocab, t, "cpu"), boosts_of(rows, vocab, 30, "cpu")
    torch.save((log_x, log_prior, target, boost), path)
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", SCRIPT.format(path=path)], check=True, env=env)
    used, *results = torch.load(path)
    if used != {"default": "baseline"}.get(capability, capability):
        pytest.skip(f"this processor has no {capability}: it chose {used}")
    m = reference.simplex_noise(rows, vocab, 7).log()
    m.scatter_add_(1, target.clamp(min=0), torch.where(target < 0, 0.0, boost).double())
    for entries, state in zip(results, (log_x, log_x.half(), m * 0.8), strict=True):
        assert_largest_entries(entries, posterior_of(state, t, log_prior), 20)


# ---- bad input: the error names the argument and its value

X, P, W = torch.zeros(4, 10), torch.full((10,), -math.log(10)), torch.zeros(10, 3)
Y, B, I = torch.arange(8).view(4, 2), torch.zeros(4, 2), torch.arange(8).view(4, 2).int()
GIVEN = torch.ones(4, dtype=torch.bool)
BAD = [
    (lambda: ops.token_posterior(X.double(), 0.1, P, top=3), TypeError, "log_x: got torch.float64"),
    (lambda: ops.token_posterior(X[0, 0], 0.1, P, top=3), ValueError, r"log_x: got shape \(\)"),
    (lambda: ops.token_posterior(X, 1.1, P, top=3), ValueError, "t: got 1.1"),
    (lambda: ops.token_posterior(X, torch.zeros(3), P, top=3), ValueError, r"t: got shape \(3,\)"),
    (lambda: ops.token_posterior(X, 0.1, P[:9], top=3), ValueError, r"log_prior: got shape \(9,\)"),
    (lambda: ops.token_posterior(X, 0.1, P + math.nan, top=3), ValueError, "log_prior: got a maximum of nan"),
    (lambda: ops.token_posterior(X, 0.1, P), ValueError, "top: got 512"),
    (lambda: ops.token_posterior(X, 0.1, P, top=3, beta=1.0), ValueError, "beta: got 1.0"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, boost=B.long()), TypeError, "boost: got torch.int64"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, boost=B[:, :1]), ValueError, r"boost: got shape \(4, 1\)"),
    (lambda: ops.noise_posterior(Y[:, :0], 0.1, 0, P, top=3, boost=B[:, :0]), ValueError, r"boost: got shape \(4, 0\)"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, boost=B + math.nan), ValueError, "boost: got nan"),
    (lambda: ops.noise_posterior(Y + 3, 0.1, 0, P, top=3, boost=B), IndexError, "target: row 3 holds 10"),
    (lambda: ops.noise_posterior(Y - 2, 0.1, 0, P, top=3, boost=B), IndexError, "target: row 0 holds -2"),
    (lambda: ops.noise_posterior(Y - 1, 0.1, 0, P, top=3, boost=B, given=GIVEN), IndexError, "target: row 0 holds -1"),
    (lambda: ops.noise_posterior(Y, torch.zeros(2), 0, P, top=3, boost=B), ValueError, r"t: got shape \(2,\)"),
    (lambda: ops.noise_embedding(Y, 0.1, W, 0, boost=B), ValueError, "boost: got Tensor"),
    (lambda: ops.noise_embedding(Y, 0.1, W, 0, boost=B, log_prior=P, top=None), ValueError, "boost: got Tensor"),
    (lambda: ops.merge_boosts(Y.float(), B, Y, B, 3), TypeError, "ids: got torch.float32"),
    (lambda: ops.merge_boosts(Y, B[:3], Y, B, 3), ValueError, r"boost: got shape \(3, 2\)"),
    (lambda: ops.merge_boosts(Y, B, Y.int(), B, 3), TypeError, "new_ids: got torch.int32"),
    (lambda: ops.merge_boosts(Y, B, Y[:3], B[:3], 3), ValueError, r"new_ids: got shape \(3, 2\)"),
    (lambda: ops.merge_boosts(Y, B, Y, B[:3], 3), ValueError, r"new_boost: got shape \(3, 2\)"),
    (lambda: ops.merge_boosts(Y, B, Y - 5, B, 3), ValueError, "ids: got -5"),
    (lambda: ops.merge_boosts(Y, B, Y, B, 0), ValueError, "keep: got 0"),
    (lambda: ops.posterior_embedding(Y.float(), B, B[:, 0], W, P), TypeError, "ids: got torch.float32"),
    (lambda: ops.posterior_embedding(Y + 3, B, B[:, 0], W, P), IndexError, "ids: row 3 holds 10"),
    (lambda: ops.posterior_embedding(Y, B[:3], B[:, 0], W, P), ValueError, r"q: got shape \(3, 2\)"),
    (lambda: ops.posterior_embedding(Y, B, B, W, P), ValueError, r"rest: got shape \(4, 2\)"),
    (lambda: ops.posterior_embedding(I, B, B[:, 0], W[0], P), ValueError, r"weight: got shape \(3,\)"),
    (lambda: ops.posterior_embedding(I, B, B[:, 0], W, P[:4]), ValueError, r"log_prior: got shape \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("t", [0.0, 0.2, 1.0])
def test_a_row_with_a_nan_is_nan(t, device):
    """Also where it has one other entry above -infinity, or where t = 1 would make it certain."""
    nan, inf = math.nan, math.inf
    for row in (
        [nan, -3.0],
        [-3.0, nan],
        [nan, 1.0, -inf],
        [nan, nan, 1.0],
        [nan, -inf],
        [inf, nan],
        [1.0, 2.0, nan],
        [-inf, -inf],
    ):
        ids, q, rest = ops.token_posterior(torch.tensor([row], device=device), t, prior_of(len(row), device), top=2)
        assert q.isnan().all() and rest.isnan().all() and ((ids >= 0) & (ids < len(row))).all(), row


def test_a_rest_that_is_no_number_stays_one(device):
    """Also where the ids leave no other token to share it out among; a negative one is taken as it is."""
    prior = prior_of(4, device)
    weight, q = weight_of(4, 3, device), torch.full((1, 2), 0.25, device=device)
    for ids in ([[0, 1]], [[0, 1, 2, 3]]):
        ids = torch.tensor(ids, device=device)
        out = ops.posterior_embedding(
            ids, torch.full(ids.shape, 0.25, device=device), torch.tensor([math.nan], device=device), weight, prior
        )
        assert out.isnan().all()
    ids, rest = torch.tensor([[0, 1]], device=device), torch.tensor([-0.5], device=device)
    want = reference.posterior_embedding(*map(to64, (ids, q, rest, weight, prior)))
    torch.testing.assert_close(
        ops.posterior_embedding(ids, q, rest, weight, prior).double().cpu(), want, rtol=1e-5, atol=1e-5
    )
