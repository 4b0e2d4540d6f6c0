"""All operators: torch.compile, opcheck, CUDA graphs, forks, and bad input, whose error names the argument and its value."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import logits_of, targets_of

from klflow_ext import ops


@pytest.mark.slow
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

ALONE = [name for name in ops.__all__ if name not in ops.TOGETHER]
COMPILED = [*ALONE, "noise_interpolate of the posterior", "noise_posterior of boosts"]


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
        "softmax_expectation": lambda: ops.softmax_expectation(logits, log_x[:3, :9]),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, device):
    case = compiled_cases(device)[name]
    torch._dynamo.reset()
    eager, compiled = case(), torch.compile(case, fullgraph=True, backend="aot_eager")()
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (eager, compiled)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
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


@pytest.mark.slow
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
        (klflow.softmax_expectation, (logits, new()[:2], -32.0, rows.clone(), rows.clone())),
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
    (lambda: ops.softmax_expectation(X.double(), X[0]), TypeError, "logits: got torch.float64"),
    (lambda: ops.softmax_expectation(X[:, :1], X[0]), ValueError, "logits: got shape"),
    (lambda: ops.softmax_expectation(X, [0.0, 1.0]), TypeError, "table: got list"),
    (lambda: ops.softmax_expectation(X, X[0].bfloat16()), TypeError, "table: got torch.bfloat16"),
    (lambda: ops.softmax_expectation(X, X[0, 0]), ValueError, r"table: got shape \(\)"),
    (lambda: ops.softmax_expectation(X, X[None]), ValueError, r"table: got shape \(1, 4, 10\)"),
    (lambda: ops.softmax_expectation(X, X[0, :1]), ValueError, r"table: got shape \(1,\)"),
    (lambda: ops.softmax_expectation(X, torch.zeros(4097)), ValueError, r"table: got shape \(4097,\)"),
    (lambda: ops.softmax_expectation(X, X[:3]), ValueError, r"table: got shape \(3, 10\), .* divides 4 rows"),
    (lambda: ops.softmax_expectation(X, X[:0]), ValueError, r"table: got shape \(0, 10\)"),
    (lambda: ops.softmax_expectation(X, X[0] + math.inf), ValueError, "table: got inf"),
    (lambda: ops.softmax_expectation(X, X[0], lowest=0), ValueError, "lowest: got 0"),
    (lambda: ops.softmax_expectation(X, X[0], lowest=32.0), ValueError, "lowest: got 32.0"),
    (lambda: ops.softmax_expectation(X, X[0], lowest=-math.inf), ValueError, "lowest: got -inf"),
    (lambda: ops.softmax_expectation(X, X[0], lowest=math.nan), ValueError, "lowest: got nan"),
    (lambda: ops.softmax_expectation(X, X[0], lowest=X[0]), TypeError, "lowest: got tensor"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_device():
    with pytest.raises(ValueError, match="target: got a tensor on meta"):
        ops.cross_entropy(X, Y.to("meta"))
