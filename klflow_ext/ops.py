"""The kernels as functions. Rows are positions of any leading shape; the simplex axis, of V tokens, is last.

Every function checks its arguments before any work and raises TypeError, ValueError or IndexError naming the argument, its
value and what is allowed. Floating tensors are float32, bfloat16 or float16 with float32 arithmetic inside; `reference`
holds a plain PyTorch twin of each, which also runs in float64. The operators below are torch.ops.klflow.*: functional or
with declared mutation, with fake kernels, usable under torch.compile(fullgraph=True) and CUDA graphs.

Randomness: `rng` is an int seed, a torch.Generator, or an int64 tensor of (seed, step), shape (2,) or (*rows, 2). Noise is a
function of (seed, step, global row, column) alone, global row = flattened row + row_offset: the same on every device and
for any split of the batch. Conventions: c = log(V / beta - V + 1) is the logit gap of the smoothed target.
"""

import os

import torch

__all__ = [
    "noise_interpolate", "logit_interpolate", "cross_entropy", "cross_entropy_grad", "topk_sample", "topk_renoise",
    "euler_step",
]  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
_klflow = torch.ops.klflow
_DEBUG_CHECK = os.environ.get("KLFLOW_CHECK") == "1"  # also check values on CUDA, which synchronises


# ---- argument checks: a few words of the message are the same everywhere: "<name>: got <value>, allowed is <what>"


def _fail(error, name, value, allowed):
    raise error(f"{name}: got {value}, allowed is {allowed}")


def _check_scalar(name, value, low, high, allowed, open_low=False, open_high=False):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(TypeError, name, repr(value), allowed)
    if not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
        _fail(ValueError, name, value, allowed)
    return float(value)


def _check_beta(beta):
    return _check_scalar("beta", beta, 0, 1, "a number in (0, 1)", True, True)


def _check_temperature(temperature):
    return _check_scalar("temperature", temperature, 0, float("inf"), "a positive finite number", True, True)


def _check_int(name, value, low, high, allowed):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        _fail(TypeError, name, repr(value), allowed)
    if value < low or value > high:
        _fail(ValueError, name, value, allowed)
    return value


def _check_tensor(name, value, dtypes, device=None):
    if not isinstance(value, torch.Tensor):
        _fail(TypeError, name, type(value).__name__, "a tensor")
    if value.dtype not in dtypes:
        _fail(TypeError, name, value.dtype, " or ".join(str(d) for d in dtypes))
    if device is not None and value.device != device:
        _fail(ValueError, name, f"a tensor on {value.device}", f"the device of the other arguments, {device}")
    return value


def _check_vocab(name, tensor):
    if tensor.dim() < 1 or tensor.shape[-1] < 2:
        _fail(ValueError, name, f"shape {tuple(tensor.shape)}", "a last axis of V >= 2 tokens")
    if tensor.shape[-1] > 2**30:
        _fail(ValueError, name, f"V = {tensor.shape[-1]}", "V <= 2^30")
    return tensor.shape[-1]


def _looks_at_values(device):
    """Whether values may be read: free on the CPU, a synchronisation on CUDA, impossible under torch.compile."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or (device.type == "cuda" and _DEBUG_CHECK))


def _broadcast(name, value, shape, rows):
    try:
        return value.expand(shape).reshape(rows)
    except RuntimeError:
        return _fail(ValueError, name, f"shape {tuple(value.shape)}", f"a shape that broadcasts to {tuple(shape)}")


def _row_scalars(name, value, shape, rows, device, low=None, high=None):
    """Floats that broadcast to the rows, as (rows,) float32; each within [low, high]."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if low is not None:
            _check_scalar(name, value, low, high, f"numbers in [{low}, {high}]")
        return torch.full((1,), float(value), device=device).expand(rows)
    _check_tensor(name, value, (*FLOATS, torch.float64), device)
    if low is not None and _looks_at_values(device) and value.numel():
        bad = ~((value >= low) & (value <= high))
        if bad.any():
            _fail(ValueError, name, value[bad].reshape(-1)[0].item(), f"numbers in [{low}, {high}]")
    return _broadcast(name, value.float(), shape, rows)


