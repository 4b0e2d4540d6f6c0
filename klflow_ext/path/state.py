"""What a sampler step works on, and a part of the protocol of networks (`Network`): `State`, where the sequences are, which a
network is asked about; `Prediction`, what it says of them; `Move`, where they go next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klflow_ext import ops
from klflow_ext.ops.linear import LOGIT_BYTES
from klflow_ext.path.evidence import Evidence
from klflow_ext.path.options import ResolvedOptions


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of the time grid and all that a step may need.

    t, t_next: numbers. Only in a step that a CUDA graph records are they tensors (B,), which nobody may look into.
    rng: (B, 2), (seed, step) of each sequence for this move; step 0 is the initial noise.
    given: (B, L) bool. known: (B, L) int64, 0 where not given.
    temperature: of this move. options: everything else that was asked for.
    """

    t: float | Tensor
    t_next: float | Tensor
    rng: Tensor
    given: Tensor
    known: Tensor
    temperature: float
    options: ResolvedOptions

    def draw(self, prediction: Prediction) -> Tensor:
        """(B, L) tokens drawn from the prediction by top_k, top_p and this move's temperature; known ones where given."""
        drawn = prediction.draw(self.options.top_k, self.rng, self.temperature, self.options.top_p)
        return torch.where(self.given, self.known, drawn)


