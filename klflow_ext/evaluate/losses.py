"""Held-out loss by time, and the entropies beside which it is read."""

from __future__ import annotations

import numpy as np
import torch

from klflow_ext import data
from klflow_ext.path import Path as NoisePath


def unigram_log_prior(stream: data.Stream, vocab_size: int) -> torch.Tensor:
    """(V,) log frequencies of the tokens, half a count added to each so that none is impossible."""
    counts = torch.from_numpy(data.token_counts(stream, vocab_size)).double() + 0.5
    return (counts / counts.sum()).log().float()


def unigram_entropy(stream: data.Stream, vocab_size: int, log_prior: torch.Tensor) -> float:
    """Cross-entropy in nats per token of a stream under unigram frequencies: what a model without context pays."""
    counts = torch.from_numpy(data.token_counts(stream, vocab_size)).double()
    return float(-(counts / counts.sum() * log_prior.double()).sum())


@torch.no_grad()
def loss_by_time(
    model, path: NoisePath, texts: torch.Tensor, shares=(0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
) -> dict[float, float]:
    """{t: loss of texts (B, L) in nats per token} at shares of t_max, all positions free; of an Autoregressive path {0: loss}.

    Of a path with t_max = 1 the last share is left out: nothing is hidden there.
    """
    device = next(model.parameters()).device
    tokens = texts.to(device)
    losses = {}
    for t in dict.fromkeys(float(path.time(share)) for share in shares):
        if t < 1:
            times = torch.full((len(tokens),), t, dtype=torch.float32, device=device)
            losses[t] = path.loss(
                model, tokens, times, torch.tensor([12345, 1], dtype=torch.int64, device=device)
            ).item()
    return losses


def token_entropy(sequences) -> float:
    """Mean over sequences of the entropy (nats) of each one's token histogram: falls when text repeats itself."""
    entropies = []
    for tokens in sequences:
        p = np.unique(np.asarray(tokens), return_counts=True)[1] / len(tokens)
        entropies.append(float(-(p * np.log(p)).sum()))
    return float(np.mean(entropies))