def _token_rows(name, value, shape, rows, vocab, device, where=None, ignore_index=None):
    """Token ids that broadcast to the rows, as (rows,); those that count must lie in [0, V)."""
    _check_tensor(name, value, INTEGERS, device)
    flat = _broadcast(name, value, shape, rows)
    if _looks_at_values(device) and rows:
        bad = (flat < 0) | (flat >= vocab)
        if where is not None:
            bad &= where
        if ignore_index is not None:
            bad &= flat != ignore_index
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"{name}: row {row} holds {flat[row].item()}, allowed is 0 to V - 1 = {vocab - 1}"
                + ("" if ignore_index is None else f" or ignore_index = {ignore_index}")
            )
    return flat


def _flags(name, value, shape, rows, device):
    if value is None:
        return None
    _check_tensor(name, value, (torch.bool,), device)
    return _broadcast(name, value, shape, rows)


def _given_known(given, known, shape, rows, vocab, device):
    flags = _flags("given", given, shape, rows, device)
    if flags is None:
        return None, None
    if known is None:
        _fail(ValueError, "known", None, "the tokens of the given rows, needed where given is")
    return flags, _token_rows("known", known, shape, rows, vocab, device, where=flags)


def _rng(rng, shape, rows, device):
    """(seed, step) pairs as the kernels take them: (2,) or (rows, 2) int64 on the device."""
    if isinstance(rng, torch.Generator):
        rng = int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
    if isinstance(rng, int) and not isinstance(rng, bool):
        if not -(2**63) <= rng < 2**64:
            _fail(ValueError, "rng", rng, "a seed that fits in 64 bits")
        seed = rng - 2**64 if rng >= 2**63 else rng
        return torch.tensor([seed, 0], dtype=torch.int64, device=device)
    _check_tensor("rng", rng, (torch.int64,), device)
    if rng.shape == (2,):
        return rng.contiguous()
    if rng.shape != (*shape, 2):
        _fail(ValueError, "rng", f"shape {tuple(rng.shape)}", f"(2,) or {(*shape, 2)}")
    return rng.reshape(rows, 2).contiguous()


def _row_offset(row_offset):
    return _check_int("row_offset", row_offset, 0, 2**32 - 1, "an integer in [0, 2^32)")


def _as_rows(tensor, vocab):
    """(rows, V) with unit stride along V: a view where the strides allow it, else a copy."""
    flat = tensor.reshape(-1, vocab)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _output(name, out, shape, dtype, device):
    """(tensor to return, its (rows, V) view); out must be viewable, so that writing reaches it."""
    vocab = shape[-1]
    if out is None:
        if dtype not in FLOATS:
            _fail(TypeError, "dtype", dtype, " or ".join(str(d) for d in FLOATS))
        out = torch.empty(shape, dtype=dtype, device=device)
        return out, out.view(-1, vocab) if out.numel() else out.reshape(-1, vocab)
    _check_tensor(name, out, FLOATS, device)
    if out.shape != torch.Size(shape):
        _fail(ValueError, name, f"shape {tuple(out.shape)}", tuple(shape))
    if out.numel() == 0:
        return out, out.reshape(-1, vocab)
    try:
        flat = out.view(-1, vocab)
    except RuntimeError:
        flat = None
    if flat is None or flat.stride(1) != 1:
        _fail(ValueError, name, f"strides {out.stride()}", "rows with stride 1 along V that can be viewed as (rows, V)")
    return out, flat


# ---- the path


