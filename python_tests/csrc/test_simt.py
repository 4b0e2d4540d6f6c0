"""The SIMT machine itself: it catches planted bugs, lets right kernels pass, and its schedule never changes a result."""

import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import simt
import torch
from cases import assert_close

from klflow_ext import _C, ops, reference

SANITIZED = os.environ.get("KLFLOW_SIMT_SANITIZE") == "1"


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    root = simt.ROOT
    path = simt.build(
        tmp_path_factory.mktemp("planted"),
        "planted",
        [root / "python_tests" / "planted.cpp", root / "csrc" / "simt" / "simt.cpp"],
    )
    library = ctypes.CDLL(str(path))
    library.planted.restype = ctypes.c_char_p

    def run(name, blocks=1, cluster=1, seed=0):
        x = np.arange(1, 64 * blocks + 1, dtype=np.float32)
        out = np.full_like(x, np.nan)
        library.planted_seed(ctypes.c_uint64(seed))
        pointer = ctypes.POINTER(ctypes.c_float)
        error = library.planted(name.encode(), x.ctypes.data_as(pointer), out.ctypes.data_as(pointer), blocks, cluster)
        return x, out, error.decode() if error else None

    run.path = path
    run.kind = lambda clusters, block: library.planted_kind(ctypes.c_int(clusters), ctypes.c_int64(block))
    return run


