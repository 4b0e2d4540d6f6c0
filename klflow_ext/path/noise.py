"""Noise that the kernels do not make, in plain PyTorch under their contract: a function of (seed, step, row, column)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klflow_ext import reference
from klflow_ext.ops.arguments import check_row_offset, rng_state

GAMMA = 8  # first stream of the attempts to draw a gamma; streams 0 to 2 are the kernels'
CHUNK = 2**20  # gammas at a time


def row_words(shape: torch.Size, rng, row_offset: int, device: torch.device) -> Tensor:
    """(..., 4) random words in [0, 2^32) of each row, as int64: one Philox block, stream 0."""
    pairs = rng_state(rng, shape, shape.numel(), device, check_row_offset(row_offset))
    words = reference.words(shape.numel(), 4, pairs, reference.SIMPLEX_NOISE, row_offset, device)
    return words.reshape(*shape, 4)


def uniform(words: Tensor) -> Tensor:
    """Words as float64 numbers in (0, 1)."""
    return (words.double() + 0.5) * 2.0**-32


def log_gamma(alpha: float, shape: torch.Size, vocab_size: int, rng, row_offset: int, device: torch.device) -> Tensor:
    """(..., V) float64 of log G, G ~ Gamma(alpha, 1) independently: the logarithm, since G itself underflows for small alpha.

    Marsaglia & Tsang (2000) for shapes of at least 1; below, log G_alpha = log G_(alpha + 1) + log(U) / alpha. Attempt a of
    column j takes the four words of the Philox counter (j, row, step, GAMMA + a).
    """
    rows = shape.numel()
    pairs = rng_state(rng, shape, rows, device, check_row_offset(row_offset))
    pairs = pairs.expand(rows, pairs.shape[-1])
    mask = 0xFFFFFFFF
    seed, step = pairs[:, 0], pairs[:, 1] & mask
    row = pairs[:, 2] if pairs.shape[1] == 3 else torch.arange(rows, dtype=torch.int64, device=device) + row_offset
    high, row = reference.key_of_row(seed, row), row & mask

    boosted = alpha < 1
    d = (alpha + 1 if boosted else alpha) - 1 / 3
    out = torch.empty(rows * vocab_size, dtype=torch.float64, device=device)
    for part in torch.arange(rows * vocab_size, device=device).split(CHUNK):
        attempt = 0
        while len(part):
            r, stream = part // vocab_size, torch.full_like(part, GAMMA + attempt)
            key = (seed[r] & mask, high[r])
            u = [uniform(w) for w in reference.philox((part % vocab_size, row[r], step[r], stream), key)]
            normal = (-2 * u[0].log()).sqrt() * (2 * math.pi * u[1]).cos()
            v = (1 + normal / math.sqrt(9 * d)) ** 3
            log_v = v.clamp_min(1e-300).log()
            accepted = (v > 0) & (u[2].log() < normal.square() / 2 + d * (1 - v + log_v))
            log_g = math.log(d) + log_v
            if boosted:
                log_g += u[3].log() / alpha
            out[part[accepted]] = log_g[accepted]
            part, attempt = part[~accepted], attempt + 1
    return out.reshape(*shape, vocab_size)