def noise_interpolate(
    target, t, rng, *, vocab_size, beta=0.01, given=None, row_offset=0, dtype=None, log=False, out=None
):
    """Noisy rows x_t on the KL geodesic from fresh Dirichlet(1) noise to the smoothed target, noise made in the kernel.

    x_t[j] is proportional to E_j^(1 - t) exp(t c [j = target]), E_j = -log U_j i.i.d. Exp(1) (DESIGN: KL geodesic; the
    paper's x_t = softmax((1 - t) log x_0 + t log x_1)). A given row is exactly onehot(target) at every t.

    Args:
        target: int64 or int32 token ids, any shape `rows`, in [0, V).
        t: time in [0, 1], number or tensor that broadcasts to rows.
        rng: seed, generator or (seed, step) tensor; see the module.
        vocab_size: V >= 2. beta: smoothing in (0, 1). given: bool, broadcasts to rows.
        row_offset: global index of the first row. dtype: of the result (float32). log: return log x_t instead.
        out: tensor (*rows, V) to write into; on a CPU this saves page faults.

    Returns: (*rows, V) on the device of target.
    Errors: TypeError, ValueError; IndexError for a target outside [0, V) (on CUDA its row is NaN; KLFLOW_CHECK=1 checks).
    """
    _check_tensor("target", target, INTEGERS)
    vocab = _check_int("vocab_size", vocab_size, 2, 2**30, "an integer V in [2, 2^30]")
    shape, rows, device = target.shape, target.numel(), target.device
    beta = _check_beta(beta)
    result, flat = _output("out", out, (*shape, vocab), dtype or torch.float32, device)
    if out is not None and dtype is not None and out.dtype != dtype:
        _fail(TypeError, "dtype", dtype, f"the dtype of out, {out.dtype}")
    _klflow.noise_interpolate(
        _token_rows("target", target, shape, rows, vocab, device),
        _row_scalars("t", t, shape, rows, device, 0, 1),
        _rng(rng, shape, rows, device),
        _flags("given", given, shape, rows, device),
        beta, _row_offset(row_offset), bool(log), flat,
    )  # fmt: skip
    return result


def logit_interpolate(log_x0, log_x1, t, *, beta=0.01, log=False, out=None):
    """Points of the KL geodesic between given end points: softmax((1 - t) log_x0 + t log_x1).

    Args:
        log_x0: (*rows, V) logits (log-probabilities up to a constant per row).
        log_x1: the same shape and dtype, or integer targets of shape rows: then log x_1 = c onehot(target) up to a constant.
        t: time in [0, 1], broadcasts to rows. At t = 0 (1) the other end point is not read, so infinite logits are fine.
        log: return log-probabilities. out: tensor to write into (then not differentiable).

    Returns: (*rows, V), dtype of log_x0. Differentiable in log_x0, log_x1 and t.
    """
    _check_tensor("log_x0", log_x0, FLOATS)
    vocab = _check_vocab("log_x0", log_x0)
    shape, device = log_x0.shape[:-1], log_x0.device
    rows = shape.numel()
    beta = _check_beta(beta)
    if isinstance(log_x1, torch.Tensor) and log_x1.dtype in INTEGERS:
        end = _token_rows("log_x1", log_x1, shape, rows, vocab, device)
    else:
        _check_tensor("log_x1", log_x1, (log_x0.dtype,), device)
        if log_x1.shape != log_x0.shape:
            _fail(ValueError, "log_x1", f"shape {tuple(log_x1.shape)}", f"the shape of log_x0, {tuple(log_x0.shape)}")
        end = _as_rows(log_x1, vocab)
    times = _row_scalars("t", t, shape, rows, device, 0, 1)
    start = _as_rows(log_x0, vocab)
    if out is None:
        return _klflow.logit_interpolate(start, end, times, beta, bool(log)).reshape(log_x0.shape)
    result, flat = _output("out", out, log_x0.shape, None, device)
    _klflow.logit_interpolate_out(start, end, times, beta, bool(log), flat)
    return result


# ---- the loss


