"""Inputs and tolerances that the tests of several operators share."""

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# One step of rounding to the dtype, relative to the value: what any correct result may be away from float64.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


SHAPES = [(21, 2), (289, 3), (21, 7), (33, 31), (9, 1000), (3, 32768), (2, 50257), (2, 50259), (1, 65537), (1, 128256),
          (1, 262144), (0, 31)]  # fmt: skip


SMALL = [(21, 2), (9, 31), (5, 1000), (2, 50259)]


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


TIMES = [0.0, 0.02, 0.1, 0.2, 0.3, 0.5, 0.8, 0.99, 1.0]


def prior_of(vocab, device="cpu", never=False):
    """Log-frequencies like those of a text, some tokens never occurring if asked; sums to 1."""
    generator = torch.Generator().manual_seed(vocab)
    weights = 1 / (torch.randperm(vocab, generator=generator) + 2.0)
    if never and vocab > 3:
        weights[1::7] = 0.0
    return (weights / weights.sum()).log().to(device)


def case_of(rows, vocab, device):
    """Targets, times, rng, given flags; the times include the ends, and every fifth row is given."""
    target = targets_of(rows, vocab, device)
    t = torch.tensor(TIMES, device=device).repeat(rows // len(TIMES) + 1)[:rows]
    return target, t, torch.tensor([123456789012345, 17], device=device), torch.arange(rows, device=device) % 5 == 2


def weight_of(vocab, width, device="cpu", dtype=torch.float32, seed=0):
    return torch.randn(vocab, width, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def to64(value):
    if not isinstance(value, torch.Tensor):
        return value
    return (value.double() if value.is_floating_point() else value).detach().cpu()
