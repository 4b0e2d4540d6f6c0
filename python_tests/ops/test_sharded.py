"""sharded_linear_cross_entropy: what one process has with all tokens, several have with their own."""

import pytest
import torch
from processes import alone, together
from test_linear import assert_near, case_of, largest_allocation

from klflow_ext import ops
from klflow_ext.ops import linear

ROWS, V, D = 37, 101, 24  # of three processes the last has fewer tokens
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"label_smoothing": 0.3, "z_loss": 1e-2},
    "ignored": {"ignore_index": 7},
    "row weights": {"row_weight": torch.linspace(0, 3, ROWS)},
}


def losses(function, tensors, target, own, group_options, **options):
    """(loss, lse if asked for, the gradients of hidden, and of this process's part of weight and bias)."""
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in (tensors[0], *(x[own] for x in tensors[1:])))
    with_bias = options.pop("with_bias", True)
    result = function(hidden, weight, target, *group_options, bias=bias if with_bias else None, **options)
    results = result if isinstance(result, tuple) else (result,)
    upstream = torch.linspace(-1, 2, ROWS)
    sum((r * (1.7 if r.dim() == 0 else upstream)).sum() for r in results).backward()
    return *(r.detach() for r in results), *(x.grad for x in (hidden, weight, bias)[: 2 + with_bias])


def compare(rank, name):
    tensors, target = case_of(ROWS, V, D)
    tensors[2][40:] += 5  # processes with different shares of the mass
    options = dict(OPTIONS[name])
    target = torch.where(target < 0, options.get("ignore_index", -100), target)
    own = ops.vocabulary_shard(V)
    for chunk_rows in (None, 10):
        for extra in (
            {"reduction": "mean"},
            {"reduction": "sum"},
            {"reduction": "none"},
            {"reduction": "none", "return_lse": True},
            {"reduction": "mean", "return_lse": True, "with_bias": False},
        ):
            everything = {**options, **extra, "chunk_rows": chunk_rows}
            ours = losses(ops.sharded_linear_cross_entropy, tensors, target, own, (V,), **everything)
            whole = list(losses(ops.linear_cross_entropy, tensors, target, slice(None), (), **everything))
            first = 2 if "return_lse" in extra else 1
            whole[first + 1 :] = [g[own] for g in whole[first + 1 :]]
            assert_near(ours, whole, 2e-6)


def others(rank):
    """16-bit rows, autocast, frozen inputs, no rows, only ignored ones, a group that is not all, and bad targets."""
    tensors, target = case_of(ROWS, V, D, dtype=torch.bfloat16)
    own = ops.vocabulary_shard(V)
    ours = losses(ops.sharded_linear_cross_entropy, tensors, target, own, (V,))
    exact = list(losses(ops.linear_cross_entropy, [x.float() for x in tensors], target, slice(None), ()))
    narrow = list(losses(ops.linear_cross_entropy, tensors, target, slice(None), ()))
    for parts in (exact, narrow):
        parts[2:] = [g[own] for g in parts[2:]]
    for a, b, e in zip(ours, narrow, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - e).norm() <= 2 * (b.float() - e).norm() + 1e-3 * e.norm()

    tensors, target = case_of(ROWS, V, D)
    with torch.autocast("cpu", torch.bfloat16):
        cast = losses(ops.sharded_linear_cross_entropy, tensors, target, own, (V,))
    assert all(x.dtype == torch.float32 for x in cast)
    assert 0 < abs(cast[0] - exact[0]) < 0.02
    hidden, weight, bias = tensors[0], *(x[own] for x in tensors[1:])
    weight = weight.clone().requires_grad_()
    whole = losses(ops.linear_cross_entropy, tensors, target, slice(None), ())
    loss = ops.sharded_linear_cross_entropy(hidden, weight, target, V, bias=bias)
    (1.7 * loss).backward()
    assert_near([weight.grad], [whole[2][own]])
    assert_near([ops.sharded_linear_cross_entropy(hidden, weight.detach(), target, V, bias=bias)], [loss.detach()])

    ignored = losses(ops.sharded_linear_cross_entropy, tensors, torch.full_like(target, -100), own, (V,))
    assert ignored[0].isnan() and not any(g.any() for g in ignored[1:])
    empty = ops.sharded_linear_cross_entropy(hidden[:0], weight, target[:0], V, reduction="sum")
    assert empty == 0
    shaped = ops.sharded_linear_cross_entropy(hidden[:36].view(4, 9, D), weight, target[:36].view(4, 9).int(), V,
                                              reduction="none")  # fmt: skip
    assert shaped.shape == (4, 9)

    groups = [torch.distributed.new_group([i]) for i in range(3)]
    single = losses(ops.sharded_linear_cross_entropy, tensors, target, slice(None), (V,), group=groups[rank])
    assert_near(single, whole)
    target[17] = V
    with pytest.raises(IndexError, match="target: row 17 holds 101, allowed is 0 to V - 1 = 100"):
        ops.sharded_linear_cross_entropy(hidden, weight, target, V)


def all_cases(rank):
    for name in OPTIONS:
        compare(rank, name)
    others(rank)


@pytest.mark.slow
def test_three_processes_are_one(tmp_path):
    together(3, tmp_path, all_cases)


def test_no_tensor_of_all_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "LOGIT_BYTES", 2**20)
    tensors, target = case_of(400, 5001, 8)
    hidden, weight = (x.requires_grad_() for x in tensors[:2])

    def loss(**options):
        ops.sharded_linear_cross_entropy(hidden, weight, target, 5001, label_smoothing=0.1, **options).backward()

    with alone(tmp_path):
        assert largest_allocation(loss) < 1.1 * 2**20 < 400 * 5001 * 4 / 3
        assert largest_allocation(lambda: loss(chunk_rows=400)) >= 400 * 5001 * 4


H, W, Y = torch.zeros(4, 6), torch.zeros(10, 6), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda f: f(H, W, Y, 11), ValueError, r"weight: got shape \(10, 6\), allowed is \(11, 6\)"),
        (lambda f: f(H, W, Y, 1), ValueError, "vocab_size: got 1"),
        (lambda f: f(H, W, H, 10), TypeError, "target: got torch.float32"),
        (lambda f: f(H, W, Y + 10, 10), IndexError, "target: row 0 holds 10"),
        (lambda f: f(H, W, Y, 10, bias=torch.zeros(9)), ValueError, r"bias: got shape \(9,\)"),
        (lambda f: f(H, W, Y, 10, reduction="avg"), ValueError, "reduction: got 'avg'"),
        (lambda f: f(H, W, Y, 10, label_smoothing=2.0), ValueError, "label_smoothing: got 2.0"),
    ],
)
def test_bad_input(call, error, message, tmp_path):
    with alone(tmp_path), pytest.raises(error, match=message):
        call(ops.sharded_linear_cross_entropy)


def test_a_token_for_every_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 3)
    assert ops.vocabulary_shard(101) == slice(78, 101)
    with pytest.raises(ValueError, match="vocab_size: got 13, allowed is one of which 4 processes get 4 tokens each"):
        ops.vocabulary_shard(13)
