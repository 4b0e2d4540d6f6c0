"""The loss: fused log-softmax cross-entropy over large vocabularies."""

import math
from typing import Any

import torch
from torch import Tensor

from klflow_ext import reference
from klflow_ext.checks import check_choice, check_flag
from klflow_ext.ops.arguments import (
    FLOATS,
    INTEGERS,
    LEAST,
    MOST,
    Scalar,
    as_rows,
    check_int,
    check_overlap,
    check_scalar,
    check_tensor,
    check_vocab,
    fail,
    fold_batch,
    is_transformed,
    needs_grad,
    output,
    refuse_gradient,
    refuse_lazy,
    register_fake_mutation,
    row_scalars,
    token_rows,
)

_klflow = torch.ops.klflow
FLOWS = "logits (or hidden states, weight and bias)"


def loss_arguments(
    shape, vocab, device, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, weight_name="weight"
):  # fmt: skip
    """(tokens (rows,) or soft targets (rows, V), the options that follow them in the cross-entropy operators), checked."""
    rows = math.prod(shape)
    ignore_index = check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1, "an integer")
    smoothing = check_scalar("label_smoothing", label_smoothing, 0, 1, "a number in [0, 1]")
    z_loss = check_scalar("z_loss", z_loss, 0, MOST, f"a number in [0, {MOST}]")
    if softcap is not None:
        softcap = check_scalar("softcap", softcap, LEAST, MOST, f"None or a number in [{LEAST}, {MOST}]")
    if weight is not None:
        check_tensor(weight_name, weight, FLOATS, device)
        if weight.shape != (vocab,):
            fail(ValueError, weight_name, f"shape {tuple(weight.shape)}", f"({vocab},)")
        refuse_gradient(weight_name, weight, FLOWS)
        weight = weight.float().contiguous()
    if row_weight is not None:
        row_weight = row_scalars("row_weight", row_weight, shape, rows, device)
        refuse_gradient("row_weight", row_weight, FLOWS)
    if isinstance(target, torch.Tensor) and target.dtype in FLOATS:
        check_tensor("target", target, FLOATS, device)
        if target.shape != (*shape, vocab):
            fail(
                ValueError,
                "target",
                f"shape {tuple(target.shape)} of soft targets",
                f"that of logits, {(*shape, vocab)}",
            )
        if ignore_index >= 0:  # torch's rule
            fail(ValueError, "ignore_index", f"{ignore_index} beside soft targets", "a negative number there")
        refuse_gradient("target", target, FLOWS)
        tokens = as_rows(target, vocab)
    else:
        check_tensor("target", target, INTEGERS, device)
        if target.shape != shape:
            fail(ValueError, "target", f"shape {tuple(target.shape)}", f"one token for each row, {tuple(shape)}")
        if target.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31:
            target = target.long()  # else the number would wrap where it is compared
        tokens = token_rows("target", target, shape, rows, vocab, device, ignore_index=ignore_index)
    return tokens, (weight, row_weight, ignore_index, smoothing, z_loss, 0.0 if softcap is None else softcap)


def check_result(reduction, return_lse):
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_flag("return_lse", return_lse)


def mean_divisor(tokens, weight, row_weight, ignore_index, *_):
    """What reduction="mean" divides by: the sum over kept rows of weight[target] row_weight."""
    if tokens.dim() == 2:
        return tokens.new_full((), tokens.shape[0], dtype=torch.float32) if row_weight is None else row_weight.sum()
    kept = tokens != ignore_index
    if weight is None and row_weight is None:
        return kept.count_nonzero().to(torch.float32)
    per_row = 1.0 if weight is None else weight[tokens.clamp(0, weight.shape[0] - 1).long()]
    if row_weight is not None:
        per_row = per_row * row_weight
    return torch.where(kept, per_row, 0.0).sum()


