"""How far texts as a whole are from real ones: the energy distance of what a judge sees in them, and MAUVE."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

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
    level = check_scalar("level", level, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
    rounds = check_int("rounds", rounds, 1, 10**7, "an integer in [1, 10**7]")
    found, real = _scaled(found, real, 2)
    between = _distances(found, real)
    within = [_distances(x, x) for x in (found, real)]
    generator = np.random.default_rng(seed)
    ones = [np.ones((1, len(x))) for x in (found, real)]
    drawn = [generator.multinomial(len(x), np.full(len(x), 1 / len(x)), rounds).astype(float) for x in (found, real)]
    drawn = [w[((drawn[0] > 0).sum(1) > 1) & ((drawn[1] > 0).sum(1) > 1)] for w in drawn]  # of two texts at least
    values = _weighted(between, within, drawn)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(_weighted(between, within, ones)[0]), float(low), float(high))


def _scaled(found: np.ndarray, real: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both in standard deviations of real; at least so many of each."""
    found, real = np.asarray(found, np.float64), np.asarray(real, np.float64)
    if found.ndim != 2 or real.ndim != 2 or found.shape[1:] != real.shape[1:] or min(len(found), len(real)) < least:
        raise ValueError(
            f"found: got {found.shape} beside {real.shape}, allowed are (N, D) and (M, D) with N, M >= {least}"
        )
    if not (np.isfinite(found).all() and np.isfinite(real).all()):
        raise ValueError("found: got features that are not finite, here or in real, allowed are finite ones")
    scale = real.std(0)
    scale[scale == 0] = 1
    return found / scale, real / scale


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


MAUVE_TEXTS = 20  # of each set for a bucket: k-means wants about 40 of both
MAUVE_SCALING = 5.0
MAUVE_CURVE = 25  # points


def need_mauve() -> Any:
    """The library's `compute_mauve`. ValueError where it is not here."""
    try:
        from mauve import compute_mauve
    except ImportError:
        raise ValueError("MAUVE needs the mauve extra: pip install 'klflow_ext[mauve]'") from None
    return compute_mauve


def mauve_settings(found: int, real: int) -> dict[str, Any]:
    """What MAUVE of so many texts depends on, in the words of the library."""
    return {
        "num_buckets": max(2, min(found, real) // MAUVE_TEXTS), "mauve_scaling_factor": MAUVE_SCALING,
        "divergence_curve_discretization_size": MAUVE_CURVE, "kmeans_explained_var": 0.9, "kmeans_num_redo": 5,
        "kmeans_max_iter": 500,
    }  # fmt: skip


def mauve(found: np.ndarray, real: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """MAUVE (Pillutla et al. 2021) of two sets of features, by the library mauve-text (the extra "mauve"), with an interval.

    In [0, 1]: near 1 where both sets come from one distribution, near 0 where they hardly meet. Features are put into buckets by
    k-means, and MAUVE is the area under the curve of divergences of the two histograms. It falls with the number of buckets and
    rises with the number of texts: figures compare for one judge, one set of real texts and one number of texts alone.

    Args:
        found: (N, D), N >= 40, of the texts to judge (`Scorer.features`). real: (M, D), M >= 40, of real ones. Both are scaled as
            for the energy distance. There is a bucket for every 20 texts of the smaller set.
        level: of the interval, in (0, 1): by the jackknife over the texts of both, the buckets as they are.
        seed: of k-means.

    Raises:
        ValueError: shapes or values outside these, or the library is missing; the message names it.
    """
    level = check_scalar("level", level, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
    seed = check_int("seed", seed, 0, 2**31, "an integer in [0, 2^31]")
    found, real = _scaled(found, real, 2 * MAUVE_TEXTS)
    compute = need_mauve()
    measured = compute(p_features=found, q_features=real, seed=seed, **mauve_settings(len(found), len(real)))
    p, q = measured.p_hist, measured.q_hist
    variance = _jackknife_variance(p, len(found), lambda one: _mauve_of(one, q))
    variance += _jackknife_variance(q, len(real), lambda one: _mauve_of(p, one))
    half = NormalDist().inv_cdf((1 + level) / 2) * variance**0.5
    value = float(measured.mauve)
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def _mauve_of(p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two histograms, as the library has it."""
    from mauve.compute_mauve import compute_area_under_curve, get_divergence_curve_for_multinomials

    weights = np.linspace(1e-6, 1 - 1e-6, MAUVE_CURVE)
    x, y = get_divergence_curve_for_multinomials(p, q, weights, MAUVE_SCALING).T
    by_x, by_y = np.argsort(x), np.argsort(y)
    return (compute_area_under_curve(x[by_x], y[by_x]) + compute_area_under_curve(y[by_y], x[by_y])) / 2


def _jackknife_variance(shares: np.ndarray, count: int, value: Callable[[np.ndarray], float]) -> float:
    """Of value(shares), a histogram of `count` texts, where each text is left out once."""
    numbers = np.rint(shares * count)
    full = np.flatnonzero(numbers)
    left_out = np.array([value((numbers - (np.arange(len(numbers)) == i)) / (count - 1)) for i in full])
    weights = numbers[full] / count
    return float((count - 1) * (weights * (left_out - (weights * left_out).sum()) ** 2).sum())
