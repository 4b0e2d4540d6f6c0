"""Logits with masks of any size, common offsets and one block far above the others, against float64: every op that adds up
exponentials of given rows. The CPU kernels walk a row in blocks of 2,048 columns, so V and the places are chosen around that.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from klflow_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2.0, 5003)},
    "soft": {"soft": True},
    "capped": {"softcap": 30.0},
}


def rows_of(kind, dtype=torch.float32, rows=3, vocab=5003):
    """(logits, targets). The targets lie in the first block, in another and at the end."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(rows, vocab, generator=g) * 2
    if kind == "raised":  # a block whose maximum is far above that of those before it
        z[0, 3000], z[1, 2048], z[2, 5002] = 60.0, 90.0, 45.0
    else:  # the first block, all but one column, or every second column masked
        z[0, :2048] = z[1, :5002] = z[2, ::2] = kind
    return z.clamp_min(torch.finfo(dtype).min if math.isfinite(z.min()) else -math.inf).to(dtype), torch.tensor(
        [2500, 5002, 1]
    )


KINDS = ["raised", -1e4, -1e10, -1e20, -1e30, -3e38, -math.inf]


def near(actual, expected, dtype, absolute):
    """Within the rounding of the dtype, 40 units of float32 or `absolute`; infinities and NaN where they are expected."""
    relative = {torch.float32: 40 * 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy(kind, dtype, options, device):
    logits, target = rows_of(kind, dtype)
    options = dict(options)
    if options.pop("soft", False):
        target = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)).softmax(-1)
        if kind == -math.inf:  # else every loss is infinite
            target = (target * (logits > -math.inf)) / (target * (logits > -math.inf)).sum(-1, keepdim=True)
            target = target.clamp_min(1e-30)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    target64 = target.double() if target.is_floating_point() else target
    loss, lse, grad = ops.cross_entropy_grad(logits, target, dloss=1.0, **options)
    loss64, lse64, grad64 = reference.cross_entropy_grad(logits.double(), target64, dloss=1.0, **wide)
    near(loss, loss64, torch.float32, 2e-6)
    near(lse, lse64, torch.float32, 2e-6)
    near(grad, grad64, dtype, 2e-7)
    plain = logits.clone().requires_grad_()
    ops.cross_entropy(plain, target, reduction="none", **options).backward(torch.ones(len(logits)))
    near(plain.grad, grad64, dtype, 2e-7)


@pytest.mark.parametrize("options", [LOSSES[name] for name in ("plain", "smoothed", "weighted", "soft")])
@pytest.mark.parametrize("offset", [1024.0, -1024.0, 8192.0])
@pytest.mark.parametrize("vocab", [5003, 50257])
def test_a_common_offset_changes_no_loss(vocab, offset, options, device):
    """Logits on a grid of 2^-8 stay the same above 8192 in float32: within 4 units in the last place of the loss."""
    options = dict(options)
    g = torch.Generator().manual_seed(2)
    logits = (torch.randn(3, vocab, generator=g) * 2 * 256).round() / 256
    target = torch.randint(vocab, (3,), generator=g)
    if "weight" in options:
        options["weight"] = torch.linspace(0.5, 2.0, vocab)
    if options.pop("soft", False):
        target = torch.randn(3, vocab, generator=g).softmax(-1)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    target64 = target.double() if target.is_floating_point() else target
    want, _, grad64 = reference.cross_entropy_grad(logits.double(), target64, dloss=1.0, **wide)
    for shift in (0.0, offset):
        loss, _, grad = ops.cross_entropy_grad(logits + shift, target, dloss=1.0, **options)
        assert ((loss.double() - want).abs() <= 4 * 2.0**-23 * want.abs()).all()
        near(grad, grad64, torch.float32, 1e-9)
        again = (logits + shift).requires_grad_()
        ops.cross_entropy(again, target, reduction="none", **options).backward(torch.ones(3))
        near(again.grad, grad64, torch.float32, 1e-9)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 30.0, 1e3, 1e5, 1e10, 1e30])
