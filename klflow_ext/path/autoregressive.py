"""Autoregression behind the interface of a path: the same backbone, causal, as the baseline that reads from left to right."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from klflow_ext.path.base import IGNORE, Path, check_targets
from klflow_ext.path.network import Called, Network


class Autoregressive(Path):
    """Next-token prediction: the model reads [start, x_1 .. x_(L-1)], start being id V, and says p(x_i | x_1 .. x_(i-1)).

    The model must be causal; there is no noise and no time (it is called with t = 0).

    Args:
        vocab_size: V, at least 2, without the start token.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str] = "autoregressive"
    likelihood_kind = "exact"
    reads: ClassVar[str] = "tokens"
    way: ClassVar[str | None] = "left_to_right"
    fields: ClassVar[tuple[str, ...]] = ("vocab_size",)

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)

    def time(self, u: Any) -> Any:
        return u * 0.0

    def model_times(self, t: Tensor, given: Tensor | None, by_position: bool) -> Tensor:
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

    def _nats(
        self, network: Network | Called, target: Tensor, label: Tensor, given: Tensor | None, seed: int, strata: int
    ) -> Tensor:
        """Exact, by one pass; a given token counts nothing, and is seen by the positions behind it. seed and strata say nothing."""
        t = torch.zeros(len(target), dtype=torch.float32, device=target.device)
        prediction = network.predict(self.noisy(target, t, 0), t)
        return prediction.cross_entropy(label, ignore_index=IGNORE, reduction="none").double().sum(1)
