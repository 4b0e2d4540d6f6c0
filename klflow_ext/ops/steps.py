"""The steps of the samplers: draw, re-noise, and the basic Euler step."""

import math

import torch
from torch import Tensor

from klflow_ext.checks import check_flag
from klflow_ext.ops.arguments import (
    FLOATS,
    Rng,
    Scalar,
    as_rows,
    check_beta,
    check_int,
    check_row_offset,
    check_scalar,
    check_tensor,
    check_vocab,
    fail,
    given_known,
    output,
    refuse_gradient,
    register_fake_mutation,
    result_dtype,
    rng_state,
    row_scalars,
    temperature_rows,
)

_klflow = torch.ops.klflow
NOTHING = "nothing (sample under torch.no_grad())"


def _topk_arguments(logits, k, rng, temperature, top_p, row_offset):
    check_tensor("logits", logits, FLOATS)
    vocab = check_vocab("logits", logits)
    k = check_int("k", k, 1, vocab, f"an integer in [1, V = {vocab}]")
    shape, row_offset = logits.shape[:-1], check_row_offset(row_offset)
    rows = math.prod(shape)
    device = logits.device
    if not isinstance(top_p, torch.Tensor):
        top_p = check_scalar("top_p", top_p, 0, 1, "a number in (0, 1]", open_low=True)
    return shape, rows, vocab, (as_rows(logits.detach(), vocab), k), (
        rng_state(rng, shape, rows, device, row_offset), temperature_rows(temperature, shape, rows, device),
        row_scalars("top_p", top_p, shape, rows, device, 0, 1), row_offset,
    )  # fmt: skip


def topk_sample(
    logits: Tensor,
    k: int,
    rng: Rng,
    *,
    temperature: Scalar = 1.0,
    top_p: Scalar = 1.0,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws a token per row from the softmax of its k largest logits / temperature.

    Ties go to the lowest index; k = 1 is argmax. top_p keeps, of those k, the smallest most likely set with mass >= top_p.
    The draw is argmax_j (logit_j / T - log E_j) with E_j ~ Exp(1) accurate for small E (streams 1 and 2 of the noise).

    Args: logits (*rows, V); k in [1, V]; rng: see the module; temperature in [1e-30, 1e30] and top_p in (0, 1], numbers
        or tensors that broadcast to rows.
    Returns: (token int64 (*rows), log_prob float32 (*rows)), log_prob under the kept, renormalised distribution. A row with a
        NaN, or with no finite maximum, gives token -1 and log_prob NaN.
    """
    shape, rows, _, head, (state, temperature, top_p, row_offset) = _topk_arguments(
        logits, k, rng, temperature, top_p, row_offset
    )
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_prob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _klflow.topk_sample(*head, state, temperature, top_p, row_offset, token, log_prob)
    return token.reshape(shape), log_prob.reshape(shape)


def topk_renoise(
    logits: Tensor,
    k: int,
    t_next: Scalar,
    rng: Rng,
    *,
    temperature: Scalar = 1.0,
    top_p: Scalar = 1.0,
    beta: float = 0.01,
    given: Tensor | None = None,
    known: Tensor | None = None,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the paper's sampling scheme: `topk_sample`, then fresh noise moved to t_next towards the drawn token.

    x_next = noise_interpolate(token, t_next, rng): the fused form of Algorithm 2 of arXiv 2411.16821.

    Args: as in `topk_sample` and `noise_interpolate`; given rows keep their known token and are exactly onehot(known).
        dtype: of x_next (that of logits).
    Returns: (token int64 (*rows), x_next (*rows, V)). A row with token -1 has NaN in x_next.
    """
    shape, rows, vocab, head, (state, temperature, top_p, row_offset) = _topk_arguments(
        logits, k, rng, temperature, top_p, row_offset
    )
    device = logits.device
    flags, tokens = given_known(given, known, shape, rows, vocab, device)
    times = row_scalars("t_next", t_next, shape, rows, device, 0, 1)
    refuse_gradient("t_next", times, NOTHING)
    beta = check_beta(beta)
    dtype = result_dtype(dtype, logits.dtype, out)
    result, flat = output("out", out, logits.shape, dtype, device, [("logits", head[0], True)])
    token = torch.empty(rows, dtype=torch.int64, device=device)
    _klflow.topk_renoise(*head, times, state, temperature, top_p, beta, flags, tokens, row_offset, token, flat)
    return token.reshape(shape), result


def euler_step(
    log_x: Tensor,
    logits: Tensor,
    rate: Scalar,
    *,
    temperature: Scalar = 1.0,
    beta: float = 0.01,
    given: Tensor | None = None,
    known: Tensor | None = None,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the basic sampler: the marginal ODE dl/dtau = c p - l along the KL geodesic (Corollary 3.3).

    p = softmax(logits / temperature), l = (1 - rate) log_x + rate c p; returns log softmax(l) and softmax(l).

    Args:
        log_x: (*rows, V) log-probabilities of the state, float32 advised.
        logits: (*rows, V).
        rate: 1 - e^-h (exact for frozen p) or h (the paper's Euler), in [0, 1], broadcasts to rows.
        given, known: given rows are exactly onehot(known), in log 0 and -inf.
        dtype: of x_next (that of logits).
        inplace: write the new state over log_x.
        out: tensor (*rows, V) for x_next; on a CPU this saves page faults.
    Returns: (log_x_next in the dtype of log_x, x_next), both (*rows, V).
    """
    check_tensor("logits", logits, FLOATS)
    vocab = check_vocab("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    rows = math.prod(shape)
    check_tensor("log_x", log_x, FLOATS, device)
    if log_x.shape != logits.shape:
        fail(ValueError, "log_x", f"shape {tuple(log_x.shape)}", f"the shape of logits, {tuple(logits.shape)}")
    rates = row_scalars("rate", rate, shape, rows, device, 0, 1)
    for name, value in (("log_x", log_x), ("logits", logits), ("rate", rates)):
        refuse_gradient(name, value, NOTHING)
    temperature, beta = temperature_rows(temperature, shape, rows, device), check_beta(beta)
    flags, tokens = given_known(given, known, shape, rows, vocab, device)
    check_flag("inplace", inplace)
    source, flat_logits = as_rows(log_x, vocab), as_rows(logits, vocab)
    inputs = [("logits", flat_logits, False)]
    dtype = result_dtype(dtype, logits.dtype, out)
    x_next, flat = output("out", out, logits.shape, dtype, device, [*inputs, ("log_x", source, False)])
    state, state_flat = output("log_x", log_x if inplace else None, logits.shape, log_x.dtype, device, inputs)
    source = state_flat if inplace else source
    _klflow.euler_step(source, flat_logits, rates, temperature, beta, flags, tokens, state_flat, flat)
    return state, x_next


for _name in ("topk_sample", "topk_renoise", "euler_step"):
    register_fake_mutation(_name)