RIGHT = {
    "reverse": (1, lambda x: x[::-1]),
    "sum_warp": (1, lambda x: x.reshape(-1, 32).sum(1).repeat(32)),
    "neighbour": (4, lambda x: np.roll(x.reshape(-1, 4, 64), -1, axis=1).reshape(-1)),
    "neighbour_twice": (4, lambda x: 2 * np.roll(x.reshape(-1, 4, 64)[:, :, 0], -1, axis=1).repeat(64) + 1000),
    "count": (1, lambda x: np.arange(64)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass_under_every_schedule(planted, name):
    cluster, expected = RIGHT[name]
    for seed in range(20):
        x, out, error = planted(name, 2 * cluster, cluster, seed) if cluster > 1 else planted(name, seed=seed)
        assert error is None
        np.testing.assert_array_equal(out, expected(x))


@pytest.mark.parametrize("name,cluster", [("reverse_no_barrier", 1), ("uninitialised", 1), ("neighbour_no_barrier", 4)])
def test_missing_barriers_and_unwritten_memory_show_in_the_result(planted, name, cluster):
    right = name.removesuffix("_no_barrier")
    for seed in range(5):  # each schedule alone must show it
        x, out, error = planted(name, cluster, cluster, seed)
        assert error is None
        expected = RIGHT[right][1](x) if right in RIGHT else x
        assert not np.array_equal(out, expected)


def test_a_block_that_is_ahead_shows_in_the_result(planted):
    """In some schedules a block writes its next result before the others have read this one."""
    wrong = 0
    for seed in range(20):
        x, out, error = planted("neighbour_twice_one_slot", 4, 4, seed)
        assert error is None
        wrong += not np.array_equal(out, RIGHT["neighbour_twice"][1](x))
    assert wrong >= 5


@pytest.mark.parametrize(
    "name,cluster,message",
    [
        ("sum_warp_mask_without_self", 1, r"block 0, thread \d+: the mask of its warp operation at .*planted.cpp:\d+ leaves"),
        ("sum_warp_missing_lanes", 1, r"deadlock: block 0 threads 0..15 wait at a warp operation at .*planted.cpp:\d+"),
        ("sum_warp_outside_mask", 1, r"block 0, thread \d+: reads lane \d+, outside the mask"),
        ("early_exit", 1, r"deadlock: block 0 threads 0..39 wait at a barrier at .*; block 0 threads 40..63 have exited"),
        ("two_barriers", 1, r"divergent barrier: block 0, thread \d+ waits at .*planted.cpp:\d+, block 0, thread"),
        ("neighbour_exits_early", 4, r"block \d, thread \d+ reads the shared memory of block \d, which may have exited"),
    ],
)  # fmt: skip
def test_wrong_synchronisation_is_an_error_that_names_the_place(planted, name, cluster, message):
    error = planted(name, cluster, cluster, 3)[2]
    assert error is not None and error.startswith(f"kernel {name}, ") and re.search(message, error), error


@pytest.mark.skipif(not SANITIZED, reason="out of bounds shared memory is AddressSanitizer's to see (.ci/run)")
def test_off_by_one_is_caught_by_the_sanitizer(planted):
    script = (
        "import ctypes; f = (ctypes.c_float * 64)(); "
        f"ctypes.CDLL({str(planted.path)!r}).planted(b'reverse_off_by_one', f, f, 1, 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "reverse" in done.stderr


def embedding_and_gradient(target, log_prior):
    results = []
    seeds = torch.arange(2 * len(target)).reshape(-1, 2)
    for options in ({}, {"log_prior": log_prior, "top": None}, {"log_prior": log_prior, "top": 50}):
        weight = torch.randn(len(log_prior), 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = ops.noise_embedding(target, 0.05, weight, seeds, **options)
        out.square().sum().backward()
        results += [out.detach(), weight.grad]
    return results


def test_schedule_and_poison_never_change_a_result(simt_library):
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(0)) * 4
    target = torch.tensor([0, 500, 1002])
    log_prior = logits[0].log_softmax(0)
    results = []
    _C.use_backend(str(simt_library))
    try:
        for seed in range(4):
            ctypes.CDLL(str(simt_library)).klflow_simt_seed(ctypes.c_uint64(seed * 1000))
            results.append([
                ops.noise_interpolate(target, 0.2, 1, vocab_size=1003),
                ops.logit_interpolate(logits, target, 0.3),
                *ops.cross_entropy_grad(logits, target, dloss=1.0, label_smoothing=0.1),
                *ops.topk_sample(logits, 40, 2, top_p=0.9),
                *ops.topk_renoise(logits, 40, 0.2, 2),
                *ops.euler_step(logits, logits, 0.1),
                *ops.softmax_expectation(logits, logits[:, :50].contiguous()),
                *ops.noise_posterior(target, 0.05, torch.arange(6).reshape(3, 2), log_prior, top=50),
                *ops.noise_posterior(
                    (target[:, None] + torch.arange(3)) % 1003, 0.05, 3, log_prior, top=50, boost=logits[:, :3].abs()
                ),
                *ops.token_posterior(logits, 0.05, log_prior, top=50),
                *embedding_and_gradient(target.repeat(15), log_prior),
            ])  # fmt: skip
    finally:
        _C.use_backend(None)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prior_that_is_none_gives_nan_and_tokens(simt_library, bad):
    """On CUDA nobody looks at log_prior first: its ids must still be tokens."""
    vocab, top = 2500, 40
    log_prior = torch.zeros(vocab)
    log_prior[1234] = bad
    ids, q = torch.full((3, top), -1, dtype=torch.int32), torch.zeros(3, top)
    rest, stats = torch.zeros(3), torch.zeros(3, 3)
    arguments = (
        torch.tensor([1234, 0, 2499]),
        torch.full((3,), 0.1),
        torch.tensor([1, 2]),
        None,
        None,
        log_prior,
        0.01,
        0,
    )
    _C.use_backend(str(simt_library))
    try:
        torch.ops.klflow.noise_posterior(*arguments, ids, q, rest, stats)
    finally:
        _C.use_backend(None)
    assert torch.equal(ids, torch.arange(top, dtype=torch.int32).expand(3, -1))
    assert q.isnan().all() and rest.isnan().all() and stats.isnan().all()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token", [3, 846])
def test_a_row_in_which_u_is_clamped(simt_library, token, dtype, log):
    """Column 846 of this row has a word so near 2^32 that U = 1 - 2^-24 by the contract, E the least there is."""
    vocab, seed, row = 1003, 5, 10172
    assert reference.words(1, vocab, seed, 0, row_offset=row)[0, 846] == 0xFFFFFFEB
    target = torch.tensor([token])
    want = reference.noise_interpolate(
        target, 0.2, seed, vocab_size=vocab, row_offset=row, log=log, dtype=torch.float64
    )
    _C.use_backend(str(simt_library))
    try:
        x = ops.noise_interpolate(target, 0.2, seed, vocab_size=vocab, row_offset=row, log=log, dtype=dtype)
    finally:
        _C.use_backend(None)
    assert_close(
        x, want, dtype, scale={torch.float32: 8.0, torch.bfloat16: 1.125}[dtype], absolute=1e-5 if log else 1e-12
    )


def test_wide_rows_are_summed_in_pieces(simt_library):
    weight = torch.randn(40, 4099, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target, log_prior = torch.tensor([3, 4, 39]), torch.zeros(40).log_softmax(0)
    results = []
    for backend in (None, str(simt_library)):
        _C.use_backend(backend)
        try:
            out = ops.noise_embedding(target, 0.1, weight, 1, log_prior=log_prior, top=10)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), weight)))
        finally:
            _C.use_backend(None)
    torch.testing.assert_close(*results)


