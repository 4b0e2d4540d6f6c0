"""In which order the positions of a text are written: sets of them, one after another, all of a set together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def slice_order(given: Tensor, count: int | Tensor) -> Tensor:
    """(B, L) int64, the slice of each position: 0 where it is given, else 1 to count (a number or (B, 1)), in turn from the left."""
    free = ~given
    return torch.where(free, (free.cumsum(1) - 1) % count + 1, 0)


@dataclass(frozen=True)
class Layout:
    """Sets of positions, in the order in which they are written; the whole repeats every `period` free positions.

    With ((0, 4), (2, 6), (1, 3, 5, 7)) the free positions 0, 4, 8, 12, ... are written in the first pass, 2, 6, 10, ... in the second,
    and all odd ones in the third. Positions are counted among those that are free, from the left.

    Args:
        sets: of the numbers 0 to period - 1, each once.

    Raises:
        ValueError, TypeError: a number is missing, there twice, or outside the period; a set is empty.
    """

    sets: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        try:
            sets = tuple(tuple(int(n) for n in numbers) for numbers in self.sets)
            whole = all(
                n == m
                for numbers, given in zip(sets, self.sets, strict=True)
                for n, m in zip(numbers, given, strict=True)
            )
        except (TypeError, ValueError):
            sets, whole = (), False
        if not whole or isinstance(self.sets, str):
            raise TypeError(f"layout: got {self.sets!r}, allowed are sets of integers, such as ((0, 2), (1, 3))")
        numbers = sorted(n for some in sets for n in some)
        if not sets or not all(sets):
            raise ValueError(
                f"layout: got {len(sets)} sets, {sum(not s for s in sets)} of them empty, allowed are sets that hold a position"
            )
        for n in range(len(numbers)):
            if numbers[n] != n:
                what = f"{numbers[n]} twice" if n and numbers[n] == numbers[n - 1] else f"no {n}"
                raise ValueError(f"layout: got {what}, allowed are the positions 0 to {len(numbers) - 1}, each once")
        object.__setattr__(self, "sets", sets)

    @classmethod
    def stride(cls, count: int) -> Layout:
        """Position i in set i modulo count: of what was tried the best by far (benchmarks/NOTES.md)."""
        return cls(tuple((i,) for i in range(count)))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """ "0 4 | 2 6 | 1 3 5 7": what `str` gives.

        Raises:
            ValueError: it is none.
        """
        try:
            return cls(tuple(tuple(int(n) for n in part.replace(",", " ").split()) for part in text.split("|")))
        except ValueError as error:
            if str(error).startswith("layout:"):
                raise
            raise ValueError(f"layout: got {text!r}, allowed are sets such as '0 4 | 2 6 | 1 3 5 7'") from None

    def __str__(self) -> str:
        return " | ".join(" ".join(map(str, numbers)) for numbers in self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def period(self) -> int:
        return sum(map(len, self.sets))

    @cached_property
    def pattern(self) -> Tensor:
        """(period,) int64, the set of each position, from 1 on."""
        pattern = torch.zeros(self.period, dtype=torch.int64, device="cpu")
        for i, numbers in enumerate(self.sets):
            pattern[list(numbers)] = i + 1
        return pattern

    def order(self, given: Tensor) -> Tensor:
        """(B, L) int64, the set of each position from 1 on, 0 where it is given (B, L) bool."""
        free = ~given
        numbers = (free.cumsum(1) - 1).clamp_min(0) % self.period
        return torch.where(free, self.pattern.to(given.device)[numbers], 0)

    def check_fits(self, given: Tensor) -> None:
        """ValueError where a sequence has free positions, but none for one of the sets."""
        needed = 1 + max(min(numbers) for numbers in self.sets)
        free = (~given).sum(1)
        short = free[(free > 0) & (free < needed)]
        if len(short):
            raise ValueError(
                f"layout: got {len(self)} sets for {int(short[0])} free positions, allowed is one whose every set holds one of them"
            )
