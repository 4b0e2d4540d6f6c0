"""How far texts as a whole are from real ones: the energy distance of what a judge sees in them."""

from __future__ import annotations

import numpy as np

from klflow_ext.checks import check_int, check_scalar
from klflow_ext.evaluate.text import Interval


def energy_distance(
    found: np.ndarray, real: np.ndarray, *, level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> Interval:
    """The energy distance of two sets of features, with a percentile bootstrap interval over both (Szekely & Rizzo 2013).

    It is 2 E|x - y| - E|x - x'| - E|y - y'|, over pairs of different texts: 0 on the average where both sets come from one
    distribution, however many texts they are, so it may fall below 0; above 0 where they do not. Bits per byte fall where all
    texts are alike and likely; this rises. Figures compare for one judge and one set of real texts alone.

    Args:
        found: (N, D), N >= 2, of the texts to judge (`Scorer.features`). real: (M, D), M >= 2, of real ones. Both are scaled
            so that each feature of real has the standard deviation 1, which takes some 50 of them to be known.
        level: of the interval, in (0, 1). rounds: draws of the bootstrap. seed: of them.

    Raises:
        ValueError: shapes or values outside these; the message names them.
    """
    found, real = np.asarray(found, np.float64), np.asarray(real, np.float64)
    level = check_scalar("level", level, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
    rounds = check_int("rounds", rounds, 1, 10**7, "an integer in [1, 10**7]")
    if found.ndim != 2 or real.ndim != 2 or found.shape[1:] != real.shape[1:] or min(len(found), len(real)) < 2:
        raise ValueError(f"found: got {found.shape} beside {real.shape}, allowed are (N, D) and (M, D) with N, M >= 2")
    if not (np.isfinite(found).all() and np.isfinite(real).all()):
        raise ValueError("found: got features that are not finite, here or in real, allowed are finite ones")
    scale = real.std(0)
    scale[scale == 0] = 1
    between = _distances(found / scale, real / scale)
    within = [_distances(x / scale, x / scale) for x in (found, real)]
    generator = np.random.default_rng(seed)
    ones = [np.ones((1, len(x))) for x in (found, real)]
    drawn = [generator.multinomial(len(x), np.full(len(x), 1 / len(x)), rounds).astype(float) for x in (found, real)]
    drawn = [w[((drawn[0] > 0).sum(1) > 1) & ((drawn[1] > 0).sum(1) > 1)] for w in drawn]  # of two texts at least
    values = _weighted(between, within, drawn)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(_weighted(between, within, ones)[0]), float(low), float(high))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def _weighted(between: np.ndarray, within: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """(R,): the distance where each text counts as often as its row of weights (R, N) and (R, M) says, a text never paired with
    itself, as often as it is drawn."""
    totals = [w.sum(1) for w in weights]
    value = 2 * ((weights[0] @ between) * weights[1]).sum(1) / (totals[0] * totals[1])
    for w, total, own in zip(weights, totals, within, strict=True):
        own = own - np.diag(np.diag(own))  # which rounding may leave above 0
        value -= ((w @ own) * w).sum(1) / (total**2 - (w**2).sum(1))
    return value
