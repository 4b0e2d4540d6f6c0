"""What the ops take and refuse: numbers of any kind, ranges, memory that overlaps, gradients asked for in vain, and tracing."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from klflow_ext import LogitPath, MaskPath, ops, reference

V, N = 37, 6
X = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
Y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
W = torch.randn(V, 8, generator=torch.Generator().manual_seed(2))
PRIOR = torch.randn(V, generator=torch.Generator().manual_seed(3)).log_softmax(0)

# Every op, with its tensors as arguments.
CALLS = {
    "noise_interpolate": (lambda y, t: ops.noise_interpolate(y, t, 0, vocab_size=V), (Y, torch.rand(N))),
    "noise_interpolate posterior": (
        lambda y, p: ops.noise_interpolate(y, 0.1, 0, vocab_size=V, output="posterior", log_prior=p), (Y, PRIOR)
    ),
    "logit_interpolate": (lambda x, y, t: ops.logit_interpolate(x, y, t), (X, Y, torch.rand(N))),
    "cross_entropy": (lambda x, y: ops.cross_entropy(x, y, label_smoothing=0.1), (X, Y)),
    "cross_entropy_grad": (lambda x, y: ops.cross_entropy_grad(x, y)[2], (X, Y)),
    "linear_cross_entropy": (lambda h, w, y: ops.linear_cross_entropy(h, w, y), (X[:, :8], W, Y)),
    "noise_posterior": (lambda y, p: ops.noise_posterior(y, 0.2, 0, p, top=4)[1], (Y, PRIOR)),
    "token_posterior": (lambda x, p: ops.token_posterior(x, 0.2, p, top=4)[1], (X, PRIOR)),
    "noise_embedding": (lambda y, w: ops.noise_embedding(y, 0.2, w, 0), (Y, W)),
    "noise_embedding sparse": (lambda y, w, p: ops.noise_embedding(y, 0.2, w, 0, log_prior=p, top=4), (Y, W, PRIOR)),
    "topk_sample": (lambda x: ops.topk_sample(x, 5, 0)[0], (X,)),
    "topk_renoise": (lambda x, t: ops.topk_renoise(x, 3, t, 0)[1], (X, torch.rand(N))),
    "euler_step": (lambda x, r: ops.euler_step(x, x, r)[1], (X, torch.rand(N))),
    "softmax_expectation": (lambda x, f: ops.softmax_expectation(x, f)[0], (X, PRIOR)),
}  # fmt: skip
EACH = pytest.mark.parametrize("call,tensors", CALLS.values(), ids=CALLS)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(call, tensors, dtype):
    want = call(*tensors)
    torch.set_default_dtype(dtype)
    try:
        got = call(*tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == want.dtype and torch.equal(got, want)


@EACH
def test_the_default_device_changes_nothing(call, tensors):
    want = call(*tensors)
    with torch.device("meta"):
        got = call(*tensors)
    assert got.device.type == "cpu" and torch.equal(got, want)


@EACH
def test_fake_tensors(call, tensors):
    want = call(*tensors)
    with FakeTensorMode() as mode:
        got = call(*[mode.from_tensor(x) for x in tensors])
    assert got.shape == want.shape and got.dtype == want.dtype


@EACH
def test_make_fx(call, tensors):
    for mode in ("real", "fake"):
        graph = make_fx(call, tracing_mode=mode)(*tensors)
        assert torch.equal(graph(*tensors), call(*tensors))


@EACH
def test_export_with_any_number_of_rows(call, tensors):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = tuple({0: rows} if len(x) == N else None for x in tensors)
    exported = torch.export.export(Module(), tensors, dynamic_shapes={"tensors": shapes}).module()
    for n in (N, 2 * N):
        larger = tuple(x.repeat(n // N, *[1] * (x.dim() - 1)) if len(x) == N else x for x in tensors)
        torch.testing.assert_close(exported(*larger), call(*larger), equal_nan=True)


SCHEDULES = {
    "t": lambda x, v: ops.noise_interpolate(Y, v, 0, vocab_size=V),
    "t of logits": lambda x, v: ops.logit_interpolate(x, Y, v),
    "t_next": lambda x, v: ops.topk_renoise(x, 5, v, 0)[1],
    "temperature": lambda x, v: ops.topk_sample(x, 5, 0, temperature=v)[0],
    "top_p": lambda x, v: ops.topk_sample(x, 5, 0, top_p=v)[0],
    "temperature of euler_step": lambda x, v: ops.euler_step(x, x, 0.1, temperature=v)[1],
    "rate": lambda x, v: ops.euler_step(x, x, v)[1],
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_compiles_no_more_than_thrice(call, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for i in range(12):
        torch.testing.assert_close(compiled(X, 1 - i / 16), call(X, 1 - i / 16))
    assert counter.frame_count <= 3


def kinds(value):
    """The same number as Python, numpy and torch have it."""
    made = [np.float64(value), np.float32(value), torch.tensor(value), np.array(value)]
    return made + [np.int64(value), np.int32(value), torch.tensor(int(value))] if value == int(value) else made


@pytest.mark.parametrize(
    "call,value",
    [
        (lambda v: ops.topk_sample(X, v, 0)[0], 5),
        (lambda v: ops.topk_sample(X, 5, v)[0], 7),
        (lambda v: ops.topk_sample(X, 5, 0, row_offset=v)[0], 9),
        (lambda v: ops.topk_sample(X, 5, 0, temperature=v)[0], 2.0),
        (lambda v: ops.topk_sample(X, 5, 0, top_p=v)[0], 0.5),
        (lambda v: ops.noise_interpolate(Y, v, 0, vocab_size=V), 0.25),
        (lambda v: ops.noise_interpolate(Y, 0.1, 0, vocab_size=v), V),
        (lambda v: ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, beta=v), 0.5),
        (lambda v: ops.noise_posterior(Y, 0.1, 0, PRIOR, top=v)[1], 4),
        (lambda v: ops.cross_entropy(X, Y, label_smoothing=v), 0.25),
        (lambda v: ops.cross_entropy(X, Y, z_loss=v), 0.5),
        (lambda v: ops.cross_entropy(X, Y, softcap=v), 3.0),
        (lambda v: ops.cross_entropy(X, Y, ignore_index=v), 3),
        (lambda v: ops.linear_cross_entropy(X[:, :8], W, Y, chunk_rows=v), 2),
        (lambda v: ops.euler_step(X, X, v)[1], 0.25),
        (lambda v: ops.softmax_expectation(X, PRIOR, lowest=v)[0], -20.0),
    ],
)
def test_numbers_of_any_kind(call, value):
    want = call(value)
    whole = isinstance(value, int)
    for number in kinds(value):
        if whole and getattr(number, "dtype", None) not in (np.int64, np.int32, torch.int64):
            with pytest.raises(TypeError):
                call(number)
        else:
            assert torch.equal(call(number), want), repr(number)
    for wrong in (True, np.bool_(True), torch.tensor(True), "1", None, [value]):
        if wrong is None and call(value).dim() == 0:
            continue  # softcap=None is fine
        with pytest.raises((TypeError, ValueError)):
            call(wrong)


@pytest.mark.parametrize("temperature", [1e-46, 1e-39, 1e-31, 1e31, 1e39, 0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_do_not_compute_are_refused(temperature):
    for call in (
        lambda: ops.topk_sample(X, 5, 0, temperature=temperature),
        lambda: ops.topk_renoise(X, 5, 0.1, 0, temperature=temperature),
        lambda: ops.euler_step(X, X, 0.1, temperature=temperature),
    ):
        with pytest.raises(ValueError, match="temperature: got"):
            call()


def test_a_temperature_for_each_row(device):
    x, temperature, top_p = (
        X.to(device),
        torch.linspace(0.2, 3, N, device=device),
        torch.linspace(0.3, 1, N, device=device),
    )
    whole = ops.topk_sample(x, 20, 3, temperature=temperature, top_p=top_p)
    want = reference.topk_sample(X.double(), 20, 3, temperature=temperature.cpu(), top_p=top_p.cpu())
    assert torch.equal(whole[0].cpu(), want[0])
    torch.testing.assert_close(whole[1].double().cpu(), want[1], rtol=1e-5, atol=1e-6)
    for i in range(N):
        options = {"temperature": temperature[i].item(), "top_p": top_p[i].item(), "row_offset": i}
        one = ops.topk_sample(x[i : i + 1], 20, 3, **options)
        assert torch.equal(one[0][0], whole[0][i]) and torch.equal(one[1][0], whole[1][i])
    state = ops.euler_step(x, x, 0.1, temperature=temperature)[1]
    torch.testing.assert_close(
        state.double().cpu(), reference.euler_step(X.double(), X.double(), 0.1, temperature=temperature.cpu())[1],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("name,value", [("softcap", 1e-31), ("softcap", 1e31), ("softcap", -1.0), ("z_loss", 1e31),
                                        ("z_loss", -1e-9), ("label_smoothing", 1.1), ("label_smoothing", math.nan)])  # fmt: skip
def test_options_of_the_loss_out_of_range(name, value):
    for call in (
        lambda: ops.cross_entropy(X, Y, **{name: value}),
        lambda: ops.linear_cross_entropy(X[:, :8], W, Y, **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name}: got"):
            call()


def test_beta_out_of_range():
    for beta in (0.0, 1e-31, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta: got"):
            ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, beta=beta)


# ---- memory


def overlapping(make):
    """(name, out, the tensor that it overlaps or None) in the ways that torch refuses."""
    buffer = torch.randn(N + 1, V)
    yield "expanded", torch.randn(1, V).expand(N, V), make(torch.randn(N, V))
    yield "rows nearer than V", torch.randn(N * V).as_strided((N, V), (V - 1, 1)), make(torch.randn(N, V))
    yield "a row further", buffer[1:], make(buffer[:N])
    wide = torch.randn(N, V + 3)
    yield "a column further", wide[:, 3:], make(wide[:, :V])


WRITERS = {
    "logit_interpolate": (lambda x, out: ops.logit_interpolate(x, Y, 0.3, out=out), True),
    "cross_entropy_grad": (lambda x, out: ops.cross_entropy_grad(x, Y, out=out)[2], True),
    "topk_renoise": (lambda x, out: ops.topk_renoise(x, 5, 0.1, 0, out=out)[1], True),
    "euler_step": (lambda x, out: ops.euler_step(torch.zeros(N, V), x, 0.1, out=out)[1], False),
    "euler_step state": (lambda x, out: ops.euler_step(x, torch.zeros(N, V), 0.1, out=out)[1], False),
    "euler_step in place": (lambda x, out: ops.euler_step(out, x, 0.1, inplace=True)[0], False),
}


@pytest.mark.parametrize("call,same_is_fine", WRITERS.values(), ids=WRITERS)
def test_writes_into_overlapping_memory(call, same_is_fine):
    for _, out, x in overlapping(lambda x: x):
        before = x.clone()
        with pytest.raises(ValueError, match="memory"):
            call(x, out)
        assert torch.equal(x, before)
    x = torch.randn(N, V)
    want = call(x.clone(), torch.empty(N, V) if "inplace" not in str(call) else x.clone())
    if same_is_fine:
        assert torch.equal(call(x, x), want)
    buffer = torch.randn(N, 2 * V)  # the halves of rows are apart
    buffer[:, :V] = torch.randn(N, V)
    call(buffer[:, :V], buffer[:, V:])
    with pytest.raises(ValueError, match="share memory"):
        ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, out=torch.randn(1, V).expand(N, V))


def test_a_gradient_in_place_of_expanded_logits():
    x = torch.randn(1, V).requires_grad_()
    with pytest.raises(ValueError, match="logits: got rows 0 elements apart"):
        ops.cross_entropy((x * 1).expand(N, V), Y, inplace_backward=True)


# ---- noise rows


OFFSET = {
    "noise_interpolate": lambda m, y, o: m.noise_interpolate(y, 0.1, 5, vocab_size=V, row_offset=o),
    "noise_posterior": lambda m, y, o: m.noise_posterior(y, 0.05, 5, PRIOR, row_offset=o, top=3)[1],
    "noise_embedding": lambda m, y, o: m.noise_embedding(y, 0.1, W, 5, row_offset=o),
    "topk_sample": lambda m, y, o: m.topk_sample(X[:1].expand(len(y), V), 30, 5, row_offset=o)[1],
    "topk_renoise": lambda m, y, o: m.topk_renoise(X[:1].expand(len(y), V), 30, 0.1, 5, row_offset=o)[1],
    "a state for each sequence": lambda m, y, o: m.noise_interpolate(
        y[None], 0.1, torch.tensor([[5, 0]]), vocab_size=V, row_offset=o
    )[0],
    "LogitPath of other noise": lambda m, y, o: LogitPath(V, alpha=0.5).sample(y, 0.1, 5, row_offset=o),
    "MaskPath": lambda m, y, o: MaskPath(V).sample(y.repeat(1), 0.5, 5, row_offset=o),
}


@pytest.mark.parametrize("call", OFFSET.values(), ids=OFFSET)
def test_rows_past_2_to_the_32(call, device):
    """Their noise is none of that of the first rows, and the same for any split."""
    rows, first = 200, 2**32 - 100
    y = torch.zeros(rows, dtype=torch.int64)
    whole, start = call(ops, y, first), call(ops, y, 0)
    assert not torch.equal(whole[100:], start[:100])
    same = (whole[100:].reshape(100, -1) == start[:100].reshape(100, -1)).double().mean()
    assert same < (0.8 if whole.dtype == torch.int64 else 0.5)  # tokens agree by chance
    torch.testing.assert_close(whole, call(reference, y, first), rtol=1e-4, atol=1e-5)
    for a, b in ((0, 90), (95, 105)):
        assert torch.equal(call(ops, y[a:b], first + a), whole[a:b])
    assert torch.equal(call(ops, y[:1], 2**32 - 1), whole[99:100])
    with pytest.raises(ValueError, match="row_offset: got 4294967296"):
        call(ops, y, 2**32)


# ---- targets


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ignore_index", [2**32, -(2**32), 2**31, -(2**31) - 1, 2**32 + 3])
def test_an_ignore_index_beyond_int32(ignore_index, grad, device):
    target = (torch.arange(N, dtype=torch.int32) % 3).to(device)
    want = torch.nn.functional.cross_entropy(X, target.cpu().long())
    x, h, w = X.to(device), X[:, :8].contiguous().to(device), W.to(device)
    got = ops.cross_entropy(x.clone().requires_grad_(grad), target, ignore_index=ignore_index)
    torch.testing.assert_close(got.detach().cpu(), want)
    linear = ops.linear_cross_entropy(h.requires_grad_(grad), w, target, ignore_index=ignore_index)
    torch.testing.assert_close(
        linear.detach().cpu(), torch.nn.functional.cross_entropy(X[:, :8] @ W.T, target.cpu().long())
    )


def test_targets_that_torch_refuses():
    for target in (torch.tensor(3), torch.tensor([3])):
        with pytest.raises(ValueError, match="target: got shape"):
            ops.cross_entropy(X, target)
        with pytest.raises(ValueError, match="target: got shape"):
            ops.linear_cross_entropy(X[:, :8], W, target)
    soft = X.softmax(-1)
    ops.cross_entropy(X, soft, ignore_index=-1)
    with pytest.raises(ValueError, match="ignore_index: got 0 beside soft targets"):
        ops.cross_entropy(X, soft, ignore_index=0)


def test_gradients_asked_for_in_vain():
    leaf = lambda *shape: torch.rand(*shape).requires_grad_()  # noqa: E731
    calls = {
        "weight": lambda: ops.cross_entropy(X, Y, weight=leaf(V)),
        "class_weight": lambda: ops.linear_cross_entropy(X[:, :8], W, Y, class_weight=leaf(V)),
        "row_weight": lambda: ops.cross_entropy(X, Y, row_weight=leaf(N)),
        "target": lambda: ops.cross_entropy(X, leaf(N, V)),
        "log_prior": lambda: ops.noise_posterior(Y, 0.1, 0, leaf(V), top=3),
        "t": lambda: ops.noise_interpolate(Y, leaf(N), 0, vocab_size=V),
        "boost": lambda: ops.noise_posterior(Y[:, None], 0.1, 0, PRIOR, top=3, boost=leaf(N, 1)),
        "t_next": lambda: ops.topk_renoise(X, 5, leaf(N), 0),
        "rate": lambda: ops.euler_step(X, X, leaf(N)),
        "log_x": lambda: ops.euler_step(leaf(N, V), X, 0.1),
        "logits": lambda: ops.euler_step(X, leaf(N, V), 0.1),
        "table": lambda: ops.softmax_expectation(X, leaf(5)),
        "log_x0": lambda: ops.logit_interpolate(leaf(N, V), Y, 0.1, out=torch.empty(N, V)),
    }
    calls["logits "] = lambda: ops.softmax_expectation(leaf(N, V), PRIOR)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: got a tensor that requires grad"):
            call()
        with torch.no_grad():
            call()


def test_a_seed_under_graph_capture(monkeypatch):
    from klflow_ext.ops import arguments

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for rng in (3, torch.Generator()):
        with pytest.raises(ValueError, match=r"rng: got .*graph capture the \(seed, step\) tensor"):
            arguments.rng_state(rng, (N,), N, torch.device("cuda"))


def on_cpu(operator, *arguments):
    """The operator's CPU function, whatever the devices of its arguments."""
    return operator.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)


