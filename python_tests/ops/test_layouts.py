"""Every operator over every tensor argument in every layout: the bits are those of contiguous arguments.

What lies around and between the elements of an argument is poison: NaN, or ids that are no tokens. With
KLFLOW_CPU_SANITIZE=1 or KLFLOW_SIMT_SANITIZE=1 (see .ci/run), a read beside a tensor ends the process.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import logits_of, targets_of

from klflow_ext import ops, reference

B, L = 2, 3  # the leading axes
LAYOUTS = [
    "expanded",
    "expanded along the last axis",
    "strided",
    "strided rows",
    "transposed",
    "transposed rows",
    "shifted",
    "inside",
]
POISON = {torch.bool: True, torch.int32: 2**31 - 1, torch.int64: 2**62}


def surrounded(x, room, place):
    """x copied to room[place], the rest of room being poison."""
    room = torch.full(room, POISON.get(x.dtype, math.nan), dtype=x.dtype, device=x.device)
    view = place(room)
    view.detach().copy_(x)
    return view


def laid_out(x, layout):
    """x in a layout; where that repeats elements, others than x has."""
    *leading, last = x.shape
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    if layout == "expanded along the last axis":
        return x[..., :1].clone().expand(x.shape)
    if layout == "strided":
        return surrounded(x, (*leading, 2 * last), lambda room: room[..., ::2])
    if layout == "strided rows":
        return surrounded(x, (2 * x.shape[0], *x.shape[1:]), lambda room: room[::2])
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "transposed rows":
        return x.transpose(0, x.dim() // 2).contiguous().transpose(0, x.dim() // 2)
    if layout == "shifted":
        return surrounded(x, (x.numel() + 1,), lambda room: room[1:].view(x.shape))
    return surrounded(x, tuple(n + 2 for n in x.shape), lambda room: room[tuple(slice(1, -1) for _ in x.shape)])


def gradients(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


# op: (its tensor arguments, how it is called with them), for rows (B, L) of V. Arguments that enter a matrix product,
# whose bits depend on the layout, are in PRODUCTS.
def cases(vocab, device):
    def tokens(*shape, seed=1):
        return targets_of(math.prod(shape), vocab, device, seed).reshape(shape)

    def floats(*shape, seed=0, std=2.0):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * std).to(device)

    def distinct(*shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randperm(vocab, generator=generator)[: shape[-1]] for _ in range(math.prod(shape[:-1]))]
        return torch.stack(ids).reshape(shape).to(device)

    width = 9
    t = torch.linspace(0.0, 0.4, B * L, device=device).reshape(B, L)
    seeds = torch.arange(2 * B * L, device=device).reshape(B, L, 2)
    given = (torch.arange(B * L, device=device) % 3 == 1).reshape(B, L)
    prior, logits, log_x = floats(vocab, seed=2), floats(B, L, vocab), floats(B, L, vocab, seed=3).log_softmax(-1)
    noise = {"target": tokens(B, L), "t": t, "rng": seeds, "given": given}
    steps = {"rng": seeds, "given": given, "known": tokens(B, L, seed=4)}
    slots = {**noise, "target": distinct(B, L, 3), "boost": floats(B, L, 3, seed=5) * 4}
    loss = {"logits": logits, "target": tokens(B, L), "weight": floats(vocab, seed=6).exp(),
            "row_weight": floats(B, L, seed=7).exp()}  # fmt: skip
    embedding, state = {"weight": floats(vocab, width)}, {"rng": seeds[:, 0]}  # of each sequence
    linear = {"hidden": floats(B, L, width), "weight": floats(vocab, width, seed=8), "bias": floats(vocab, seed=9),
              "target": tokens(B, L), "class_weight": loss["weight"], "row_weight": loss["row_weight"]}  # fmt: skip
    soft = {**loss, "target": floats(B, L, vocab, seed=10).softmax(-1)}
    entries = dict(zip(("ids", "q", "rest"), ops.token_posterior(log_x, 0.1, prior, top=5), strict=True))
    upstream, wide = {"upstream": floats(B, L, seed=11)}, {"upstream": floats(B, L, width, seed=12)}

    def loss_gradient(upstream, logits, **rest):
        logits = logits.detach().requires_grad_()
        options = {"reduction": "none", "return_lse": True, "label_smoothing": 0.1}
        return gradients(ops.cross_entropy(logits, **rest, **options), logits, (upstream, upstream * 0.5))

    def linear_gradient(upstream, hidden, weight, bias, **rest):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        return gradients(
            ops.linear_cross_entropy(*leaves[:2], bias=leaves[2], reduction="none", **rest), leaves, upstream
        )

    def embedding_gradient(upstream, weight, **rest):
        weight = weight.detach().requires_grad_()
        return gradients(ops.noise_embedding(weight=weight, **rest), weight, upstream)

    def entries_gradient(upstream, weight, **rest):
        weight = weight.detach().requires_grad_()
        return gradients(ops.posterior_embedding(weight=weight, **rest), weight, upstream)

    def path_gradient(upstream, log_x0, log_x1, t):
        leaves = [x.detach().requires_grad_() for x in (log_x0, log_x1, t)]
        return gradients(ops.logit_interpolate(*leaves), leaves, upstream)

    ends = {"log_x0": logits, "log_x1": log_x, "t": t}
    return {
        "noise_interpolate": (noise, lambda **x: ops.noise_interpolate(vocab_size=vocab, **x)),
        "noise_interpolate of sequences": (noise | state, lambda **x: ops.noise_interpolate(vocab_size=vocab, **x)),
        "noise_interpolate of the posterior": (
            noise | {"log_prior": prior},
            lambda **x: ops.noise_interpolate(vocab_size=vocab, output="posterior", log=True, **x),
        ),
        "logit_interpolate": (ends, ops.logit_interpolate),
        "logit_interpolate of targets": (ends | {"log_x1": tokens(B, L)}, ops.logit_interpolate),
        "logit_interpolate backward": (ends | {"upstream": floats(B, L, vocab, seed=13)}, path_gradient),
        "cross_entropy": (loss, lambda **x: ops.cross_entropy(reduction="none", return_lse=True, **x)),
        "cross_entropy, a mean": (loss, lambda **x: ops.cross_entropy(label_smoothing=0.1, return_lse=True, **x)),
        "cross_entropy of soft targets": (soft, lambda **x: ops.cross_entropy(reduction="none", **x)),
        "cross_entropy backward": (loss | upstream, loss_gradient),
        "cross_entropy_grad": (loss | {"dloss": upstream["upstream"]}, ops.cross_entropy_grad),
        "linear_cross_entropy": (linear, lambda **x: ops.linear_cross_entropy(reduction="none", chunk_rows=5, **x)),
        "linear_cross_entropy backward": (linear | upstream, linear_gradient),
        "noise_posterior": (noise | {"log_prior": prior}, lambda **x: ops.noise_posterior(top=5, **x)),
        "noise_posterior of boosts": (slots | {"log_prior": prior}, lambda **x: ops.noise_posterior(top=5, **x)),
        "token_posterior": ({"log_x": log_x, "t": t, "log_prior": prior}, lambda **x: ops.token_posterior(top=5, **x)),
        "posterior_embedding": (entries | embedding | {"log_prior": prior}, ops.posterior_embedding),
        "posterior_embedding backward": (entries | embedding | {"log_prior": prior} | wide, entries_gradient),
        "noise_embedding": (noise | embedding, ops.noise_embedding),
        "noise_embedding backward": (noise | embedding | wide, embedding_gradient),
        "noise_embedding of the posterior": (
            noise | embedding | {"log_prior": prior},
            lambda **x: ops.noise_embedding(top=None, **x),
        ),
        "noise_embedding of entries": (
            noise | embedding | {"log_prior": prior},
            lambda **x: ops.noise_embedding(top=5, **x),
        ),
        "merge_boosts": (
            {"ids": distinct(B, L, 5), "boost": floats(B, L, 5), "new_ids": distinct(B, L, 4, seed=1),
             "new_boost": floats(B, L, 4, seed=14)},
            lambda **x: ops.merge_boosts(keep=6, **x),
        ),
        "topk_sample": ({"logits": logits, "rng": seeds}, lambda **x: ops.topk_sample(k=20, top_p=0.9, **x)),
        "topk_renoise": ({"logits": logits, "t_next": t, **steps}, lambda **x: ops.topk_renoise(k=20, **x)),
        "euler_step": ({"log_x": log_x, "logits": logits, "rate": t, **steps}, euler_step),
        "softmax_expectation": ({"logits": logits, "table": floats(17, seed=15)}, ops.softmax_expectation),
        "softmax_expectation of sequences": (
            {"logits": logits, "table": floats(B, 17, seed=15)},
            ops.softmax_expectation,
        ),
    }  # fmt: skip


def euler_step(rng, **x):
    return ops.euler_step(temperature=0.7, **x)


PRODUCTS = {
    "linear_cross_entropy": {"hidden", "weight"},
    "linear_cross_entropy backward": {"hidden", "weight"},
    "noise_embedding": {"weight"},
    "noise_embedding backward": {"upstream"},
    "noise_embedding of the posterior": {"weight"},
    "posterior_embedding backward": {"upstream"},  # its sum over rows
}
NAMES = list(cases(31, "cpu"))


def as_list(result):
    return list(result) if isinstance(result, tuple) else [result]


# V: odd and short; more than a block of the CPU kernels and than a narrow row of the CUDA kernels.
@pytest.mark.parametrize("vocab", [31, 2501])
@pytest.mark.parametrize("name", NAMES)
def test_arguments(name, vocab, device, request):
    if vocab > 31 and request.node.callspec.params["device"] == "simt":
        pytest.skip("the layouts that CUDA kernels read are those of their rows, whatever V: seconds saved")
    arguments, call = cases(vocab, device)[name]
    for argument, plain in arguments.items():
        for layout in LAYOUTS:
            if (
                layout == "expanded along the last axis"
                and argument in ("ids", "new_ids", "target")
                and plain.dim() == 3
            ):
                continue  # an id is at most once in a row
            view = laid_out(plain, layout)
            assert layout == "expanded" or "along" in layout or torch.equal(view, plain)
            want = as_list(call(**arguments | {argument: view.contiguous()}))
            got = as_list(call(**arguments | {argument: view}))
            for a, b in zip(got, want, strict=True):
                if argument in PRODUCTS.get(name, ()):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(a, b), (argument, layout)


# ---- results: written where they belong, and nowhere else

PLACES = {
    "shifted": lambda rows, vocab: ((rows * vocab + 2,), lambda room: room[1:-1].view(rows, vocab)),
    "long rows": lambda rows, vocab: ((rows, vocab + 3), lambda room: room[:, 1:-2]),
    "every second row": lambda rows, vocab: ((2 * rows, vocab), lambda room: room[::2]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("vocab", [31, 2501])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results(dtype, vocab, place, device):
    rows = 6
    logits = logits_of(rows, vocab, dtype, device)
    state = logits_of(rows, vocab, dtype, device, std=1, seed=3)
    target = targets_of(rows, vocab, device)
    t = torch.linspace(0.0, 0.3, rows, device=device)
    given = torch.arange(rows, device=device) % 3 == 1
    options = {"given": given, "known": target}

    def backward(x):
        loss = ops.cross_entropy(x.requires_grad_(), target, reduction="sum", inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.data_ptr() == x.data_ptr()
        return grad

    calls = {  # of x, which is written: empty at first, or the values of an argument that is overwritten
        "noise_interpolate": (None, lambda x: ops.noise_interpolate(target, t, 3, given=given, vocab_size=vocab, out=x)),
        "noise_interpolate of the posterior": (None, lambda x: ops.noise_interpolate(
            target, t, 3, given=given, vocab_size=vocab, out=x, output="posterior", log_prior=logits[0])),
        "logit_interpolate": (None, lambda x: ops.logit_interpolate(logits, state, t, out=x)),
        "logit_interpolate, log": (None, lambda x: ops.logit_interpolate(logits, target, t, log=True, out=x)),
        "cross_entropy_grad": (None, lambda x: ops.cross_entropy_grad(logits, target, dloss=1.0, out=x)[2]),
        "cross_entropy_grad in place": (logits, lambda x: ops.cross_entropy_grad(x, target, dloss=1.0, out=x)[2]),
        "cross_entropy in place": (logits, backward),
        "topk_renoise": (None, lambda x: ops.topk_renoise(logits, 9, t, 3, out=x, **options)[1]),
        "euler_step": (None, lambda x: ops.euler_step(state, logits, 0.1, out=x, **options)[1]),
        "euler_step in place": (state, lambda x: ops.euler_step(x, logits, 0.1, inplace=True, **options)[0]),
    }  # fmt: skip
    for name, (values, call) in calls.items():
        plain = torch.empty(rows, vocab, dtype=dtype, device=device) if values is None else values.clone()
        want = call(plain).detach()
        shape, within = PLACES[place](rows, vocab)
        room = torch.full(shape, math.nan, dtype=dtype, device=device)
        view = within(room)
        view.copy_(0 if values is None else values)
        got = call(view.detach()).detach()
        assert got.data_ptr() == view.data_ptr() and torch.equal(got, want), name
        assert room.isnan().sum() == room.numel() - rows * vocab, name


@pytest.mark.skipif(os.environ.get("KLFLOW_CPU_SANITIZE") != "1", reason="needs KLFLOW_CPU_SANITIZE=1")
def test_one_element_past_a_row_is_caught_by_the_sanitizer(cpu_library):
    script = (
        "import ctypes; f = (ctypes.c_float * 1024)(); "  # larger than what Python keeps in pools
        f"ctypes.CDLL({str(cpu_library)!r}).klflow_read(ctypes.byref(f, 4 * 1022), {{}})"
    )
    for n, caught in ((2, False), (3, True)):
        done = subprocess.run([sys.executable, "-c", script.format(n)], capture_output=True, text=True)
        assert (done.returncode != 0 and "heap-buffer-overflow" in done.stderr) == caught, done.stderr


# ---- the smallest and largest of everything


@pytest.mark.parametrize("vocab", [2, 3, 4, 15, 16, 17, 511, 512, 513, 2047, 2048, 2049])
def test_edges_of_blocks_and_vectors(vocab, device):
    """k = V, top = V and V around the sizes that the kernels work in: nothing is left out, or read that is not there."""
    rows = 3
    logits, target = logits_of(rows, vocab, device=device, layout="shifted"), targets_of(rows, vocab, device)
    prior = logits_of(1, vocab, device=device, std=1)[0]
    for top in {1, vocab - 1, vocab}:
        want = reference.noise_posterior(target.cpu(), 0.2, 5, prior.double().cpu(), top=top)
        ids, q, rest = ops.noise_posterior(target, 0.2, 5, prior, top=top)
        assert torch.equal(ids.cpu(), want[0])
        torch.testing.assert_close(q.double().cpu(), want[1].double(), rtol=1e-4, atol=1e-7)
        for state in (logits, logits.bfloat16(), logits.half()):
            want = reference.token_posterior(state.double().cpu(), 0.1, prior.double().cpu(), top=top)
            ids, q, rest = ops.token_posterior(state, 0.1, prior, top=top)
            torch.testing.assert_close(q.double().cpu(), want[1].double(), rtol=2e-4, atol=1e-7)
    for k in {1, vocab - 1, vocab}:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for top_p in (1.0, 0.8, 1e-30):
                x = logits.to(dtype)
                token, log_prob = ops.topk_sample(x, k, 5, top_p=top_p)
                want, want_log = reference.topk_sample(x.double().cpu(), k, 5, top_p=top_p)
                assert torch.equal(token.cpu(), want)
                torch.testing.assert_close(log_prob.double().cpu(), want_log, rtol=1e-5, atol=1e-5)
