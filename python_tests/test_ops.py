"""Every kernel against its float64 twin in `reference`, over shapes, dtypes, strides and devices."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from klflow_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One step of rounding to the dtype, relative to the value: what any correct result may be away from float64.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = [(77, 2), (289, 3), (77, 7), (33, 31), (9, 1000), (3, 32768), (2, 50257), (2, 50259), (1, 65537), (1, 128256),
          (1, 262144), (0, 31)]  # fmt: skip
SMALL = [(77, 2), (9, 31), (5, 1000), (2, 50259)]


def logits_of(rows, vocab, dtype=torch.float32, device="cpu", std=5.0, shift=0.0, layout="plain", seed=0):
    """Random logits; layout "strided" has a row stride above V, "shifted" also a base one element off alignment."""
    generator = torch.Generator().manual_seed(seed + vocab)
    values = (torch.randn(rows, vocab, generator=generator) * std + shift).to(dtype).to(device)
    if layout == "plain":
        return values
    extra = 5 if layout == "strided" else 6
    room = torch.full((rows, vocab + extra), math.nan, dtype=dtype, device=device)
    view = room[:, 1 : 1 + vocab] if layout == "shifted" else room[:, :vocab]
    view.copy_(values)
    return view


def targets_of(rows, vocab, device="cpu", seed=1):
    return torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed + vocab)).to(device)


def assert_close(actual, expected, dtype, scale=1.0, absolute=1e-12):
    """|actual - expected| <= scale * (rounding of the dtype) * |expected| + absolute, elementwise."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    allowed = scale * EPS[dtype] * expected.abs() + absolute
    tiny = {torch.float16: 2.0**-25}.get(dtype, 0.0)  # gradual underflow
    error = (actual - expected).abs()
    bad = ~(error <= allowed + tiny) & ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not bad.any(), f"worst {((error - allowed)[bad]).max()} at {bad.nonzero()[0].tolist()}"


# ---- noise_interpolate


def noise_tolerance(dtype, request):
    """(scale of the rounding for x_t, absolute error of log x_t).

    CPU: E within 1e-7. CUDA: log2 E and 2^x of the special-function unit, 8e-6 together at their documented worst, and a
    bfloat16 row is kept as float16 between its passes: half a unit in the last place and an eighth.
    """
    if request.node.callspec.params["device"] == "cpu":
        return 1.0, 4e-6
    return {torch.float32: 8.0, torch.bfloat16: 1.125, torch.float16: 1.02}[dtype], 1e-5


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_noise_interpolate(rows, vocab, dtype, log, device, request):
    target = targets_of(rows, vocab, device)
    t = torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(device)
    if rows > 2:
        t[0], t[1] = 0.0, 1.0
    given = torch.arange(rows, device=device) % 5 == 2
    rng = torch.tensor([123456789012345, 17], device=device)
    actual = ops.noise_interpolate(target, t, rng, vocab_size=vocab, given=given, dtype=dtype, log=log, row_offset=11)
    expected = reference.noise_interpolate(target.cpu(), t.double().cpu(), rng.cpu(), vocab_size=vocab, given=given.cpu(),
                                           dtype=torch.float64, log=log, row_offset=11)  # fmt: skip
    scale, absolute = noise_tolerance(dtype, request)
    assert_close(actual, expected, dtype, scale=scale, absolute=absolute if log else 1e-12)
    assert torch.equal(actual[given].cpu().double(), expected[given.cpu()])


def test_noise_interpolate_broadcasts_and_writes_out(device, request):
    target = torch.randint(50, (3, 4), device=device, dtype=torch.int32)
    t = torch.tensor([[0.1], [0.2], [0.3]], device=device)
    room = torch.full((3, 4, 60), math.nan, device=device)
    out = room[..., :50]
    result = ops.noise_interpolate(target, t, 5, vocab_size=50, out=out)
    assert result.data_ptr() == out.data_ptr() and room[..., 50:].isnan().all()
    expected = reference.noise_interpolate(target.cpu(), t.double().cpu(), 5, vocab_size=50, dtype=torch.float64)
    assert_close(out, expected, torch.float32, scale=noise_tolerance(torch.float32, request)[0])