def _loss_arguments(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap):
    """Flattened and checked arguments of the cross-entropy operators, and the divisor of reduction='mean'."""
    _check_tensor("logits", logits, FLOATS)
    vocab = _check_vocab("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    rows = shape.numel()
    _check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1, "an integer")
    smoothing = _check_scalar("label_smoothing", label_smoothing, 0, 1, "a number in [0, 1]")
    z_loss = _check_scalar("z_loss", z_loss, 0, float("inf"), "a finite number >= 0", open_high=True)
    if softcap is not None:
        _check_scalar("softcap", softcap, 0, float("inf"), "None or a positive finite number", True, True)
    if weight is not None:
        _check_tensor("weight", weight, FLOATS, device)
        if weight.shape != (vocab,):
            _fail(ValueError, "weight", f"shape {tuple(weight.shape)}", f"({vocab},)")
        weight = weight.float().contiguous()
    if row_weight is not None:
        row_weight = _row_scalars("row_weight", row_weight, shape, rows, device)
    if isinstance(target, torch.Tensor) and target.dtype in FLOATS:
        _check_tensor("target", target, FLOATS, device)
        if target.shape != logits.shape:
            _fail(
                ValueError,
                "target",
                f"shape {tuple(target.shape)} of soft targets",
                f"that of logits, {tuple(logits.shape)}",
            )
        tokens = _as_rows(target.detach(), vocab)
        per_row = torch.ones(rows, device=device) if row_weight is None else row_weight
    else:
        tokens = _token_rows("target", target, shape, rows, vocab, device, ignore_index=ignore_index)
        kept = tokens != ignore_index
        if weight is None:
            per_row = kept.float()
        else:
            per_row = torch.where(kept, weight[tokens.clamp(0, vocab - 1).long()], 0.0)
        if row_weight is not None:
            per_row = torch.where(kept, per_row * row_weight, 0.0)
    options = (weight, row_weight, ignore_index, smoothing, z_loss, 0.0 if softcap is None else float(softcap))
    return _as_rows(logits, vocab), tokens, options, per_row.sum()


def cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, row_weight=None,
    reduction="mean", return_lse=False, inplace_backward=False,
):  # fmt: skip
    """Fused log-softmax cross-entropy over large vocabularies; log-probabilities are never built.

    loss_n = row_weight_n (sum_j q_nj w_j (lse_n - z_nj) + z_loss lse_n^2), z = softcap tanh(logits / softcap),
    q = (1 - label_smoothing) onehot(target) + label_smoothing / V; equal to torch.nn.functional.cross_entropy where that
    has the option. "mean" divides by the sum of w[target] row_weight over kept rows (NaN if there is none, as in torch).

    Args:
        logits: (*rows, V). target: token ids of shape rows, or soft targets (floats) of the shape of logits.
        weight: (V,) class weights. ignore_index: rows with this target have zero loss and gradient.
        row_weight: a weight per row. reduction: "mean", "sum" or "none" (any upstream gradient per row).
        return_lse: also return lse (*rows), differentiable.
        inplace_backward: the backward pass writes the gradient over logits, which are then no longer usable.

    Returns: loss (float32), or (loss, lse). Gradients flow to logits only.
    Errors: IndexError for a target outside [0, V) (on CUDA the row's loss is NaN; KLFLOW_CHECK=1 checks there too).
    """
    if reduction not in ("mean", "sum", "none"):
        _fail(ValueError, "reduction", repr(reduction), "'mean', 'sum' or 'none'")
    flat, tokens, options, divisor = _loss_arguments(
        logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap
    )
    if inplace_backward and not torch.compiler.is_compiling():  # the compiler plans its own memory
        loss, lse = _InplaceCrossEntropy.apply(flat, tokens, *options)
    else:
        loss, lse = _klflow.cross_entropy(flat, tokens, *options)
    shape = logits.shape[:-1]
    if reduction == "none":
        loss = loss.reshape(shape)
    else:
        loss = loss.sum() if reduction == "sum" else loss.sum() / divisor
    return (loss, lse.reshape(shape)) if return_lse else loss


