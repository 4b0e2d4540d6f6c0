"""How likely a text is to a way that draws sets of positions in a known order: its passes are made, and nothing is drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from klflow_ext.path import IGNORE, Path, Prediction
from klflow_ext.path.network import Called, Network
from klflow_ext.sample.passes import Passes


class Scoring(Passes):
    """Passes in which every token that a way draws is the one that stands in the text, and its -log p is noted.

    Attributes:
        nats: (B, L) float64, -log p of each token that was asked for, at temperature 1 and among all V; 0 where given.
    """

    def __init__(self, network: Network | Called, path: Path, tokens: Tensor, given: Tensor, **options):
        super().__init__(network, path, tokens, given, [0] * len(tokens), **options)
        self.text = tokens
        self.nats = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        self._times = torch.zeros_like(tokens)  # that a token was asked for

    def draw(
        self, prediction: Prediction, places: Tensor, *knobs: Any, wanted: Tensor | None = None, **more: Any
    ) -> Tensor:
        """As `Passes.draw`, whatever its knobs say."""
        tokens = self.text.gather(1, places)
        counts = ~self.given.gather(1, places)
        if wanted is not None:
            counts &= wanted
        label = tokens.masked_fill(~counts, IGNORE)
        self.nats.scatter_add_(
            1, places, prediction.cross_entropy(label, ignore_index=IGNORE, reduction="none").double()
        )
        self._times.scatter_add_(1, places, counts.long())
        return tokens

    def end(self) -> None:
        super().end()
        if bool((self._times != (~self.given).long()).any()):
            raise ValueError(
                "method: got one that does not draw every free token once, allowed is one that draws sets of positions in a known "
                "order"
            )
