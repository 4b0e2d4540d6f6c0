"""Autoregression behind the interface of a path: the same backbone, causal, as the baseline that reads from left to right."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from klflow_ext.path.base import IGNORE, Path, check_targets
from klflow_ext.path.network import Model, network_of, predict_from_hidden, predict_from_logits
from klflow_ext.path.state import Prediction


class Autoregressive(Path):
    """Next-token prediction: the model reads [start, x_1 .. x_(L-1)], start being id V, and says p(x_i | x_1 .. x_(i-1)).

    The model must be causal; there is no noise and no time (it is called with t = 0).

    Args:
        vocab_size: V, at least 2, without the start token.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str] = "autoregressive"
    reads: ClassVar[str] = "tokens"
    final: ClassVar[str] = "draw"
    fields: ClassVar[tuple[str, ...]] = ("vocab_size",)

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)

    def time(self, u: Tensor | float) -> Tensor | float:
        return u * 0.0

    def model_times(self, t: Tensor, given: Tensor | None) -> Tensor:
        return torch.zeros_like(t)

    def sample(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """What the model reads of the tokens target (..., L): [start, x_1 .. x_(L-1)], padding as start too.

        t, rng, given and row_offset change nothing.
        """
        check_targets(target, self.vocab_size)
        inputs = torch.full_like(target, self.vocab_size, dtype=torch.int64)
        inputs[..., 1:] = target[..., :-1].masked_fill(target[..., :-1] == IGNORE, self.vocab_size)
        return inputs

    def generate(
        self, model: Model, tokens: Tensor, given: Tensor, draw: Callable[[Prediction, int], Tensor],
        after: Callable[[Tensor], None],
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Left to right: a pass over the prefix that all sequences are given, then one for each position.

        A known token takes the place of the draw, whatever the model says; positions before it do not see it.

        Args:
            model: a Network with a cache (a causal Denoiser): each pass reads new positions only; else `model(x, t)` reads all so far.
            tokens, given: (B, L) ids, and which of them are known; at least one is not.
            draw: `draw(prediction, i)`, the (B, 1) tokens of position i. after: called with the tokens after each pass.

        Returns:
            tokens (B, L), and the number of passes: the positions from the first to the last that is free in any sequence.
        """
        free = (~given).any(0).nonzero()
        first, last = int(free[0]), int(free[-1])
        tokens = torch.where(given, tokens, 0)
        inputs = torch.cat([torch.full_like(tokens[:, :1], self.vocab_size), tokens[:, :-1]], 1)
        t = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        network = network_of(model)
        cache = network.cache(len(tokens)) if network is not None and network.caches else None
        for i in range(first, last + 1):
            if cache is None:
                prediction = predict_from_logits(model, inputs[:, : i + 1], t, self.vocab_size).last()
            else:
                new = inputs[:, cache.length : i + 1]
                h = network.hidden(network.embed(new, t), t, cache=cache)
                prediction = predict_from_hidden(network, h[:, -1:], self.vocab_size)
            drawn = torch.where(given[:, i : i + 1], tokens[:, i : i + 1], draw(prediction, i))
            tokens[:, i : i + 1] = drawn
            inputs[:, i + 1 : i + 2] = drawn[:, : inputs.shape[1] - i - 1]
            after(tokens)
        return tokens, last - first + 1