@pytest.mark.parametrize("name", ["rng", "temperature", "top_p", "token", "log_prob"])
def test_every_tensor_of_an_operator_is_on_the_device_of_its_first(name):
    row = torch.ones(N)
    tensors = {
        "rng": torch.tensor([0, 0]),
        "temperature": row,
        "top_p": row,
        "token": Y.clone(),
        "log_prob": X[:, 0].clone(),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(
        RuntimeError, match=f"^{name}: got a tensor on another device, allowed is the device of logits, cpu"
    ):
        on_cpu(
            torch.ops.klflow.topk_sample, X, 3, *list(tensors.values())[:3], 0, tensors["token"], tensors["log_prob"]
        )


def test_the_device_is_checked_of_what_is_given_only():
    out = [torch.empty(N), torch.empty(N)]
    on_cpu(torch.ops.klflow.cross_entropy_out, X, Y, None, None, -100, 0.0, 0.0, 0.0, *out)
    with pytest.raises(
        RuntimeError, match="^row_weight: got a tensor on another device, allowed is the device of logits"
    ):
        row_weight = torch.ones(N, device="meta")
        on_cpu(torch.ops.klflow.cross_entropy_out, X, Y, None, row_weight, -100, 0.0, 0.0, 0.0, *out)


def test_more_pairs_than_their_numbers_can_name():
    """Refused before anything else is looked at, on every device: the tensors of so many are views of one number."""
    many, order, one = torch.ones(1, 1).expand(2**31, 1), torch.zeros(0, dtype=torch.int32), torch.ones(1)
    with pytest.raises(RuntimeError, match=r"ids: 2147483648 entries, allowed are fewer than 2\^31"):
        torch.ops.klflow.scatter_rows(order, Y, many, one, one, torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(RuntimeError, match=r"ids: 2147483648 entries, allowed are fewer than 2\^31"):
        torch.ops.klflow.group_by_token(torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1), 4, order, Y)


# ---- what is a tensor but no dense one, a flag but no bool, a number but no real one


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "_mkldnn", "nested"])
def test_tensors_of_other_layouts(layout):
    make = {
        "sparse_coo": torch.Tensor.to_sparse, "sparse_csr": torch.Tensor.to_sparse_csr, "_mkldnn": torch.Tensor.to_mkldnn,
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
    }[layout]  # fmt: skip
    calls = {
        "logits": lambda x: ops.cross_entropy(x, Y),
        "log_x": lambda x: ops.euler_step(x, X, 0.1),
        "hidden": lambda x: ops.linear_cross_entropy(x, W.T, Y),
        "log_x0": lambda x: ops.logit_interpolate(x, Y, 0.1),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name}: got a tensor of layout {layout}, allowed is a dense one"):
            call(make(X))


