"""A channel that confuses tokens, to train on evidence and to measure by: the true token stands among others, each with a score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from klflow_ext.path import Evidence


def confuse(
    tokens: Tensor, strength: np.ndarray, prior: np.ndarray, generator: np.random.Generator, size: int = 8
) -> Evidence:
    """What is observed of tokens: a list of `size` that holds the true one, the others drawn from the prior, and a score of each.

    The score of the true token is Normal(d, 1), of each other Normal(0, 1), d its strength. Given the list, then,
    log P(list, scores | k) = d score_k - log prior_k + a constant for k in the list; a token that is there twice adds up.

    Args:
        tokens: (B, L) int64.
        strength: d, (B, 1) or (B, L).
        prior: (V,) from which the others are drawn, positive.
    """
    b, length = tokens.shape
    others = np.searchsorted(prior.cumsum() / prior.sum(), generator.random((b, length, size - 1)), side="right")
    ids = np.concatenate([tokens.numpy()[..., None], others.clip(0, len(prior) - 1)], 2)
    scores = generator.standard_normal(ids.shape)
    scores[..., 0] += strength
    scores *= strength[..., None]
    order = ids.argsort(2, kind="stable")
    ids, scores = np.take_along_axis(ids, order, 2), np.take_along_axis(scores, order, 2)
    for i in range(size - 1, 0, -1):  # of equal tokens the first keeps all
        same = ids[..., i] == ids[..., i - 1]
        scores[..., i - 1] = np.where(same, np.logaddexp(scores[..., i - 1], scores[..., i]), scores[..., i - 1])
        ids[..., i] = np.where(same, -1, ids[..., i])
    values = scores - np.log(prior)[ids]
    return Evidence(torch.from_numpy(ids), torch.from_numpy(values))
