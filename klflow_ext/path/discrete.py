"""Discrete flow matching (Gat et al. 2024, arXiv 2407.15595): every token shows with probability kappa(t), else noise stands there."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from klflow_ext.path.base import IGNORE, Path, check_targets, hide_padding
from klflow_ext.path.network import Called, Network
from klflow_ext.path.noise import row_words, uniform
from klflow_ext.path.state import Move, Prediction, State

KAPPA = {  # kappa(t) from 0 to 1, of float64 tensors
    "linear": lambda t: t,
    "square": lambda t: t * t,
    "cubic": lambda t: t * t * (3 - 2 * t),
    "cosine": lambda t: 1 - torch.cos(math.pi / 2 * t),
}


class _DiscretePath(Path):
    reads: ClassVar[str] = "tokens"
    fields: ClassVar[tuple[str, ...]] = ("vocab_size", "schedule", "t_split")

    def __init__(self, vocab_size: int, schedule: str = "linear", t_split: float | None = None) -> None:
        super().__init__(vocab_size, 1.0, t_split)
        if not isinstance(schedule, str) or schedule not in KAPPA:
            raise ValueError(f"schedule: got {schedule!r}, allowed is one of {sorted(KAPPA)}")
        self.schedule = schedule

    def kappa(self, t: Tensor | float) -> Tensor:
        """Probability that a token shows at times t in [0, 1], float64."""
        return KAPPA[self.schedule](torch.as_tensor(t, dtype=torch.float64, device=getattr(t, "device", "cpu")))

    def sample(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        check_targets(target, self.vocab_size)
        target, t, given = hide_padding(target, t, given, torch.float64)
        words = row_words(target.shape, rng, row_offset, target.device)
        shown = uniform(words[..., 0]) < self.kappa(t)
        if given is not None:
            shown |= given
        return torch.where(shown, target, self._noise(words)).long()

    def _noise(self, words: Tensor) -> Tensor:
        """Ids (...) of noise, from the random words (..., 4) of each position."""
        raise NotImplementedError

    def _jumps(self, move: Move) -> Tensor:
        """(B, L): which positions jump, each with probability (kappa(t') - kappa(t)) / (1 - kappa(t))."""
        now, then = self.kappa(move.t), self.kappa(move.t_next)
        words = row_words(move.given.shape, move.rng, 0, move.given.device)
        return uniform(words[..., 0]) < (then - now) / (1 - now)


class MaskPath(_DiscretePath):
    """Mask noise: x_t is the token with probability kappa(t), else the mask, id V. A model has V + 1 input ids.

    The loss counts masked positions only, as in mask diffusion (MDLM, Sahoo et al. 2024): at the others x_t says the token.

    Args:
        vocab_size: V, at least 2, without the mask.
        schedule: kappa: "linear" t, "square" t^2, "cubic" 3 t^2 - 2 t^3, "cosine" 1 - cos(pi t / 2).
        t_split: as in `Path`; the sampling scheme masks shown tokens anew, and so can correct them.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str] = "mask"
    likelihood_kind = "bound"

    def _noise(self, words: Tensor) -> Tensor:
        return torch.full(words.shape[:-1], self.vocab_size, dtype=torch.int64, device=words.device)

    def _cross_entropy(self, prediction: Prediction, state: State, label: Tensor, reduction: str) -> Tensor:
        """With "mean", 0 where chance has masked no position."""
        label = label.masked_fill(state.x != self.vocab_size, IGNORE)
        if reduction != "mean":
            return super()._cross_entropy(prediction, state, label, reduction)
        return super()._cross_entropy(prediction, state, label, "sum") / (label != IGNORE).sum().clamp_min(1)

    def _nats(
        self, network: Network | Called, target: Tensor, label: Tensor, given: Tensor | None, seed: int, strata: int
    ) -> Tensor:
        """The bound of writing the text in a random order (ARDM, Hoogeboom et al. 2021, arXiv 2110.02037).

        Of f tokens to be written, m = 1 .. f are still masked, all m as likely: the bound is f / m times the cross-entropy summed
        over the masked ones. It does not depend on the schedule of kappa.
        """
        free, generator = label != IGNORE, np.random.default_rng((seed, 2))
        count = free.sum(1)
        nats = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        for i in range(strata):
            u = torch.from_numpy((i + generator.random(len(target))) / strata).to(target.device)
            masked = (1 + (u * count).long()).clamp_max(count)
            scores = torch.from_numpy(generator.random(target.shape)).to(target.device).masked_fill(~free, 2.0)
            hidden = (scores.argsort(1).argsort(1) < masked[:, None]) & free
            t = self.time_of_share(1 - masked / count.clamp_min(1)).float()
            state = State(torch.where(hidden | (target == IGNORE), self.vocab_size, target))
            prediction = self.predict(network, state, target, t, given)
            shown = label.masked_fill(~hidden, IGNORE)
            sums = prediction.cross_entropy(shown, ignore_index=IGNORE, reduction="none").double().sum(1)
            nats += sums * count / masked.clamp_min(1) / strata
        return nats

    def time_of_share(self, share: Tensor) -> Tensor:
        """The times, float64, at which tokens show with probabilities `share` in [0, 1]: kappa, inverted."""
        low, high = torch.zeros_like(share, dtype=torch.float64), torch.ones_like(share, dtype=torch.float64)
        for _ in range(50):
            middle = (low + high) / 2
            below = self.kappa(middle) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def step(self, state: State, prediction: Prediction, move: Move) -> State:
        """Each mask turns, with probability (kappa(t') - kappa(t)) / (1 - kappa(t)), into a draw from p."""
        jumps = self._jumps(move) & (state.x == self.vocab_size)
        return State(torch.where(jumps, move.draw(prediction), state.x))

    def resolve(self, state: State, drawn: Tensor) -> Tensor:
        return torch.where(state.x == self.vocab_size, drawn, state.x)


class UniformPath(_DiscretePath):
    """Uniform noise: x_t is the token with probability kappa(t), else any of the V tokens, all alike.

    The model is called with a time for each position, (B, L), 1 where a token is given: x_t alone does not show which are.

    Args and errors: as `MaskPath`.
    """

    kind: ClassVar[str] = "uniform"

    def _noise(self, words: Tensor) -> Tensor:
        return words[..., 1] * self.vocab_size >> 32

    def model_times(self, t: Tensor, given: Tensor | None, by_position: bool) -> Tensor:
        return t if given is None else torch.where(given, 1.0, t[:, None])

    def step(self, state: State, prediction: Prediction, move: Move) -> State:
        """Each position turns, with probability (kappa(t') - kappa(t)) / (1 - kappa(t)), into a draw from p."""
        return State(torch.where(self._jumps(move), move.draw(prediction), state.x))
