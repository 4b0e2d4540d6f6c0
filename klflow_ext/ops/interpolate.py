"""The KL geodesic: noisy rows from in-kernel noise, and points between given rows."""

import math

import torch
from torch import Tensor

from klflow_ext import reference
from klflow_ext.checks import check_choice, check_flag
from klflow_ext.ops.arguments import (
    FLOATS,
    INTEGERS,
    Rng,
    Scalar,
    as_rows,
    check_beta,
    check_int,
    check_log_prior,
    check_tensor,
    check_vocab,
    fail,
    fold_batch,
    is_transformed,
    needs_grad,
    noise_arguments,
    refuse_gradient,
    register_fake_mutation,
    result_dtype,
    row_scalars,
    token_rows,
)
from klflow_ext.ops.arguments import output as output_rows
from klflow_ext.ops.posterior import all_entries

_klflow = torch.ops.klflow


def noise_interpolate(
    target: Tensor,
    t: Scalar,
    rng: Rng,
    *,
    vocab_size: int,
    beta: float = 0.01,
    given: Tensor | None = None,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
    log: bool = False,
    out: Tensor | None = None,
    output: str = "simplex",
    log_prior: Tensor | None = None,
) -> Tensor:
    """Noisy rows x_t on the KL geodesic from fresh Dirichlet(1) noise to the smoothed target, noise made in the kernel.

    x_t[j] is proportional to E_j^(1 - t) exp(t c [j = target]), E_j = -log U_j i.i.d. Exp(1): the paper's
    x_t = softmax((1 - t) log x_0 + t log x_1), since x_0 is E over its sum. A given row is exactly onehot(target) at every t.
    With output="posterior", the whole of the rows that `noise_posterior` gives the largest entries of instead: the exact
    posterior q of each token given x_t, straight from the noise, at twice its arithmetic; x_t is never built.

    Args:
        target: int64 or int32 token ids, any shape `rows`, in [0, V).
        t: time in [0, 1], number or tensor that broadcasts to rows.
        rng: seed, generator or (seed, step) tensor; see the module.
        vocab_size: V >= 2.
        beta: smoothing in (0, 1).
        given: bool, broadcasts to rows.
        row_offset: global index of the first row.
        dtype: of the result (float32).
        log: return log x_t, or log q, instead.
        out: tensor (*rows, V) to write into; on a CPU this saves page faults.
        output: "simplex" for x_t, "posterior" for q.
        log_prior: for q, (V,) log-probabilities of the tokens up to a constant; -inf for one that never occurs.

    Returns: (*rows, V) on the device of target. Before rounding to dtype, x_t is within 1e-6 of its value on a CPU and 8e-6
        on CUDA, log x_t within 1e-5, log q within 1e-6 of the largest |log q - log_prior| of the row and 1e-5.
    Errors: TypeError, ValueError; IndexError for a target outside [0, V) (on CUDA its row is NaN; KLFLOW_CHECK=1 checks).
    """
    check_tensor("target", target, INTEGERS)
    vocab = check_int("vocab_size", vocab_size, 2, 2**30, "an integer V in [2, 2^30]")
    shape, device = target.shape, target.device
    check_choice("output", output, ("simplex", "posterior"))
    check_flag("log", log)
    if output == "posterior":
        if log_prior is None:
            fail(ValueError, "log_prior", None, "log-probabilities (V,), needed for output='posterior'")
        log_prior = check_log_prior(log_prior, vocab, device)
    elif log_prior is not None:
        fail(ValueError, "log_prior", type(log_prior).__name__, "None for output='simplex'")
    noise, options = noise_arguments(target, t, rng, beta, given, row_offset, vocab)
    result, flat = output_rows("out", out, (*shape, vocab), result_dtype(dtype, torch.float32, out), device)
    if output == "posterior":
        all_entries(noise, options, log_prior, log, flat)
    else:
        _klflow.noise_interpolate(*noise, *options, log, flat)
    return result