@pytest.mark.parametrize("flag", [torch.tensor([]), np.array([1, 2]), 1, None, "yes"])
def test_flags(flag):
    calls = {
        "log": lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, log=flag),
        "log ": lambda: ops.logit_interpolate(X, Y, 0.1, log=flag),
        "return_lse": lambda: ops.cross_entropy(X, Y, return_lse=flag),
        "inplace_backward": lambda: ops.cross_entropy(X, Y, inplace_backward=flag),
        "return_lse ": lambda: ops.linear_cross_entropy(X[:, :8], W, Y, return_lse=flag),
        "inplace": lambda: ops.euler_step(X, X, 0.1, inplace=flag),
        "reduction": lambda: ops.cross_entropy(X, Y, reduction=flag),
        "output": lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, output=flag),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: got"):
            call()


def test_numbers_that_are_not_real():
    for number in (1j, torch.tensor(1j), np.array(1j), np.array(object()), 10**400):
        with pytest.raises((TypeError, ValueError), match="beta: got"):
            ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, beta=number)


def test_dtypes_of_results():
    for dtype in (torch.tensor([]), np.array([1, 2]), "float32", torch.float64):
        for call in (
            lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=V, dtype=dtype),  # noqa: B023
            lambda: ops.topk_renoise(X, 5, 0.1, 0, dtype=dtype),  # noqa: B023
            lambda: ops.euler_step(X, X, 0.1, dtype=dtype),  # noqa: B023
        ):
            with pytest.raises(TypeError, match="dtype: got"):
                call()
    with pytest.raises(TypeError, match="dtype: got torch.float16, allowed is the dtype of out"):
        ops.topk_renoise(X, 5, 0.1, 0, dtype=torch.float16, out=torch.empty(N, V))


def test_negated_views():
    """Read as what they are, never written to: their memory holds other numbers."""
    view = torch._neg_view(-X)
    assert view.is_neg() and torch.equal(ops.cross_entropy(view, Y), ops.cross_entropy(X, Y))
    calls = {
        "out": lambda: ops.logit_interpolate(X, Y, 0.1, out=view),
        "log_x": lambda: ops.euler_step(view, X, 0.1, inplace=True),
        "logits": lambda: ops.cross_entropy(torch._neg_view(X.clone().requires_grad_()), Y, inplace_backward=True),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: got a negated view"):
            call()
