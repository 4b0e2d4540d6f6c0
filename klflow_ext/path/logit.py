"""The logit path: logits move on a straight line between noise and text, which is a KL geodesic of the simplex."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from klflow_ext import ops
from klflow_ext.checks import check_field, check_int, check_scalar
from klflow_ext.path.base import IGNORE, Path, check_targets, check_text, hide_padding
from klflow_ext.path.likelihood import Likelihood
from klflow_ext.path.network import Called, Model, Network, as_network, evaluating
from klflow_ext.path.noise import log_gamma
from klflow_ext.path.race import race_rate
from klflow_ext.path.state import Move, Prediction, State


def identification_accuracy(vocab_size: int, beta: float, t: float, alpha: float = 1.0) -> float:
    """P(argmax x_t = k): how often the noisy row alone shows its token.

    With g = exp(-s), s = c t / (1 - t), it is E[F(G / g)^(V - 1)], F the distribution function of G ~ Gamma(alpha). For
    alpha = 1 that equals prod_{j=1}^{V-1} j / (j + g) = Gamma(V) Gamma(1 + g) / Gamma(V + g); else it is integrated over log G.
    """
    gap = math.log(vocab_size / beta - vocab_size + 1)
    s = gap * t / (1 - t) if t < 1 else math.inf
    if alpha == 1:
        g = math.exp(-s)
        return math.exp(math.lgamma(vocab_size) + math.lgamma(1 + g) - math.lgamma(vocab_size + g))
    a = torch.tensor(alpha, dtype=torch.float64, device="cpu")
    highest = math.log(alpha + 10 * math.sqrt(alpha) + 40)
    log_g = torch.linspace(-40 / alpha - 40, highest, 2**15, dtype=torch.float64, device="cpu")
    weight = torch.exp(alpha * log_g - log_g.exp())
    token = (log_g + s).clamp_max(700).exp()
    log_below = torch.where(
        token > alpha, torch.log1p(-torch.special.gammaincc(a, token)), torch.special.gammainc(a, token).log()
    )
    return float((weight * torch.exp((vocab_size - 1) * log_below)).sum() / weight.sum())


def log_evidence(log_x: Tensor, t: Tensor, c: float, alpha: float = 1.0) -> Tensor:
    """log of the likelihood of each token given its own noisy row, up to a constant: -V alpha log(1 - (1 - e^-s) u).

    u = softmax(log x_t / (1 - t)), s = c t / (1 - t): u is Dirichlet(alpha) noise whose token is e^s times as likely, and in
    the measure du / prod u, which such factors leave as it is, that noise has the density prod u^alpha. Safe in the limits:
    with L(a) = log a the bracket is logaddexp(L(1 - u), L(u) - s), and 1 - u of the largest entry is summed over the others.
    A one-hot row says its token.

    Args:
        log_x: (..., V) log x_t up to a constant a row; -inf is allowed.
        t: (...) times in [0, 1).
    """
    vocab_size = log_x.shape[-1]
    t = t[..., None]
    s = c * t / (1 - t)
    log_u = torch.log_softmax(log_x / (1 - t), -1)
    top = log_u.argmax(-1, keepdim=True)
    rest = torch.logsumexp(log_u.scatter(-1, top, -torch.inf), -1, keepdim=True)
    log_others = torch.log1p(-log_u.exp()).scatter(-1, top, rest)
    evidence = -vocab_size * alpha * torch.logaddexp(log_others, log_u - s)
    onehot = torch.full_like(log_u, -torch.inf).scatter(-1, top, 0.0)
    return torch.where(rest == -torch.inf, onehot, evidence)


class LogitPath(Path):
    """The logit-linear path: l_t = (1 - t) log x_0 + t log x_1, x_t = softmax(l_t), x_0 ~ Dirichlet(alpha, ..., alpha).

    Args:
        vocab_size: V, at least 2.
        beta: smoothing of the target x_1 = (1 - beta) onehot(k) + beta / V, in (0, 1).
        t_max: where training and sampling stop, in (0, 1). None: the time at which the noisy row alone shows its token with
            a probability of 98.5 % (`calibrate`); later times teach nothing but copying.
        t_split: where the hybrid sampler turns from `basic` to `sampling`, in [0, 1]. None: a quarter of t_max. The paper has
            0.28 of 0.30; late splits were measured to give worse text (benchmarks/NOTES.md).
        alpha: concentration of the noise, in [0.001, 1000]. 1, the paper's, is uniform on the simplex and made inside the
            kernels; others are drawn in plain PyTorch, as rows, at some hundred bytes an entry while a part of them is drawn.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str] = "logit"
    likelihood_kind = "bound"
    fields: ClassVar[tuple[str, ...]] = ("vocab_size", "beta", "t_max", "t_split", "alpha")

    def __init__(
        self,
        vocab_size: int,
        beta: float = 0.01,
        t_max: float | None = None,
        t_split: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        check_field("vocab_size", vocab_size, 2)
        check_scalar("beta", beta, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
        if t_max is not None:
            check_scalar("t_max", t_max, 0, 1, "None or a number in (0, 1)", open_low=True, open_high=True)
        check_scalar("alpha", alpha, 1e-3, 1e3, "a number in [0.001, 1000]")
        self.vocab_size, self.beta, self.alpha = vocab_size, float(beta), float(alpha)
        super().__init__(vocab_size, self.time_of_accuracy(0.985) if t_max is None else t_max, t_split)

    @property
    def c(self) -> float:
        """The logit gap of the target, log(x_1[k] / x_1[j]) = log(V / beta - V + 1)."""
        return math.log(self.vocab_size / self.beta - self.vocab_size + 1)

    @property
    def closed_form(self) -> bool:
        return self.alpha == 1

    @property
    def has_likelihood(self) -> bool:
        return self.closed_form

    def odds(self, t: Tensor | float) -> Tensor | float:
        """s = c t / (1 - t): by how much the token's logit stands out once the noise is scaled to its full size."""
        return self.c * t / (1 - t)

    def accuracy(self, t: float) -> float:
        """P(argmax x_t = k) at time t in [0, 1]."""
        return identification_accuracy(self.vocab_size, self.beta, t, self.alpha)

    def time_of_accuracy(self, accuracy: float) -> float:
        """The time at which `accuracy(t)` reaches a value between 1 / V and 1 (both excluded)."""
        if not 1 / self.vocab_size < accuracy < 1:
            raise ValueError(
                f"accuracy: got {accuracy!r}, allowed is a number in (1/V, 1) = ({1 / self.vocab_size:g}, 1)"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.accuracy(middle) < accuracy else (low, middle)
        return (low + high) / 2

    def calibrate(self, accuracy: float = 0.985) -> LogitPath:
        """A path whose t_max is the time at which a row shows its token with this probability; t_split keeps its share."""
        t_max = self.time_of_accuracy(accuracy)
        return LogitPath(self.vocab_size, self.beta, t_max, self.t_split / self.t_max * t_max, self.alpha)

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
        """Draw x_t (log: log x_t), (..., V) float32: x_t[j] is proportional to G_j^(1 - t) exp(t c [j = k]), G_j ~ Gamma(alpha).

        Arguments as in `Path.sample`.
        """
        target, t, given = hide_padding(target, t, given)
        if self.alpha == 1:
            return ops.noise_interpolate(
                target, t, rng, vocab_size=self.vocab_size, beta=self.beta, given=given, log=log, row_offset=row_offset
            )
        check_targets(target, self.vocab_size)
        t = t.double().expand(target.shape)[..., None]
        l = (1 - t) * log_gamma(self.alpha, target.shape, self.vocab_size, rng, row_offset, target.device)
        log_x = l.scatter_add_(-1, target[..., None], self.c * t).log_softmax(-1)
        if given is not None:
            onehot = torch.full_like(log_x, -math.inf).scatter_(-1, target[..., None], 0.0)
            log_x = torch.where(given[..., None], onehot, log_x)
        return (log_x if log else log_x.exp()).float()

    def noisy(self, target: Tensor, t: Tensor, rng, *, given: Tensor | None = None, row_offset: int = 0) -> State:
        """As `Path.noisy`; its rows are made only for a network that does not make them itself."""
        if not self.closed_form:
            return super().noisy(target, t, rng, given=given, row_offset=row_offset)
        tokens, times, shown = hide_padding(target, t, given)
        return self._hidden(tokens, times, rng, shown, row_offset)

    def _nats(
        self, network: Network | Called, target: Tensor, label: Tensor, given: Tensor | None, seed: int, strata: int
    ) -> Tensor:
        """The race bound (`klflow_ext.path.race`); `strata` passes and one more."""
        return self._race(network, target, label, given, seed, strata).sum(1)

    def _race(
        self, network: Network | Called, target: Tensor, label: Tensor, given: Tensor | None, seed: int, strata: int
    ) -> Tensor:
        """(B, strata + 1) float64: the parts of the bound, by equal widths of s up to s_max, and the last cross-entropy.

        Each sequence has its own s in each of the strata, so the standard error tells all of the noise.
        """
        most = float(self.odds(self.t_max))
        generator = np.random.default_rng((seed, 2))
        parts = []
        for i in range(strata + 1):
            if i == strata:
                s = torch.full((len(target),), most, dtype=torch.float64)
            else:
                s = torch.from_numpy((i + generator.random(len(target))) / strata * most).clamp_min(1e-3 / strata)
            s = s.to(target.device)
            t = (s / (self.c + s)).float()
            rng = torch.tensor([seed, i], dtype=torch.int64, device=target.device)
            prediction = self.predict(network, self.noisy(target, t[:, None], rng, given=given), target, t, given)
            if i == strata:
                rate = prediction.cross_entropy(label, ignore_index=IGNORE, reduction="none").double()
            else:
                rate = race_rate(prediction, label.clamp_min(0), s).masked_fill(label == IGNORE, 0) * most / strata
            parts.append(rate.sum(1))
        return torch.stack(parts, 1)

    def race_times(self, model: Model, target: Tensor, count: int, *, seed: int = 0, strata: int = 32) -> list[float]:
        """`count` times from 0 to t_max, between any two of which the race bound of some texts falls by as much.

        For `SampleOptions.times`: a pass stands where there is something to learn. Arguments as in `likelihood`; count >= 2.
        """
        count = check_int("count", count, 2, 2**31, "an integer >= 2")
        strata = check_int("strata", strata, 1, 2**20, "an integer in [1, 2^20]")
        network = as_network(model, self)
        label, _ = check_text(target, None)
        with torch.no_grad(), evaluating(network):
            falls = self._race(network, target, label, None, seed, strata)[:, :-1].sum(0).clamp_min(0).cpu().numpy()
        below = np.concatenate([[0.0], falls.cumsum()])
        s = np.interp(np.linspace(0, below[-1], count), below, np.linspace(0, float(self.odds(self.t_max)), strata + 1))
        return [0.0, *(float(x / (self.c + x)) for x in s[1:-1]), self.t_max]

    def likelihood(self, model: Model, target: Tensor, **options: Any) -> Likelihood:
        """As `Path.likelihood`: the race bound, with noise of alpha = 1."""
        if not self.closed_form:
            raise ValueError(f"alpha: got {self.alpha}, allowed is 1 where a likelihood is asked for")
        return super().likelihood(model, target, **options)

    def renoise(self, tokens: Tensor, t: float | Tensor, rng: Tensor, given: Tensor) -> State:
        if self.closed_form:
            return self._hidden(tokens, t, rng, given, 0)
        log_x = self.sample(tokens, t, rng, given=given, log=True)  # kept: x of small alpha underflows
        return State(log_x.exp(), log_x)

    def _hidden(self, tokens: Tensor, t: float | Tensor, rng, given: Tensor | None, row_offset: int) -> State:
        make = partial(self.sample, tokens, t, rng, given=given, row_offset=row_offset)
        return State(tokens=tokens, t=t, rng=rng, given=given, row_offset=row_offset, make=make)

    def step(self, state: State, prediction: Prediction, move: Move) -> State:
        """Algorithm 1: the marginal ODE dl/dtau = c p - l, by the exact exponential step or the paper's Euler step.

        With move.options.boosts the exact step is made in m = l / (1 - t), where it only adds: m <- m + c (s' - s) p, s = t / (1 - t).
        So m = log E + a sum, of which the `boosts` largest entries are kept: the noise is made again, and no row is stored.
        """
        if move.options.boosts is not None and move.options.euler == "exact" and not state.is_made:
            return self._sparse_step(state, prediction, move)
        rate = 1 - (1 - move.t_next) / (1 - move.t)  # 1 - e^-h
        if move.options.euler == "paper":
            rate = -math.log1p(-rate)  # h
        log_x = state.log_x
        if log_x is None and state.is_made:
            log_x = state.x.log()
        elif log_x is None:
            assert state.tokens is not None
            log_x = self.sample(state.tokens, state.t, state.rng, given=move.given, log=True)
        out = state.x if state.is_made else torch.empty_like(log_x)
        log_x, x = ops.euler_step(
            log_x, prediction.logits, rate, temperature=move.temperature, beta=self.beta, given=move.given,
            known=move.known, inplace=True, out=out,
        )  # fmt: skip
        return State(x, log_x)

    def _sparse_step(self, state: State, prediction: Prediction, move: Move) -> State:
        tokens, boost, most = state.tokens, state.boost, move.options.boosts
        assert tokens is not None and most is not None
        if boost is None:
            tokens = tokens[..., None]
            boost = torch.full(tokens.shape, float(self.odds(state.t)), dtype=torch.float32, device=tokens.device)
        ids, p = prediction.largest(min(most, self.vocab_size), move.temperature)
        rise = self.odds(move.t_next) - self.odds(move.t)
        tokens, boost = ops.merge_boosts(tokens, boost, ids, rise * p, most)
        shown = torch.full_like(tokens, -1)
        shown[..., 0] = move.known
        tokens = torch.where(move.given[..., None], shown, tokens)
        return State(tokens=tokens, t=move.t_next, rng=state.rng, given=move.given, boost=boost)

    def resample(self, state: State, prediction: Prediction, move: Move) -> State:
        if not self.closed_form or not prediction.is_dense:
            return super().resample(state, prediction, move)
        options = move.options
        _, x = ops.topk_renoise(
            prediction.logits, options.top_k, move.t_next, move.rng, temperature=move.temperature, top_p=options.top_p,
            beta=self.beta, given=move.given, known=move.known, out=state.x if state.is_made else None,
        )  # fmt: skip
        return State(x)

    def __repr__(self) -> str:
        alpha = "" if self.alpha == 1 else f", alpha={self.alpha:g}"
        return (
            f"LogitPath(vocab_size={self.vocab_size}, beta={self.beta:g}, t_max={self.t_max:.4f}, "
            f"t_split={self.t_split:.4f}{alpha})"
        )
