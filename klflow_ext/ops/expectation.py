"""Means over a softmax, without its probabilities."""

import math

import torch
from torch import Tensor

from klflow_ext.ops.arguments import (
    FLOATS,
    LEAST,
    MOST,
    as_rows,
    check_scalar,
    check_tensor,
    check_vocab,
    fail,
    looks_at_values,
    refuse_gradient,
    register_fake_mutation,
)

_klflow = torch.ops.klflow
NOTHING = "nothing (call it under torch.no_grad())"
MOST_KNOTS = 4096


def softmax_expectation(
    logits: Tensor,
    table: Tensor,
    *,
    lowest: float = -32.0,
) -> tuple[Tensor, Tensor]:
    """The mean of a function of log p over p = softmax(logits), the function being a table: mean = sum_j p_j f(log p_j).

    So any functional of the form E_p f(log p) in one call: the entropy with f(l) = -l, sum_j p_j^2 with f(l) = e^l, the terms
    of a likelihood bound. f is linear between its knots, table[i] at log p = lowest (1 - i / (N - 1)): table[N - 1] is f(0),
    table[0] is f(lowest) and f of all that lies below. A logit of -inf counts nothing. p and log p are never built.

    Args:
        logits: (*rows, V), 2 <= V <= 2^30; float32, bfloat16 or float16.
        table: float32, finite, 2 <= N <= 4096: (N,) for all rows, or (T, N) where T divides the number of rows, of which
            row r has table[r // (rows / T)]. With logits (B, L, V), a table (B, N) has a function for each sequence.
        lowest: a number in [-1e30, -1e-30].

    Returns: (mean, lse), float32 of shape rows, lse = logsumexp(logits). Not differentiable. A row that holds a NaN or +inf
        has NaN in both; one of only -inf has a mean of NaN and an lse of -inf, as torch.logsumexp.
    Accuracy: log p is float32 inside, so a mean is within 1e-6 of the largest |f| and 2e-6 of the steepest slope of f
        (6e-6 in a row of 262,144 equal logits, on a card without clusters): of a table that is smooth (a slope of a few
        times its size at most), a few units of float32; of one that jumps from knot to knot, less.
    Errors: TypeError, ValueError.
    """
    check_tensor("logits", logits, FLOATS)
    vocab = check_vocab("logits", logits)
    shape = logits.shape[:-1]
    rows = math.prod(shape)
    check_tensor("table", table, (torch.float32,), logits.device)
    if table.dim() not in (1, 2) or not 2 <= table.shape[-1] <= MOST_KNOTS:
        fail(ValueError, "table", f"shape {tuple(table.shape)}", f"(N,) or (T, N) with 2 <= N <= {MOST_KNOTS}")
    if table.dim() == 2 and (rows % table.shape[0] if table.shape[0] > 0 else rows):
        fail(ValueError, "table", f"shape {tuple(table.shape)}", f"a number of tables that divides {rows} rows")
    if looks_at_values(table) and not table.isfinite().all():
        fail(ValueError, "table", table[~table.isfinite()][0].item(), "finite numbers")
    lowest = check_scalar("lowest", lowest, -MOST, -LEAST, f"a number in [-{MOST}, -{LEAST}]")
    for name, value in (("logits", logits), ("table", table)):
        refuse_gradient(name, value, NOTHING)
    mean = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tables = table.detach().reshape(-1, table.shape[-1]).contiguous()
    _klflow.softmax_expectation(as_rows(logits.detach(), vocab), tables, lowest, mean, lse)
    return mean.reshape(shape), lse.reshape(shape)


register_fake_mutation("softmax_expectation")
