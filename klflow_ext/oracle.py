"""A denoiser that is exactly right, for data whose distribution is known: it needs no training and tests everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import LogitPath


def log_evidence(log_x: Tensor, t: Tensor, c: float) -> Tensor:
    """log of the likelihood of each token given its own noisy row, up to a constant: -V log(1 - (1 - e^-s) u).

    u = softmax(log x_t / (1 - t)), s = c t / (1 - t). Safe in the limits: with L(a) = log a the bracket is
    logaddexp(L(1 - u), L(u) - s), and 1 - u of the largest entry is summed over the others. A one-hot row says its token.

    Args:
        log_x: (..., V) log x_t up to a constant a row; -inf is allowed.
        t: (...) times in [0, 1).
    """
    vocab_size = log_x.shape[-1]
    t = t[..., None]
    s = c * t / (1 - t)
    log_u = torch.log_softmax(log_x / (1 - t), -1)
    top = log_u.argmax(-1, keepdim=True)
    rest = torch.logsumexp(log_u.scatter(-1, top, -torch.inf), -1, keepdim=True)
    log_others = torch.log1p(-log_u.exp()).scatter(-1, top, rest)
    evidence = -vocab_size * torch.logaddexp(log_others, log_u - s)
    onehot = torch.full_like(log_u, -torch.inf).scatter(-1, top, 0.0)
    return torch.where(rest == -torch.inf, onehot, evidence)


class ExactDenoiser:
    """`model(x_t, t) -> logits` where the logits are the log posterior marginals log p(k | x_t, t), in float64.

    For one position with prior pi: p(k | x_t) is proportional to pi_k (1 - (1 - e^-s) u_k)^-V, with s = c t / (1 - t) and
    u = softmax(l_t / (1 - t)). For a joint distribution the likelihood of a sequence is the product of its positions' factors.

    Args:
        prior: (V,) token probabilities of independent positions, or (sequences (S, L) tokens, weights (S,)). Weights need not
            sum to 1.
        path: the path that made the noise.

    Raises:
        ValueError: shapes, signs or token values do not fit.
    """

    def __init__(self, prior: Tensor | tuple[Tensor, Tensor], path: LogitPath) -> None:
        self.path = path
        self.sequences = None
        weights = prior
        if isinstance(prior, (tuple, list)):
            self.sequences, weights = torch.as_tensor(prior[0]).long(), prior[1]
            if self.sequences.dim() != 2:
                raise ValueError(f"prior sequences must have shape (S, L), got {tuple(self.sequences.shape)}")
            low, high = int(self.sequences.min()), int(self.sequences.max())
            if low < 0 or high >= path.vocab_size:
                raise ValueError(f"prior sequences must hold tokens in [0, {path.vocab_size}), got {low} to {high}")
        weights = torch.as_tensor(weights, dtype=torch.float64)
        expected = (path.vocab_size if self.sequences is None else len(self.sequences),)
        if tuple(weights.shape) != expected:
            raise ValueError(f"prior weights must have shape {expected}, got {tuple(weights.shape)}")
        if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < float("inf"):
            raise ValueError("prior weights must be finite, at least 0, and not all 0")
        self.log_weights = torch.log(weights / weights.sum())
        if self.sequences is not None:  # (S, L V): which (position, token) pairs each sequence has
            onehot = torch.nn.functional.one_hot(self.sequences, path.vocab_size)
            self.pairs = onehot.flatten(1).double()

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """(B, L, V) or (..., V) x_t at times t (scalar, (B,) or (B, L)) to the log posterior marginals of that shape."""
        if x.shape[-1] != self.path.vocab_size:
            raise ValueError(f"x must have {self.path.vocab_size} columns, got {x.shape[-1]}")
        rows = x.shape[:-1]
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        t = t.reshape(t.shape + (1,) * (len(rows) - t.dim())).expand(rows)
        evidence = log_evidence(x.double().log(), t, self.path.c)
        log_weights = self.log_weights.to(x.device)
        if self.sequences is None:
            return torch.log_softmax(log_weights + evidence, -1)
        sequences = self.sequences.to(x.device)
        if x.dim() != 3 or x.shape[1] != sequences.shape[1]:
            raise ValueError(f"x must have shape (B, {sequences.shape[1]}, {x.shape[-1]}), got {tuple(x.shape)}")
        pairs = self.pairs.to(x.device)
        # Matrix products pick and sum the factors; -inf (a token excluded by a given row) would turn into NaN in them.
        marginals = []
        for part in evidence.clamp_min(-1e30).flatten(1).split(max(1, 2**20 // len(pairs))):  # (rows, S) stays in cache
            joint = torch.addmm(log_weights, part, pairs.T)
            if bool((joint.amax(-1) < -1e29).any()):
                raise ValueError("x: its given tokens have zero probability under the prior")
            marginals.append(torch.softmax(joint, -1) @ pairs)
        return torch.cat(marginals).view(x.shape).log()
