"""The race: the exact reverse of the logit path's noise, one way back for every way there (`klflow_ext.path.race`)."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import LogitPath, Move, Path, Prediction, State
from klflow_ext.path.noise import log_gamma
from klflow_ext.sample.denoise import register_sampler


class RaceState(State):
    """A state that knows the clocks y (B, L, V) float64 before they are normalised."""

    def __init__(self, x: Tensor, y: Tensor):
        super().__init__(x)
        self.y = y


@register_sampler("race")
def race_step(path: Path, state: State, prediction: Prediction, move: Move) -> State:
    """Draws every token k from p, then the clocks at the next time given those of now and k.

    From g = e^-s to g' < g, with r = (g - g') / (1 - g), noising is Y = (1 + r) min(Y', Exp(rate r)). So, coordinate by
    coordinate, Y' = Y / (1 + r), plus Exp(1) with probability r / (1 + r); that of k plus Exp(mean 1 / g') with probability
    r / (g' + r). With a corrector c the move goes on to s' + c (s' - s), and is noised back to s' in the same way: the clocks have
    the same distribution, and depend less on those before. It holds rows (B, L, V), and is there to test the other schemes by.
    """
    if not isinstance(path, LogitPath) or not path.closed_form:
        raise ValueError(f"method: got 'race' on {path!r}, allowed is a LogitPath with alpha = 1")
    token = move.draw(prediction)
    s, s_next = (torch.as_tensor(path.odds(t), dtype=torch.float64) for t in (move.t, move.t_next))
    beyond = s_next + move.options.corrector * (s_next - s)
    g, g_next, g_beyond = torch.exp(-s), torch.exp(-s_next), torch.exp(-beyond)
    clocks = _exponential(move, path.vocab_size, 0)
    chosen = torch.zeros_like(clocks, dtype=torch.bool).scatter_(-1, token[..., None], True)
    if isinstance(state, RaceState):
        r = (g - g_beyond) / (1 - g)
        # Exp(1) is longer with the probability of a wait, and then by Exp(1)
        wait = torch.log1p(torch.where(chosen, g_beyond, 1.0) / r)
        y = state.y / (1 + r) + torch.where(chosen, 1 / g_beyond, 1.0) * (clocks - wait).clamp_min(0)
    else:
        y = torch.where(chosen, 1 / g_beyond, 1.0) * clocks
    if move.options.corrector:
        r = (g_next - g_beyond) / (1 - g_next)
        y = (1 + r) * torch.minimum(y, _exponential(move, path.vocab_size, 1) / r)
    x = ((1 - move.t_next) * y.log()).softmax(-1)
    known = torch.nn.functional.one_hot(move.known, path.vocab_size).to(x.dtype)
    return RaceState(torch.where(move.given[..., None], known, x).float(), y)


def _exponential(move: Move, vocab_size: int, number: int) -> Tensor:
    """(B, L, V) float64 of Exp(1), the noise of this move by its number."""
    rows = move.given.shape[1]
    return log_gamma(1.0, move.given.shape, vocab_size, move.rng, number * rows, move.given.device).exp()
