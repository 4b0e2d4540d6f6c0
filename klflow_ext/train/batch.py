"""What step i sees: tokens, times, and which tokens are given. It depends on (seed, i) alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klflow_ext import data
from klflow_ext.data.sources import CHUNK
from klflow_ext.path import IGNORE, Evidence, Path, as_network
from klflow_ext.path.layout import slice_order
from klflow_ext.path.network import Model, Network
from klflow_ext.train.channel import confuse
from klflow_ext.train.config import TrainConfig


def low_discrepancy(count: int, generator: np.random.Generator) -> np.ndarray:
    """count points in [0, 1), one in each of count equal cells, in random order."""
    return (generator.permutation(count) + generator.random()) / count % 1.0


class LossCurve:
    """A running estimate of the loss at times in [0, t_max], and times drawn where it falls fastest.

    Their density is proportional to -d loss / d t, so that the loss falls by the same amount between any two neighbours:
    the time warping of CDCD (Dieleman et al. 2022, arXiv 2211.15089), here from bins instead of a fitted curve. Bins count
    free tokens, and forget with a factor of KEEP per measurement.
    """

    BINS, KEEP = 32, 0.99

    def __init__(self, t_max: float):
        self.t_max = t_max
        self.sums = torch.zeros(2, self.BINS, dtype=torch.float64)  # loss, tokens

    def measurement(self, t: Tensor, losses: Tensor, counts: Tensor) -> Tensor:
        """(2, BINS): losses (B,) of sequences, summed over their counts (B,) of tokens, by their times (B,)."""
        bins = (t.double() / self.t_max * self.BINS).long().clamp(0, self.BINS - 1)
        return torch.zeros_like(self.sums).index_add(1, bins, torch.stack([losses.double(), counts.double()]))

    def add(self, measurement: Tensor) -> None:
        self.sums.mul_(self.KEEP).add_(measurement)

    def density(self) -> np.ndarray:
        """(BINS,) shares, sum 1: of the slope; uniform until every bin has been seen and the loss falls somewhere."""
        loss, tokens = self.sums.numpy()
        if not tokens.all():
            return np.full(self.BINS, 1 / self.BINS)
        means = loss / tokens
        falls = np.maximum(means[:-1] - means[1:], 0)  # between the centres of neighbours
        slopes = (np.concatenate([falls[:1], falls]) + np.concatenate([falls, falls[-1:]])) / 2
        total = slopes.sum()
        return slopes / total if total > 0 else np.full(self.BINS, 1 / self.BINS)

    def times(self, u: np.ndarray, share: float) -> np.ndarray:
        """Times of u in [0, 1), by the inverse of share x density + (1 - share) x uniform."""
        shares = share * self.density() + (1 - share) / self.BINS
        below = np.concatenate([[0.0], shares.cumsum()])
        return np.interp(u, below / below[-1], np.linspace(0, self.t_max, self.BINS + 1))


def check_tokens(name: str, stream: data.Stream, vocab_size: int) -> None:
    """ValueError where an array in memory holds what is no token and no padding. Of token folders this is known already, and a memory
    map is not read for it."""
    if isinstance(stream, (data.Tokens, data.Mixture, np.memmap)):
        return
    array = np.asanyarray(stream)
    for start in range(0, len(array), CHUNK):
        part = array[start : start + CHUNK]
        if part.min() >= 0 and part.max() < vocab_size:
            continue
        wrong = (part != IGNORE) & ((part < 0) | (part >= vocab_size))
        if wrong.any():
            place = start + int(wrong.argmax())
            raise ValueError(f"{name}: got {array[place]} at place {place}, allowed is 0 to V - 1 = {vocab_size - 1}")


@dataclass
class Batch:
    """What one step sees, and what a loop of one's own needs of it.

    Attributes:
        tokens: (B, L) int64. t: (B,) float32. given: (B, L) bool, seen in the clear.
        blank: (B,) bool; of these nothing but what is given is to be seen, t = 0.
        counts: (B,), how many tokens are free.
        rng: (2,) int64, (seed, step): the noise, another in every step.
        order: (B, L) int64, the slice of each position, or None. evidence: of some sequences, or None.
    """

    tokens: Tensor
    t: Tensor
    given: Tensor
    blank: Tensor
    counts: Tensor
    rng: Tensor
    order: Tensor | None = None
    evidence: Evidence | None = None

    def to(self, device: str | torch.device) -> Batch:
        """The same on a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: x.to(device) for name, x in values.items() if x is not None}
        return Batch(**values)

    def loss(self, path: Path, model: Model) -> Tensor:
        """The loss of a Trainer: -log p in nats per free token, the mean over the batch. Gradients flow to the model."""
        total = path.loss(
            model, self.tokens, self.t, self.rng, given=self.given, order=self.order, evidence=self.evidence, reduction="sum"
        )  # fmt: skip
        return total / int(self.counts.sum())