def logit_interpolate(
    log_x0: Tensor,
    log_x1: Tensor,
    t: Scalar,
    *,
    beta: float = 0.01,
    log: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Points of the KL geodesic between given end points: softmax((1 - t) log_x0 + t log_x1).

    Args:
        log_x0: (*rows, V) logits (log-probabilities up to a constant per row).
        log_x1: the same shape and dtype, or integer targets of shape rows: then log x_1 = c onehot(target) up
            to a constant.
        t: time in [0, 1], broadcasts to rows. At t = 0 (1) the other end point is not read, so infinite logits
            are fine.
        log: return log-probabilities.
        out: tensor to write into (then not differentiable).

    Returns: (*rows, V), dtype of log_x0. Differentiable in log_x0, log_x1 and t.
    """
    check_tensor("log_x0", log_x0, FLOATS)
    vocab = check_vocab("log_x0", log_x0)
    shape, device = log_x0.shape[:-1], log_x0.device
    rows = math.prod(shape)
    beta = check_beta(beta)
    check_flag("log", log)
    if isinstance(log_x1, torch.Tensor) and log_x1.dtype in INTEGERS:
        end = token_rows("log_x1", log_x1, shape, rows, vocab, device)
    else:
        check_tensor("log_x1", log_x1, (log_x0.dtype,), device)
        if log_x1.shape != log_x0.shape:
            fail(ValueError, "log_x1", f"shape {tuple(log_x1.shape)}", f"the shape of log_x0, {tuple(log_x0.shape)}")
        end = as_rows(log_x1, vocab)
    times = row_scalars("t", t, shape, rows, device, 0, 1)
    start = as_rows(log_x0, vocab)
    if out is None and (is_transformed(start, end, times) or needs_grad(start, end, times)):
        # The compiler takes the operator, which knows its gradient; the Function also knows torch.func and forward mode.
        points = _klflow.logit_interpolate if torch.compiler.is_compiling() else _LogitInterpolate.apply
        return points(start, end, times, beta, log).reshape(log_x0.shape)
    for name, value in (("log_x0", log_x0), ("log_x1", log_x1), ("t", times)):
        refuse_gradient(name, value, "log_x0, log_x1 and t without out")
    ends = [("log_x0", start, True)] + ([("log_x1", end, True)] if end.dim() == 2 else [])
    result, flat = output_rows("out", out, log_x0.shape, log_x0.dtype, device, ends)
    _klflow.logit_interpolate_out(start, end, times, beta, log, flat)
    return result


# ---- fake kernels and gradients


for _name in ("noise_interpolate", "logit_interpolate_out"):
    register_fake_mutation(_name)


@torch.library.register_fake("klflow::logit_interpolate")
def _(log_x0, log_x1, t, beta, log):
    return log_x0.new_empty(log_x0.shape)


def _setup_logit_interpolate(ctx, inputs, output):
    log_x0, log_x1, t, ctx.beta, ctx.log = inputs
    ctx.save_for_backward(log_x0, log_x1, t, output)


def _through_softmax(dl, y):
    """What a change dl of logits does to their softmax y; its matrix is symmetric, so a gradient goes back in the same way."""
    return y * (dl - (y * dl).sum(-1, keepdim=True))


def _backward_logit_interpolate(ctx, upstream):
    log_x0, log_x1, t, output = ctx.saved_tensors
    y, g = output.float(), upstream.float()
    if ctx.log:
        dl = g - y.exp() * g.sum(-1, keepdim=True)
    else:
        dl = _through_softmax(g, y)
    soft = log_x1.dim() == 2
    d0 = dl * (1 - t)[:, None]
    d1 = (dl * t[:, None]).to(log_x1.dtype) if soft else None
    dt = None
    if ctx.needs_input_grad[2]:
        dt = (dl * _direction(log_x0, log_x1, ctx.beta)).sum(-1)
    return d0.to(log_x0.dtype), d1, dt, None, None


def _direction(log_x0, log_x1, beta):
    """d l / d t."""
    if log_x1.dim() == 2:
        return log_x1.float() - log_x0.float()
    c = torch.full(
        (log_x1.shape[0], 1), reference.gap(log_x0.shape[1], beta), dtype=torch.float32, device=log_x0.device
    )
    return (-log_x0.float()).scatter_add(1, log_x1.long()[:, None], c)


torch.library.register_autograd(
    "klflow::logit_interpolate", _backward_logit_interpolate, setup_context=_setup_logit_interpolate
)


class _LogitInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(log_x0, log_x1, t, beta, log):
        return _klflow.logit_interpolate(log_x0.detach(), log_x1.detach(), t.detach(), beta, log)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_logit_interpolate(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], output)

    backward = staticmethod(_backward_logit_interpolate)

    @staticmethod
    def jvp(ctx, d0, d1, dt, *_):
        log_x0, log_x1, t, output = ctx.saved_tensors
        dl = 0.0 if d0 is None else d0.float() * (1 - t)[:, None]
        if d1 is not None:
            dl = dl + d1.float() * t[:, None]
        if dt is not None:
            dl = dl + dt[:, None] * _direction(log_x0, log_x1, ctx.beta)
        y = output.float()
        change = dl - (y.exp() * dl).sum(-1, keepdim=True) if ctx.log else _through_softmax(dl, y)
        return change.to(output.dtype)

    @staticmethod
    def vmap(info, in_dims, log_x0, log_x1, t, beta, log):
        """The batch goes before the rows."""
        flat = [fold_batch(x, dim, info.batch_size) for x, dim in zip((log_x0, log_x1, t), in_dims, strict=False)]
        out = _LogitInterpolate.apply(*flat, beta, log)
        return out.view(info.batch_size, -1, out.shape[-1]), 0
