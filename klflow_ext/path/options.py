"""How a text is generated: every knob of the schemes, in one place. Samplers, steps and the command line read it here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, get_args

from klflow_ext.checks import LEAST, MOST, check_choice, check_int, check_scalar
from klflow_ext.path.layout import Layout

Temperature = float | tuple[float, float] | Callable[[float], float]
Final = Literal["argmax", "draw"]
Euler = Literal["exact", "paper"]


@dataclass(frozen=True)
class SampleOptions:
    """What `Sampler.infill` may be asked for.

    Raises:
        ValueError, TypeError: a field is outside its range, or no number; the message names it.
    """

    steps: int = 64
    """Network passes (NFE), at least 1. Of the schemes that denoise: steps - 1 moves, and a last pass whose tokens are the
    result."""

    method: str | None = None
    """"basic", "sampling" or "hybrid", by which all positions move from noise to text together; "slices" or "segments", by which
    every pass draws some of the free positions for good, given all that stands; or a registered name. None: "slices" for a
    network that was trained with them, else "segments".

    Slices: each set of the layout is a slice. Segments: for a model trained on sequences of which a part is given; everything is
    read again in every pass. Tokens that are drawn together lie apart, so they hardly depend on each other. No more passes are
    made than a sequence has free positions."""

    layout: Layout | str | None = None
    """Of slices and segments, the order of the positions, a `Layout` or its text, such as "0 4 | 2 6 | 1 3 5 7". There are then as many
    passes as sets (times slice_steps), whatever `steps` says. None: a stride, position i in set i mod (steps / slice_steps)."""

    slice_steps: int = 1
    """Of "slices": passes for each slice, at least 1. With more, a slice goes from noise to its tokens by the sampling scheme, and
    there are steps / slice_steps slices."""

    top_k: int | None = 20
    """Of each draw, at least 1; None: all V. The basic scheme of a path on the simplex draws only at the end."""

    top_p: float = 1.0
    """Of each draw, in (0, 1]: the likeliest tokens whose shares add up to it."""

    temperature: Temperature = 1.0
    """A positive number; (first, last), linear over the passes; or a function of the progress in [0, 1], each positive. 0 alone is the
    likeliest token of each draw, as top_k=1."""

    t_split: float | None = None
    """Where hybrid turns from basic to sampling, in [0, 1]; None: the path's own."""

    grid_power: float = 1.0
    """Of `Path.time_grid`, positive; below 1: more of the passes late."""

    times: Sequence[float] | None = None
    """Of the schemes that denoise, the times at which the network is asked, as many as steps, rising from 0 to below 1, such as those of
    `LogitPath.race_times`. None: `Path.time_grid`."""

    final: Final | None = None
    """How the last pass chooses: "argmax", or "draw" from its p. None: "draw" on a path of tokens, else "argmax". It, t_split
    and grid_power say nothing to slices and segments."""

    euler: Euler = "exact"
    """Rate of LogitPath's basic step: "exact" (1 - e^-h) or the paper's (h)."""

    boosts: int | None = 64
    """Of a network that reads posteriors, the entries of p that each exact basic step adds to the noise, and that a position
    keeps of their sum, in [1, 1024]; None: all, in a state of rows (B, L, V)."""

    corrector: float = 0.0
    """Of "race", how far each move goes beyond its time before it is noised back to it, as a share of the move, in [0, 1000]: 0 is the
    exact reverse process as it stands."""

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("steps", check_int("steps", self.steps, 1, 2**31, "an integer >= 1"))
        if isinstance(self.layout, str):
            keep("layout", Layout.parse(self.layout))
        elif not isinstance(self.layout, Layout | None):
            raise TypeError(f"layout: got {self.layout!r}, allowed is None, a Layout or its text")
        most = self.steps if self.layout is None else 2**31
        keep("slice_steps", check_int("slice_steps", self.slice_steps, 1, most, f"1 to steps = {self.steps}"))
        if self.final is not None:
            check_choice("final", self.final, get_args(Final))
        check_choice("euler", self.euler, get_args(Euler))
        if self.times is not None:
            keep("times", _times(self.times, self.steps))
        if self.top_k is not None:
            keep("top_k", check_int("top_k", self.top_k, 1, 2**63, "None or an integer >= 1"))
        if self.boosts is not None:
            keep("boosts", check_int("boosts", self.boosts, 1, 1024, "None or an integer in [1, 1024]"))
        if not callable(self.temperature) and self.temperature != 0:
            self.temperatures(1)
        keep("top_p", check_scalar("top_p", self.top_p, 0, 1, "a number in (0, 1]", open_low=True))
        if self.t_split is not None:
            keep("t_split", check_scalar("t_split", self.t_split, 0, 1, "None or a number in [0, 1]"))
        keep("corrector", check_scalar("corrector", self.corrector, 0, 1000, "a number in [0, 1000]"))
        power = check_scalar("grid_power", self.grid_power, 0, math.inf, "a positive number", True, True)
        keep("grid_power", power)

    def temperatures(self, passes: int) -> list[float]:
        """The temperature of each pass: the schedule at i / (passes - 1), at 1 for a single pass."""
        schedule = self.temperature
        if not callable(schedule):
            pair = schedule if isinstance(schedule, (tuple, list)) else (schedule, schedule)
            if len(pair) != 2:
                raise ValueError(f"temperature: got {schedule!r}, allowed is a number, (first, last) or a function")
            first, last = (_temperature(value) for value in pair)
            schedule = lambda progress: first + (last - first) * progress  # noqa: E731
        return [_temperature(schedule(i / (passes - 1) if passes > 1 else 1.0)) for i in range(passes)]


@dataclass(frozen=True)
class ResolvedOptions(SampleOptions):
    """SampleOptions with what a path and a network say of the fields that were None. boosts: None for a dense state."""

    method: str = "segments"
    layout: Layout | None = None
    top_k: int = 20
    t_split: float = 0.0
    final: Final = "argmax"

    @classmethod
    def of(
        cls, options: SampleOptions, *, vocab_size: int, t_split: float, reads: str, sparse: bool, default_method: str
    ) -> ResolvedOptions:
        """For a path of this vocab_size, t_split and reads; sparse: whether the network takes boosts."""
        found = {field.name: getattr(options, field.name) for field in fields(SampleOptions)}
        found["method"] = options.method or default_method
        found["top_k"] = vocab_size if options.top_k is None else min(options.top_k, vocab_size)
        if isinstance(options.temperature, (int, float)) and options.temperature == 0:
            found["top_k"], found["temperature"] = 1, 1.0
        found["t_split"] = t_split if options.t_split is None else options.t_split
        found["final"] = options.final or ("draw" if reads == "tokens" else "argmax")
        found["boosts"] = options.boosts if sparse else None
        return cls(**found)

    @property
    def last_top_k(self) -> int:
        """top_k of the last pass."""
        return 1 if self.final == "argmax" else self.top_k


def _times(times: Sequence[float], steps: int) -> tuple[float, ...]:
    try:
        found = tuple(float(t) for t in times)
    except (TypeError, ValueError):
        raise TypeError(f"times: got {times!r}, allowed are numbers") from None
    if len(found) != steps or found[0] != 0 or found[-1] >= 1 or not all(a < b for a, b in pairwise(found)):
        raise ValueError(f"times: got {len(found)} of {times!r}, allowed are steps = {steps}, rising from 0 to below 1")
    return found


def _temperature(value: float) -> float:
    return check_scalar(
        "temperature", value, LEAST, MOST, f"0 alone, a number in [{LEAST}, {MOST}], two or a function to them"
    )
