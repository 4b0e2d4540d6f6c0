"""Argument checks that the ops share: tensors, rows and what broadcasts to them."""

import math
import os

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from klflow_ext.checks import LEAST, MOST, check_int, check_scalar, fail

Scalar = float | torch.Tensor  # numbers that broadcast to the rows
Rng = int | torch.Generator | torch.Tensor  # see klflow_ext.ops
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
DEBUG_CHECK = os.environ.get("KLFLOW_CHECK") == "1"  # also check values on CUDA, which synchronises


def check_beta(beta):
    return check_scalar("beta", beta, LEAST, 1, f"a number in [{LEAST}, 1)", open_high=True)


def check_tensor(name, value, dtypes, device=None):
    if not isinstance(value, torch.Tensor):
        fail(TypeError, name, type(value).__name__, "a tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        fail(TypeError, name, f"a tensor of layout {kind}", "a dense one")
    if value.dtype not in dtypes:
        fail(TypeError, name, value.dtype, " or ".join(str(d) for d in dtypes))
    if device is not None and value.device != device:
        fail(ValueError, name, f"a tensor on {value.device}", f"the device of the other arguments, {device}")
    return value


def check_vocab(name, tensor):
    if tensor.dim() < 1 or tensor.shape[-1] < 2:
        fail(ValueError, name, f"shape {tuple(tensor.shape)}", "a last axis of V >= 2 tokens")
    if tensor.shape[-1] > 2**30:
        fail(ValueError, name, f"V = {tensor.shape[-1]}", "V <= 2^30")
    return tensor.shape[-1]


def looks_at_values(tensor):
    """Whether its values may be read: free on the CPU, a synchronisation on CUDA, impossible where something traces."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or get_proxy_mode() is not None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and DEBUG_CHECK)


def refuse_gradient(name, value, flows):
    """ValueError for an argument that has no gradient but asks for one; flows: what gradients flow to."""
    if value.requires_grad and torch.is_grad_enabled():
        fail(ValueError, name, "a tensor that requires grad", f"one that does not, as gradients flow to {flows} only")


def broadcast(name, value, shape, rows):
    if value.shape == shape:
        return value if len(shape) == 1 else value.reshape(rows)
    try:
        return value.expand(shape).reshape(rows)
    except RuntimeError:
        return fail(ValueError, name, f"shape {tuple(value.shape)}", f"a shape that broadcasts to {tuple(shape)}")


def row_scalars(name, value, shape, rows, device, low=None, high=None):
    """Floats that broadcast to the rows, as (rows,) float32; each within [low, high]."""
    if not isinstance(value, torch.Tensor):
        least, most = (-3e38, 3e38) if low is None else (low, high)
        value = check_scalar(name, value, least, most, f"numbers in [{least}, {most}]")
        if torch.compiler.is_compiling():  # a product keeps a symbolic number symbolic, where torch.full would fix it
            return (torch.ones(1, dtype=torch.float32, device=device) * value).expand(rows)
        return torch.full((1,), value, dtype=torch.float32, device=device).expand(rows)
    whole = INTEGERS if value.dim() == 0 else ()
    check_tensor(name, value, (*FLOATS, torch.float64, *whole), device)
    if low is not None and looks_at_values(value) and value.numel():
        bad = ~((value >= low) & (value <= high))
        if bad.any():
            fail(ValueError, name, value[bad].reshape(-1)[0].item(), f"numbers in [{low}, {high}]")
    return broadcast(name, value.float(), shape, rows)


def temperature_rows(temperature, shape, rows, device):
    return row_scalars("temperature", temperature, shape, rows, device, LEAST, MOST)


def token_rows(name, value, shape, rows, vocab, device, where=None, ignore_index=None):
    """Token ids that broadcast to the rows, as (rows,); those that count must lie in [0, V).

    The CPU operators check that themselves, with the same error; here it would cost more than a row's work.
    """
    check_tensor(name, value, INTEGERS, device)
    flat = broadcast(name, value, shape, rows)
    if device.type != "cpu" and looks_at_values(flat):
        check_tokens(name, flat, vocab, where, ignore_index)
    return flat


def check_tokens(name, flat, vocab, where=None, ignore_index=None):
    """flat: (rows,) or (rows, K)."""
    bad = (flat < 0) | (flat >= vocab)
    if where is not None:
        bad &= where
    if ignore_index is not None:
        bad &= flat != ignore_index
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"{name}: row {index[0]} holds {flat[index].item()}, allowed is 0 to V - 1 = {vocab - 1}"
            + ("" if ignore_index is None else f" or ignore_index = {ignore_index}")
        )


def row_flags(name, value, shape, rows, device):
    if value is None:
        return None
    check_tensor(name, value, (torch.bool,), device)
    return broadcast(name, value, shape, rows)


def given_known(given, known, shape, rows, vocab, device):
    flags = row_flags("given", given, shape, rows, device)
    if flags is None:
        return None, None
    if known is None:
        fail(ValueError, "known", None, "the tokens of the given rows, needed where given is")
    return flags, token_rows("known", known, shape, rows, vocab, device, where=flags)


def rng_state(rng, shape, rows, device, row_offset=0):
    """The noise state as the kernels take it, int64 on the device: (2,), (rows, 2), or (rows, 3) with the row's number."""
    if not isinstance(rng, torch.Tensor) or rng.dim() == 0:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            fail(ValueError, "rng", repr(rng), "under CUDA graph capture the (seed, step) tensor on the device")
        if isinstance(rng, torch.Generator):
            rng = torch.randint(2**63 - 1, (), generator=rng, device=rng.device, dtype=torch.int64)
        seed = check_int("rng", rng, -(2**63), 2**64 - 1, "a seed that fits in 64 bits, a torch.Generator or a tensor")
        state = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], dtype=torch.int64, device=device)
    else:
        check_tensor("rng", rng, (torch.int64,), device)
        if rng.shape == (2,):
            state = rng.contiguous()
        elif len(shape) > 1 and rng.shape == (*shape[:-1], 2):  # a state for each sequence: rows are numbered within it
            row = torch.arange(row_offset, row_offset + shape[-1], dtype=torch.int64, device=device).expand(shape)
            state = torch.cat([rng[..., None, :].expand(*shape, 2), row[..., None]], -1).reshape(rows, 3)
        elif rng.shape == (*shape, 2):
            state = rng.reshape(rows, 2).contiguous()
        else:
            each = f", {(*shape[:-1], 2)}" if len(shape) > 1 else ""
            fail(ValueError, "rng", f"shape {tuple(rng.shape)}", f"(2,){each} or {(*shape, 2)}")
    return state


