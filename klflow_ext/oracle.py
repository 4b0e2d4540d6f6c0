"""A denoiser that is exactly right, for data whose distribution is known: it needs no training and tests everything else."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from klflow_ext.path import Autoregressive, LinearPath, LogitPath, MaskPath, Path, UniformPath
from klflow_ext.path.logit import log_evidence

OUTSIDE = 1e6  # slope of a log-likelihood beyond its support, where steps of a solver may end: the nearest token wins


def linear_log_likelihood(x: Tensor, t: Tensor) -> Tensor:
    """log of the density of x_t given each token, up to a constant: 0 where (x_t - t onehot(k)) / (1 - t) is on the simplex.

    That noise is uniform, so only its support speaks: x_t[k] >= t. x (..., V), t (...).
    """
    return OUTSIDE * (x - t[..., None] + 1e-6).clamp_max(0)


def sphere_log_likelihood(x: Tensor, t: Tensor) -> Tensor:
    """log of the density of sqrt(x_t) on the sphere given each token k, up to a constant.

    In polar coordinates around onehot(k) the path keeps the direction and shrinks the angle, phi = (1 - t) theta with
    cos(phi) = sqrt(x_t[k]); the area element is sin(phi)^(V - 2) d phi. Dirichlet(1) noise y = sqrt(x_0) has a density
    proportional to prod_j y_j there, and y_j = sqrt(x_t[j]) sin(theta) / sin(phi) for j != k. Together:
    cos(theta) / cos(phi) (sin(theta) / sin(phi))^(2 V - 3), where theta < pi / 2. x (..., V), t (...).
    """
    y = x.sqrt()
    phi = torch.atan2((1 - x).clamp_min(1e-24).sqrt(), y)
    theta = phi / (1 - t[..., None])
    inside = theta.clamp_max(math.pi / 2 - 1e-6)
    density = inside.cos().log() - y.clamp_min(1e-30).log() + (2 * x.shape[-1] - 3) * (inside.sin() / phi.sin()).log()
    return density - OUTSIDE * (theta - inside)


def token_log_likelihood(x: Tensor, kappa: Tensor, path: MaskPath | UniformPath) -> Tensor:
    """log P(x_t | k) of ids x (...), for each token k (..., V), shown with probability kappa (...); up to a constant for masks."""
    shown = F.one_hot(x, path.vocab_size + 1)[..., : path.vocab_size].double()
    if isinstance(path, MaskPath):
        return torch.where((x == path.vocab_size)[..., None], 0.0, shown.log())
    kappa = kappa[..., None]
    return (kappa * shown + (1 - kappa) / path.vocab_size).log()


class ExactDenoiser:
    """`model(x_t, t) -> logits` where the logits are the log posterior marginals log p(k | x_t, t), in float64.

    For one position with prior pi: p(k | x_t) is proportional to pi_k p(x_t | k), for a LogitPath
    pi_k (1 - (1 - e^-s) u_k)^(-V alpha), with s = c t / (1 - t) and u = softmax(l_t / (1 - t)). For a joint distribution the
    likelihood of a sequence is the product of its positions' factors. A model of any path of this package; of an
    Autoregressive one it says p(x_i | x_1 .. x_(i-1)).

    Args:
        prior: (V,) token probabilities of independent positions, or (sequences (S, L) tokens, weights (S,)). Weights need not
            sum to 1.
        path: the path that made the noise.

    Raises:
        ValueError: shapes, signs or token values do not fit.
    """

    def __init__(self, prior: Tensor | tuple[Tensor, Tensor], path: Path) -> None:
        self.path = path
        self.sequences = None
        weights = prior
        if isinstance(prior, (tuple, list)):
            self.sequences, weights = torch.as_tensor(prior[0]).long(), prior[1]
            if self.sequences.dim() != 2:
                raise ValueError(f"prior: got sequences of shape {tuple(self.sequences.shape)}, allowed is (S, L)")
            low, high = int(self.sequences.min()), int(self.sequences.max())
            if low < 0 or high >= path.vocab_size:
                raise ValueError(f"prior: got tokens {low} to {high}, allowed is 0 to V - 1 = {path.vocab_size - 1}")
        weights = torch.as_tensor(weights, dtype=torch.float64)
        expected = (path.vocab_size if self.sequences is None else len(self.sequences),)
        if tuple(weights.shape) != expected:
            raise ValueError(f"prior: got weights of shape {tuple(weights.shape)}, allowed is {expected}")
        if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < float("inf"):
            raise ValueError(
                "prior: got weights with a negative, infinite or no positive value, allowed are finite ones >= 0"
            )
        self.log_weights = torch.log(weights / weights.sum())
        if self.sequences is not None:  # (S, L V): which (position, token) pairs each sequence has
            onehot = torch.nn.functional.one_hot(self.sequences, path.vocab_size)
            self.pairs = onehot.flatten(1).double()

    def _log_likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        """(..., V) log p(x_t | k) of each position by itself, up to a constant a position."""
        path = self.path
        if isinstance(path, (MaskPath, UniformPath)):
            return token_log_likelihood(x, path.kappa(t).to(x.device), path)
        x = x.double()
        if isinstance(path, LogitPath):
            return log_evidence(x.log(), t, path.c, path.alpha)
        likelihood = (linear_log_likelihood if isinstance(path, LinearPath) else sphere_log_likelihood)(x, t)
        return torch.where(x.amax(-1, keepdim=True) == 1, x.log(), likelihood)

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """x_t at times t (scalar, (B,) or (B, L)) to the log posterior marginals: (B, L, V) or (..., V), or ids (B, L), which
        become (B, L, V)."""
        if self.path.reads == "rows" and x.shape[-1] != self.path.vocab_size:
            raise ValueError(f"x: got {x.shape[-1]} columns, allowed is V = {self.path.vocab_size}")
        if isinstance(self.path, Autoregressive):
            return self._next(x)
        rows = x.shape[:-1] if self.path.reads == "rows" else x.shape
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        t = t.reshape(t.shape + (1,) * (len(rows) - t.dim())).expand(rows)
        evidence = self._log_likelihood(x, t)
        log_weights = self.log_weights.to(x.device)
        if self.sequences is None:
            return torch.log_softmax(log_weights + evidence, -1)
        sequences = self.sequences.to(x.device)
        if len(rows) != 2 or rows[1] != sequences.shape[1]:
            raise ValueError(f"x: got positions of shape {tuple(rows)}, allowed is (B, {sequences.shape[1]})")
        pairs = self.pairs.to(x.device)
        # Matrix products pick and sum the factors; -inf (a token excluded by a given row) would turn into NaN in them.
        marginals = []
        for part in evidence.clamp_min(-1e30).flatten(1).split(max(1, 2**20 // len(pairs))):  # (rows, S) stays in cache
            joint = torch.addmm(log_weights, part, pairs.T)
            if bool((joint.amax(-1) < -1e29).any()):
                raise ValueError("x: its given tokens have zero probability under the prior")
            marginals.append(torch.softmax(joint, -1) @ pairs)
        return torch.cat(marginals).view(evidence.shape).log()

    def _next(self, x: Tensor) -> Tensor:
        """(B, L, V) log p(x_i | x_1 .. x_(i-1)) of inputs [start, x_1, ..] (B, L)."""
        log_weights = self.log_weights.to(x.device)
        if self.sequences is None:
            return log_weights.expand(*x.shape, -1)
        sequences = self.sequences.to(x.device)
        agrees = (x[:, None, 1:] == sequences[:, : x.shape[1] - 1]).long().cumprod(-1)  # (B, S, L - 1)
        agrees = F.pad(agrees, (1, 0), value=1).double() * log_weights.exp()[:, None]
        onehot = F.one_hot(sequences[:, : x.shape[1]], self.path.vocab_size).double()
        marginals = torch.einsum("bsl,slv->blv", agrees, onehot)
        return (marginals / marginals.sum(-1, keepdim=True)).log()
