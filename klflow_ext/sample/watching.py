"""What a pass leaves behind, for who watches: `Sampler.infill(watch=..., top=...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klflow_ext.path import Prediction

UNKNOWN = -1  # the token of a position of which no pass has said anything yet


@dataclass(frozen=True, eq=False)
class Pass:
    """A pass over sequences of one length, on the CPU. All p are of the network and what was observed, before temperature, top_k and
    top_p.

    Attributes:
        number, total: which pass it is, from 1, of how many.
        members: which sequences of the batch these B are. All, but where lengths differ, or the number of free positions for a way
            that wants it equal: then one group makes its passes after the other.
        given: (B, L) bool.
        stands: (B, L) bool, positions that are given or drawn for good. On a MaskPath those that show a token, which the sampling
            scheme may hide again.
        tokens: (B, L) int64. Those that stand; elsewhere the likeliest, or UNKNOWN where no pass has asked yet.
        confidence: (B, L) float32, p of each token when a pass asked for it last; 1 where given, 0 where unknown.
        entropy: (B,) float32, mean entropy of p in nats over the positions that this pass asked for and that did not stand before
            it; NaN where it asked for none.
        top_tokens, top_p: (B, L, top), the likeliest tokens of each position when a pass asked for it last, and their p; UNKNOWN
            and 0 where none did. None where top = 0.
    """

    number: int
    total: int
    members: list[int]
    given: Tensor
    stands: Tensor
    tokens: Tensor
    confidence: Tensor
    entropy: Tensor
    top_tokens: Tensor | None
    top_p: Tensor | None


class Watcher:
    """Makes a Pass of what a way says after each pass, and hands it on.

    Args:
        watch: called with each Pass. top: how many tokens of each position it holds. members: as in Pass.
    """

    def __init__(self, watch: Callable[[Pass], object], top: int, members: list[int]):
        self.watch, self.top, self.members = watch, top, members
        self._confidence: Tensor | None = None
        self._tops: tuple[Tensor, Tensor] | None = None

    def see(
        self,
        tokens: Tensor,
        prediction: Prediction,
        *,
        given: Tensor,
        before: Tensor,
        stands: Tensor,
        places: Tensor | None,
        number: int,
        total: int,
    ) -> None:
        """tokens (B, L); before, stands: positions that stood before the pass, and after it; places (B, N): those of the prediction,
        None: all."""
        if self._confidence is None:
            self._confidence = torch.where(given, 1.0, torch.full(given.shape, -1.0, device=given.device))
            shape = (*given.shape, self.top)
            self._tops = (
                torch.full(shape, UNKNOWN, device=given.device),
                torch.zeros(shape, device=given.device),
            )
        assert self._tops is not None
        if places is None:
            places = torch.arange(given.shape[1], device=given.device).expand_as(given)
        p, entropy, ids, shares = prediction.look(tokens.gather(1, places), self.top)
        asked = ~before.gather(1, places)

        def put(into: Tensor, values: Tensor) -> Tensor:
            """values (B, N, ...) at the places that were asked for."""
            wide = places if into.dim() == 2 else places[..., None].expand_as(values)
            keep = asked if into.dim() == 2 else asked[..., None]
            return into.scatter(1, wide, torch.where(keep, values, into.gather(1, wide)))

        self._confidence = put(self._confidence, p)
        self._tops = (put(self._tops[0], ids), put(self._tops[1], shares))
        count = asked.sum(1)
        mean = torch.where(asked, entropy, 0.0).sum(1) / count  # 0 / 0 is NaN, as it says
        known = (self._confidence >= 0) | stands
        self.watch(
            Pass(
                number=number,
                total=max(total, number),
                members=self.members,
                given=given.cpu(),
                stands=stands.cpu(),
                tokens=torch.where(known, tokens, UNKNOWN).cpu(),
                confidence=self._confidence.clamp_min(0.0).cpu(),
                entropy=mean.cpu(),
                top_tokens=self._tops[0].cpu() if self.top else None,
                top_p=self._tops[1].cpu() if self.top else None,
            )
        )