def test_a_frequent_token_gathers_long_lists(simt_library):
    rows, width = 2500, 10
    q, dout = torch.rand(rows, 1), torch.randn(rows, width)
    starts = torch.tensor([0, 0, rows - 100, rows - 100, rows])
    prior, g, dweight = torch.rand(4), torch.randn(width), torch.zeros(4, width)
    _C.use_backend(str(simt_library))
    try:
        torch.ops.klflow.scatter_rows(torch.arange(rows, dtype=torch.int32), starts, q, prior, g, dout, dweight)
    finally:
        _C.use_backend(None)
    sums = [(q * dout)[a:b].double().sum(0) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    torch.testing.assert_close(dweight.double(), torch.stack(sums) + prior[:, None] * g, rtol=1e-5, atol=1e-5)


# op, dtype, V: blocks to a row, and how many of these blocks share a multiprocessor of Hopper (228 KB, 1 KB of each reserved)
LAYOUTS = [
    ("noise_interpolate", torch.bfloat16, 50259, 1, 2),
    ("noise_interpolate", torch.float32, 50259, 2, 2),
    ("noise_interpolate", torch.bfloat16, 128256, 4, 2),
    ("noise_interpolate", torch.bfloat16, 262144, 8, 2),
    ("noise_interpolate", torch.float32, 262144, 8, 1),
    ("cross_entropy_grad", torch.bfloat16, 32768, 1, 3),
    ("cross_entropy_grad", torch.bfloat16, 50259, 1, 2),
    ("cross_entropy_grad", torch.float32, 50259, 2, 2),
    ("cross_entropy_grad", torch.float32, 128256, 8, 2),
    ("topk_sample", torch.bfloat16, 50259, 1, 2),
    ("topk_renoise", torch.bfloat16, 50259, 1, 2),
    ("euler_step", torch.bfloat16, 50259, 2, 2),
    ("softmax_expectation", torch.bfloat16, 50259, 1, 2),
    ("softmax_expectation", torch.float32, 50259, 2, 2),
    ("softmax_expectation of 4096 knots", torch.bfloat16, 50259, 2, 2),
    ("softmax_expectation of 4096 knots", torch.float32, 262144, 8, 1),
    ("logit_interpolate", torch.bfloat16, 50259, 2, 2),
    ("noise_posterior", torch.float32, 50259, 2, 2),
    ("noise_posterior", torch.float32, 128256, 8, 2),
    ("noise_posterior", torch.float32, 262144, 8, 1),
    ("noise_posterior_boosted", torch.float32, 50259, 2, 2),
    ("token_posterior", torch.bfloat16, 50259, 2, 2),
    ("noise_embedding", torch.bfloat16, 50259, 1, 2),
    ("noise_embedding_sparse", torch.bfloat16, 50259, 1, 2),
]


@pytest.fixture
def as_kind(simt_library):
    """as_kind(name): the machine stands for that kind of device until the test ends."""
    yield lambda name: simt.set_kind(simt_library, name)
    simt.set_kind(simt_library, os.environ.get("KLFLOW_SIMT_DEVICE", "sm_90"))


def launch(library, op, dtype, vocab):
    """Runs the op on one row and returns (result, blocks to a row, bytes of shared memory of each)."""
    logits, target = torch.zeros(1, vocab, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    weight = torch.zeros(vocab, 8, dtype=dtype)
    calls = {
        "noise_interpolate": lambda: ops.noise_interpolate(target, 0.2, 0, vocab_size=vocab, dtype=dtype),
        "cross_entropy_grad": lambda: ops.cross_entropy_grad(logits, target),
        "topk_sample": lambda: ops.topk_sample(logits, 50, 0),
        "topk_renoise": lambda: ops.topk_renoise(logits, 50, 0.2, 0),
        "euler_step": lambda: ops.euler_step(logits, logits, 0.1),
        "softmax_expectation": lambda: ops.softmax_expectation(logits, torch.linspace(1, 0, 1024)),
        "softmax_expectation of 4096 knots": lambda: ops.softmax_expectation(logits, torch.linspace(1, 0, 4096)),
        "logit_interpolate": lambda: ops.logit_interpolate(logits, target, 0.2),
        "noise_posterior": lambda: ops.noise_posterior(target, 0.2, 0, logits[0]),
        "noise_posterior_boosted": lambda: ops.noise_posterior(
            target[:, None], 0.2, 0, logits[0], boost=torch.ones(1, 1)
        ),
        "token_posterior": lambda: ops.token_posterior(logits, 0.2, logits[0]),
        "noise_embedding": lambda: ops.noise_embedding(target, 0.2, weight, 0),
        "noise_embedding_sparse": lambda: ops.noise_embedding(target, 0.2, weight, 0, log_prior=logits[0]),
    }
    _C.use_backend(str(library))
    try:
        result = calls[op]()
    finally:
        _C.use_backend(None)
    cluster, shared = ctypes.c_uint(), ctypes.c_uint()
    ctypes.CDLL(str(library)).klflow_simt_last_launch(ctypes.byref(cluster), ctypes.byref(shared))
    return result, cluster.value, shared.value


@pytest.mark.parametrize("op,dtype,vocab,blocks,resident", LAYOUTS, ids=str)
def test_shared_memory_is_as_designed(simt_library, as_kind, op, dtype, vocab, blocks, resident):
    as_kind("sm_90")
    _, cluster, shared = launch(simt_library, op, dtype, vocab)
    fit = min((228 << 10) // (shared + 1024), 2048 // 512)
    print(f"{op:20}{str(dtype):16}V {vocab:7}: {cluster} blocks to a row, {shared:7} B each, {fit} resident")
    assert cluster == blocks and shared <= 227 << 10 and fit >= resident


@pytest.mark.parametrize("vocab", [50259, 262144])
@pytest.mark.parametrize("op", sorted({layout[0] for layout in LAYOUTS}))
@pytest.mark.parametrize("kind", simt.KINDS)
def test_every_op_fits_every_kind_of_device(simt_library, as_kind, kind, op, vocab):
    """What is too long for a block's shared memory waits elsewhere or is read again, with nearly the same result."""
    as_kind("sm_90")
    expected, _, _ = launch(simt_library, op, torch.float32, vocab)
    as_kind(kind)
    result, cluster, shared = launch(simt_library, op, torch.float32, vocab)
    clusters, block, _ = simt.KINDS[kind]
    assert shared <= block << 10 and (clusters or cluster == 1)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_layout_that_the_device_lacks_is_an_error(planted):
    planted.kind(False, 163 << 10)
    assert "a cluster of 4 blocks: the device has no such" in planted("neighbour", 4, 4)[2]
    planted.kind(True, 8)
    assert "bytes of shared memory: the device gives a block 8" in planted("reverse")[2]
    planted.kind(True, 227 << 10)
    assert planted("reverse")[2] is None
