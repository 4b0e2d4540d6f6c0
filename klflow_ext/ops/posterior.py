"""The posterior of each token given its own noisy row: its largest entries, or all of it."""

import torch

from klflow_ext.ops.arguments import (
    FLOATS,
    INTEGERS,
    check_int,
    check_log_prior,
    check_tensor,
    noise_arguments,
    register_fake_mutation,
)

_klflow = torch.ops.klflow


def largest_entries(noise, options, log_prior, top, stats=None):
    """(ids, q, rest) of flat rows; the arguments as `noise_arguments` gives them."""
    rows, device = noise[0].shape[0], log_prior.device
    ids = torch.empty(rows, top, dtype=torch.int32, device=device)
    q, rest = torch.empty(rows, top, device=device), torch.empty(rows, device=device)
    _klflow.noise_posterior(*noise, log_prior, *options, ids, q, rest, stats)
    return ids, q, rest


def all_entries(noise, options, log_prior, log, out):
    """Writes q or log q of flat rows to out (rows, V): its sum and maximum first, then one tile of all columns."""
    (target, t, rng, given), (beta, row_offset), (rows, vocab) = noise, options, out.shape
    stats = torch.empty(rows, 3, device=out.device)
    largest_entries(noise, options, log_prior, 0, stats)
    _klflow.noise_tile(target, t, rng, given, log_prior, stats, beta, row_offset, vocab, 0, log, None, out)


def noise_posterior(target, t, rng, log_prior, *, top=512, beta=0.01, given=None, row_offset=0):
    """The largest entries of each token's posterior given its own noisy row x_t, straight from in-kernel noise.

    q = softmax(log_prior + e), e_j = -V log(1 - (1 - e^-s) u_j), u = softmax(log x_t / (1 - t)), s = c t / (1 - t): the
    exact posterior of a position with that prior, given x_t of `noise_interpolate(target, t, rng)` (DESIGN: posterior
    input). x_t, e and q are never built. A given row, and one at t = 1, is onehot(target).

    Args:
        target, t, rng, beta, given, row_offset: as in `noise_interpolate`.
        log_prior: (V,) log-probabilities of the tokens up to a constant; -inf for one that never occurs.
        top: how many entries are kept, in [1, V].

    Returns: (ids int32 (*rows, top) in ascending order, q float32 (*rows, top), rest float32 (*rows): the mass of the
        others). Of equal entries the lower columns are kept. Not differentiable.
    Errors: TypeError, ValueError; IndexError for a target outside [0, V) (on CUDA its q and rest are NaN; KLFLOW_CHECK=1
        checks).
    """
    check_tensor("target", target, INTEGERS)
    check_tensor("log_prior", log_prior, (*FLOATS, torch.float64), target.device)
    vocab = log_prior.numel()
    log_prior = check_log_prior(log_prior, vocab, target.device)
    check_int("top", top, 1, vocab, f"an integer in [1, V = {vocab}]")
    noise, options = noise_arguments(target, t, rng, beta, given, row_offset, vocab)
    ids, q, rest = largest_entries(noise, options, log_prior, top)
    shape = target.shape
    return ids.reshape(*shape, top), q.reshape(*shape, top), rest.reshape(shape)


register_fake_mutation("noise_posterior")
