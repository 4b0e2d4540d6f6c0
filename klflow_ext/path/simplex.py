"""Paths on the simplex that the paper compares with: the straight line and the Fisher-Rao geodesic, from Dirichlet(1) noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from klflow_ext import ops
from klflow_ext.path.base import Path, check_targets, hide_padding
from klflow_ext.path.state import Move, Prediction, State


class _SimplexPath(Path):
    @staticmethod
    def _interpolate(x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """x_t (..., V) in the memory of x0; target, t (..., 1)."""
        raise NotImplementedError

    @staticmethod
    def _towards(x: Tensor, p: Tensor, share: float) -> Tensor:
        """x moved along the marginal ODE of p, by share = (t' - t) / (1 - t)."""
        raise NotImplementedError

    def sample(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        check_targets(target, self.vocab_size)
        target, t, given = hide_padding(target, t, given)
        if given is not None:
            t = torch.where(given, 1.0, t)
        # of token 0: a row's sum ends with its target, whose place would show in the last bit
        x0 = ops.noise_interpolate(0 * target, 0.0, rng, vocab_size=self.vocab_size, row_offset=row_offset)
        return self._interpolate(x0, target[..., None], t.expand(target.shape)[..., None])

    def step(self, state: State, prediction: Prediction, move: Move) -> State:
        p = torch.softmax(prediction.logits / move.temperature, -1)
        x = self._towards(state.x, p, float((move.t_next - move.t) / (1 - move.t)))
        return State(torch.where(move.given[..., None], state.x, x))


class LinearPath(_SimplexPath):
    """The straight line x_t = (1 - t) x_0 + t onehot(k), x_0 ~ Dirichlet(1, ..., 1).

    Args:
        vocab_size: V, at least 2. t_max, t_split: as in `Path`; for large V all is said by t = log(V) / V.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str] = "linear"

    @staticmethod
    def _interpolate(x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
        return x0.mul_(1 - t).scatter_add_(-1, target, t)

    @staticmethod
    def _towards(x: Tensor, p: Tensor, share: float) -> Tensor:
        """The marginal ODE dx/dt = (p - x) / (1 - t), exactly for frozen p."""
        return torch.lerp(x, p, share)


class SpherePath(_SimplexPath):
    """The Fisher-Rao geodesic: sqrt(x_t) on the great circle from sqrt(x_0), x_0 ~ Dirichlet(1, ..., 1), to onehot(k).

    sqrt(x_t) = (sin((1 - t) theta) sqrt(x_0) + sin(t theta) onehot(k)) / sin(theta), cos(theta) = sqrt(x_0[k])
    (Cheng et al. 2024, arXiv 2405.16441; Davis et al. 2024, arXiv 2405.14664).

    Args and errors: as `LinearPath`.
    """

    kind: ClassVar[str] = "sphere"

    @staticmethod
    def _interpolate(x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
        y = x0.sqrt_()
        theta = y.gather(-1, target).clamp_max(1.0).acos().clamp_min(1e-6)
        y = y.mul_(((1 - t) * theta).sin() / theta.sin())
        return y.scatter_add_(-1, target, (t * theta).sin() / theta.sin()).square_()

    @staticmethod
    def _towards(x: Tensor, p: Tensor, share: float) -> Tensor:
        """The marginal ODE dy/dt = E_p[log_y(onehot)] / (1 - t), y = sqrt(x), by the exponential map.

        log_y(onehot(j)) = theta_j (onehot(j) - cos(theta_j) y) / sin(theta_j), cos(theta_j) = y_j.
        """
        y = x.sqrt()
        sine = (1 - x).clamp_min(0).sqrt()
        pull = p * torch.where(sine > 1e-3, torch.atan2(sine, y) / sine, 1.0)  # p theta / sin(theta)
        v = pull - (pull * y).sum(-1, keepdim=True) * y
        length = v.norm(dim=-1, keepdim=True)
        angle = share * length
        y = (angle.cos() * y + share * torch.sinc(angle / math.pi) * v).clamp_min_(0).square_()
        return y / y.sum(-1, keepdim=True)