def check_row_offset(row_offset):
    return check_int("row_offset", row_offset, 0, 2**32 - 1, "an integer in [0, 2^32)")


def check_log_prior(log_prior, vocab, device):
    check_tensor("log_prior", log_prior, (*FLOATS, torch.float64), device)
    if log_prior.shape != (vocab,) or vocab < 2:
        fail(
            ValueError, "log_prior", f"shape {tuple(log_prior.shape)}", "one log-probability for each of V >= 2 tokens"
        )
    refuse_gradient("log_prior", log_prior, "weight")
    if looks_at_values(log_prior) and not log_prior.max() < float("inf"):  # NaN too
        fail(ValueError, "log_prior", f"a maximum of {log_prior.max().item()}", "numbers below infinity")
    return log_prior.detach().float().contiguous()


def boost_rows(boost, target):
    """The boosts of the slots of each row, (rows, K) float32, or None."""
    if boost is None:
        return None
    check_tensor("boost", boost, (*FLOATS, torch.float64), target.device)
    if boost.dim() < 1 or boost.shape[-1] < 1 or boost.shape != target.shape:
        fail(
            ValueError,
            "boost",
            f"shape {tuple(boost.shape)}",
            f"that of target, {tuple(target.shape)}, (*rows, K >= 1)",
        )
    refuse_gradient("boost", boost, "weight")
    if looks_at_values(boost) and boost.isnan().any():
        fail(ValueError, "boost", "nan", "numbers")
    return boost.detach().float().reshape(math.prod(boost.shape[:-1]), boost.shape[-1]).contiguous()


def noise_arguments(target, t, rng, beta, given, row_offset, vocab, boost=None):
    """(target, t, rng, given) as flat rows, (beta, row_offset). With boosts, target is (*rows, K) and then (rows, K)."""
    shape, device = target.shape if boost is None else target.shape[:-1], target.device
    rows = math.prod(shape)
    if boost is None:
        tokens = token_rows("target", target, shape, rows, vocab, device)
    else:
        tokens = target.reshape(rows, target.shape[-1]).contiguous()
        if device.type != "cpu" and looks_at_values(tokens):
            check_tokens("target", tokens, vocab, ignore_index=-1)
    times, row_offset = row_scalars("t", t, shape, rows, device, 0, 1), check_row_offset(row_offset)
    refuse_gradient("t", times, "weight, where there is one,")
    return (
        tokens,
        times,
        rng_state(rng, shape, rows, device, row_offset),
        row_flags("given", given, shape, rows, device),
    ), (check_beta(beta), row_offset)