@pytest.mark.parametrize("vocab", [31, 1000, 50259])
def test_slices_have_the_same_bits(vocab, device):
    rows = 12
    target, t = targets_of(rows, vocab, device), 0.2
    logits = logits_of(rows, vocab, device=device)
    seeds = torch.stack([torch.arange(rows), torch.full((rows,), 3)], 1).to(device)
    for rng in (9, seeds):
        part_rng = rng if isinstance(rng, int) else rng[5:8]
        whole = ops.noise_interpolate(target, t, rng, vocab_size=vocab)
        part = ops.noise_interpolate(target[5:8], t, part_rng, vocab_size=vocab, row_offset=5)
        assert torch.equal(whole[5:8], part)
        token, x = ops.topk_renoise(logits, 20, t, rng)
        part_token, part_x = ops.topk_renoise(logits[5:8], 20, t, part_rng, row_offset=5)
        assert torch.equal(token[5:8], part_token) and torch.equal(x[5:8], part_x)
    loss, lse, grad = ops.cross_entropy_grad(logits, target, dloss=1.0)
    one = ops.cross_entropy_grad(logits[7:8].clone(), target[7:8], dloss=1.0)
    assert torch.equal(loss[7:8], one[0]) and torch.equal(lse[7:8], one[1]) and torch.equal(grad[7:8], one[2])


@pytest.mark.parametrize("length", [1, 3])
def test_a_state_for_each_sequence(length, device, request):
    """rng (B, 2): a sequence's noise and draws are those it has alone, wherever it stands in the batch."""
    b, vocab = 4, 1003
    target = targets_of(b * length, vocab, device).view(b, length)
    logits = logits_of(b * length, vocab, device=device).view(b, length, vocab)
    log_prior = torch.randn(vocab, generator=torch.Generator().manual_seed(4)).log_softmax(-1).to(device)
    states = torch.tensor([[7, 1], [7, 2], [8, 1], [9, 5]], device=device)
    calls = {
        "noise": lambda s, rng: ops.noise_interpolate(target[s], 0.2, rng, vocab_size=vocab, row_offset=2),
        "posterior": lambda s, rng: ops.noise_posterior(target[s], 0.2, rng, log_prior, top=20, row_offset=2),
        "sample": lambda s, rng: ops.topk_sample(logits[s], 20, rng, row_offset=2),
        "renoise": lambda s, rng: ops.topk_renoise(logits[s], 20, 0.2, rng, row_offset=2),
    }
    for name, call in calls.items():
        whole = call(slice(None), states)
        for i in range(b):
            alone = call(slice(i, i + 1), states[i : i + 1])
            one = call(i, states[i])  # rows (L,) with one state: numbered along L too
            for all_rows, own, flat in zip(
                *(v if isinstance(v, tuple) else (v,) for v in (whole, alone, one)), strict=True
            ):
                assert torch.equal(all_rows[i : i + 1], own) and torch.equal(all_rows[i], flat), name
    x = calls["noise"](slice(None), states)
    want = reference.noise_interpolate(
        target.cpu(), 0.2, states.cpu(), vocab_size=vocab, row_offset=2, dtype=torch.float64
    )
    assert_close(x, want, torch.float32, scale=noise_tolerance(torch.float32, request)[0])
    want, _ = reference.topk_sample(logits.double().cpu(), 20, states.cpu(), row_offset=2)
    assert torch.equal(calls["sample"](slice(None), states)[0].cpu(), want)


