"""The path between noise and text: logits move on a straight line, which is a KL geodesic of the simplex."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klflow_ext import ops

IGNORE = -100  # a target with this value is padding: no loss, and its row carries noise only


def identification_accuracy(vocab_size: int, beta: float, t: float) -> float:
    """P(argmax x_t = k): how often the noisy row alone shows its token.

    Equals prod_{j=1}^{V-1} j / (j + g) = Gamma(V) Gamma(1 + g) / Gamma(V + g), with g = exp(-s) and s = c t / (1 - t).
    """
    gap = math.log(vocab_size / beta - vocab_size + 1)
    g = math.exp(-gap * t / (1 - t)) if t < 1 else 0.0
    return math.exp(math.lgamma(vocab_size) + math.lgamma(1 + g) - math.lgamma(vocab_size + g))


class LogitPath:
    """The logit-linear path: l_t = (1 - t) log x_0 + t log x_1, x_t = softmax(l_t), x_0 ~ Dirichlet(1, ..., 1).

    Args:
        vocab_size: V, at least 2.
        beta: smoothing of the target x_1 = (1 - beta) onehot(k) + beta / V, in (0, 1).
        t_max: where training and sampling stop, in (0, 1). None: the time at which the noisy row alone shows its token with
            a probability of 98.5 % (`calibrate`); later times teach nothing but copying.
        t_split: where the hybrid sampler turns from `basic` to `sampling`, in [0, 1]. None: 14/15 of t_max, which is the
            0.28 of 0.30 used by the paper.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(
        self, vocab_size: int, beta: float = 0.01, t_max: float | None = None, t_split: float | None = None
    ) -> None:
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 2:
            raise ValueError(f"vocab_size must be an integer of at least 2, got {vocab_size!r}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {beta!r}")
        if t_max is not None and not 0 < t_max < 1:
            raise ValueError(f"t_max must be in (0, 1), got {t_max!r}")
        if t_split is not None and not 0 <= t_split <= 1:
            raise ValueError(f"t_split must be in [0, 1], got {t_split!r}")
        self.vocab_size = vocab_size
        self.beta = float(beta)
        self.t_max = self.time_of_accuracy(0.985) if t_max is None else float(t_max)
        self.t_split = self.t_max * 14 / 15 if t_split is None else float(t_split)

    @property
    def c(self) -> float:
        """The logit gap of the target, log(x_1[k] / x_1[j]) = log(V / beta - V + 1)."""
        return math.log(self.vocab_size / self.beta - self.vocab_size + 1)

    def odds(self, t: Tensor | float) -> Tensor | float:
        """s = c t / (1 - t): by how much the token's logit stands out once the noise is scaled to its full size."""
        return self.c * t / (1 - t)

    def accuracy(self, t: float) -> float:
        """P(argmax x_t = k) at time t in [0, 1]."""
        return identification_accuracy(self.vocab_size, self.beta, t)

    def time_of_accuracy(self, accuracy: float) -> float:
        """The time at which `accuracy(t)` reaches a value between 1 / V and 1 (both excluded)."""
        if not 1 / self.vocab_size < accuracy < 1:
            raise ValueError(f"accuracy must be in (1/V, 1) = ({1 / self.vocab_size:g}, 1), got {accuracy!r}")
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.accuracy(middle) < accuracy else (low, middle)
        return (low + high) / 2

    def calibrate(self, accuracy: float = 0.985) -> LogitPath:
        """A path whose t_max is the time at which a row shows its token with this probability; t_split keeps its share."""
        t_max = self.time_of_accuracy(accuracy)
        return LogitPath(self.vocab_size, self.beta, t_max, self.t_split / self.t_max * t_max)

    def time_grid(self, moves: int) -> Tensor:
        """Times of `moves` moves from 0 to t_max, uniform in tau = -log(1 - t): (moves + 1,) float64; no moves: just 0."""
        if moves < 0:
            raise ValueError(f"moves must be at least 0, got {moves!r}")
        tau = torch.linspace(0, 1, moves + 1, dtype=torch.float64) * -math.log1p(-self.t_max)
        grid = -torch.expm1(-tau)
        if moves:
            grid[-1] = self.t_max
        return grid

    def sample(
        self,
        target: Tensor,
        t: Tensor | float,
        rng,
        *,
        given: Tensor | None = None,
        log: bool = False,
        row_offset: int = 0,
    ) -> Tensor:
        """Draw x_t (or log x_t) of the tokens `target`.

        Args:
            target: (...) tokens in [0, V); rows of padding (`IGNORE`) come out as pure noise, so that nothing leaks from them.
            t: time in [0, 1], broadcastable to target's shape.
            rng: int seed, `torch.Generator`, or int64 tensor (2,) = (seed, step) or (..., 2).
            given: (...) bool; these rows are exactly onehot(target) at every t.

        Returns:
            (..., V) float32; x_t[j] is proportional to E_j^(1 - t) exp(t c [j = k]), E_j ~ Exp(1).
        """
        target, t, given = self._rows(target, t, given)
        return ops.noise_interpolate(
            target, t, rng, vocab_size=self.vocab_size, beta=self.beta, given=given, log=log, row_offset=row_offset
        )

    @staticmethod
    def _rows(target: Tensor, t: Tensor | float, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(target, t, given) with padding as rows of pure noise: nothing is known of them, at time 0."""
        padding = target == IGNORE
        t = torch.as_tensor(t, dtype=torch.float32, device=target.device)
        t = torch.where(padding, torch.zeros((), device=target.device), t)
        return target.masked_fill(padding, 0), t, None if given is None else given & ~padding

    def loss(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        t: Tensor,
        rng,
        *,
        given: Tensor | None = None,
        reduction: str = "mean",
        row_offset: int = 0,
    ) -> Tensor:
        """-log p(k | x_t, t), averaged over the rows that are neither given nor padding (the paper's equation 13).

        Args:
            model: `model(x_t, t) -> logits`, (B, L, V) and (B,) to (B, L, V). One that has `embed_noise`, `hidden` and `head`
                (Denoiser) is trained without any tensor of positions x V.
            target: (B, L) tokens; `IGNORE` marks padding.
            t: (B,) times in [0, 1].
            given: (B, L) bool, rows that the model sees in the clear.
            reduction: "mean", "sum" or "none" ((B, L), zero where a row has no loss).
        """
        label = target if given is None else target.masked_fill(given, IGNORE)
        if hasattr(model, "embed_noise"):
            tokens, times, given = self._rows(target, t[:, None], given)
            h = model.hidden(model.embed_noise(tokens, times, rng, given=given, row_offset=row_offset), t)
            return ops.linear_cross_entropy(h, model.head.weight, label, ignore_index=IGNORE, reduction=reduction)
        x = self.sample(target, t[:, None], rng, given=given, row_offset=row_offset)
        return ops.cross_entropy(model(x, t), label, ignore_index=IGNORE, reduction=reduction)

    def to_dict(self) -> dict:
        return {
            "kind": "logit", "vocab_size": self.vocab_size, "beta": self.beta, "t_max": self.t_max, "t_split": self.t_split
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict) -> LogitPath:
        values = dict(values)
        kind = values.pop("kind", "logit")
        if kind != "logit":
            raise ValueError(f"kind of path must be 'logit', got {kind!r}")
        return cls(**values)

    def __repr__(self) -> str:
        return f"LogitPath(vocab_size={self.vocab_size}, beta={self.beta:g}, t_max={self.t_max:.4f}, t_split={self.t_split:.4f})"
