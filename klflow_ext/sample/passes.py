"""The passes of a network over some sequences: asked for, counted, shown, kept, and looked at."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from klflow_ext.path import Evidence, Path, Prediction, ResolvedOptions, State
from klflow_ext.path.layout import Layout, slice_order
from klflow_ext.path.network import Called, Network, Streams
from klflow_ext.sample.watching import Watcher


class Passes:
    """What a way through a text works with.

    Attributes:
        network, path: who is asked, and on which path.
        given: (B, L) bool. known: (B, L) int64, the given tokens, 0 elsewhere.
        evidence: what was observed of the others, or None. A way that says `hears=True` when it is registered hands `predict` that
            of the positions that it asks for.
        seeds: (B,) int64. count: passes made. bad_pass: (B,) int64, the first pass whose logits said nothing, 0: none.
        keeps: whether a way is to `keep` its tokens after each pass, as somebody watches or wants the history: those kept.
    """

    def __init__(
        self,
        network: Network | Called,
        path: Path,
        tokens: Tensor,
        given: Tensor,
        seeds: Sequence[int] | Tensor,
        *,
        progress: bool = False,
        return_history: bool = False,
        evidence: Evidence | None = None,
        watcher: Watcher | None = None,
    ):
        self.evidence = None if evidence is None else evidence.without(given)
        self.network, self.path, self.given, self.known = network, path, given, torch.where(given, tokens, 0)
        self.count, self.keeps = 0, return_history or watcher is not None
        self.history: list[Tensor] = []
        self._returns_history, self._watcher, self._stood = return_history, watcher, given
        if not isinstance(seeds, Tensor):
            seeds = torch.tensor(seeds, dtype=torch.int64, device=given.device)
        self.seeds = seeds
        self._total, self._shows, self._start = 0, progress, time.perf_counter()
        self._latest: Prediction | None = None
        self.bad_pass = torch.zeros(len(given), dtype=torch.int64, device=given.device)

    @cached_property
    def _some_given(self) -> bool:
        return bool(self.given.any())

    def rng(self, step: int) -> Tensor:
        """(B, 2): the noise state of each sequence, (seed, step)."""
        return torch.stack([self.seeds, torch.full_like(self.seeds, step)], 1)

    def observed(self, places: Tensor) -> Evidence | None:
        """What was observed of some positions (B, N)."""
        return None if self.evidence is None else self.evidence.at(places)

    def observed_beyond(self, shown: Tensor) -> Evidence | None:
        """What was observed of all positions but those that are shown (B, L)."""
        return None if self.evidence is None else self.evidence.without(shown)

    def layout(self, options: ResolvedOptions, most: int) -> Layout:
        """That which was asked for, else a stride of `most` sets.

        Raises:
            ValueError: it does not fit the free positions.
        """
        if options.layout is None:
            return Layout.stride(most)
        options.layout.check_fits(self.given)
        return options.layout

    def expect(self, total: int) -> None:
        """Says how many passes there will be, for the progress line."""
        self._total = total

    def predict(
        self,
        state: State,
        t: float,
        given: Tensor,
        *,
        previous: Tensor | None = None,
        cache: Any = None,
        streams: Streams | None = None,
        evidence: Evidence | None = None,
    ) -> Prediction:
        """What the network says of a state at time t; given (B, L): what it may take for certain. evidence: of these positions.

        previous, cache, streams: as in `Network.predict`. A network with slices hears of what all ways are given by streams.

        Raises:
            ValueError: the logits of the pass before held a NaN or had no finite maximum (on CUDA only at the end: looking
                synchronises).
        """
        self.look()
        times = torch.full((len(given),), t, dtype=torch.float32, device=given.device)
        times = self.path.model_times(times, given, self.network.times_by_position)
        if self.network.slices and streams is None and self._some_given:
            streams = Streams.of_text(self.known, slice_order(self.given, 1))
        state.evidence = evidence
        self._latest = self.network.predict(state, times, previous=previous, cache=cache, streams=streams)
        self.advance()
        return self._latest.with_evidence(evidence)

    def advance(self) -> None:
        """Counts a pass; shows a line with the time left once they have taken two seconds."""
        self.count += 1
        seconds = time.perf_counter() - self._start
        if self._shows and seconds > 2:
            left = seconds / self.count * (self._total - self.count)
            end = "\r" + " " * 50 + "\r" if self.count == self._total else ""
            print(
                f"\rsampling: pass {self.count}/{self._total}, {left:.0f} s left {end}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def draw(
        self,
        prediction: Prediction,
        places: Tensor,
        k: int,
        step: int,
        temperature: float,
        top_p: float,
        *,
        row_offset: int = 0,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, N): the tokens of the positions `places` for good, drawn from a prediction of theirs alone, by the noise of a step.

        wanted: (B, N) bool, which of them the way will use; None: all.

        A way through which a likelihood is to be had draws all its tokens by this (`Scoring`).
        """
        return prediction.draw(k, self.rng(step), temperature, top_p, row_offset=row_offset)

    def best(self, prediction: Prediction) -> Tensor:
        """(B, L): the likeliest tokens, for the history."""
        return prediction.draw(1, self.rng(0))

    def guess(self, found: Tensor, stands: Tensor, prediction: Prediction, places: Tensor) -> Tensor:
        """(B, L), for the history: the tokens found where they stand, else the likeliest at the places (B, N) of a prediction."""
        return torch.where(stands, found, found.scatter(1, places, self.best(prediction)))

    def keep(
        self,
        tokens: Tensor,
        prediction: Prediction | None = None,
        *,
        places: Tensor | None = None,
        stands: Tensor | None = None,
    ) -> None:
        """Puts tokens (B, L) into the history, given ones as they are, and shows them to who watches.

        Args:
            prediction: what the pass said, without which there is nothing to watch. places: (B, N) of its positions; None: all.
            stands: (B, L) bool, positions that are given or drawn for good after this pass; None: as before.
        """
        tokens = torch.where(self.given, self.known, tokens)
        if self._returns_history:
            self.history.append(tokens)
        if self._watcher is None or prediction is None:
            return
        before = self._stood
        self._stood = before if stands is None else stands
        self._watcher.see(
            tokens,
            prediction,
            given=self.given,
            before=before,
            stands=self._stood,
            places=places,
            number=self.count,
            total=self._total,
        )

    def note_bad(self, bad: Tensor) -> None:
        """bad (B,) bool: sequences whose logits said nothing in the latest pass."""
        self.bad_pass = torch.where((self.bad_pass == 0) & bad, self.count, self.bad_pass)

    def look(self) -> None:
        """Notes which sequences the latest pass said nothing of."""
        if self._latest is None or self._latest.bad is None:
            return
        self.note_bad(self._latest.bad)
        if self.bad_pass.device.type == "cpu":
            self._refuse_bad()

    def end(self) -> None:
        """After the last pass: looks at what is left to be looked at."""
        self.look()
        self._refuse_bad()

    def _refuse_bad(self) -> None:
        if not bool(self.bad_pass.any()):
            return
        sequence = int(self.bad_pass.nonzero()[0])
        raise ValueError(
            f"logits: got a NaN or no finite maximum in pass {int(self.bad_pass[sequence])}, sequence {sequence}, allowed are "
            "finite numbers; such a model has diverged"
        )


def places_of(flags: Tensor) -> Tensor:
    """(B, N): where flags (B, L), of which every row has N, are set."""
    return flags.nonzero()[:, 1].view(len(flags), -1)
