"""The loss from hidden states: the output layer and its cross-entropy, a chunk of rows at a time."""

import math
from typing import Any

import torch
from torch import Tensor

from klflow_ext.ops.arguments import (
    FLOATS,
    check_int,
    check_tensor,
    check_tokens,
    fail,
    is_transformed,
    looks_at_values,
    needs_grad,
)
from klflow_ext.ops.loss import check_result, cross_entropy, loss_arguments, mean_divisor
from klflow_ext.ops.products import add_product

_klflow = torch.ops.klflow

# Logits held at a time on a CPU: enough rows for an efficient matrix product (333 of V = 50,259 in float32), and the same
# for any V. A GPU's products need more rows, and every chunk reads and writes the float32 gradient of weight once.
LOGIT_BYTES = 2**26
CUDA_LOGIT_BYTES = 2**29
LEAST_ROWS, CUDA_LEAST_ROWS = 16, 2048
CUDA_ROWS = 256  # a multiple of it: the height of a matrix product's tiles


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    chunk_rows: int | None = None,
    logit_bytes: int | None = None,
) -> Any:
    """cross_entropy(hidden @ weight.T + bias, target) without the logits: those of a chunk of rows exist at a time.

    Where the result is one number, its gradients are made in the forward pass, from the same logits; the backward pass
    only scales them. With reduction="none" or return_lse=True the backward pass makes each chunk's logits again. Under
    torch.func transforms, in forward mode and with create_graph=True, all logits are made, and every derivative is right.

    Args:
        hidden: (*rows, D).
        weight: (V, D), as nn.Linear holds it.
        bias: (V,). All of one dtype, which the logits have too; under autocast its dtype, as for a matrix
            product. Gradients of weight and bias are summed in float32.
        target: token ids of shape rows, or soft targets (*rows, V).
        class_weight: (V,), the `weight` of `cross_entropy`, where the other options are described.
        chunk_rows: rows at a time; None: as logit_bytes says.
        logit_bytes: of the logits at a time, at least those of 16 rows, on CUDA of 256; None: 64 MB, on CUDA 512 MB or what
            2,048 rows have. The more, the fewer passes over the gradient of weight.

    Returns: loss (float32), or (loss, lse). Gradients flow to hidden, weight and bias.
    Errors: as `cross_entropy`.
    """
    check_result(reduction, return_lse)
    flat, shape = layer_arguments(hidden, weight, bias)
    vocab, device = weight.shape[0], weight.device
    tokens, options = loss_arguments(
        shape, vocab, device, target, class_weight, row_weight, ignore_index, label_smoothing, z_loss, softcap,
        "class_weight",
    )  # fmt: skip
    chunk_rows = check_chunk(flat, vocab, chunk_rows, logit_bytes)
    lse: Any = None
    if is_transformed(flat, weight, bias, tokens, *options[:2]):
        result: Any = _with_logits(flat, weight, bias, tokens, *options, reduction=reduction, return_lse=True)
        loss, lse = result
        loss = loss.reshape(shape) if reduction == "none" else loss
        return (loss, lse.reshape(shape)) if return_lse else loss
    arguments = (flat, weight, bias, tokens, *options, chunk_rows)
    wanted = [x is not None and needs_grad(x) for x in (flat, weight, bias)]
    if reduction == "none" or return_lse or not any(wanted):
        loss, lse = _loss_rows(*arguments)
        if reduction == "none":
            loss = loss.reshape(shape)
            return (loss, lse.reshape(shape)) if return_lse else loss
        loss = loss.sum()
    elif torch.compiler.is_compiling():
        loss = _loss_and_gradients(*arguments, *wanted)[0]
    else:
        loss = _LinearCrossEntropy.apply(*arguments)
    if reduction == "mean":
        loss = mean_of(loss, mean_divisor(tokens, *options))
    return (loss, lse.reshape(shape)) if return_lse else loss


