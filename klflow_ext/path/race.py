"""A bound of -log p for the logit path, whose noise is a race of exponential clocks.

With Y_j ~ Exp(1) for j != k and Y_k ~ Exp(rate g), g = e^-s, s = c t / (1 - t), softmax((1 - t) log Y) is the paper's x_t.
To noise further is Y <- (1 + r) min(Y, R), R_j ~ Exp(rate r): it asks for no token, so the states form a Markov chain, and the
usual bound of a chain's likelihood holds, with p the model's distribution at s:

    -log p(text) <= sum over positions of  int_0^s_max E l(s) ds + E[-log p_k at s_max],
    l(s) = G(p_k) - g sum_{j != k} F(p_j),
    F(p) = int_0^1 p / (p + (1 - p) w^a) dw,    G(p) = (1 - p) / p F(p),    a = 1 - g.

l is 0 at s = 0 and goes to -log p_k for large s. F and G are functions of log p and s alone: they are tabulated for the s of
each sequence, and `ops.softmax_expectation` sums over the tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from klflow_ext import ops
from klflow_ext.path.state import Prediction

LOWEST, STEPS, FINE = -32.0, 512, 4  # of the tables: log p from -32 to 0 in 512 steps, of 4 each for the kernel
SEQUENCES = 64  # whose tables exist at a time


def race_rate(prediction: Prediction, target: Tensor, s: Tensor) -> Tensor:
    """(B, L) float64: l(s) of tokens target (B, L), at s (B,) > 0 of each sequence. It is right to about 1e-5."""
    return torch.cat([
        _rate(logits[i : i + SEQUENCES], target[part][i : i + SEQUENCES], s[part][i : i + SEQUENCES].double())
        for part, logits in prediction._parts()
        for i in range(0, len(logits), SEQUENCES)
    ])  # fmt: skip


def _rate(logits: Tensor, target: Tensor, s: Tensor) -> Tensor:
    f, g = _table(s), torch.exp(-s)[:, None]
    knots = torch.linspace(LOWEST, 0, STEPS * FINE + 1, dtype=torch.float64, device=s.device)
    share = g * _at(f, knots.expand(len(s), -1), s) / knots.exp()  # g F(p) / p, at most 1
    mean, lse = ops.softmax_expectation(logits, share.float(), lowest=LOWEST)
    log_p = logits.gather(-1, target[..., None])[..., 0].double() - lse.double()
    kept = log_p.clamp(LOWEST, 0)
    own = _at(f, kept, s)
    others = mean.double() - g * own
    return (
        -torch.expm1(kept) / kept.exp() * own + (kept - log_p).clamp_min(0) - others
    )  # beyond the table G rises by <= -log p


def _table(s: Tensor) -> Tensor:
    """F (B, STEPS + 1) float64 at log p from LOWEST to 0, for s (B,) float64.

    With lambda = log(p / (1 - p)), F(lambda) = int_0^inf e^-y sigmoid(lambda + a y) dy. So between neighbours of a distance d,
    F(lambda) = [the integral up to d / a] + e^(-d / a) F(lambda + d), from above to below. The piece is a quadrature in the cube
    root of e^-y, in which it is smooth to the end.
    """
    a = -torch.expm1(-s)[:, None]
    log_p = torch.linspace(LOWEST, 0, STEPS + 1, dtype=torch.float64, device=s.device)
    odds = log_p - torch.log(-torch.expm1(log_p))
    left = torch.exp(-odds.diff() / a)  # (B, STEPS), 0 at the end
    nodes, weights = (torch.from_numpy(x).to(s.device) for x in np.polynomial.legendre.leggauss(8))
    x = (1 + nodes) / 2
    v = left[..., None] + (1 - left[..., None]) * x**3
    pieces = (1 - left) * (torch.sigmoid(odds[:-1, None] - a[..., None] * v.log()) @ (3 * x**2 * weights / 2))
    found = [torch.ones_like(s)]
    for piece, share in zip(pieces.T.flip(0), left.T.flip(0), strict=True):
        found.append(torch.addcmul(piece, share, found[-1]))
    return torch.stack(found[::-1], 1)


def _at(f: Tensor, log_p: Tensor, s: Tensor) -> Tensor:
    """F (B, L) at log_p (B, L) in [LOWEST, 0], from its table, by cubic pieces: dF / d log p = (F - p) / (a (1 - p))."""
    a, width = -torch.expm1(-s)[:, None], -LOWEST / STEPS
    knots = torch.linspace(LOWEST, 0, STEPS + 1, dtype=torch.float64, device=s.device)
    slopes = width * (f - knots.exp()) / (a * -torch.expm1(knots))
    slopes[:, -1:] = width / (1 + a)
    cell = ((log_p - LOWEST) / width).long().clamp(0, STEPS - 1)
    x = (log_p - LOWEST) / width - cell
    f0, f1, s0, s1 = f.gather(1, cell), f.gather(1, cell + 1), slopes.gather(1, cell), slopes.gather(1, cell + 1)
    return f0 + x * (s0 + x * (3 * (f1 - f0) - 2 * s0 - s1 + x * (s0 + s1 - 2 * (f1 - f0))))