def _flat_arguments(logits, target, *options):
    check_tensor("logits", logits, FLOATS)
    vocab = check_vocab("logits", logits)
    return as_rows(logits, vocab), *loss_arguments(logits.shape[:-1], vocab, logits.device, target, *options)


def _new_rows(flat):
    return flat.new_empty(flat.shape[0], dtype=torch.float32)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Fused log-softmax cross-entropy over large vocabularies; log-probabilities are never built.

    loss_n = row_weight_n (sum_j q_nj w_j (lse_n - z_nj) + z_loss lse_n^2), z = softcap tanh(logits / softcap),
    q = (1 - label_smoothing) onehot(target) + label_smoothing / V; equal to torch.nn.functional.cross_entropy where that
    has the option. "mean" divides by the sum of w[target] row_weight over kept rows (NaN if there is none, as in torch).

    Args:
        logits: (*rows, V).
        target: token ids of shape rows, or soft targets (floats) of the shape of logits.
        weight: (V,) class weights.
        ignore_index: rows with this target have zero loss and gradient.
        row_weight: a weight per row.
        reduction: "mean", "sum" or "none" (any upstream gradient per row).
        return_lse: also return lse (*rows), differentiable.
        inplace_backward: the backward pass writes the gradient over logits, which are then no longer usable.

    Returns: loss (float32), or (loss, lse). Gradients flow to logits only. A row that holds a NaN or +inf has NaN in both.
    Errors: IndexError for a target outside [0, V) (on CUDA the row's loss is NaN; KLFLOW_CHECK=1 checks there too).
    """
    check_result(reduction, return_lse)
    check_flag("inplace_backward", inplace_backward)
    flat, tokens, options = _flat_arguments(
        logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap
    )
    shape = logits.shape[:-1]
    transformed = is_transformed(flat, tokens, *options[:2])
    divisor = mean_divisor(tokens, *options) if reduction == "mean" and (transformed or needs_grad(flat)) else None
    if transformed:
        loss, lse, _ = _CrossEntropy.apply(flat, tokens, *options, None)
    elif not needs_grad(flat):  # the differentiable operator alone costs as much as a short row
        if flat.device.type == "cpu" and reduction != "none":
            loss, lse = _klflow.cross_entropy_total(flat, tokens, *options, reduction == "mean")
            return (loss, lse.reshape(shape)) if return_lse else loss
        loss, lse = _new_rows(flat), _new_rows(flat)
        _klflow.cross_entropy_out(flat, tokens, *options, loss, lse)
    elif torch.compiler.is_compiling():  # the compiler plans its own memory
        loss, lse = _klflow.cross_entropy(flat, tokens, *options)
    elif inplace_backward:
        check_overlap("logits", flat)
        refuse_lazy("logits", flat)
        loss, lse = _InplaceCrossEntropy.apply(flat, tokens, *options)
    else:
        loss, lse, _ = _CrossEntropy.apply(flat, tokens, *options, _expected_upstream(flat, divisor))
    if reduction == "none":
        loss = loss.reshape(shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (mean_divisor(tokens, *options) if divisor is None else divisor)
    return (loss, lse.reshape(shape)) if return_lse else loss


def _expected_upstream(flat, divisor):
    """The gradient that every row's loss will most likely get, (rows,), for which the forward pass makes that of the logits;
    None: the backward pass makes it.

    On a CPU a second pass over the logits costs more than scaling what was made, if it must be scaled at all. On a GPU it
    costs less, as the scale is not known there. In float16 what is small would be lost before a loss scale is applied.
    """
    if flat.device.type != "cpu" or flat.dtype == torch.float16:
        return None
    one = torch.ones((), dtype=torch.float32, device=flat.device)
    return (one if divisor is None else one / divisor).expand(flat.shape[0])


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    row_weight: Tensor | None = None,
    dloss: Scalar | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse and the gradient of the logits from one read of them, without autograd; options as in `cross_entropy`.

    dloss: upstream gradient per row, broadcasts to rows; None: that of the mean, so that grad = d mean(loss) / d logits.
    out: where the gradient goes, of the dtype of logits; may be logits itself.
    Returns: (loss (*rows), lse (*rows), grad (*rows, V)), loss and lse in float32.
    """
    flat, tokens, options = _flat_arguments(
        logits.detach() if isinstance(logits, torch.Tensor) else logits,
        target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    shape, rows, device = logits.shape[:-1], flat.shape[0], logits.device
    if dloss is None:
        upstream = (1.0 / mean_divisor(tokens, *options)).expand(rows)
    else:
        upstream = row_scalars("dloss", dloss, shape, rows, device)
    grad, flat_grad = output("out", out, logits.shape, logits.dtype, device, [("logits", flat, True)])
    if grad.dtype != logits.dtype:
        fail(TypeError, "out", grad.dtype, f"the dtype of logits, {logits.dtype}")
    loss, lse = _new_rows(flat), _new_rows(flat)
    _klflow.cross_entropy_grad(flat, tokens, *options, upstream, loss, lse, flat_grad)
    return loss.reshape(shape), lse.reshape(shape), grad


# ---- fake kernels and gradients


for _name in ("cross_entropy_out", "cross_entropy_grad", "cross_entropy_backward"):
    register_fake_mutation(_name)


@torch.library.register_fake("klflow::cross_entropy")
def _(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap):
    return (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    )


@torch.library.register_fake("klflow::cross_entropy_total")
def _(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, mean):
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[:1], dtype=torch.float32)


def _setup_cross_entropy(ctx, inputs, output):
    logits, target, weight, row_weight, *options = inputs
    ctx.save_for_backward(logits, target, weight, row_weight, output[1])
    ctx.options = options


def _cross_entropy_gradient(ctx, dloss, dlse, grad_into):
    logits, target, weight, row_weight, lse = ctx.saved_tensors
    if dloss is None:
        dloss = torch.zeros_like(lse)
    grad = grad_into(logits)
    _klflow.cross_entropy_backward(logits, target, lse, weight, row_weight, *ctx.options, dloss, dlse, grad)
    return grad


def _new_like(logits):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward_cross_entropy(ctx, dloss, dlse):
    return (_cross_entropy_gradient(ctx, dloss, dlse, _new_like), *[None] * 7)


torch.library.register_autograd("klflow::cross_entropy", _backward_cross_entropy, setup_context=_setup_cross_entropy)


class _CrossEntropy(torch.autograd.Function):
    """(loss, lse) of rows, and the gradient of the logits for the expected upstream gradient of the loss (or an empty tensor).

    Derivatives of the gradient, and forward-mode derivatives, are those of plain torch operations: right, of any order, and
    with tensors of the size of the logits.
    """

    @staticmethod
    def forward(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, expected):
        options = (target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap)
        loss, lse = _new_rows(logits), _new_rows(logits)
        if expected is None:
            _klflow.cross_entropy_out(logits, *options, loss, lse)
            return loss, lse, logits.new_empty(0)
        grad = _new_like(logits)
        _klflow.cross_entropy_grad(logits, *options, expected, loss, lse, grad)
        return loss, lse, grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, ctx.expected = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        _setup_cross_entropy(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], output[1])
        ctx.grad = None if ctx.expected is None else output[2]

    @staticmethod
    def backward(ctx, dloss, dlse, _):
        nothing = [None] * 8
        if torch.is_grad_enabled():  # the gradient may be differentiated again
            return _plain_gradient(ctx, dloss, dlse), *nothing
        grad, ctx.grad = ctx.grad, None  # once: a second backward pass makes it again
        if grad is None or dloss is None or dlse is not None:
            return _cross_entropy_gradient(ctx, dloss, dlse, _new_like), *nothing
        if not torch.equal(dloss, ctx.expected):
            grad.mul_((dloss / ctx.expected)[:, None])
        return grad, *nothing

    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, target, weight, row_weight, lse = ctx.saved_tensors
        return *_tangents(tangent, logits, target, weight, row_weight, lse, *ctx.options), None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, row_weight, *scalars_and_wants):
        """The batch goes before the rows."""
        if in_dims[2] is not None:
            raise ValueError("weight: got a batch of them under vmap, allowed is the same for all")
        *scalars, _ = scalars_and_wants
        rows = zip((logits, target, row_weight), (*in_dims[:2], in_dims[3]), strict=True)
        logits, target, row_weight = (fold_batch(x, dim, info.batch_size) for x, dim in rows)
        loss, lse, _ = _CrossEntropy.apply(logits, target, weight, row_weight, *scalars, None)
        return (loss.view(info.batch_size, -1), lse.view(info.batch_size, -1), logits.new_empty(0)), (0, 0, None)


