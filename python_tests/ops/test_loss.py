"""cross_entropy against its float64 twin and torch, over shapes, dtypes, strides and devices."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SHAPES, SMALL, assert_close, logits_of, loss_case, noise_tolerance, targets_of

from klflow_ext import ops, reference

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


@pytest.mark.slow
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


@pytest.mark.slow
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