def cross_entropy_grad(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, row_weight=None,
    dloss=None, out=None,
):  # fmt: skip
    """Loss, lse and the gradient of the logits from one read of them, without autograd; options as in `cross_entropy`.

    dloss: upstream gradient per row, broadcasts to rows; None: that of the mean, so that grad = d mean(loss) / d logits.
    out: where the gradient goes, of the dtype of logits; may be logits itself.
    Returns: (loss (*rows), lse (*rows), grad (*rows, V)), loss and lse in float32.
    """
    flat, tokens, options, divisor = _loss_arguments(
        logits.detach() if isinstance(logits, torch.Tensor) else logits,
        target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    shape, rows, device = logits.shape[:-1], flat.shape[0], logits.device
    if dloss is None:
        upstream = (1.0 / divisor).reshape(1).expand(rows)
    else:
        upstream = _row_scalars("dloss", dloss, shape, rows, device)
    grad, flat_grad = _output("out", out, logits.shape, logits.dtype, device)
    if grad.dtype != logits.dtype:
        _fail(TypeError, "out", grad.dtype, f"the dtype of logits, {logits.dtype}")
    loss, lse = torch.empty(rows, device=device), torch.empty(rows, device=device)
    _klflow.cross_entropy_grad(flat, tokens, *options, upstream, loss, lse, flat_grad)
    return loss.reshape(shape), lse.reshape(shape), grad


# ---- the sampler's steps


def _topk_arguments(logits, k, rng, temperature, top_p, row_offset):
    _check_tensor("logits", logits, FLOATS)
    vocab = _check_vocab("logits", logits)
    _check_int("k", k, 1, vocab, f"an integer in [1, V = {vocab}]")
    _check_scalar("top_p", top_p, 0, 1, "a number in (0, 1]", open_low=True)
    shape = logits.shape[:-1]
    rows = shape.numel()
    return shape, rows, vocab, (_as_rows(logits.detach(), vocab), k), (
        _rng(rng, shape, rows, logits.device), _check_temperature(temperature), float(top_p), _row_offset(row_offset)
    )  # fmt: skip


def topk_sample(logits, k, rng, *, temperature=1.0, top_p=1.0, row_offset=0):
    """Draws a token per row from the softmax of its k largest logits / temperature.

    Ties go to the lowest index; k = 1 is argmax. top_p keeps, of those k, the smallest most likely set with mass >= top_p.
    The draw is argmax_j (logit_j / T - log E_j) with E_j ~ Exp(1) accurate for small E (streams 1 and 2 of the noise).

    Args: logits (*rows, V); k in [1, V]; rng: see the module; temperature > 0; top_p in (0, 1].
    Returns: (token int64 (*rows), log_prob float32 (*rows)), log_prob under the kept, renormalised distribution. A row with a
        NaN, or with no finite maximum, gives token -1 and log_prob NaN.
    """
    shape, rows, _, head, (state, temperature, top_p, row_offset) = _topk_arguments(
        logits, k, rng, temperature, top_p, row_offset
    )
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_prob = torch.empty(rows, device=logits.device)
    _klflow.topk_sample(*head, state, temperature, top_p, row_offset, token, log_prob)
    return token.reshape(shape), log_prob.reshape(shape)


def topk_renoise(
    logits,
    k,
    t_next,
    rng,
    *,
    temperature=1.0,
    top_p=1.0,
    beta=0.01,
    given=None,
    known=None,
    row_offset=0,
    dtype=None,
    out=None,
):
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
    flags, tokens = _given_known(given, known, shape, rows, vocab, device)
    times = _row_scalars("t_next", t_next, shape, rows, device, 0, 1)
    beta = _check_beta(beta)
    result, flat = _output("out", out, logits.shape, dtype or logits.dtype, device)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    _klflow.topk_renoise(*head, times, state, temperature, top_p, beta, flags, tokens, row_offset, token, flat)
    return token.reshape(shape), result


def euler_step(log_x, logits, rate, *, temperature=1.0, beta=0.01, given=None, known=None, dtype=None, inplace=False):
    """One step of the basic sampler: the marginal ODE dl/dtau = c p - l along the KL geodesic (Corollary 3.3).

    p = softmax(logits / temperature), l = (1 - rate) log_x + rate c p; returns log softmax(l) and softmax(l).

    Args:
        log_x: (*rows, V) log-probabilities of the state, float32 advised. logits: (*rows, V).
        rate: 1 - e^-h (exact for frozen p) or h (the paper's Euler), in [0, 1], broadcasts to rows.
        given, known: given rows are exactly onehot(known), in log 0 and -inf. dtype: of x_next (that of logits).
        inplace: write the new state over log_x.
    Returns: (log_x_next in the dtype of log_x, x_next), both (*rows, V).
    """
    _check_tensor("logits", logits, FLOATS)
    vocab = _check_vocab("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    rows = shape.numel()
    _check_tensor("log_x", log_x, FLOATS, device)
    if log_x.shape != logits.shape:
        _fail(ValueError, "log_x", f"shape {tuple(log_x.shape)}", f"the shape of logits, {tuple(logits.shape)}")
    rates = _row_scalars("rate", rate, shape, rows, device, 0, 1)
    temperature, beta = _check_temperature(temperature), _check_beta(beta)
    flags, tokens = _given_known(given, known, shape, rows, vocab, device)
    x_next, flat = _output("dtype", None, logits.shape, dtype or logits.dtype, device)
    state, state_flat = _output("log_x", log_x if inplace else None, logits.shape, log_x.dtype, device)
    source = state_flat if inplace else _as_rows(log_x, vocab)
    _klflow.euler_step(source, _as_rows(logits, vocab), rates, temperature, beta, flags, tokens, state_flat, flat)
    return state, x_next


# ---- fake kernels (shapes and dtypes only) and gradients


def _fake_nothing(*arguments):
    return None


for _name in ("noise_interpolate", "logit_interpolate_out", "cross_entropy_grad", "cross_entropy_backward", "topk_sample",
              "topk_renoise", "euler_step"):  # fmt: skip
    torch.library.register_fake(f"klflow::{_name}")(_fake_nothing)


@torch.library.register_fake("klflow::logit_interpolate")
def _(log_x0, log_x1, t, beta, log):
    return log_x0.new_empty(log_x0.shape)


@torch.library.register_fake("klflow::cross_entropy")
def _(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap):
    return (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    )


def _setup_logit_interpolate(ctx, inputs, output):
    log_x0, log_x1, t, _, log = inputs
    ctx.save_for_backward(log_x0, log_x1, t, output)
    ctx.log, ctx.beta = log, inputs[3]


def _backward_logit_interpolate(ctx, upstream):
    log_x0, log_x1, t, output = ctx.saved_tensors
    y, g = output.float(), upstream.float()
    if ctx.log:
        dl = g - y.exp() * g.sum(-1, keepdim=True)
    else:
        dl = y * (g - (y * g).sum(-1, keepdim=True))
    soft = log_x1.dim() == 2
    d0 = dl * (1 - t)[:, None]
    d1 = (dl * t[:, None]).to(log_x1.dtype) if soft else None
    dt = None
    if ctx.needs_input_grad[2]:
        if soft:
            dt = (dl * (log_x1.float() - log_x0.float())).sum(-1)
        else:
            vocab = log_x0.shape[1]
            c = float(torch.log(torch.tensor(vocab / ctx.beta - vocab + 1, dtype=torch.float64)))
            dt = c * dl.gather(1, log_x1.long()[:, None])[:, 0] - (dl * log_x0.float()).sum(-1)
    return d0.to(log_x0.dtype), d1, dt, None, None


torch.library.register_autograd(
    "klflow::logit_interpolate", _backward_logit_interpolate, setup_context=_setup_logit_interpolate
)


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
    return (grad, *[None] * 7)


def _backward_cross_entropy(ctx, dloss, dlse):
    return _cross_entropy_gradient(
        ctx, dloss, dlse, lambda logits: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    )


torch.library.register_autograd("klflow::cross_entropy", _backward_cross_entropy, setup_context=_setup_cross_entropy)


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
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, dlse):
        if ctx.used:
            raise RuntimeError(
                "cross_entropy(inplace_backward=True): a second backward pass, but the first replaced the logits"
            )
        result = _cross_entropy_gradient(ctx, dloss, dlse, lambda logits: logits.detach())
        ctx.used = True
        torch.autograd.graph.increment_version(ctx.saved_tensors[0])
        return result
