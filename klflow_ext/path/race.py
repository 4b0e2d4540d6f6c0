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

LOWEST, STEPS = -32.0, 2048  # of the tables: log p from -32 to 0, in steps of 1 / 64


def race_rate(prediction: Prediction, target: Tensor, s: Tensor) -> Tensor:
    """(B, L) float64: l(s) of tokens target (B, L), at s (B,) > 0 of each sequence. It is right to about 1e-5."""
    s = s.double()
    f, log_p = _table(s)
    share = f / log_p.exp() * torch.exp(-s)[:, None]  # g F(p) / p, at most 1
    rates = []
    for part, logits in prediction._parts():
        mean, lse = ops.softmax_expectation(logits, share[part].float(), lowest=LOWEST)
        token = logits.gather(-1, target[part][..., None])[..., 0].double() - lse.double()
        kept = token.clamp(LOWEST, 0)
        own = _interpolate(f[part], kept, s[part])
        others = mean.double() - own * torch.exp(-s[part])[:, None]
        g = -torch.expm1(kept) / kept.exp() * own
        rates.append(g + (kept - token).clamp_min(0) - others)  # beyond the table G rises by no more than -log p
    return torch.cat(rates)


def _table(s: Tensor) -> tuple[Tensor, Tensor]:
    """F (B, N) float64 at log_p (N,) from LOWEST to 0, for s (B,) float64.

    With lambda = log(p / (1 - p)), F(lambda) = int_0^inf e^-y sigmoid(lambda + a y) dy. So between neighbours of a distance d,
    F(lambda) = [the integral up to d / a] + e^(-d / a) F(lambda + d), from above to below. The piece is a quadrature in the cube
    root of e^-y, in which it is smooth to the end.
    """
    a = -torch.expm1(-s)[:, None]
    log_p = torch.linspace(LOWEST, 0, STEPS + 1, dtype=torch.float64, device=s.device)
    odds = log_p - torch.log(-torch.expm1(log_p))
    left = torch.exp(-odds.diff() / a)  # (B, N - 1), 0 at the end
    nodes, weights = (torch.from_numpy(x).to(s.device) for x in np.polynomial.legendre.leggauss(8))
    x = (1 + nodes) / 2
    v = left[..., None] + (1 - left[..., None]) * x**3
    pieces = (1 - left) * (torch.sigmoid(odds[:-1, None] - a[..., None] * v.log()) @ (3 * x**2 * weights / 2))
    f = torch.ones(len(s), STEPS + 1, dtype=torch.float64, device=s.device)
    for i in range(STEPS - 1, -1, -1):
        torch.addcmul(pieces[:, i], left[:, i], f[:, i + 1], out=f[:, i])
    return f, log_p


def _interpolate(f: Tensor, log_p: Tensor, s: Tensor) -> Tensor:
    """F (B, L) at log_p (B, L) in [LOWEST, 0], from its table, by cubic pieces: dF / d log p = (F - p) / (a (1 - p))."""
    a, width = -torch.expm1(-s)[:, None], -LOWEST / STEPS
    cell = ((log_p - LOWEST) / width).long().clamp(0, STEPS - 1)
    x = (log_p - LOWEST) / width - cell
    f0, f1 = f.gather(1, cell), f.gather(1, cell + 1)

    def slope(f: Tensor, cell: Tensor) -> Tensor:
        log_p = LOWEST + cell * width
        inside = (f - log_p.exp()) / (a * -torch.expm1(log_p))
        return torch.where(cell == STEPS, 1 / (1 + a), inside) * width

    s0, s1 = slope(f0, cell), slope(f1, cell + 1)
    return f0 + x * (s0 + x * (3 * (f1 - f0) - 2 * s0 - s1 + x * (s0 + s1 - 2 * (f1 - f0))))
