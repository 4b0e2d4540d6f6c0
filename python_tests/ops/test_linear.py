"""linear_cross_entropy against its float64 twin, its memory, and its gradients under compile, autocast and DDP."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F

from klflow_ext import ops, reference
from klflow_ext.ops import linear, products

NAMES = ("hidden", "weight", "bias")


def case_of(rows, vocab, width, device="cpu", dtype=torch.float32, seed=0):
    """hidden, weight, bias and targets, two of them ignored where there are that many."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((rows, width), (vocab, width), (vocab,))
    )
    target = torch.randint(vocab, (rows,), generator=g)
    target[3:5] = -100
    return (hidden, weight * width**-0.5, bias), target.to(device)


def run(function, tensors, target, *, upstream=None, with_bias=True, **options):
    """(loss, lse if asked for, the gradients of hidden, weight and bias)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    result = function(leaves[0], leaves[1], target, bias=leaves[2] if with_bias else None, **options)
    results = result if isinstance(result, tuple) else (result,)
    total = sum(
        (r * (1.7 if upstream is None or r.dim() == 0 else upstream.to(r.dtype))).sum() for r in results
    )  # a loss that is one number has an upstream gradient too
    total.backward()
    return *(r.detach() for r in results), *(x.grad for x in leaves[: 2 + with_bias])


def float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_near(actual, expected, limit=3e-6):
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        a, e = a.double().cpu(), e.double().cpu()
        assert (a - e).abs().max() <= limit * (1 + e.abs().max()), number


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "capped": {"softcap": 2.0, "ignore_index": 7},
    "weights": {"class_weight": torch.linspace(0.5, 2, 101), "row_weight": torch.linspace(0, 3, 19)},
    "soft": {"target": torch.randn(19, 101, generator=torch.Generator().manual_seed(5)).softmax(-1)},
    "no bias": {"with_bias": False},
}


@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 19, 1000])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTIONS)
def test_against_the_twin(options, chunk_rows, device):
    tensors, target = case_of(19, 101, 24, device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[options].items()}
    target = options.pop("target", torch.where(target < 0, options.get("ignore_index", -100), target))
    upstream = torch.linspace(-1, 2, 19, device=device)
    for extra in (
        {"reduction": "mean"},
        {"reduction": "sum"},
        {"reduction": "none", "upstream": upstream},
        {"reduction": "none"},  # an upstream gradient of stride 0
        {"reduction": "none", "return_lse": True, "upstream": upstream},
        {"reduction": "mean", "return_lse": True, "upstream": upstream},
    ):
        actual = run(ops.linear_cross_entropy, tensors, target, chunk_rows=chunk_rows, **options, **extra)
        arguments = {k: float64(v) for k, v in (options | extra).items()}
        expected = run(reference.linear_cross_entropy, [x.double() for x in tensors], float64(target), **arguments)
        assert_near(actual, expected)


def test_without_gradients_and_of_some_inputs(device):
    (hidden, weight, bias), target = case_of(19, 101, 24, device)
    whole = run(ops.linear_cross_entropy, (hidden, weight, bias), target, chunk_rows=10)
    assert torch.equal(ops.linear_cross_entropy(hidden, weight, target, bias=bias, chunk_rows=10), whole[0])
    for number in range(3):
        leaves = [hidden.clone(), weight.clone(), bias.clone()]
        leaves[number].requires_grad_()
        (ops.linear_cross_entropy(leaves[0], leaves[1], target, bias=leaves[2], chunk_rows=10) * 1.7).backward()
        assert torch.equal(leaves[number].grad, whole[1 + number])
        assert all(x.grad is None for i, x in enumerate(leaves) if i != number)
        assert torch.equal(leaves[0], hidden) and torch.equal(leaves[1], weight)


@pytest.mark.parametrize("chunk_rows", [16, 96])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_as_the_dense_path(dtype, reduction, chunk_rows, device):
    tensors, target = case_of(96, 10007, 32, device, dtype)
    options = (
        {"reduction": reduction} if reduction == "mean" else {"reduction": "none", "upstream": torch.full((96,), 0.1)}
    )
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def dense(hidden, weight, target, bias, reduction):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction=reduction)

    ours = run(ops.linear_cross_entropy, tensors, target, chunk_rows=chunk_rows, **options)
    peer = run(dense, tensors, target, **options)
    exact = run(reference.linear_cross_entropy, [x.double() for x in tensors], target, **options)
    for name, a, b, e in zip(("loss", *NAMES), ours, peer, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - e).norm() <= 1.5 * (b.double() - e).norm() + 1e-6 * e.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_that_was_not_written(dtype):
    """Uninitialised memory is NaN here; matrix products of an odd V on processors with AMX read past its last column."""
    tensors, target = case_of(96, 10007, 32, torch.device("cpu"), dtype)
    torch.use_deterministic_algorithms(True)
    try:
        for reduction in ("mean", "none"):
            results = run(ops.linear_cross_entropy, tensors, target, reduction=reduction, chunk_rows=48)
            assert all(x.isfinite().all() for x in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_float16_gradients_too_small_for_float16_logits():
    """Of the mean of many rows: 1 / rows comes after the sums, so that nothing underflows on the way."""
    tensors, target = case_of(4096, 1000, 16, dtype=torch.float16)
    ours = run(ops.linear_cross_entropy, tensors, target)
    exact = run(reference.linear_cross_entropy, [x.double() for x in tensors], target)
    for a, e in zip(ours, exact, strict=True):
        assert (a.double() - e).norm() <= 0.01 * e.norm() + e.numel() ** 0.5 * 2.0**-25


def test_autocast_as_a_matrix_product(device):
    (hidden, weight, bias), target = case_of(40, 1003, 32, device)
    exact = run(reference.linear_cross_entropy, [x.double() for x in (hidden, weight, bias)], target)
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(ops.linear_cross_entropy, (hidden, weight, bias), target, chunk_rows=16)
        dense = run(
            lambda h, w, y, bias: F.cross_entropy(F.linear(h, w, bias).float(), y), (hidden, weight, bias), target
        )
    narrow = [x.bfloat16() for x in (hidden, weight, bias)]
    assert torch.equal(ours[0], run(ops.linear_cross_entropy, narrow, target, chunk_rows=16)[0])
    for a, b, e in zip(ours, dense, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a.double() - e).norm() <= 1.5 * (b.double() - e).norm() + 1e-6 * e.norm()


def test_edges(device):
    tensors, target = case_of(6, 31, 8, device)
    ignored = torch.full_like(target, -100)
    loss, *gradients = run(ops.linear_cross_entropy, tensors, ignored)
    assert loss.isnan() and all((g == 0).all() for g in gradients)
    empty = (tensors[0][:0], *tensors[1:])
    for reduction in ("mean", "sum", "none"):
        loss, *gradients = run(ops.linear_cross_entropy, empty, target[:0], reduction=reduction)
        assert loss.isnan() if reduction == "mean" else loss.sum() == 0
        assert gradients[0].shape == (0, 8) and all((g == 0).all() for g in gradients)
    one = run(ops.linear_cross_entropy, (tensors[0][:1], *tensors[1:]), target[:1])
    assert_near(
        one, run(reference.linear_cross_entropy, [x.double() for x in (tensors[0][:1], *tensors[1:])], target[:1])
    )
    shaped = ops.linear_cross_entropy(
        tensors[0].view(2, 3, 8), tensors[1], target.view(2, 3).int(), reduction="none", return_lse=True
    )
    assert all(r.shape == (2, 3) for r in shaped)
    strided = tensors[0].t().contiguous().t()
    assert_near(
        [ops.linear_cross_entropy(strided, tensors[1].t().contiguous().t(), target)],
        [ops.linear_cross_entropy(tensors[0], tensors[1], target)],
    )


@pytest.mark.parametrize("return_lse", [False, True])
def test_second_backward(return_lse, device):
    tensors, target = case_of(20, 101, 8, device)
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = ops.linear_cross_entropy(*leaves[:2], target, bias=leaves[2], return_lse=return_lse, chunk_rows=7)
    loss = loss[0] if return_lse else loss
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    (3 * loss).backward(retain_graph=True)
    assert_near([x.grad for x in leaves], [4 * g for g in once])
    loss.backward()
    assert_near([x.grad for x in leaves], [5 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_targets_are_checked_before_any_work():
    tensors, target = case_of(20, 101, 8)
    target[17] = 101
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match="target: row 17 holds 101, allowed is 0 to V - 1 = 100 or ignore_index"):
            run(ops.linear_cross_entropy, tensors, target, chunk_rows=5, reduction=reduction)


# ---- memory


def largest_allocation(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_all_logits(reduction, dtype, monkeypatch):
    monkeypatch.setattr(linear, "LOGIT_BYTES", 2**20)
    monkeypatch.setattr(products, "BLOCK", 512)
    tensors, target = case_of(400, 5001, 8, dtype=dtype)
    tensors = [x.requires_grad_() for x in tensors]
    logits = 400 * 5001 * dtype.itemsize

    def loss(function, **options):
        function(tensors[0], tensors[1], target, reduction=reduction, **options).sum().backward()

    assert largest_allocation(lambda: loss(ops.linear_cross_entropy)) < 1.1 * 2**20 < logits / 3
    assert largest_allocation(lambda: loss(ops.linear_cross_entropy, chunk_rows=400)) >= logits


def test_default_chunks(monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "_loss_rows", lambda hidden, *rest: seen.append(rest[-1]) or (hidden, hidden))
    for rows, vocab, dtype, expected in (
        (8192, 50259, torch.float32, 328),  # 25 chunks of at most 333 rows
        (8192, 50259, torch.bfloat16, 631),
        (100, 50259, torch.float32, 100),
        (8192, 2**21, torch.float32, 16),
        (0, 31, torch.float32, 1),
    ):
        hidden, weight = (torch.empty(n, 1, dtype=dtype, device="meta") for n in (rows, vocab))
        ops.linear_cross_entropy(hidden, weight, torch.empty(rows, dtype=torch.int64, device="meta"), reduction="sum")
        assert seen.pop() == expected


@pytest.mark.parametrize(
    "rows,vocab,budget,expected",
    [
        (8192, 50259, None, 4096),  # two chunks of at most 5,120 rows
        (8192, 128256, None, 2048),  # 525 MB
        (16384, 262144, None, 2048),  # 1,074 MB: the least
        (5000, 128256, None, 1792),  # three chunks, the last 1,416 rows
        (8192, 128256, 2**31, 8192),
        (8192, 128256, 2**30, 4096),
        (8192, 128256, 2**27, 512),
        (8192, 128256, 1, 256),
        (100, 50259, None, 256),
        (0, 50259, None, 1),
    ],
)
def test_chunks_on_cuda(rows, vocab, budget, expected):
    assert linear.rows_of_chunk(rows, 2 * vocab, "cuda", budget) == expected


def test_a_budget_on_a_cpu():
    tensors, target = case_of(40, 101, 8)
    whole = run(ops.linear_cross_entropy, tensors, target, chunk_rows=20)
    assert linear.rows_of_chunk(40, 404, "cpu", 404 * 30) == 20  # two chunks of at most 30
    for a, b in zip(run(ops.linear_cross_entropy, tensors, target, logit_bytes=404 * 30), whole, strict=True):
        assert torch.equal(a, b)


# ---- compile, opcheck, DDP


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}, {"label_smoothing": 0.1}])
def test_compiles_as_one_graph(options, device):
    tensors, target = case_of(20, 101, 8, device)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_near(
        run(compiled, tensors, target, chunk_rows=6, **options),
        run(ops.linear_cross_entropy, tensors, target, chunk_rows=6, **options),
        1e-7,
    )


def test_compiles_under_autocast():
    tensors, target = case_of(20, 101, 8)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(run(compiled, tensors, target), run(ops.linear_cross_entropy, tensors, target), 1e-7)


def test_opcheck(device):
    tensors, target = case_of(9, 31, 8, device)
    lse, options = torch.zeros(9, device=device), (None, None, -100, 0.1, 1e-3, 0.0, 4)
    leaves = [x.clone().requires_grad_() for x in tensors]
    klflow = torch.ops.klflow
    for op, arguments in (
        (klflow.linear_cross_entropy, (*leaves, target, *options)),
        (klflow.linear_cross_entropy_grad, (*tensors, target, *options, True, True, False)),
        (klflow.linear_cross_entropy_backward, (lse, lse, None, *tensors, target, *options, True, True, True)),
    ):
        torch.library.opcheck(op, arguments)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 101)

    def forward(self, x, target):
        return ops.linear_cross_entropy(self.body(x), self.head.weight, target, bias=self.head.bias, chunk_rows=3)


def ddp_worker(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    (x, _, _), target = case_of(10, 101, 8)
    target.clamp_(min=0)
    alone, shared = Head(), torch.nn.parallel.DistributedDataParallel(Head())
    alone(x, target).backward()
    for _ in range(2):
        shared.zero_grad()
        shared(x[rank * 5 : rank * 5 + 5], target[rank * 5 : rank * 5 + 5]).backward()
        for a, b in zip(shared.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    # Both here, the reducer gone, then the group: otherwise gloo's threads may outlive it, and the process aborts.
    torch.distributed.barrier()
    del shared, a, b
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (tmp_path / "rendezvous",), nprocs=2)


# ---- bad input

H, W, Y = torch.zeros(4, 6), torch.zeros(10, 6), torch.zeros(4, dtype=torch.int64)
BAD = [
    (lambda f: f([1], W, Y), TypeError, "hidden: got list"),
    (lambda f: f(H.double(), W, Y), TypeError, "hidden: got torch.float64"),
    (lambda f: f(torch.tensor(1.0), W, Y), ValueError, r"hidden: got shape \(\)"),
    (lambda f: f(H, W.bfloat16(), Y), TypeError, "weight: got torch.bfloat16, allowed is torch.float32"),
    (lambda f: f(H, W[:, :5], Y), ValueError, r"weight: got shape \(10, 5\)"),
    (lambda f: f(H, W[:1], Y), ValueError, r"weight: got shape \(1, 6\)"),
    (lambda f: f(H, W.to("meta"), Y), ValueError, "weight: got a tensor on meta"),
    (lambda f: f(H, W, Y, bias=torch.zeros(9)), ValueError, r"bias: got shape \(9,\)"),
    (lambda f: f(H, W, Y, bias=torch.zeros(10).half()), TypeError, "bias: got torch.float16"),
    (lambda f: f(H, W, Y[:3]), ValueError, "target: got shape"),
    (lambda f: f(H, W, torch.zeros(4, 9)), ValueError, r"target: got shape \(4, 9\)"),
    (lambda f: f(H, W, Y - 1), IndexError, "target: row 0 holds -1"),
    (lambda f: f(H, W, Y, class_weight=torch.ones(3)), ValueError, "class_weight: got shape"),
    (lambda f: f(H, W, Y, reduction="avg"), ValueError, "reduction: got 'avg'"),
    (lambda f: f(H, W, Y, label_smoothing=math.nan), ValueError, "label_smoothing: got nan"),
    (lambda f: f(H, W, Y, chunk_rows=0), ValueError, "chunk_rows: got 0"),
    (lambda f: f(H, W, Y, chunk_rows=2.0), TypeError, "chunk_rows: got 2.0"),
    (lambda f: f(H, W, Y, logit_bytes=0), ValueError, "logit_bytes: got 0"),
    (lambda f: f(H, W, Y, logit_bytes=2.5), TypeError, "logit_bytes: got 2.5"),
    (
        lambda f: f(H, W, Y, logit_bytes=64, chunk_rows=3),
        ValueError,
        "logit_bytes: got 64, allowed is None beside chunk_rows",
    ),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(ops.linear_cross_entropy)
