"""The posterior of each token given its own noisy row: its largest entries, or all of it."""

import math

import torch
from torch import Tensor

from klflow_ext.ops.arguments import (
    FLOATS,
    INTEGERS,
    Rng,
    Scalar,
    as_rows,
    boost_rows,
    check_beta,
    check_int,
    check_log_prior,
    check_tensor,
    check_vocab,
    fail,
    looks_at_values,
    noise_arguments,
    refuse_gradient,
    register_fake_mutation,
    row_scalars,
)

_klflow = torch.ops.klflow


def _new_entries(rows, top, device):
    return (
        torch.empty(rows, top, dtype=torch.int32, device=device),
        torch.empty(rows, top, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def largest_entries(noise, options, log_prior, top, boost=None, stats=None):
    """(ids, q, rest) of flat rows; the arguments as `noise_arguments` and `boost_rows` give them."""
    entries = _new_entries(noise[0].shape[0], top, log_prior.device)
    _klflow.noise_posterior(*noise, boost, log_prior, *options, *entries, stats)
    return entries


def all_entries(noise, options, log_prior, log, out):
    """Writes q or log q of flat rows to out (rows, V): its sum and maximum first, then one tile of all columns."""
    (target, t, rng, given), (beta, row_offset), (rows, vocab) = noise, options, out.shape
    stats = torch.empty(rows, 3, dtype=torch.float32, device=out.device)
    largest_entries(noise, options, log_prior, 0, stats=stats)
    _klflow.noise_tile(target, t, rng, given, log_prior, stats, beta, row_offset, vocab, 0, log, None, out)


def noise_posterior(
    target: Tensor,
    t: Scalar,
    rng: Rng,
    log_prior: Tensor,
    *,
    top: int = 512,
    beta: float = 0.01,
    given: Tensor | None = None,
    row_offset: int = 0,
    boost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entries of each token's posterior given its own noisy row x_t, straight from in-kernel noise.

    q = softmax(log_prior + e), e_j = -V log(1 - (1 - e^-s) u_j), u = softmax(m), m = log x_t / (1 - t), s = c t / (1 - t):
    the exact posterior of a position with that prior, given x_t of `noise_interpolate(target, t, rng)`.
    x_t, e and q are never built. A given row, and one at t = 1, is onehot(target).

    Without boost, m = log E + s onehot(target), E the noise: the row of one token. With it, m = log E + sum_i boost_i
    onehot(target_i): the row that a basic sampler (`euler_step`) reaches from that noise in steps t_i -> t_{i+1} of
    boost += c (s'_{i+1} - s'_i) p, s' = t / (1 - t), where p = softmax(logits) is kept to its largest entries
    (`merge_boosts`). t enters through e^-s alone, and a given row is onehot(target[..., 0]).

    Args:
        target, t, rng, beta, given, row_offset: as in `noise_interpolate`. With boost, target is (*rows, K), its tokens
            different within a row, -1 for an unused slot; t, rng and given go with rows.
        log_prior: (V,) log-probabilities of the tokens up to a constant; -inf for one that never occurs.
        top: how many entries are kept, in [1, V].
        boost: None or floats (*rows, K); beyond +-60 they count as +-60.

    Returns: (ids int32 (*rows, top) in ascending order, q float32 (*rows, top), rest float32 (*rows): the mass of the
        others). Of equal entries the lower columns are kept. Not differentiable.
    Errors: TypeError, ValueError; IndexError for a target outside [0, V) (on CUDA its q and rest are NaN; KLFLOW_CHECK=1
        checks).
    """
    check_tensor("target", target, INTEGERS)
    check_tensor("log_prior", log_prior, (*FLOATS, torch.float64), target.device)
    vocab = log_prior.numel()
    log_prior = check_log_prior(log_prior, vocab, target.device)
    top = check_int("top", top, 1, vocab, f"an integer in [1, V = {vocab}]")
    boost = boost_rows(boost, target)
    shape = target.shape if boost is None else target.shape[:-1]
    noise, options = noise_arguments(target, t, rng, beta, given, row_offset, vocab, boost)
    ids, q, rest = largest_entries(noise, options, log_prior, top, boost)
    return ids.reshape(*shape, top), q.reshape(*shape, top), rest.reshape(shape)


def token_posterior(
    log_x: Tensor,
    t: Scalar,
    log_prior: Tensor,
    *,
    top: int = 512,
    beta: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entries of each token's posterior given its own noisy row, from a dense state log_x = log x_t.

    q of `noise_posterior`, u = softmax(log_x / (1 - t)). A row with one entry above -inf (a given one), and any row at
    t = 1, is onehot of its largest entry.

    Args:
        log_x: (*rows, V) log x_t up to a constant for each row; float32, bfloat16 or float16; -inf is allowed.
        t: time in [0, 1], number or tensor that broadcasts to rows.
        beta: smoothing in (0, 1).
        log_prior: (V,) log-probabilities of the tokens up to a constant; -inf for one that never occurs.
        top: how many entries are kept, in [1, V].

    Returns: (ids, q, rest) as `noise_posterior` does. NaN (with ids that are tokens) for a row that holds a NaN or +inf or
        only -inf. The evidence is right to 1e-6 of its value. Not differentiable.
    Errors: TypeError, ValueError.
    """
    check_tensor("log_x", log_x, FLOATS)
    vocab = check_vocab("log_x", log_x)
    shape, device = log_x.shape[:-1], log_x.device
    rows = math.prod(shape)
    log_prior = check_log_prior(log_prior, vocab, device)
    top = check_int("top", top, 1, vocab, f"an integer in [1, V = {vocab}]")
    times = row_scalars("t", t, shape, rows, device, 0, 1)
    for name, value in (("log_x", log_x), ("t", times)):
        refuse_gradient(name, value, "nothing")
    ids, q, rest = _new_entries(rows, top, device)
    _klflow.token_posterior(as_rows(log_x.detach(), vocab), times, log_prior, check_beta(beta), ids, q, rest)
    return ids.reshape(*shape, top), q.reshape(*shape, top), rest.reshape(shape)


def merge_boosts(
    ids: Tensor,
    boost: Tensor,
    new_ids: Tensor,
    new_boost: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """Adds two sparse rows, boost at ids and new_boost at new_ids, and keeps the `keep` largest sums.

    Args:
        ids, boost: int64 or int32 and floats, (*rows, K); new_ids, new_boost: the same types, (*rows, L). An id is >= 0 and
            at most once in each row, or -1: an unused slot, whose boost is not read.
        keep: how many entries are kept, >= 1.

    Returns: (ids, boost) of shape (*rows, min(keep, K + L)) in descending order of boost, equal ones by ascending id, unused
        slots (-1, 0) last: the target and boost of `noise_posterior`. Deterministic.
    Errors: TypeError, ValueError.

    Equivalent to, for one row and ids >= 0:
        dense = torch.zeros(V).index_add(0, ids, boost).index_add(0, new_ids, new_boost)
        result = dense.sort(descending=True, stable=True).indices[:keep], dense.sort(descending=True).values[:keep]
    """
    check_tensor("ids", ids, INTEGERS)
    check_tensor("boost", boost, (*FLOATS, torch.float64), ids.device)
    check_tensor("new_ids", new_ids, (ids.dtype,), ids.device)
    check_tensor("new_boost", new_boost, (boost.dtype,), ids.device)
    keep = check_int("keep", keep, 1, 2**30, "an integer >= 1")
    if ids.dim() < 1:
        fail(ValueError, "ids", "shape ()", "(*rows, K)")
    if boost.shape != ids.shape:
        fail(ValueError, "boost", f"shape {tuple(boost.shape)}", f"that of ids, {tuple(ids.shape)}")
    if new_ids.dim() != ids.dim() or new_ids.shape[:-1] != ids.shape[:-1]:
        fail(ValueError, "new_ids", f"shape {tuple(new_ids.shape)}", f"{(*ids.shape[:-1], 'L')}")
    if new_boost.shape != new_ids.shape:
        fail(ValueError, "new_boost", f"shape {tuple(new_boost.shape)}", f"that of new_ids, {tuple(new_ids.shape)}")
    if looks_at_values(ids) and (ids < -1).any() | (new_ids < -1).any():
        fail(ValueError, "ids", min(ids.min().item(), new_ids.min().item()), "tokens or -1")
    ids, order = torch.cat([ids, new_ids], -1).sort(dim=-1, stable=True)
    boost = torch.cat([boost, new_boost], -1).gather(-1, order)
    same = (ids[..., 1:] == ids[..., :-1]) & (
        ids[..., 1:] >= 0
    )  # an id is there twice at most: add the second to the first
    boost = boost + torch.nn.functional.pad(torch.where(same, boost[..., 1:], 0), (0, 1))
    unused = (ids < 0) | torch.nn.functional.pad(same, (1, 0))
    order = torch.where(unused, -torch.inf, boost).argsort(dim=-1, descending=True, stable=True)[..., :keep]
    ids, boost = torch.where(unused, -1, ids), torch.where(unused, 0, boost)
    return ids.gather(-1, order), boost.gather(-1, order)


for _name in ("noise_posterior", "token_posterior"):
    register_fake_mutation(_name)