class State:
    """Where the sequences are: x, or the tokens (B, L) and the noise that hides them.

    Args:
        x: rows (B, L, V) on the simplex, or token ids (B, L), as the path's `reads` says.
        log_x: log x where a path's step keeps it; None once a row has been re-noised.
        tokens, t, rng, given, row_offset: what x is made of, where `make` is there to make it: by `path.sample`, when
            somebody asks for x. t is a number, (B,) or (B, L); given (B, L) bool or None.
        boost: what the basic scheme has added to the noise, sparsely: tokens and boost are then (B, L, K), as in
            `ops.noise_posterior`, and there is no x.
        evidence: what was observed of the positions; None: nothing.
    """

    def __init__(
        self,
        x: Tensor | None = None,
        log_x: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        t: float | Tensor = 0.0,
        rng: Tensor | None = None,
        given: Tensor | None = None,
        row_offset: int = 0,
        boost: Tensor | None = None,
        make: Callable[[], Tensor] | None = None,
        evidence: Evidence | None = None,
    ):
        self._x, self._make, self.log_x = x, make, log_x
        self.evidence = evidence
        self.tokens, self.t, self.rng, self.given = tokens, t, rng, given
        self.row_offset, self.boost = row_offset, boost

    @property
    def is_made(self) -> bool:
        """Whether x exists already."""
        return self._x is not None

    @property
    def x(self) -> Tensor:
        if self._x is None:
            if self._make is None:
                raise ValueError("state: got one of tokens and boosts, allowed is one with rows, for this network")
            self._x = self._make()
        return self._x


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap), as `ops.cross_entropy` does it; None: the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Prediction:
    """What the network says of a state: its logits, or losses and draws from them, for which they exist a few at a time.

    Args:
        logits: (B, L, V), or None: those of hidden (B, L, D) @ weight.T + bias, weight (V, D), bias (V,) or None.
        softcap: of those, which are then softcap tanh(logits / softcap); None: as they are.
        evidence: what was observed, of B x L positions: its likelihood is a factor of p; None: nothing.

    Attributes:
        bad: (B,) bool, of the sequences in whose logits, as far as they were looked at, a row holds a NaN or has no finite
            maximum; None before. Draws from such rows are token 0 and mean nothing: who samples must look (Sampler does).
    """

    def __init__(
        self,
        logits: Tensor | None,
        hidden: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        evidence: Evidence | None = None,
        whole: Prediction | None = None,
    ):
        self._logits, self.hidden, self.weight, self.bias, self.softcap = logits, hidden, weight, bias, softcap
        self.evidence = evidence
        self._whole = whole  # of which this is a part, so that it hears of what is bad
        self.bad: Tensor | None = None

    def _note(self, bad: Tensor) -> None:
        """bad: (B, N) of rows."""
        bad = bad.any(1)
        self.bad = bad if self.bad is None else self.bad | bad
        if self._whole is not None:
            self._whole._note(bad[:, None])

    def with_evidence(self, evidence: Evidence | None) -> Prediction:
        """The same, and what was observed."""
        if evidence is None:
            return self
        options: Any = {"softcap": self.softcap, "evidence": evidence, "whole": self}
        return Prediction(self._logits, self.hidden, self.weight, self.bias, **options)

    @property
    def is_dense(self) -> bool:
        return self._logits is not None

    @property
    def logits(self) -> Tensor:
        """(B, L, V) float32."""
        self._logits = (self._of(self._head()[0]) if self._logits is None else self._logits).float()
        if self.evidence is not None:
            self._logits, self.evidence = self.evidence.add_to(self._logits), None
        self._note(~self._logits.amax(-1).isfinite())  # a NaN is the maximum, too
        return self._logits

    def _head(self) -> tuple[Tensor, Tensor]:
        """(hidden, weight)."""
        assert self.hidden is not None and self.weight is not None, "either logits or these are there"
        return self.hidden, self.weight

    def _of(self, hidden: Tensor) -> Tensor:
        weight, bias = self._head()[1], None if self.bias is None else self.bias.to(hidden.dtype)
        return capped(torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias), self.softcap)

    def cross_entropy(self, label: Tensor, **options) -> Tensor:
        """-log p(label), label (B, L); options as in `ops.cross_entropy`. Gradients flow to the network."""
        if self.evidence is not None:
            return ops.cross_entropy(self.logits, label, **options)
        if self._logits is not None:
            wide = self._logits.dtype == torch.float64  # there are no kernels of it
            return ops.cross_entropy(self._logits.float() if wide else self._logits, label, **options)
        hidden, weight = self._head()
        return ops.linear_cross_entropy(hidden, weight, label, bias=self.bias, softcap=self.softcap, **options)

    def loss_among(self, evidence: Evidence, label: Tensor) -> Tensor:
        """(B, L): -log p(label | what was observed), label (B, L), where p is among the tokens that are listed alone; 0 where nothing
        was observed. No other logits are made. Gradients flow to the network."""
        ids, used = evidence.ids.clamp_min(0), evidence.ids >= 0
        if self._logits is not None:
            logits = self._logits.gather(2, ids)
        else:
            hidden, weight = self._head()
            logits = torch.einsum("bld,blkd->blk", hidden, F.embedding(ids, weight).to(hidden.dtype))
            logits = capped(logits if self.bias is None else logits + self.bias[ids], self.softcap)
        observed = evidence.observed
        among = torch.where(used, logits.float() + evidence.log_likelihood, -torch.inf)
        own = torch.where(used & (evidence.ids == label[..., None]), among, -torch.inf)
        among, own = (
            torch.where(observed[..., None], x, 0.0) for x in (among, own)
        )  # no NaN where nothing was observed
        return torch.where(observed, among.logsumexp(2) - own.amax(2), 0.0)

    def last(self) -> Prediction:
        """What it says of the last position of each sequence."""
        rows = self._head()[0] if self._logits is None else self._logits
        return self.at(torch.full((len(rows), 1), rows.shape[1] - 1, device=rows.device))

    def at(self, places: Tensor) -> Prediction:
        """What it says of some positions of each sequence, places (B, N)."""
        choose = lambda x: x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))  # noqa: E731
        evidence = None if self.evidence is None else self.evidence.at(places)
        logits, hidden = (choose(self._logits), None) if self._logits is not None else (None, choose(self._head()[0]))
        options: Any = {"softcap": self.softcap, "evidence": evidence, "whole": self}
        return Prediction(logits, hidden, self.weight, self.bias, **options)

    def draw(self, k: int, rng: Tensor, temperature: float = 1.0, top_p: float = 1.0, row_offset: int = 0) -> Tensor:
        """(B, L) tokens of `ops.topk_sample`, rng (B, 2); 0 where the logits say nothing (see `bad`)."""
        drawn = [
            ops.topk_sample(logits, k, rng[part], temperature=temperature, top_p=top_p, row_offset=row_offset)[0]
            for part, logits in self._parts()
        ]
        tokens = torch.cat(drawn)
        self._note(tokens < 0)
        return tokens.clamp_(min=0)

    def largest(self, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(ids, p), both (B, L, k): the largest entries of p = softmax(logits / temperature)."""
        ids, shares = [], []
        for _, logits in self._parts():
            logits = logits.float() / temperature
            values, columns = logits.topk(k)
            ids.append(columns)
            shares.append((values - logits.logsumexp(-1, keepdim=True)).exp())
        p = torch.cat(shares)
        self._note(p.isnan().any(-1))
        return torch.cat(ids), p.nan_to_num_(0.0)

    def look(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(p of tokens (B, L), entropy (B, L) of p in nats, the k likeliest tokens (B, L, k), their p), by logits of a few sequences at
        a time."""
        found = []
        for part, logits in self._parts():
            log_p = logits.float().log_softmax(-1)
            best, ids = log_p.topk(min(k, log_p.shape[-1])) if k else (log_p[..., :0], tokens[part][..., None][..., :0])
            own = log_p.gather(-1, tokens[part][..., None])[..., 0]
            found.append((own.exp(), torch.special.entr(log_p.exp_()).sum(-1), ids, best.exp()))
        own, entropy, ids, best = (torch.cat(x) for x in zip(*found, strict=True))
        return own, entropy, ids, best

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The logits of some sequences after another, and which they are."""
        if self._logits is not None:
            yield slice(None), self.logits
            return
        hidden, weight = self._head()
        b, length, _ = hidden.shape
        some = max(1, LOGIT_BYTES // (4 * length * weight.shape[0]))
        for i in range(0, b, some):
            part = slice(i, i + some)
            logits = self._of(hidden[part])
            yield part, logits if self.evidence is None else self.evidence[part].add_to(logits.float())