class Batches:
    """The batches of a stream of tokens, as a config says: those of `data.order_of`, which are never drawn twice in an epoch.

    slices: whether the network has them; then there is an order.
    prior: (V,) token frequencies of a network that reads posteriors, by which evidence is made; None: none is.

    Raises:
        ValueError: the stream is too short, holds what is no token, or cannot be shuffled so.

    Attributes:
        time_sampling: how times are drawn. curve: where "learned" looks; the Trainer adds to it.
    """

    def __init__(
        self,
        stream: data.Stream,
        path: Path,
        config: TrainConfig,
        slices: bool = False,
        prior: np.ndarray | None = None,
    ):
        self.stream, self.path, self.config, self.slices = stream, path, config, slices
        self.source = data.order_of(stream, config.length, config.seed, config.shuffle)
        check_tokens("stream", stream, path.vocab_size)
        self.prior = None if prior is None else np.maximum(prior, 1e-12)
        self.time_sampling = config.time_sampling or ("middle" if path.t_max < 1 else "uniform")
        self.curve = LossCurve(path.t_max) if self.time_sampling == "learned" else None

    @classmethod
    def of(cls, stream: data.Stream, path: Path, config: TrainConfig, model: Model) -> Batches:
        """Those for a model, as a Trainer makes them: with slices and evidence where it has these.

        batches = Batches.of(stream, path, config, model)
        for step in range(config.steps):
            batches.batch(step).loss(path, model).backward()
        """
        network = as_network(model, path)
        if network.max_length is not None and config.length > network.max_length:
            raise ValueError(f"length: got {config.length}, allowed is at most max_length = {network.max_length}")
        if config.evidence_share and not network.reads_posterior:
            raise ValueError(
                f"evidence_share: got {config.evidence_share}, allowed is 0 for a model that reads no posteriors"
            )
        prior = None
        if isinstance(network, Network) and network.reads_posterior:
            prior = network.log_prior.double().softmax(0).cpu().numpy()
        return cls(stream, path, config, slices=network.slices, prior=prior)

    def batch(self, step: int) -> Batch:
        """That of a step, on the CPU."""
        c = self.config
        tokens = torch.from_numpy(self.source.take(np.arange(step * c.batch_size, (step + 1) * c.batch_size)))
        generator = np.random.default_rng((c.seed, step, 1))
        t = self.times(generator)
        given, blank = self.given_mask(generator)
        order = evidence = None
        if self.slices:
            order, blank = self.order(given, generator)
        if self.prior is not None and c.evidence_share:
            observed = torch.from_numpy(generator.random(c.batch_size) < c.evidence_share)
            evidence = self.evidence(tokens, observed, generator)
            blank |= observed
            if order is not None:
                order = torch.where(observed[:, None], self.scattered_order(given, generator), order)
        counts = ((tokens != IGNORE) & ~given).sum(1)
        rng = torch.tensor([c.seed, step], dtype=torch.int64)
        return Batch(tokens, t.masked_fill(blank, 0.0), given, blank, counts, rng, order, evidence)

    def order(self, given: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """order (B, L), the slices of what is free, and blank (B,), as config.flow_share says.

        The slices are strides. Their number n is L for a third of the sequences, else from 4 to L, uniform in its logarithm.
        """
        b, length = given.shape
        least = min(4, length)
        count = np.round(least * (length / least) ** np.minimum(1, 1.5 * generator.random(b))).astype(np.int64)
        return slice_order(given, torch.from_numpy(count)[:, None]), torch.from_numpy(
            generator.random(b) >= self.config.flow_share
        )

    def scattered_order(self, given: Tensor, generator: np.random.Generator) -> Tensor:
        """order (B, L) of slices of one size whose positions lie anywhere, as where the surest are drawn first.

        The number n of slices is from 1 to L, uniform in its logarithm.
        """
        b, length = given.shape
        count = torch.from_numpy(np.round(length ** generator.random(b)).astype(np.int64))[:, None]
        turn = torch.from_numpy(generator.random((b, length)).argsort(1).argsort(1))  # a permutation of the positions
        return torch.where(given, 0, turn * count // length + 1)

    def evidence(self, tokens: Tensor, observed: Tensor, generator: np.random.Generator) -> Evidence:
        """What the channel says of the sequences that are observed (B,), of one strength in [0, 4) each."""
        assert self.prior is not None
        strength = np.broadcast_to(4 * generator.random((len(tokens), 1)), tokens.shape)
        said = confuse(tokens.clamp_min(0), strength, self.prior, generator)
        return said.without((tokens == IGNORE) | ~observed[:, None])

    def times(self, generator: np.random.Generator) -> Tensor:
        """(B,) times of a batch, as config.time_sampling says."""
        c = self.config
        u = low_discrepancy(c.batch_size, generator)
        if self.curve is not None:
            return torch.from_numpy(self.curve.times(u, c.middle_share)).float()
        if self.time_sampling == "middle":
            u = np.where(generator.random(c.batch_size) < c.middle_share, 0.2 + 0.6 * u, u)
        return self.path.time(torch.from_numpy(u)).float()

    def given_mask(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """given (B, L) and blank (B,), as config.given_share says; blank: nothing but what is given is to be seen, t = 0."""
        b, length = self.config.batch_size, self.config.length
        mask, positions = np.zeros((b, length), bool), np.arange(length)
        chosen = generator.random(b) < self.config.given_share
        for row in np.flatnonzero(chosen):
            kind = generator.random()
            if self.slices:  # beginnings of segments are what the slices are for
                kind = 0.5 + kind / 2
            if kind < 0.5:  # the first tokens of each segment, of a length from 4 to L, uniform in its logarithm
                segment = round(4 * (length / 4) ** generator.random()) if length > 4 else length
                mask[row] = positions % segment < generator.integers(0, segment)
            elif kind < 0.75:
                mask[row] = generator.random(length) < generator.random()
                mask[row, generator.integers(length)] = False  # a batch of nothing but given tokens has no loss
            elif kind < 0.875:
                mask[row, : generator.integers(1, length)] = True
            else:
                size = generator.integers(1, length)
                start = generator.integers(0, length - size + 1)
                mask[row] = True
                mask[row, start : start + size] = False
        return torch.from_numpy(mask), torch.from_numpy(chosen & (generator.random(b) < 0.5))
