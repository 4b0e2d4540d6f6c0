"""How likely some texts are to a model: -log p in nats, exactly or as an upper bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """-log p of texts.

    Args:
        nats: (B,) float64, of each text; where it is a bound, an unbiased estimate of it.
        tokens: (B,) int64, how many tokens of each text are counted: those neither given nor padding.
        exact: whether nats are -log p itself, or an upper bound of it.
    """

    nats: Tensor
    tokens: Tensor
    exact: bool

    @property
    def per_token(self) -> float:
        """Nats per token, over all texts."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Of per_token, over the texts as independent draws; nan for a single one."""
        count = len(self.nats)
        if count < 2:
            return math.nan
        residuals = self.nats - self.per_token * self.tokens
        return float(residuals.std() * math.sqrt(count) / self.tokens.sum())

    def bits_per_byte(self, size: int) -> float:
        """Of texts whose counted tokens are `size` bytes in all."""
        return float(self.nats.sum()) / math.log(2) / size

    def __repr__(self) -> str:
        kind = "exact" if self.exact else "upper bound"
        return f"Likelihood({self.per_token:.3f} +- {self.standard_error:.3f} nats per token, {kind})"