def _plain_gradient(ctx, dloss, dlse):
    """The gradient of the logits in plain torch operations."""
    logits, target, weight, row_weight, lse = ctx.saved_tensors

    def rows(x):
        ignore_index, label_smoothing, z_loss, softcap = _reference_options(ctx.options)
        return reference.loss_rows(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, row_weight)[:2]

    pull_back: Any = torch.func.vjp(rows, logits)[1]
    return pull_back(tuple(torch.zeros_like(lse) if d is None else d for d in (dloss, dlse)))[0]


def _reference_options(options):
    *others, softcap = options
    return *others, softcap or None


def _tangents(tangent, logits, target, weight, row_weight, lse, ignore_index, label_smoothing, z_loss, softcap):
    """Directional derivatives of (loss, lse): sum_j p_j dz_j for lse, and from it that of CrossEntropyParams' loss."""
    z, dz = logits.float(), tangent.float()
    if softcap:
        tanh = (z / softcap).tanh()
        z, dz = softcap * tanh, dz * (1 - tanh * tanh)
    dlse = (torch.softmax(z, -1) * dz).sum(-1)
    w = torch.ones_like(z[0]) if weight is None else weight
    uniform = label_smoothing / z.shape[1] * w
    kept = None
    if target.dim() == 2:
        qw = (1 - label_smoothing) * target.float() * w + uniform
        total, pulled = qw.sum(-1), (qw * dz).sum(-1)
    else:
        kept = target != ignore_index
        token = torch.where(kept, target, 0).long()
        own = (1 - label_smoothing) * w[token]
        total = own + uniform.sum()
        pulled = own * dz.gather(1, token[:, None])[:, 0] + (uniform * dz).sum(-1)
    dloss = (total + 2 * z_loss * lse) * dlse - pulled
    if row_weight is not None:
        dloss = dloss * row_weight
    return dloss if kept is None else torch.where(kept, dloss, 0.0), dlse


class _InplaceCrossEntropy(torch.autograd.Function):
    """cross_entropy whose backward pass puts the gradient where the logits were."""

    @staticmethod
    def forward(ctx, logits, target, *options):
        loss, lse = _klflow.cross_entropy(logits.detach(), target, *options)
        ctx.set_materialize_grads(False)
        _setup_cross_entropy(ctx, (logits, target, *options), (loss, lse))
        ctx.used = False
        return loss, lse

    @staticmethod
    def backward(ctx, dloss, dlse):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "cross_entropy(inplace_backward=True): create_graph=True, but the gradient takes the place of what it is a "
                "function of; leave inplace_backward out"
            )
        if ctx.used:
            raise RuntimeError(
                "cross_entropy(inplace_backward=True): a second backward pass, but the first replaced the logits"
            )
        grad = _cross_entropy_gradient(ctx, dloss, dlse, lambda logits: logits.detach())
        ctx.used = True
        torch.autograd.graph.increment_version(ctx.saved_tensors[0])
        return (grad, *[None] * 7)
