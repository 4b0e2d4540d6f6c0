"""What is known of a position beyond a certain token: a likelihood of some tokens, as readers of print, speech or typing give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """log P(what was observed at a position | its token), for some tokens of each position, and one number for all the others.

    Only differences within a position count. Positions are independent given their tokens. Where nothing was observed, all ids are
    -1.

    Args:
        ids: (B, L, K) int64, tokens, each at most once in a position; -1: unused.
        log_likelihood: (B, L, K) floats, -inf for a token that cannot be; not read where unused.
        other: (B, L) floats, or a number, of every token that is not listed; not read where nothing is listed.

    Raises:
        ValueError, TypeError: a shape or type that does not fit, a token twice, a position of which every token is excluded.
    """

    ids: Tensor
    log_likelihood: Tensor
    other: Tensor = -math.inf  # type: ignore[assignment]  # a Tensor from __post_init__ on

    def __post_init__(self) -> None:
        ids, likelihood, other = torch.as_tensor(self.ids), torch.as_tensor(self.log_likelihood), self.other
        if ids.dim() != 3 or ids.shape[2] < 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, allowed are integers (B, L, K >= 1)")
        if likelihood.shape != ids.shape:
            raise ValueError(
                f"log_likelihood: got shape {tuple(likelihood.shape)}, allowed is that of ids, {tuple(ids.shape)}"
            )
        ids, likelihood = ids.long(), likelihood.float().to(ids.device)
        used = ids >= 0
        other = torch.as_tensor(other, dtype=torch.float32, device=ids.device)
        if other.shape not in ((), ids.shape[:2]):
            raise ValueError(f"other: got shape {tuple(other.shape)}, allowed is a number or {tuple(ids.shape[:2])}")
        other = torch.where(used.any(2), other, 0.0)
        likelihood = likelihood.masked_fill(~used, -math.inf)
        for name, value in (("log_likelihood", likelihood), ("other", other)):
            if bool((value.isnan() | (value == math.inf)).any()):
                raise ValueError(f"{name}: got a NaN or inf, allowed are numbers and -inf")
        order = ids.sort(2).values
        twice = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
        if bool(twice.any()):
            row, place, i = twice.nonzero()[0].tolist()
            raise ValueError(
                f"ids: got the token {int(order[row, place, i])} twice at position {place} of sequence {row}, allowed is once"
            )
        excluded = (likelihood == -math.inf).all(2) & (other == -math.inf)
        if bool(excluded.any()):
            row, place = excluded.nonzero()[0].tolist()
            raise ValueError(
                f"evidence: got one that excludes every token at position {place} of sequence {row}, allowed is at least one that can be"
            )
        for name, value in (("ids", ids), ("log_likelihood", likelihood), ("other", other)):
            object.__setattr__(self, name, value)

    @classmethod
    def of_lists(
        cls, rows: Sequence[Sequence[Sequence[tuple[int, float]] | None]], other: float = -math.inf
    ) -> Evidence:
        """Of B sequences of L positions each: (token, log-likelihood) pairs, or None where nothing was observed."""
        most = max((len(pairs or ()) for row in rows for pairs in row), default=0)
        length = len(rows[0]) if rows else 0
        if any(len(row) != length for row in rows):
            raise ValueError(f"rows: got {sorted({len(row) for row in rows})} positions, allowed is one length for all")
        ids = torch.full((len(rows), length, max(most, 1)), -1)
        values = torch.zeros(ids.shape)
        for b, row in enumerate(rows):
            for i, pairs in enumerate(row):
                for j, (token, value) in enumerate(pairs or ()):
                    ids[b, i, j], values[b, i, j] = token, value
        return cls(ids, values, torch.tensor(other))

    @classmethod
    def stack(cls, some: Sequence[Evidence]) -> Evidence:
        """Of the sequences of all of them, which have the same length."""
        most = max(e.ids.shape[2] for e in some)
        wide = [(most - e.ids.shape[2], e) for e in some]
        return cls._made(
            torch.cat([F.pad(e.ids, (0, more), value=-1) for more, e in wide]),
            torch.cat([F.pad(e.log_likelihood, (0, more), value=-math.inf) for more, e in wide]),
            torch.cat([e.other for _, e in wide]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def observed(self) -> Tensor:
        """(B, L) bool."""
        return (self.ids >= 0).any(2)

    def without(self, shown: Tensor) -> Evidence:
        """Of the positions that are not shown (B, L)."""
        return self._made(
            self.ids.masked_fill(shown[..., None], -1),
            self.log_likelihood.masked_fill(shown[..., None], -math.inf),
            self.other.masked_fill(shown, 0.0),
        )

    def to(self, device: torch.device | str) -> Evidence:
        return self._map(lambda x: x.to(device))

    def __getitem__(self, rows: Tensor | slice) -> Evidence:
        """Of some sequences."""
        return self._map(lambda x: x[rows])

    def at(self, places: Tensor) -> Evidence:
        """Of some positions (B, N) of each sequence."""
        return self._map(
            lambda x: x.gather(1, places.reshape(*places.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        return self._made(change(self.ids), change(self.log_likelihood), change(self.other))

    @staticmethod
    def _made(ids: Tensor, log_likelihood: Tensor, other: Tensor) -> Evidence:
        """Of what was checked before."""
        made = object.__new__(Evidence)
        for name, value in (("ids", ids), ("log_likelihood", log_likelihood), ("other", other)):
            object.__setattr__(made, name, value)
        return made

    def posterior(self, log_prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, q, rest): the posterior of each token under a prior (V,), as `ops.posterior_embedding` reads it.

        q_k is proportional to prior_k P(observed | k); rest is the mass of what is not listed, which is spread as the prior is.
        """
        vocab = len(log_prior)
        log_prior = log_prior.log_softmax(0)
        ids, likelihood = self._distinct(vocab)
        shares = log_prior[ids]
        log_q = shares + likelihood
        unlisted = torch.log1p(-shares.double().exp().sum(2).clamp_max(1 - 1e-12)).float() + self.other
        log_q = torch.cat([log_q, unlisted[..., None]], 2).log_softmax(2)
        q = log_q.exp()
        return ids, q[..., :-1], q[..., -1]

    def _distinct(self, vocab: int) -> tuple[Tensor, Tensor]:
        """(ids, log-likelihoods), with other tokens in the unused places: those of the lowest ids that are not listed."""
        ids, unused, count = self.ids, self.ids < 0, self.ids.shape[2]
        if count > vocab:
            raise ValueError(f"ids: got {count} for a position, allowed are at most V = {vocab}")
        few = min(vocab, 2 * count)
        listed = torch.zeros(*ids.shape[:2], few + 1, dtype=torch.bool, device=ids.device)
        listed.scatter_(2, torch.where(unused | (ids >= few), few, ids), True)
        spare = listed[..., :few].long().argsort(dim=2, stable=True)[..., :count]
        number = (unused.cumsum(2) - 1).clamp_min(0)
        likelihood = torch.where(unused, self.other[..., None], self.log_likelihood)
        return torch.where(unused, spare.gather(2, number), ids), likelihood

    def add_to(self, logits: Tensor) -> Tensor:
        """Logits (B, L, V) float32 plus the log-likelihood of each token."""
        ids, likelihood = self._distinct(logits.shape[2])
        return logits + self.other[..., None].expand(logits.shape).scatter(2, ids, likelihood)