# ---- logit_interpolate


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SMALL)
def test_logit_interpolate(rows, vocab, dtype, hard, device):
    a = logits_of(rows, vocab, dtype, device, std=3, layout="shifted")
    b = targets_of(rows, vocab, device) if hard else logits_of(rows, vocab, dtype, device, std=3, shift=100, seed=5)
    t = torch.linspace(0, 1, rows, device=device)
    for log in (False, True):
        actual = ops.logit_interpolate(a, b, t, log=log)
        expected = reference.logit_interpolate(
            a.double().cpu(), b.cpu() if hard else b.double().cpu(), t.double().cpu(), log=log
        )
        assert_close(
            actual, expected, dtype, scale=30 if dtype == torch.float32 else 1.2, absolute=2e-5 if log else 1e-10
        )


@pytest.mark.parametrize("log", [False, True])
def test_logit_interpolate_gradient(log, device):
    a = logits_of(6, 31, device=device, std=2).requires_grad_()
    b = logits_of(6, 31, device=device, std=2, seed=4).requires_grad_()
    t = torch.linspace(0.1, 0.9, 6, device=device).requires_grad_()
    upstream = logits_of(6, 31, device=device, std=1, seed=9)
    ops.logit_interpolate(a, b, t, log=log).backward(upstream)
    a64, b64, t64 = (v.detach().double().cpu().requires_grad_() for v in (a, b, t))
    reference.logit_interpolate(a64, b64, t64, log=log).backward(upstream.double().cpu())
    for got, want in ((a, a64), (b, b64), (t, t64)):
        torch.testing.assert_close(got.grad.double().cpu(), want.grad, rtol=2e-5, atol=2e-6)


# ---- cross_entropy

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"softcap": 15.0},
    {"weight": True},
    {"row_weight": True},
    {"weight": True, "row_weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 20.0},
    {"soft": True},
    {"soft": True, "weight": True, "label_smoothing": 0.1, "row_weight": True},
]


