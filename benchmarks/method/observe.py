"""Held-out text through a channel that confuses its tokens: how much of it comes back."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from compared import LENGTH, held_texts, label, load_sampler, text_streams, update

from klflow_ext import Sampler, evaluate
from klflow_ext.train.channel import confuse

STRENGTHS = (1.0, 1.5, 2.0)
TEXTS = 96


@contextmanager
def deaf(sampler: Sampler):
    """A network that reads posteriors, told nothing of what was observed: the likelihood is then a factor of what is drawn."""
    before = sampler.network.reads_posterior
    sampler.network.reads_posterior = False
    try:
        yield
    finally:
        sampler.network.reads_posterior = before


def observe(arguments) -> None:
    """Accuracy, and where it has one -log p of the text given what was observed, of the channel alone and of every method.

    The true token stands among eight; `klflow_ext.train.channel` says how. All methods decode greedily.
    """
    sampler, tokenizer = load_sampler(arguments)
    _, stream, held = text_streams(arguments)
    vocab = tokenizer.get_vocab_size()
    log_prior = evaluate.unigram_log_prior(stream, vocab)
    prior = log_prior.double().softmax(0).numpy()
    tokens = held_texts(held, TEXTS, seed=777)
    free = torch.zeros_like(tokens, dtype=torch.bool)
    rows = []

    def note(strength: float, name: str, found, nats: float | None = None) -> None:
        row = {"strength": strength, "method": name, "accuracy": float((found == tokens).float().mean())}
        rows.append(row if nats is None else {**row, "nats": nats})
        print(f"{label(arguments)}: {rows[-1]}", flush=True)

    for strength in STRENGTHS:
        generator = np.random.default_rng(0)
        evidence = confuse(tokens, np.full(tokens.shape, strength), prior, generator)

        def nats_of(ids, p):
            return float(-(p * (ids == tokens[..., None])).sum(2).clamp_min(1e-9).log().mean())  # noqa: B023

        ids, q, _ = evidence.posterior(log_prior)
        note(strength, "channel", ids.gather(2, q.argmax(2, keepdim=True))[..., 0], nats_of(ids, q))
        ids, p = sampler.posterior(tokens, free, evidence=evidence, top=8)
        note(strength, "one pass", ids[..., 0], nats_of(ids, p))
        options = {"evidence": evidence, "top_k": 1}
        for steps in (4, 8, 16, LENGTH):
            found = sampler.infill(tokens, free, method="confidence", steps=steps, **options).tokens
            note(strength, f"confidence, {steps} passes", found)
        if not sampler.network.slices:
            continue
        for steps in (8, 16, LENGTH):
            found = sampler.infill(tokens, free, method="slices", steps=steps, **options).tokens
            said = sampler.likelihood(tokens, evidence=evidence, method="slices", steps=steps).per_token
            note(strength, f"slices, {steps} passes", found, said)
        with deaf(sampler):
            found = sampler.infill(tokens, free, method="slices", steps=LENGTH, **options).tokens
            said = sampler.likelihood(tokens, evidence=evidence, method="slices", steps=LENGTH).per_token
        note(strength, "left to right times the channel", found, said)
    update(arguments, observed=rows)