def as_rows(tensor, vocab):
    """(rows, V) with unit stride along V: a view where the strides allow it, else a copy."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, vocab)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def is_transformed(*tensors):
    """Whether torch.func or forward-mode differentiation looks on: the operators below know neither, autograd Functions do."""
    if torch.compiler.is_compiling():
        return False
    level = torch.autograd.forward_ad._current_level >= 0
    return any(
        t is not None
        and (
            torch._C._functorch.is_functorch_wrapped_tensor(t)
            or (level and torch.autograd.forward_ad.unpack_dual(t).tangent is not None)
        )
        for t in tensors
    )


def fold_batch(tensor, dim, batch):
    """Rows of a batch under vmap, (batch * rows, ...): dim is where the batch is, None where all share the rows."""
    if tensor is None:
        return None
    tensor = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(-1, *tensor.shape[2:])


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def result_dtype(dtype, default, out):
    """The dtype that is asked for, or the default."""
    if dtype is None:
        return default
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        fail(TypeError, "dtype", repr(dtype), " or ".join(str(d) for d in FLOATS))
    if isinstance(out, torch.Tensor) and out.dtype != dtype:
        fail(TypeError, "dtype", dtype, f"the dtype of out, {out.dtype}")
    return dtype


def output(name, out, shape, dtype, device, inputs=()):
    """(tensor to return, its (rows, V) view); out must be viewable, so that writing reaches it, and its memory its own.

    inputs: what it may not overlap, unless it is the very same tensor: (name, (rows, V) tensor, whether that is allowed).
    """
    vocab = shape[-1]
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
        return out, out.view(-1, vocab) if out.numel() else out.reshape(-1, vocab)
    check_tensor(name, out, FLOATS, device)
    if out.shape != torch.Size(shape):
        fail(ValueError, name, f"shape {tuple(out.shape)}", tuple(shape))
    refuse_lazy(name, out)
    if out.numel() == 0:
        return out, out.reshape(-1, vocab)
    try:
        flat = out.view(-1, vocab)
    except RuntimeError:
        flat = None
    if flat is None or flat.stride(1) != 1:
        fail(ValueError, name, f"strides {out.stride()}", "rows with stride 1 along V that can be viewed as (rows, V)")
    check_overlap(name, flat, inputs)
    return out, flat


def refuse_lazy(name, written):
    """ValueError for a view whose memory holds other numbers than it has: those of torch are negated when they are read."""
    if not torch.compiler.is_compiling() and written.is_neg():
        fail(ValueError, name, "a negated view", "memory that holds the numbers themselves")


def check_overlap(name, flat, inputs=()):
    """ValueError where rows (rows, V) that are written share memory with each other or with an input."""
    if torch.compiler.is_compiling() or isinstance(flat, FakeTensor) or get_proxy_mode() is not None:
        return
    rows, vocab = flat.shape
    if rows > 1 and flat.stride(0) < vocab:
        fail(
            ValueError,
            name,
            f"rows {flat.stride(0)} elements apart, which share memory,",
            f"rows at least V = {vocab} apart",
        )
    for other, tensor, same_is_fine in inputs:
        if not may_overlap(flat, tensor) or (same_is_fine and is_same_memory(flat, tensor)):
            continue
        fail(
            ValueError,
            name,
            f"memory that overlaps {other}",
            f"memory of its own{f' or {other} itself' * same_is_fine}",
        )


def is_same_memory(a, b):
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def may_overlap(a, b):
    """Whether rows of a, of unit stride and apart from each other, share memory with tensor b; of interleaved rows of one
    buffer (columns of it) only those that do."""
    if a.device != b.device or 0 in (a.numel(), b.numel()):
        return False

    def end(x):
        return (
            x.data_ptr() + (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()
        )

    if end(a) <= b.data_ptr() or end(b) <= a.data_ptr():
        return False
    pitch = a.stride(0) * a.element_size()
    if (
        a.shape[0] == 1
        or b.dim() != 2
        or b.shape[0] == 1
        or b.stride(0) * b.element_size() != pitch
        or b.stride(1) != 1
    ):
        return True
    ahead = (b.data_ptr() - a.data_ptr()) % pitch  # of b's rows within a's
    return ahead < a.shape[1] * a.element_size() or ahead + b.shape[1] * b.element_size() > pitch


def register_fake_mutation(name):
    """A fake kernel for an operator that only writes to its arguments."""
    torch.library.register_fake(f"klflow::{name}")(lambda *arguments: None)