def loss_case(rows, vocab, dtype, device, options, **layout):
    logits = logits_of(rows, vocab, dtype, device, **layout)
    options = dict(options)
    generator = torch.Generator().manual_seed(5)
    if options.pop("soft", False):
        target = torch.randn(rows, vocab, generator=generator).softmax(-1).to(device)
    else:
        target = targets_of(rows, vocab, device)
        target[::4] = -100
    for name, size in (("weight", vocab), ("row_weight", rows)):
        if options.get(name):
            options[name] = (torch.rand(size, generator=generator) + 0.5).to(device)
    options64 = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    target64 = target.double().cpu() if target.is_floating_point() else target.cpu()
    return logits, target, options, target64, options64


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SMALL)
def test_cross_entropy(rows, vocab, dtype, options, device):
    logits, target, options, target64, options64 = loss_case(rows, vocab, dtype, device, options, layout="shifted")
    before = logits.clone()
    for reduction in ("mean", "sum", "none"):
        x, x64 = logits.detach().clone().requires_grad_(), logits.detach().double().cpu().requires_grad_()
        loss, lse = ops.cross_entropy(x, target, reduction=reduction, return_lse=True, **options)
        loss64, lse64 = reference.cross_entropy(x64, target64, reduction=reduction, return_lse=True, **options64)
        torch.testing.assert_close(loss.double().cpu(), loss64, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(lse.double().cpu(), lse64, rtol=1e-6, atol=1e-5)
        upstream = torch.linspace(-1, 2, rows) if reduction == "none" else torch.tensor(0.7)
        dlse = torch.linspace(0.5, -0.5, rows)
        torch.autograd.backward([loss, lse], [upstream.to(device), dlse.to(device)])
        torch.autograd.backward([loss64, lse64], [upstream.double(), dlse.double()])
        scale = x64.grad.abs().max().item()
        assert_close(x.grad, x64.grad, dtype, scale=20 if dtype == torch.float32 else 1.1, absolute=2e-6 * scale)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("std,shift", [(1, 0), (5, 100), (20, -100)])
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_cross_entropy_over_scales(rows, vocab, std, shift, device):
    logits = logits_of(rows, vocab, device=device, std=std, shift=shift, layout="strided")
    target = targets_of(rows, vocab, device)
    loss, lse, grad = ops.cross_entropy_grad(logits, target, dloss=1.0)
    want = reference.cross_entropy_grad(logits.double().cpu(), target.cpu(), dloss=1.0)
    torch.testing.assert_close(loss.double().cpu(), want[0], rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(lse.double().cpu(), want[1], rtol=1e-6, atol=1e-5)
    assert_close(grad, want[2], torch.float32, scale=20, absolute=1e-6)


def test_the_longest_rows(device, request):
    """V = 2^20: in float32 even a cluster of eight blocks cannot keep the row, and reads or makes it again."""
    vocab, target = 2**20, torch.tensor([2**20 - 1], device=device)
    logits = logits_of(1, vocab, device=device)
    wide = logits.double().cpu()
    loss, lse, grad = ops.cross_entropy_grad(logits, target, dloss=1.0)
    want = reference.cross_entropy_grad(wide, target.cpu(), dloss=1.0)
    torch.testing.assert_close(loss.double().cpu(), want[0], rtol=1e-6, atol=2e-5)
    assert_close(grad, want[2], torch.float32, scale=20, absolute=1e-6)
    for log in (False, True):
        x = ops.noise_interpolate(target, 0.2, 3, vocab_size=vocab, log=log)
        want = reference.noise_interpolate(target.cpu(), 0.2, 3, vocab_size=vocab, dtype=torch.float64, log=log)
        scale, absolute = noise_tolerance(torch.float32, request)
        assert_close(x, want, torch.float32, scale=scale, absolute=absolute if log else 1e-12)
    state, x = ops.euler_step(logits, logits, 0.1)
    want_state, want_x = reference.euler_step(wide, wide, torch.tensor([0.1], dtype=torch.float64))
    assert_close(state, want_state, torch.float32, absolute=2e-5)
    assert_close(x, want_x, torch.float32, scale=30, absolute=1e-10)
    assert_close(ops.logit_interpolate(logits, target, 0.3), reference.logit_interpolate(wide, target.cpu(), 0.3),
                 torch.float32, scale=30, absolute=1e-10)  # fmt: skip


def test_rows_beyond_2_to_the_32_elements(device):
    """Three rows 2^31 elements apart: the last begins 2^32 elements after the first. Only the pages in use exist."""
    stride, vocab, target = 2**31, 1003, torch.tensor([0, 500, 1002], device=device)
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of GPU memory")
    try:
        room = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("needs 9 GB of address space")
    far = room.as_strided((3, vocab), (stride, 1))
    near = logits_of(3, vocab, torch.bfloat16, device)
    far.copy_(near)
    for a, b in zip(ops.cross_entropy_grad(far, target), ops.cross_entropy_grad(near, target), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ops.topk_sample(far, 50, 1)[0], ops.topk_sample(near, 50, 1)[0])
    ops.noise_interpolate(target, 0.2, 3, vocab_size=vocab, out=far)
    assert torch.equal(far, ops.noise_interpolate(target, 0.2, 3, vocab_size=vocab, dtype=torch.bfloat16))


def test_cross_entropy_equals_torch(device):
    logits, target = logits_of(40, 1000, device=device), targets_of(40, 1000, device)
    target[::3] = -100
    weight = torch.rand(1000, device=device)
    for kwargs in ({}, {"label_smoothing": 0.1}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.1}):
        torch.testing.assert_close(
            ops.cross_entropy(logits, target, **kwargs), F.cross_entropy(logits, target, **kwargs)
        )


def test_gradient_in_place_and_second_backward(device):
    logits, target = logits_of(8, 300, device=device), targets_of(8, 300, device)
    a = logits.clone().requires_grad_()
    loss = ops.cross_entropy(a, target)
    loss.backward(retain_graph=True)
    first = a.grad.clone()
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * first)
    base = logits.clone().requires_grad_()
    hidden = base * 1.0
    loss = ops.cross_entropy(hidden, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(base.grad, first)
    torch.testing.assert_close(hidden.detach(), first)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    rows, lse, grad = ops.cross_entropy_grad(logits, target)
    mine = logits.clone()
    same = ops.cross_entropy_grad(mine, target, out=mine)
    assert torch.equal(same[2], grad) and same[2].data_ptr() == mine.data_ptr() and torch.equal(same[0], rows)
    torch.testing.assert_close(grad, first)


def test_cross_entropy_edges(device):
    logits = logits_of(4, 10, device=device)
    ignored = torch.full((4,), -100, device=device)
    assert ops.cross_entropy(logits, ignored).isnan()
    assert ops.cross_entropy(logits, ignored, reduction="sum") == 0
    empty = torch.empty(0, 10, device=device)
    assert ops.cross_entropy(empty, ignored[:0], reduction="none").shape == (0,)
    assert ops.cross_entropy(empty, ignored[:0]).isnan()
    target = torch.tensor([0, 1, 2, 3], device=device)
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[2, 2] = 1.0
    loss, lse, grad = ops.cross_entropy_grad(logits, target, dloss=1.0)
    assert loss[1].isnan() and lse[1].isnan() and grad[1].isnan().all()
    assert loss[2] == 0 and torch.equal(grad[2], torch.zeros_like(grad[2]))
    many = torch.full((1, 5000), -math.inf, device=device)
    many[0, 4999] = 2.0
    assert ops.cross_entropy(many, torch.tensor([4999], device=device)) == 0


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


def test_a_forked_child_has_no_threads_of_its_parent():
    script = """
import os, torch
from klflow_ext import ops
x = torch.randn(200, 5000)
want = ops.topk_sample(x, 5, 0)[0]
child = os.fork()
if child == 0:
    os._exit(not torch.equal(ops.topk_sample(x, 5, 0)[0], want))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=120).returncode == 0


# ---- the operators under torch.compile and opcheck


COMPILED = [*ops.__all__, "noise_interpolate of the posterior", "noise_posterior of boosts"]


def compiled_cases(device):
    logits, target = logits_of(6, 64, device=device), targets_of(6, 64, device)
    log_x, rng = logits.log_softmax(-1), torch.tensor([1, 2], device=device)
    return {
        "noise_interpolate": lambda: ops.noise_interpolate(target, 0.2, rng, vocab_size=64),
        "noise_interpolate of the posterior": lambda: ops.noise_interpolate(
            target, 0.2, rng, vocab_size=64, output="posterior", log_prior=log_x[0], log=True
        ),
        "logit_interpolate": lambda: ops.logit_interpolate(log_x, logits, 0.3),
        "cross_entropy": lambda: ops.cross_entropy(logits, target, label_smoothing=0.1, return_lse=True),
        "cross_entropy_grad": lambda: ops.cross_entropy_grad(logits, target),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(logits, logits, target % 6, chunk_rows=4),
        "topk_sample": lambda: ops.topk_sample(logits, 5, rng),
        "topk_renoise": lambda: ops.topk_renoise(logits, 5, 0.2, rng),
        "euler_step": lambda: ops.euler_step(log_x, logits, 0.1),
        "noise_posterior": lambda: ops.noise_posterior(target, 0.2, rng, log_x[0], top=5),
        "noise_posterior of boosts": lambda: ops.noise_posterior(
            target.view(3, 2), 0.2, rng, log_x[0], top=5, boost=logits[:3, :2]
        ),
        "token_posterior": lambda: ops.token_posterior(log_x, 0.2, log_x[0], top=5),
        "posterior_embedding": lambda: ops.posterior_embedding(
            target.view(3, 2), log_x[:3, :2].exp(), log_x[:3, 5].exp(), logits.T, log_x[0]
        ),
        "merge_boosts": lambda: ops.merge_boosts(
            target.view(3, 2), logits[:3, :2], target.view(3, 2), logits[:3, :2], 3
        ),
        "noise_embedding": lambda: ops.noise_embedding(target % 6, 0.2, logits, rng, log_prior=log_x[:, 0], top=5),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", COMPILED)
def test_cuda_graph_replays(name):
    call = compiled_cases(torch.device("cuda"))[name]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    expected = call()
    graph.replay()
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replay_draws_new_noise_when_the_step_advances():
    rng, target = torch.tensor([1, 0], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    out = torch.empty(4, 1003, device="cuda")
    ops.noise_interpolate(target, 0.2, rng, vocab_size=1003, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.noise_interpolate(target, 0.2, rng, vocab_size=1003, out=out)
        rng[1] += 1
    seen = []
    for step in range(3):
        graph.replay()
        seen.append(out.clone())
        assert torch.equal(
            out, ops.noise_interpolate(target, 0.2, torch.tensor([1, step], device="cuda"), vocab_size=1003)
        )
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, device):
    case = compiled_cases(device)[name]
    torch._dynamo.reset()
    eager, compiled = case(), torch.compile(case, fullgraph=True, backend="aot_eager")()
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (eager, compiled)), strict=True):
        assert torch.equal(a, b)


def test_gradients_compile_as_one_graph(device):
    logits, target = logits_of(6, 64, device=device), targets_of(6, 64, device)

    def loss_of(x):
        return ops.cross_entropy(ops.logit_interpolate(x, x * 0.5, 0.3, log=True) * 3, target)

    grads = []
    for f in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        f(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_opcheck(device):
    klflow = torch.ops.klflow
    logits = logits_of(6, 64, device=device)
    target = targets_of(6, 64, device)
    t, rng = torch.full((6,), 0.2, device=device), torch.tensor([1, 2], device=device)
    rows = torch.empty(6, device=device)
    token = torch.empty(6, dtype=torch.int64, device=device)
    given = torch.tensor([True, False] * 3, device=device)
    options = (None, None, -100, 0.1, 1e-3, 0.0)
    grad_logits = logits.clone().requires_grad_()
    lse = logits.logsumexp(-1)

    def new():
        return torch.empty_like(logits)

    for op, args in [
        (klflow.noise_interpolate, (target, t, rng, given, 0.01, 0, False, new())),
        (klflow.logit_interpolate, (grad_logits, logits, t, 0.01, True)),
        (klflow.logit_interpolate, (grad_logits, target, t, 0.01, False)),
        (klflow.logit_interpolate_out, (logits, target, t, 0.01, False, new())),
        (klflow.cross_entropy, (grad_logits, target, *options)),
        (klflow.cross_entropy_out, (logits, target, *options, rows.clone(), rows.clone())),
        *([(klflow.cross_entropy_total, (logits, target, *options, True))] if logits.device.type == "cpu" else []),
        (klflow.cross_entropy_grad, (logits, target, *options, t, rows.clone(), rows.clone(), new())),
        (klflow.cross_entropy_backward, (logits, target, lse, *options, t, None, new())),
        (klflow.topk_sample, (logits, 5, rng, t + 0.5, t + 0.1, 0, token.clone(), rows.clone())),
        (klflow.topk_renoise, (logits, 5, t, rng, t + 0.5, t + 0.1, 0.01, given, target, 0, token.clone(), new())),
        (klflow.euler_step, (logits, logits, t, t + 0.5, 0.01, given, target, new(), new())),
    ]:
        torch.library.opcheck(op, args)


# ---- bad input: the error names the argument and its value

X, Y = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
BAD = [
    (lambda: ops.noise_interpolate(Y.float(), 0.1, 0, vocab_size=10), TypeError, "target: got torch.float32"),
    (lambda: ops.noise_interpolate([1], 0.1, 0, vocab_size=10), TypeError, "target: got list"),
    (lambda: ops.noise_interpolate(Y + 10, 0.1, 0, vocab_size=10), IndexError, "target: row 0 holds 10"),
    (lambda: ops.noise_interpolate(Y, 1.1, 0, vocab_size=10), ValueError, "t: got 1.1"),
    (lambda: ops.noise_interpolate(Y, torch.tensor([0, 0, 0, -0.5]), 0, vocab_size=10), ValueError, "t: got -0.5"),
    (lambda: ops.noise_interpolate(Y, math.nan, 0, vocab_size=10), ValueError, "t: got nan"),
    (lambda: ops.noise_interpolate(Y, torch.zeros(3), 0, vocab_size=10), ValueError, r"t: got shape \(3,\)"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=1), ValueError, "vocab_size: got 1"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, beta=0.0), ValueError, "beta: got 0.0"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, beta=1.0), ValueError, "beta: got 1.0"),
    (lambda: ops.noise_interpolate(Y, 0.1, "x", vocab_size=10), TypeError, "rng: got 'x'"),
    (lambda: ops.noise_interpolate(Y, 0.1, torch.zeros(3), vocab_size=10), TypeError, "rng: got torch.float32"),
    (
        lambda: ops.noise_interpolate(Y, 0.1, torch.zeros(3, dtype=torch.int64), vocab_size=10),
        ValueError,
        "rng: got shape",
    ),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, given=Y), TypeError, "given: got torch.int64"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, row_offset=-1), ValueError, "row_offset: got -1"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, dtype=torch.int8), TypeError, "dtype: got torch.int8"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, out=X[:3]), ValueError, "out: got shape"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, out=torch.zeros(10, 4).T), ValueError, "out: got strides"),
    (lambda: ops.logit_interpolate(X, X[:3], 0.1), ValueError, "log_x1: got shape"),
    (lambda: ops.logit_interpolate(X, X.half(), 0.1), TypeError, "log_x1: got torch.float16"),
    (lambda: ops.logit_interpolate(X[:, :1], X[:, :1], 0.1), ValueError, "log_x0: got shape"),
    (lambda: ops.cross_entropy(X, Y - 1), IndexError, "target: row 0 holds -1"),
    (lambda: ops.cross_entropy(X.double(), Y), TypeError, "logits: got torch.float64"),
    (lambda: ops.cross_entropy(X, Y[:3]), ValueError, "target: got shape"),
    (lambda: ops.cross_entropy(X, Y, reduction="avg"), ValueError, "reduction: got 'avg'"),
    (lambda: ops.cross_entropy(X, Y, label_smoothing=1.5), ValueError, "label_smoothing: got 1.5"),
    (lambda: ops.cross_entropy(X, Y, z_loss=-1), ValueError, "z_loss: got -1"),
    (lambda: ops.cross_entropy(X, Y, softcap=0), ValueError, "softcap: got 0"),
    (lambda: ops.cross_entropy(X, Y, weight=torch.ones(3)), ValueError, "weight: got shape"),
    (lambda: ops.cross_entropy(X, Y, ignore_index=0.5), TypeError, "ignore_index: got 0.5"),
    (lambda: ops.topk_sample(X, 0, 0), ValueError, "k: got 0"),
    (lambda: ops.topk_sample(X, 11, 0), ValueError, "k: got 11"),
    (lambda: ops.topk_sample(X, 2.0, 0), TypeError, "k: got 2.0"),
    (lambda: ops.topk_sample(X, 2, 0, temperature=0), ValueError, "temperature: got 0"),
    (lambda: ops.topk_sample(X, 2, 0, top_p=0.0), ValueError, "top_p: got 0.0"),
    (lambda: ops.topk_sample(X, 2, 0, top_p=1.5), ValueError, "top_p: got 1.5"),
    (lambda: ops.topk_renoise(X, 2, 2.0, 0), ValueError, "t_next: got 2.0"),
    (lambda: ops.topk_renoise(X, 2, 0.1, 0, given=Y == 0), ValueError, "known: got None"),
    (lambda: ops.topk_renoise(X, 2, 0.1, 0, given=Y == 0, known=Y + 99), IndexError, "known: row 0 holds 99"),
    (lambda: ops.euler_step(X, X[:3], 0.1), ValueError, "log_x: got shape"),
    (lambda: ops.euler_step(X, X, 1.5), ValueError, "rate: got 1.5"),
    (lambda: ops.euler_step(X, X, 0.1, temperature=-1), ValueError, "temperature: got -1"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_device():
    with pytest.raises(ValueError, match="target: got a tensor on meta"):
        ops.cross_entropy(X, Y.to("meta"))