def mean_of(total, divisor):
    """total / divisor; where that is 0, NaN, but with gradients of zero, as in torch."""
    empty = divisor == 0
    return torch.where(empty, math.nan, total / torch.where(empty, 1, divisor))


def layer_arguments(hidden, weight, bias, vocab=None):
    """(hidden as rows, in autocast's dtype where that is on; their shape), checked; vocab: the rows that weight must have."""
    check_tensor("hidden", hidden, FLOATS)
    if hidden.dim() < 1:
        fail(ValueError, "hidden", "shape ()", "(*rows, D)")
    *shape, width = hidden.shape
    device = hidden.device
    dtypes: tuple[torch.dtype, ...] = (hidden.dtype,)
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        hidden, dtypes = hidden.to(torch.get_autocast_dtype(device.type)), FLOATS
    check_tensor("weight", weight, dtypes, device)
    fits = weight.dim() == 2 and weight.shape[1] == width and 2 <= weight.shape[0] <= 2**30
    if not fits or vocab not in (None, weight.shape[0]):
        allowed = f"(V, {width}), V in [2, 2^30]" if vocab is None else f"({vocab}, {width})"
        fail(ValueError, "weight", f"shape {tuple(weight.shape)}", allowed)
    if bias is not None:
        check_tensor("bias", bias, dtypes, device)
        if bias.shape != weight.shape[:1]:
            fail(ValueError, "bias", f"shape {tuple(bias.shape)}", f"({weight.shape[0]},)")
    return hidden.reshape(-1, width), torch.Size(shape)


def check_chunk(flat, vocab, chunk_rows, logit_bytes):
    """The rows of a chunk of logits (rows, vocab) in the dtype of flat, from the two arguments that say it."""
    if logit_bytes is not None:
        check_int("logit_bytes", logit_bytes, 1, 2**62, "None or an integer in [1, 2^62]")
    if chunk_rows is None:
        return rows_of_chunk(flat.shape[0], vocab * flat.element_size(), flat.device.type, logit_bytes)
    if logit_bytes is not None:
        fail(ValueError, "logit_bytes", logit_bytes, "None beside chunk_rows")
    return check_int("chunk_rows", chunk_rows, 1, 2**30, "None or an integer in [1, 2^30]")


