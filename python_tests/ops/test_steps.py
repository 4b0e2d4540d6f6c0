"""topk_sample, topk_renoise and euler_step against their float64 twins, over shapes, dtypes, strides and devices."""

import math

import pytest
import torch
from cases import DTYPES, SHAPES, SMALL, assert_close, logits_of, noise_tolerance, targets_of

from klflow_ext import ops, reference

# ---- topk_sample, topk_renoise


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_topk_sample(rows, vocab, dtype, top_p, device):
    logits = logits_of(rows, vocab, dtype, device, std=3, layout="shifted")
    for k in sorted({1, 2, min(vocab, 50), min(vocab, 256), min(vocab, 400), vocab if vocab <= 1000 else 2}):
        token, log_prob = ops.topk_sample(logits, k, 7, temperature=0.8, top_p=top_p, row_offset=3)
        want, want_log = reference.topk_sample(logits.double().cpu(), k, 7, temperature=0.8, top_p=top_p, row_offset=3)
        assert torch.equal(token.cpu(), want)
        torch.testing.assert_close(log_prob.double().cpu(), want_log, rtol=1e-5, atol=1e-5)


def test_topk_ties_nan_and_infinities(device):
    ties = torch.zeros(64, 5000, device=device)
    assert (ops.topk_sample(ties, 1, 0)[0] == 0).all()
    token, log_prob = ops.topk_sample(ties, 3, 0)
    assert set(token.tolist()) == {0, 1, 2}
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -math.log(3)))
    rows = torch.randn(5, 5000, device=device)
    rows[0, 4321] = math.nan
    rows[1] = -math.inf
    rows[2] = -math.inf
    rows[2, 77] = 0.0
    rows[3] = torch.arange(5000.0)  # ascending: the queue overflows again and again
    token, log_prob = ops.topk_sample(rows, 10, 0)
    assert token[:2].tolist() == [-1, -1] and log_prob[:2].isnan().all()
    assert token[2] == 77 and log_prob[2] == 0 and token[3] >= 4990
    wide = torch.zeros(8, 60000, device=device)  # a cluster of blocks in float32, and ties in all of them
    wide[4:, 30000:30005] = 3.0  # across two blocks' slices
    token, log_prob = ops.topk_sample(wide, 5, 0)
    assert set(token[:4].tolist()) <= set(range(5)) and set(token[4:].tolist()) <= set(range(30000, 30005))
    torch.testing.assert_close(log_prob, torch.full_like(log_prob, -math.log(5)))
    token, x = ops.topk_renoise(rows, 10, 0.3, 0)
    assert x[:2].isnan().all() and not x[2:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab,k", [(31, 30), (513, 7), (2047, 50), (2048, 300)])
def test_topk_of_awkward_rows(vocab, k, dtype, device):
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randn(10, vocab, generator=generator)
    rows[0] = torch.randint(-3, 3, (vocab,), generator=generator)  # ties everywhere
    rows[1] = torch.where(rows[1] > 0, 0.0, -0.0)  # one value, two spellings
    rows[2] = -torch.rand(vocab, generator=generator) - 100  # nothing above 0
    rows[3, : vocab - 5] = -math.inf  # fewer finite logits than k
    rows[4] = -torch.arange(vocab)
    rows[5, -1] = math.nan
    rows[6, 0] = -torch.tensor(math.nan)
    rows[7, vocab // 2] = math.inf
    rows[8] *= 1e4
    rows = rows.to(dtype).repeat(3, 1)
    token, log_prob = ops.topk_sample(rows.to(device), k, 5)
    want, want_log = reference.topk_sample(rows.double(), k, 5)
    assert torch.equal(token.cpu(), want)
    torch.testing.assert_close(log_prob.double().cpu(), want_log, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_p", [1e-50, 0.1, 0.5, 0.9, 1 - 2.0**-24])
def test_top_p_keeps_the_smallest_set(top_p, dtype, device):
    """The shortest prefix of the sorted logits with mass >= top_p, ties by column, however many logits there are."""
    vocab = 1500
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, vocab, generator=generator) * torch.tensor([1e-3, 0.1, 1, 5, 50, 1, 1, 1])[:, None]
    rows[1] = torch.randint(-2, 2, (vocab,), generator=generator)  # hundreds of equals at the bound
    rows[5] = torch.where(rows[5] > 0, 0.0, -0.0)  # one value, two spellings
    rows[6, vocab // 2 :] = -math.inf
    rows[7] = torch.arange(vocab).flip(0) * 2.0**-12
    rows = rows.to(dtype)
    for k in (vocab, 700, 60):
        token, log_prob = ops.topk_sample(rows.to(device), k, 5, top_p=top_p)
        z, column = rows.double().sort(descending=True, stable=True)
        z[:, k:] = -math.inf
        mass = (z - z[:, :1]).exp()
        before = mass.cumsum(-1) - mass  # equal to the bound (where masses are whole numbers): enough
        bound = float(torch.tensor(top_p).float()) * mass.sum(-1, keepdim=True)
        kept = (before < bound) | (torch.arange(vocab) == 0)
        place = (column == token.cpu()[:, None]).double().argmax(-1)
        assert kept[torch.arange(8), place].all()
        want = z.masked_fill(~kept, -math.inf).log_softmax(-1)[torch.arange(8), place]
        # The bound itself is rounded: one of the kept more or less than in float64, no more.
        slack = 1e-5 + (1.01 / kept.sum(-1) if top_p > 0.999 else 0)
        assert ((log_prob.double().cpu() - want).abs() <= slack).all()


def test_the_range_of_temperatures(device):
    """What is 0 or infinite in float32 never reaches a kernel; at both ends of the range the results are right."""
    rows, vocab = 6, 600
    logits, token = logits_of(rows, vocab, device=device), torch.empty(rows, dtype=torch.int64, device=device)
    log_x, seed = torch.randn(rows, vocab, device=device).log_softmax(-1), torch.tensor([0, 0], device=device)
    out, row = torch.empty(rows, vocab, device=device), torch.full((rows,), 0.3, device=device)
    klflow = torch.ops.klflow
    one = torch.ones(rows, device=device)
    for bad in (0.0, -1.0, 1e-50, 1e-45, 1e-44, 1e-38, 1e-31, 1e31, 1e39, math.inf, math.nan):
        if device.type == "cuda":  # where the operators themselves do not look at values
            break
        bad = torch.tensor([1.0] * (rows - 1) + [bad])
        with pytest.raises(RuntimeError, match="temperature: got"):
            klflow.topk_sample(logits, 20, seed, bad, one, 0, token, row.clone())
        with pytest.raises(RuntimeError, match="temperature: got"):
            klflow.topk_renoise(logits, 20, row, seed, bad, one, 0.01, None, None, 0, token, out)
        with pytest.raises(RuntimeError, match="temperature: got"):
            klflow.euler_step(log_x, logits, row, bad, 0.01, None, None, out.clone(), out)
    best = logits.argmax(-1)
    for k, top_p in ((20, 1.0), (20, 0.5), (vocab, 1.0), (vocab, 0.5)):
        token, log_prob = ops.topk_sample(logits, k, 0, temperature=1e-30, top_p=top_p)
        assert torch.equal(token, best) and (log_prob == 0).all()
        assert torch.equal(ops.topk_renoise(logits, k, 0.3, 0, temperature=1e-30, top_p=top_p)[0], best)
        token, log_prob = ops.topk_sample(logits, k, 0, temperature=1e30, top_p=top_p)
        torch.testing.assert_close(log_prob, torch.full_like(log_prob, -math.log(k * top_p)))
    for temperature in (1e-30, 1e30):
        state, x = ops.euler_step(log_x, logits, 0.3, temperature=temperature)
        want, want_x = reference.euler_step(log_x.double().cpu(), logits.double().cpu(), 0.3, temperature=temperature)
        assert_close(state, want, torch.float32, absolute=2e-5)
        assert_close(x, want_x, torch.float32, scale=30, absolute=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SMALL)
def test_topk_renoise(rows, vocab, dtype, device, request):
    logits = logits_of(rows, vocab, dtype, device, std=3, layout="strided")
    given = torch.arange(rows, device=device) % 3 == 1
    known = targets_of(rows, vocab, device, seed=8)
    t = torch.linspace(0, 1, rows, device=device)
    k = min(vocab, 20)
    rng = torch.tensor([5, 6], device=device)
    token, x = ops.topk_renoise(logits, k, t, rng, given=given, known=known)
    want, want_x = reference.topk_renoise(
        logits.double().cpu(), k, t.double().cpu(), rng.cpu(), given=given.cpu(), known=known.cpu()
    )
    assert torch.equal(token.cpu(), want) and x.dtype == dtype
    assert_close(x, want_x, dtype, scale=noise_tolerance(dtype, request)[0])
    drawn, _ = ops.topk_sample(logits, k, rng)
    assert torch.equal(token[~given], drawn[~given]) and torch.equal(token[given], known[given])
    assert torch.equal(x[~given], ops.noise_interpolate(token, t, rng, vocab_size=vocab, dtype=dtype)[~given])


# ---- euler_step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SMALL)
def test_euler_step(rows, vocab, dtype, device):
    logits = logits_of(rows, vocab, dtype, device, std=5, layout="shifted")
    log_x = logits_of(rows, vocab, device=device, std=1, seed=3).log_softmax(-1)
    rate = torch.linspace(0, 1, rows, device=device)
    given, known = torch.arange(rows, device=device) % 4 == 3, targets_of(rows, vocab, device)
    state, x = ops.euler_step(log_x, logits, rate, temperature=0.7, given=given, known=known)
    want, want_x = reference.euler_step(log_x.double().cpu(), logits.double().cpu(), rate.double().cpu(), temperature=0.7,
                                        given=given.cpu(), known=known.cpu())  # fmt: skip
    assert_close(state, want, torch.float32, absolute=2e-5)
    assert_close(x, want_x, dtype, scale=30 if dtype == torch.float32 else 1.2, absolute=1e-10)
    mine = log_x.clone()
    same, same_x = ops.euler_step(mine, logits, rate, temperature=0.7, given=given, known=known, inplace=True)
    assert same.data_ptr() == mine.data_ptr() and torch.equal(mine, state) and torch.equal(same_x, x)
