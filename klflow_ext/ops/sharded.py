"""The loss from hidden states where the output layer is split over processes, each of which holds some of the tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from klflow_ext.ops.arguments import INTEGERS, check_int, check_tensor, check_tokens, fail, looks_at_values, needs_grad
from klflow_ext.ops.linear import _gradients_again, _loss_rows, check_chunk, layer_arguments, mean_of
from klflow_ext.ops.loss import check_result, loss_arguments, mean_divisor

NOBODY = -1  # a local target: the row's token is of another process, or is ignored


def vocabulary_shard(vocab_size: int, group: Any = None) -> slice:
    """The tokens of this process where V are split over a group's, as torch.chunk and a DTensor's Shard(0) split them.

    Raises:
        ValueError: there are not two tokens for each process.
    """
    vocab_size = check_int("vocab_size", vocab_size, 2, 2**30, "an integer in [2, 2^30]")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    each = -(-vocab_size // ranks)
    if vocab_size - each * (ranks - 1) < 2:
        allowed = f"one of which {ranks} processes get {each} tokens each, the last at least 2"
        fail(ValueError, "vocab_size", vocab_size, allowed)
    return slice(rank * each, min((rank + 1) * each, vocab_size))


def sharded_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_size: int,
    *,
    group: Any = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    chunk_rows: int | None = None,
    logit_bytes: int | None = None,
) -> Any:
    """`linear_cross_entropy` where weight and bias hold this process's tokens alone, `vocabulary_shard(vocab_size, group)`.

    Every process of the group calls it with the same hidden states, targets and options, and gets the same loss. Beside its
    chunk of (rows x V / processes) logits a process holds numbers by the row. Two reductions of such make the lse and
    the targets' logits of all; the backward pass makes each chunk's logits again and reduces the gradient of hidden once, so
    that every process has all of it, and of weight and bias that of its own tokens.

    Args:
        hidden: (*rows, D).
        weight: (tokens of this process, D).
        target: token ids of shape rows, of the whole vocabulary.
        vocab_size: V, of all processes together.
        group: whose processes they are; None: all.
        bias: (tokens of this process,).
        chunk_rows, logit_bytes: of this process's logits. These and the other options are those of `linear_cross_entropy`.

    Returns: loss (float32), or (loss, lse). Gradients are of the first order, and not under torch.func or torch.compile.
    Errors: as `linear_cross_entropy`, before anything is sent.
    """
    check_result(reduction, return_lse)
    own = vocabulary_shard(vocab_size, group)
    flat, shape = layer_arguments(hidden, weight, bias, own.stop - own.start)
    check_tensor("target", target, INTEGERS)
    tokens, options = loss_arguments(
        shape, vocab_size, flat.device, target, None, row_weight, ignore_index, label_smoothing, z_loss, None
    )
    _, row_weight, ignore_index, smoothing, z_loss, _ = options
    if looks_at_values(tokens):
        check_tokens("target", tokens, vocab_size, ignore_index=ignore_index)
    size = check_chunk(flat, own.stop - own.start, chunk_rows, logit_bytes)
    kept = tokens != ignore_index
    here = kept & (tokens >= own.start) & (tokens < own.stop)
    local = torch.where(here, tokens - own.start, NOBODY)
    inputs = (flat, weight, bias)
    if needs_grad(*(x for x in inputs if x is not None)):
        lse, logit, total = _Rows.apply(*inputs, local, group, size, smoothing > 0)
    else:
        lse, logit, total = _rows(*inputs, local, group, size, smoothing > 0)[:3]
    loss = lse - (1 - smoothing) * logit + z_loss * lse * lse
    if smoothing > 0:
        loss = loss - smoothing / vocab_size * total
    if row_weight is not None:
        loss = loss * row_weight
    unknown = kept & ((tokens < 0) | (tokens >= vocab_size))  # where nobody may look at the values in time
    loss = torch.where(kept, loss, 0.0).masked_fill(unknown, math.nan)
    if reduction == "none":
        loss = loss.reshape(shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = mean_of(loss, mean_divisor(tokens, *options))
    return (loss, lse.reshape(shape)) if return_lse else loss


def _options(chunk_rows):
    """Those of the operators: the plain loss."""
    return None, None, NOBODY, 0.0, 0.0, 0.0, chunk_rows


def _rows(hidden, weight, bias, local, group, chunk_rows, with_total):
    """(lse, the target's logit or 0, the sum of the logits or 0) over all processes' tokens, and the lse of this one's."""
    loss, own_lse = _loss_rows(hidden, weight, bias, local, *_options(chunk_rows))
    largest = own_lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    sums = [(own_lse - largest).exp(), torch.where(local == NOBODY, 0.0, own_lse - loss)]
    if with_total:
        offset = 0.0 if bias is None else bias.sum(dtype=torch.float32)
        sums.append(hidden.float() @ weight.sum(0, dtype=torch.float32) + offset)
    both = torch.stack(sums)
    dist.all_reduce(both, group=group)
    return largest + both[0].log(), both[1], both[2] if with_total else torch.zeros_like(own_lse), own_lse


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, local, group, chunk_rows, with_total):
        lse, logit, total, own_lse = _rows(hidden, weight, bias, local, group, chunk_rows, with_total)
        ctx.save_for_backward(hidden, weight, bias, local, lse, own_lse)
        ctx.settings = group, chunk_rows, with_total
        return lse, logit, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dlse, dlogit, dtotal):
        """A logit's gradient is dlse p + dlogit [it is the target's] + dtotal. The operator's p is of this process's tokens
        alone, and its loss has the gradient p - [it is the target's], of rows with a target here."""
        hidden, weight, bias, local, lse, own_lse = ctx.saved_tensors
        group, chunk_rows, with_total = ctx.settings
        wanted = ctx.needs_input_grad[:3]
        share = dlse * (own_lse - lse).exp()
        dlse = torch.where(local == NOBODY, share, share + dlogit)
        inputs = (hidden, weight, bias, local, *_options(chunk_rows))
        dhidden, dweight, dbias = _gradients_again(own_lse, -dlogit, dlse, *inputs, *wanted)
        if with_total and wanted[0]:
            dhidden = dhidden.float().addr_(dtotal, weight.sum(0, dtype=torch.float32))
        if with_total and wanted[1]:
            dweight += dtotal @ hidden.float()
        if with_total and wanted[2]:
            dbias += dtotal.sum()
        if wanted[0]:
            dhidden = dhidden.float()  # the sum over the processes is not rounded on the way
            dist.all_reduce(dhidden, group=group)
        gradients = (dhidden, dweight, dbias)
        found = [
            g.to(x.dtype) if w else None for g, x, w in zip(gradients, (hidden, weight, bias), wanted, strict=True)
        ]
        return *found, *[None] * 4