def rows_of_chunk(rows, row_bytes, device_type, logit_bytes=None):
    """How many rows a chunk has, whose logits take row_bytes each: chunks of one size, within the memory budget."""
    on_cuda = device_type == "cuda"
    step = CUDA_ROWS if on_cuda else 1
    if logit_bytes is None:
        budget, least = (CUDA_LOGIT_BYTES, CUDA_LEAST_ROWS) if on_cuda else (LOGIT_BYTES, LEAST_ROWS)
    else:
        budget, least = logit_bytes, CUDA_ROWS if on_cuda else LEAST_ROWS
    most = max(least, budget // row_bytes // step * step)
    each = -(-rows // max(1, -(-rows // most)))
    return max(1, -(-each // step) * step)


def _with_logits(
    hidden, weight, bias, target, class_weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, **result
):
    """linear_cross_entropy of flat rows with all their logits, differentiable any number of times."""
    weight, bias = _as_hidden(hidden, weight, bias)
    return cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), target, weight=class_weight, row_weight=row_weight,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap or None, **result,
    )  # fmt: skip


# ---- chunks. Below, `options` are those of the cross-entropy operators with chunk_rows behind them.


def _chunks(hidden, weight, bias, target, class_weight, row_weight, *scalars_and_size):
    """(slice of rows, logits, target, options) of every chunk, all logits in one buffer; autocast leaves `out` products be.

    Its rows start at multiples of 128 bytes or more: for odd V the product alone is then 1.4 times faster (MKL, float32).
    """
    *scalars, chunk_rows = scalars_and_size
    rows, vocab = hidden.shape[0], weight.shape[0]
    buffer = hidden.new_empty(min(chunk_rows, rows), -(-vocab // 64) * 64)
    buffer[:, vocab:] = 0  # oneDNN's 16-bit products of an odd V read one column more and multiply it by zero
    buffer = buffer[:, :vocab]
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        logits = buffer[: part.stop - start]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits, target[part], (class_weight, None if row_weight is None else row_weight[part], *scalars)


class _Gradients:
    """Gradients of hidden (in its dtype), weight and bias (in float32) from those of the logits; empty if not wanted."""

    def __init__(self, hidden, weight, wanted):
        self.inputs, self.wanted = (hidden, weight), wanted
        new = hidden.new_empty if hidden.shape[0] else hidden.new_zeros
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        dtypes = (hidden.dtype, torch.float32, torch.float32)
        self.sums = [new(s if w else (0,), dtype=d) for s, d, w in zip(shapes, dtypes, wanted, strict=True)]

    def add(self, part, dlogits):
        (hidden, weight), (dhidden, dweight, dbias) = self.inputs, self.sums
        hidden, first = hidden[part], part.start == 0
        if self.wanted[0]:
            torch.mm(dlogits, weight, out=dhidden[part])
        if self.wanted[1]:
            add_product(dweight, dlogits.t(), hidden, first)
        if self.wanted[2]:
            columns = dlogits.sum(0, dtype=torch.float32)
            dbias.copy_(columns) if first else dbias.add_(columns)


def _as_hidden(hidden, weight, bias):
    """weight and bias in the dtype of hidden, which may be autocast's."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _new_rows(hidden):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _check_target(target, weight, ignore_index):
    """Before any chunk's work, which would count rows from the chunk's first."""
    if target.dim() == 1 and looks_at_values(target):
        check_tokens("target", target, weight.shape[0], ignore_index=ignore_index)


def _forward(hidden, weight, bias, target, *options):
    _check_target(target, weight, options[2])
    loss, lse = _new_rows(hidden), _new_rows(hidden)
    for part, logits, tokens, chunk in _chunks(hidden, *_as_hidden(hidden, weight, bias), target, *options):
        _klflow.cross_entropy_out(logits, tokens, *chunk, loss[part], lse[part])
    return loss, lse


def _forward_grad(hidden, weight, bias, target, *options_and_wants):
    *options, want_hidden, want_weight, want_bias = options_and_wants
    _check_target(target, weight, options[2])
    weight, bias = _as_hidden(hidden, weight, bias)
    gradients = _Gradients(hidden, weight, (want_hidden, want_weight, want_bias))
    loss, lse, one = _new_rows(hidden), _new_rows(hidden), hidden.new_ones(1, dtype=torch.float32)
    for part, logits, tokens, chunk in _chunks(hidden, weight, bias, target, *options):
        upstream = one.expand(len(logits))  # not yet the mean's, in which small float16 gradients would vanish
        _klflow.cross_entropy_grad(logits, tokens, *chunk, upstream, loss[part], lse[part], logits)
        gradients.add(part, logits)
    return loss.sum(), lse, *gradients.sums


def _backward(lse, dloss, dlse, hidden, weight, bias, target, *options_and_wants):
    *options, want_hidden, want_weight, want_bias = options_and_wants
    weight, bias = _as_hidden(hidden, weight, bias)
    gradients = _Gradients(hidden, weight, (want_hidden, want_weight, want_bias))
    for part, logits, tokens, chunk in _chunks(hidden, weight, bias, target, *options):
        slopes = dloss[part], None if dlse is None else dlse[part]
        _klflow.cross_entropy_backward(logits, tokens, lse[part], *chunk, *slopes, logits)
        gradients.add(part, logits)
    return tuple(gradients.sums)


# ---- operators, fake kernels and gradients

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? row_weight, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap, SymInt chunk_rows"
)
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"


def _operator(name, function, schema):
    return torch.library.custom_op(f"klflow::{name}", function, mutates_args=(), schema=schema)


_loss_rows = _operator("linear_cross_entropy", _forward, f"({_INPUTS}) -> (Tensor loss, Tensor lse)")
_loss_and_gradients = _operator(
    "linear_cross_entropy_grad",
    _forward_grad,
    f"({_INPUTS}, {_WANTED}) -> (Tensor loss, Tensor lse, Tensor dhidden, Tensor dweight, Tensor dbias)",
)
_gradients_again = _operator(
    "linear_cross_entropy_backward",
    _backward,
    f"(Tensor lse, Tensor dloss, Tensor? dlse, {_INPUTS}, {_WANTED}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)


@_loss_rows.register_fake
def _(hidden, *_):
    return _new_rows(hidden), _new_rows(hidden)


@_loss_and_gradients.register_fake
def _(hidden, weight, *options):
    return hidden.new_empty((), dtype=torch.float32), _new_rows(hidden), *_Gradients(hidden, weight, options[-3:]).sums


@_gradients_again.register_fake
def _(lse, dloss, dlse, hidden, weight, *options):
    return tuple(_Gradients(hidden, weight, options[-3:]).sums)


def _as_inputs(ctx, gradients):
    """What a backward pass returns: the gradients in the dtypes of their inputs, None for every other input."""
    wanted = ctx.needs_input_grad
    found = [g.to(d) if w else None for g, d, w in zip(gradients, ctx.dtypes, wanted, strict=False)]
    return (*found, *[None] * (len(wanted) - 3))


def _save_dtypes(ctx, inputs):
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.scalars = inputs[6:]
    _save_dtypes(ctx, inputs)


def _gradients_from_inputs(ctx, dloss, dlse):
    *inputs, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_gradients(ctx, dloss, dlse)
    return _as_inputs(ctx, _gradients_again(lse, dloss, dlse, *inputs, *ctx.scalars, *wanted))


def _differentiable_gradients(ctx, dloss, dlse):
    """The gradients in operations that can be differentiated again; dloss: of the rows."""
    hidden, weight, bias, *others, lse = ctx.saved_tensors

    def rows(hidden, weight, *biases):
        bias = biases[0] if biases else None
        options = (*others, *ctx.scalars[:-1])
        return _with_logits(hidden, weight, bias, *options, reduction="none", return_lse=True)

    pull_back: Any = torch.func.vjp(rows, hidden, weight, *(() if bias is None else (bias,)))[1]
    gradients = pull_back(tuple(torch.zeros_like(lse) if d is None else d for d in (dloss, dlse)))
    wanted = ctx.needs_input_grad
    found = [g if w else None for g, w in zip((*gradients, None), wanted, strict=False)]
    return (*found[:3], *[None] * (len(wanted) - 3))


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    _save_dtypes(ctx, inputs)


def _scaled_gradients(ctx, dloss, *_):
    return _as_inputs(ctx, [g.float() * dloss for g in ctx.saved_tensors])


_loss_rows.register_autograd(_gradients_from_inputs, setup_context=_save_inputs)
_loss_and_gradients.register_autograd(_scaled_gradients, setup_context=_save_gradients)


def _scale(gradient, factor, dtype):
    """gradient * factor where it is, or on CUDA as the dtype of its input, in one pass."""
    if gradient.is_cuda and dtype not in (None, gradient.dtype):
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.float().mul_(factor)


class _LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy_grad whose backward pass scales the gradients where they are; a second one makes them again."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, lse, *ctx.gradients = _forward_grad(*inputs, *ctx.needs_input_grad[:3])
        _save_inputs(ctx, inputs, (loss, lse))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # the gradients may be differentiated again
            return _differentiable_gradients(ctx, dloss.expand(ctx.saved_tensors[-1].shape), None)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            return _gradients_from_inputs(ctx, dloss.expand(ctx.saved_tensors[-1].shape), None)
        return _as_inputs(ctx, [_scale(g, dloss, d) for g, d in zip(gradients, ctx.dtypes, strict=True)])
