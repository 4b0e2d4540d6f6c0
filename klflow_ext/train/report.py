"""What is told of a run that stopped because its loss or its gradient stayed not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor


class NotFinite(ValueError):
    """Training stopped: too many steps one after another were not finite. The text says which step, sequences and modules."""


@dataclass(frozen=True)
class BadStep:
    """A step that was not finite.

    Attributes:
        step, loss, gradient_norm: of the whole batch.
        skipped: how many were so one after another, this one with them.
        sequences: number in the batch, time and loss of each, the worst first.
        modules: norm of the gradient of each module, the worst first.
    """

    step: int
    loss: float
    gradient_norm: float
    skipped: int
    sequences: list[tuple[int, float, float]]
    modules: dict[str, float]

    SHOWN = 5

    @classmethod
    def of(
        cls, step: int, loss: float, norm: float, skipped: int, t: Tensor, losses: Tensor,
        gradients: Iterable[tuple[str, Tensor]],
    ) -> BadStep:  # fmt: skip
        """From the times (B,) and losses (B,) of the sequences, and the gradient of each parameter by name."""
        squares: dict[str, float] = {}
        for name, gradient in gradients:
            module = name.rpartition(".")[0] or name
            squares[module] = squares.get(module, 0.0) + float(gradient.double().square().sum())
        sequences = [(i, *pair) for i, pair in enumerate(zip(t.tolist(), losses.tolist(), strict=True))]
        modules = {name: math.sqrt(square) for name, square in squares.items()}
        return cls(
            step, loss, norm, skipped,
            sorted(sequences, key=lambda entry: _badness(entry[2])),
            dict(sorted(modules.items(), key=lambda entry: _badness(entry[1]))),
        )  # fmt: skip

    def lines(self, last: str) -> str:
        """A few plain lines; `last` says where the last checkpoint is."""
        sequences = ", ".join(f"{i} (t {t:.3f}, loss {loss:.4g})" for i, t, loss in self.sequences[: self.SHOWN])
        modules = ", ".join(f"{name} {norm:.3g}" for name, norm in list(self.modules.items())[: self.SHOWN])
        return (
            f"loss: got {self.loss:g} with a gradient of norm {self.gradient_norm:g} in step {self.step}, the last of "
            f"{self.skipped} that were skipped one after another; the weights are those of before\n"
            f"  sequences of the batch, the worst first: {sequences}\n"
            f"  gradient norm by module: {modules}\n"
            f"  {last}"
        )

    def to_dict(self) -> dict:
        """For JSON: numbers that are not finite as texts."""
        values = asdict(self)
        values["sequences"] = [{"number": i, "t": _number(t), "loss": _number(loss)} for i, t, loss in self.sequences]
        values["modules"] = {name: _number(norm) for name, norm in self.modules.items()}
        return {name: _number(value) if isinstance(value, float) else value for name, value in values.items()}


def _badness(value: float) -> tuple[bool, float]:
    return math.isfinite(value), -value if math.isfinite(value) else 0.0


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