def test_softcap_of_any_size(softcap, device):
    g = torch.Generator().manual_seed(3)
    logits, target = torch.randn(4, 5003, generator=g) * 4, torch.randint(5003, (4,), generator=g)
    logits[1] *= 10
    logits[2] *= softcap / 4
    if softcap > 1e5:  # logits of that size leave one token only
        logits[2] = logits[3]
    loss, _, grad = ops.cross_entropy_grad(logits, target, dloss=1.0, softcap=softcap)
    loss64, _, grad64 = reference.cross_entropy_grad(logits.double(), target, dloss=1.0, softcap=softcap)
    scale = float(logits[2].abs().max().clamp_max(softcap)) * 2.0**-21  # of the rounding of z
    near(loss, loss64, torch.float32, 2e-6 + scale)
    near(grad, grad64, torch.float32, 1e-8 + scale * float(grad64.abs().max()))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, 1024.0])
def test_logit_interpolate(kind, dtype, hard, log, device):
    if kind == 1024.0:
        logits, target = rows_of("raised", torch.float32)
        logits = logits.to(dtype) + 1024
    else:
        logits, target = rows_of(kind, dtype)
    end = target if hard else logits.flip(-1)
    for t in (0.0, 0.25):
        got = ops.logit_interpolate(logits, end, t, log=log)
        want = reference.logit_interpolate(logits.double(), end if hard else end.double(), t, log=log)
        lowest = want[want > -math.inf].abs().max().item() if log else 1.0
        near(got, want, dtype, (lowest + 1024 * (kind == 1024.0)) * 2.0**-22 if log else 1e-7)
    x, x64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (ops.logit_interpolate(x, end, 0.25) * up).sum().backward()
    (reference.logit_interpolate(x64, end if hard else end.double(), 0.25) * up).sum().backward()
    near(x.grad, x64.grad, dtype, {torch.float32: 1e-7, torch.bfloat16: 2e-3, torch.float16: 2e-4}[dtype])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3])
@pytest.mark.parametrize("kind", [*KINDS, 1024.0])
def test_euler_step(kind, temperature, device):
    logits, target = rows_of("raised" if kind == 1024.0 else kind)
    logits = logits + 1024 if kind == 1024.0 else logits
    state = F.log_softmax(torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)), -1)
    if kind != "raised" and kind != 1024.0:
        state[0, :2048] = kind
    log_x, x = ops.euler_step(state, logits, 0.3, temperature=temperature)
    want_log, want = reference.euler_step(state.double(), logits.double(), 0.3, temperature=temperature)
    far = want_log[want_log > -math.inf].abs().max().item()
    near(log_x, want_log, torch.float32, far * 2.0**-22)
    near(x, want, torch.float32, 1e-7)


def test_masked_classes_of_weight_0(device):
    """A class that never counts may be masked, also where it is the target or gets a share of the smoothing."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    weight = torch.ones(40)
    logits[:, 7], weight[7] = -math.inf, 0.0
    target = torch.tensor([3, 7, 9])
    for smoothing in (0.0, 0.1):
        loss, _, grad = ops.cross_entropy_grad(logits, target, weight=weight, label_smoothing=smoothing, dloss=1.0)
        want = reference.cross_entropy_grad(
            logits.double(), target, weight=weight.double(), label_smoothing=smoothing, dloss=1.0
        )
        assert loss.isfinite().all()
        near(loss, want[0], torch.float32, 2e-6)
        near(grad, want[2], torch.float32, 1e-7)


def test_a_row_of_nothing_is_nan(device):
    """Only -infinity: as in torch, neither a loss nor a distribution."""
    logits, target = torch.full((2, 5003), -math.inf), torch.tensor([0, 5002])
    logits[1] = 0.0
    loss, _, grad = ops.cross_entropy_grad(logits, target, dloss=1.0)
    rows = [loss, grad]
    for log in (False, True):
        rows.append(ops.logit_interpolate(logits, logits, 0.5, log=log))
    rows += ops.euler_step(logits, logits, 0.5)
    for got in rows:
        assert got[0].isnan().all() and got[1].isfinite().all()
