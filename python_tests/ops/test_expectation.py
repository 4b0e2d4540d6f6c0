"""softmax_expectation against its float64 twin, over shapes, dtypes, strides and devices."""

import math

import pytest
import torch
from cases import DTYPES, SHAPES, SMALL, logits_of

from klflow_ext import ops, reference


def knots_of(n, lowest=-32.0):
    """log p of the knots, float64."""
    return torch.linspace(lowest, 0.0, n, dtype=torch.float64)


# name: (table, lowest), |f| <= 1
def rough(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 2 - 1


TABLES = {
    "entropy": ((-knots_of(4096) / 32).float(), -32.0),
    "e^l": (knots_of(1000).exp().float(), -32.0),
    "a wave": (knots_of(4096).sin().float(), -32.0),
    "rough": (rough(20), -32.0),
    "a short range": (rough(9), -3.0),
    "two knots": (torch.tensor([-0.3, 0.9]), -7.5),
    "one": (torch.ones(5), -32.0),
}


def assert_near(got, logits, table, lowest, log_p=2e-6):
    """A mean within 1e-6 of the largest |f|, and where f is steep what an error of log_p in log p makes of it."""
    mean, lse = got
    want, want_lse = reference.softmax_expectation(logits.double().cpu(), table.double().cpu(), lowest=lowest)
    steepest = table.diff(dim=-1).abs().max().item() * (table.shape[-1] - 1) / -lowest
    assert mean.dtype == lse.dtype == torch.float32
    near = {"rtol": 0, "atol": 1e-6 * table.abs().max().item() + log_p * steepest, "equal_nan": True}
    torch.testing.assert_close(mean.double().cpu(), want, **near)
    torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_softmax_expectation(rows, vocab, dtype, device):
    for (table, lowest), std in zip(TABLES.values(), (5, 1, 2, 0.1, 3, 20, 5), strict=True):
        logits = logits_of(rows, vocab, dtype, device, std=std, shift=3 * std, layout="shifted")
        assert_near(ops.softmax_expectation(logits, table.to(device), lowest=lowest), logits, table, lowest)


@pytest.mark.parametrize("name", ["entropy", "a wave"])
@pytest.mark.parametrize("vocab", [1000, 50259, 262144])
def test_many_equal_columns(vocab, name, device):
    """Errors that are the same in every column: sums in float32 alone, or log p rounded thrice, would show them."""
    table, lowest = TABLES[name]
    logits = torch.full((3, vocab), 0.3, device=device)
    logits[1, 5], logits[2, vocab // 2] = 10.1, 13.7
    # A thread of a device without clusters adds up 512 equal terms of the longest row in float32.
    log_p = 6e-6 if vocab == 262144 else 2e-6
    assert_near(ops.softmax_expectation(logits, table.to(device)), logits, table, lowest, log_p)


@pytest.mark.parametrize("rows,vocab", SMALL)
def test_entropy(rows, vocab, device):
    logits = logits_of(rows, vocab, device=device, layout="strided")
    mean, lse = ops.softmax_expectation(logits, torch.tensor([64.0, 0.0], device=device), lowest=-64.0)
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(mean.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_for_each_sequence(dtype, device):
    tables = rough(3 * 50).reshape(3, 50).to(device)
    logits = logits_of(12, 1003, dtype, device).reshape(3, 4, 1003)
    mean, lse = ops.softmax_expectation(logits, tables)
    assert mean.shape == lse.shape == (3, 4)
    assert_near((mean, lse), logits, tables, -32.0)
    for b in range(3):
        for got, want in zip(ops.softmax_expectation(logits[b], tables[b]), (mean[b], lse[b]), strict=True):
            assert torch.equal(got, want)
    each = rough(12 * 50).reshape(12, 50).to(device)
    assert_near(ops.softmax_expectation(logits, each), logits, each, -32.0)


def test_rows_do_not_depend_on_their_batch(device):
    logits, (table, _) = logits_of(7, 2501, device=device), TABLES["a wave"]
    whole = ops.softmax_expectation(logits, table.to(device))
    for a, b in ((0, 3), (3, 7), (6, 7)):
        part = ops.softmax_expectation(logits[a:b], table.to(device))
        assert all(torch.equal(x, y[a:b]) for x, y in zip(part, whole, strict=True))


@pytest.mark.parametrize("vocab", [2, 3, 15, 16, 17, 511, 513, 2047, 2048, 2049])
def test_edges_of_blocks_and_vectors(vocab, device):
    table, lowest = TABLES["rough"]
    for dtype in DTYPES:
        logits = logits_of(3, vocab, dtype, device, layout="shifted")
        assert_near(ops.softmax_expectation(logits, table.to(device)), logits, table, lowest)


def test_one_token_is_certain(device):
    """Where p is 1, the mean is f(0), to the bit."""
    logits = torch.full((4, 5003), -math.inf, device=device)
    logits[0, 0], logits[1, 5002], logits[2, 2048] = 3.0, -3e38, 3e38
    logits[3] = 0.0
    logits[3, 7] = 200.0
    table = rough(777)
    mean, lse = ops.softmax_expectation(logits, table.to(device))
    assert (mean == table[-1].item()).all()
    assert torch.equal(lse.cpu(), torch.tensor([3.0, -3e38, 3e38, 200.0]))


def test_what_is_no_row(device):
    """NaN, +inf and only -inf give NaN, each in its own row alone."""
    logits = logits_of(9, 5003, device=device)
    logits[1, 0] = logits[2, 5002] = math.nan
    logits[3, 3000] = math.inf
    logits[4] = -math.inf
    logits[5], logits[5, 9] = -math.inf, math.nan
    logits[6], logits[6, 9] = -math.inf, math.inf
    logits[7, ::2] = -math.inf
    table = rough(30).to(device)
    mean, lse = ops.softmax_expectation(logits, table)
    bad = [False, True, True, True, True, True, True, False, False]
    assert mean.isnan().tolist() == bad
    assert lse[4] == -math.inf and lse.isnan().tolist() == [b and i != 4 for i, b in enumerate(bad)]
    good = [0, 7, 8]
    assert_near((mean[good], lse[good]), logits[good], table, -32.0)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e6, 1e9, -1e30, 3e38])
def test_offsets_of_any_size(offset, device):
    """Logits whose differences are few: every log p is that of the differences."""
    steps = torch.tensor([0.0, 1.0, 0.0, -math.inf]).repeat(300)
    logits = torch.where(steps == 1.0, offset, offset - max(1.0, abs(offset) * 2.0**-20)).where(steps > -1, steps)
    table, lowest = TABLES["a wave"]
    assert_near(
        ops.softmax_expectation(logits.expand(2, -1).to(device), table.to(device)), logits.expand(2, -1), table, lowest
    )


def test_masks_and_raised_blocks(device):
    """What is far below, of any size, has f(lowest); blocks far above those before them change nothing."""
    table, lowest = TABLES["rough"]
    logits = logits_of(8, 5003, device=device, std=2.0)
    for i, mask in enumerate((-1e4, -1e10, -1e30, -3e38, -math.inf)):
        logits[i, : 2048 + 500 * i] = mask
    logits[5, 3000], logits[6, 2048], logits[7, 5002] = 60.0, 90.0, 45.0
    assert_near(ops.softmax_expectation(logits, table.to(device)), logits, table, lowest)


def test_log_p_below_the_table(device):
    logits = torch.zeros(1, 3000, device=device)  # log p = -8
    logits[0, 0] = 7.0
    table = torch.tensor([math.nan, 0.25, 1.0, math.nan], device=device)[1:3]  # beside it, nothing is read
    p = (7.0 - logits.double().logsumexp(-1)).exp().item()
    for lowest in (-1e-30, -1.0):
        mean, _ = ops.softmax_expectation(logits, table, lowest=lowest)
        top = 0.25 + 0.75 * max(0.0, 1 - math.log(p) / lowest)
        assert abs(mean.item() - (p * top + (1 - p) * 0.25)) < 2e-6
    mean, _ = ops.softmax_expectation(logits, table, lowest=-1e30)
    assert abs(mean.item() - 1.0) < 1e-6


@pytest.mark.slow
def test_the_longest_rows(device):
    """V = 2^20: longer than the shared memory of a cluster of eight blocks in float32; they are read again."""
    table, lowest = TABLES["a wave"]
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(1, 2**20, dtype, device)
        assert_near(ops.softmax_expectation(logits, table.to(device)), logits, table, lowest)


def test_no_rows(device):
    table = torch.zeros(2, 3, device=device)
    for shape, t in (((0, 31), table[0]), ((0, 31), table), ((2, 0, 31), table), ((0, 4, 31), table[:0])):
        mean, lse = ops.softmax_expectation(torch.zeros(shape, device=device), t)
        assert mean.shape == lse.shape == shape[:-1]
    mean, lse = ops.softmax_expectation(torch.zeros(31, device=device), table[0])  # one row
    assert mean.shape == () and mean == 0 and abs(lse.item() - math.log(31)) < 1e-6


def test_what_an_operator_refuses(device):
    """Its own checks, of who calls it without the function."""
    op, logits, rows = (
        torch.ops.klflow.softmax_expectation,
        torch.zeros(4, 10, device=device),
        torch.zeros(4, device=device),
    )
    table = torch.zeros(2, 5, device=device)
    for message, arguments in {
        "logits: must have two axes": (logits[0], table, -32.0, rows, rows),
        "logits: the last axis": (torch.zeros(10, 4, device=device).T, table, -32.0, rows, rows),
        "table: must have two axes": (logits, table[0], -32.0, rows, rows),
        "table: 1 knots": (logits, table[:, :1].contiguous(), -32.0, rows, rows),
        "table: 4097 knots": (logits, torch.zeros(1, 4097, device=device), -32.0, rows, rows),
        "table: must be contiguous": (logits, torch.zeros(5, 2, device=device).T, -32.0, rows, rows),
        "table: must be contiguous of": (logits, table.double(), -32.0, rows, rows),
        "table: 3 tables do not divide 4 rows": (logits, torch.zeros(3, 5, device=device), -32.0, rows, rows),
        "table: 0 tables": (logits, table[:0], -32.0, rows, rows),
        "lowest: 0 is": (logits, table, 0.0, rows, rows),
        "lowest: 1 is": (logits, table, 1.0, rows, rows),
        "lowest: nan is": (logits, table, math.nan, rows, rows),
        "lowest: -inf is": (logits, table, -math.inf, rows, rows),
        "mean: shape": (logits, table, -32.0, rows[:3], rows),
        "lse: must be contiguous": (logits, table, -32.0, rows, torch.zeros(8, device=device)[::2]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
