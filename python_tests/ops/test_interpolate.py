"""noise_interpolate and logit_interpolate against their float64 twins, over shapes, dtypes, strides and devices."""

import math

import pytest
import torch
from cases import DTYPES, SHAPES, SMALL, assert_close, logits_of, noise_tolerance, targets_of

from klflow_ext import ops, reference


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
