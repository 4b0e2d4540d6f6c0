"""What a sampler step works on: where the sequences are, what the network says of them, and where they go next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klflow_ext import ops
from klflow_ext.ops.linear import LOGIT_BYTES

if TYPE_CHECKING:
    from klflow_ext.path.base import Path


@dataclass
class Move:
    """One move of the time grid and all that a step may need.

    t, t_next: numbers. Only in a step that a CUDA graph records are they tensors (B,), which nobody may look into.
    """

    index: int
    t: float | Tensor
    t_next: float | Tensor
    path: Path
    rng: Tensor  # (B, 2): (seed, step) of each sequence for this move; step 0 is the initial noise
    given: Tensor  # (B, L) bool
    known: Tensor  # (B, L) int64, 0 where not given
    top_k: int
    top_p: float
    temperature: float
    t_split: float
    euler: str
    boosts: int | None  # entries kept of the basic scheme's sparse state on a LogitPath; None: its dense state

    def draw(self, prediction: Prediction) -> Tensor:
        """(B, L) tokens drawn from the prediction by this move's top_k, top_p and temperature; known ones where given."""
        drawn = prediction.draw(self.top_k, self.rng, self.temperature, self.top_p)
        return torch.where(self.given, self.known, drawn)


@dataclass
class State:
    """Where the sequences are: x, or the tokens (B, L) and the noise that hides them.

    x: rows (B, L, V) on the simplex, or token ids (B, L), as the path's `reads` says. None stands for
        path.sample(tokens, t, rng), which is built only where it is asked for.
    log_x: log x where a path's step keeps it; None once a row has been re-noised.
    t: a number, or (B,) as in `Move`.
    boost: what the basic scheme has added to the noise, sparsely: tokens and boost are then (B, L, K), as in
        `ops.noise_posterior`.
    """

    x: Tensor | None
    log_x: Tensor | None = None
    tokens: Tensor | None = None
    t: float | Tensor = 0.0
    rng: Tensor | None = None
    boost: Tensor | None = None


class Prediction:
    """What the network says of a state: its logits, or draws from them, for which they exist a few sequences at a time.

    Args:
        logits: (B, L, V), or None: those of hidden (B, L, D) @ weight.T + bias, weight (V, D), bias (V,) or None.

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
    ):
        self._logits, self.hidden, self.weight, self.bias = logits, hidden, weight, bias
        self.bad: Tensor | None = None

    def _note(self, bad: Tensor) -> None:
        """bad: (B, N) of rows."""
        bad = bad.any(1)
        self.bad = bad if self.bad is None else self.bad | bad

    @property
    def is_dense(self) -> bool:
        return self._logits is not None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._of(self.hidden).float()
        self._note(~self._logits.amax(-1).isfinite())  # a NaN is the maximum, too
        return self._logits

    def _of(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)

    def last(self) -> Prediction:
        """What it says of the last position of each sequence."""
        return Prediction(self._logits[:, -1:]) if self.is_dense else self._with(self.hidden[:, -1:])

    def _with(self, hidden: Tensor) -> Prediction:
        return Prediction(None, hidden, self.weight, self.bias)

    def at(self, places: Tensor) -> Prediction:
        """What it says of some positions of each sequence, places (B, N)."""
        if self.is_dense:
            return Prediction(self._logits.gather(1, places[..., None].expand(-1, -1, self._logits.shape[-1])))
        hidden = self.hidden.gather(1, places[..., None].expand(-1, -1, self.hidden.shape[-1]))
        return self._with(hidden)

    def draw(self, k: int, rng: Tensor, temperature: float = 1.0, top_p: float = 1.0, row_offset: int = 0) -> Tensor:
        """(B, L) tokens of `ops.topk_sample`, rng (B, 2); 0 where the logits say nothing (see `bad`)."""
        options = {"temperature": temperature, "top_p": top_p, "row_offset": row_offset}
        parts = [ops.topk_sample(logits, k, rng[part], **options)[0] for part, logits in self._parts()]
        tokens = torch.cat(parts)
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
        ids, p = torch.cat(ids), torch.cat(shares)
        self._note(p.isnan().any(-1))
        return ids, p.nan_to_num_(0.0)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The logits of some sequences after another, and which they are."""
        if self.is_dense:
            yield slice(None), self._logits
            return
        b, length, _ = self.hidden.shape
        some = max(1, LOGIT_BYTES // (4 * length * self.weight.shape[0]))
        for i in range(0, b, some):
            yield slice(i, i + some), self._of(self.hidden[i : i + some])
