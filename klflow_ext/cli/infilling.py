"""klflow eval --infilling: a run fills the holes of HumanEval, and the tests of each task say what that was worth."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from klflow_ext.data import encode_pieces
from klflow_ext.evaluate import code
from klflow_ext.evaluate.sandbox import permitted_layers
from klflow_ext.sample import Sampler

TIMEOUT = 10.0  # seconds of each program


def window(before: list[int], hole: int, after: list[int], length: int) -> tuple[list[int], list[bool]]:
    """(tokens, given) of a hole of so many tokens and what stands around it, at most `length` tokens, as even as there is text.

    A hole longer than half of that is cut to it.
    """
    hole = min(hole, max(length // 2, 1))
    room = length - hole
    left = min(len(before), max(room // 2, room - len(after)))
    right = min(len(after), room - left)
    tokens = before[len(before) - left :] + [0] * hole + after[:right]
    return tokens, [True] * left + [False] * hole + [True] * right


@dataclass(frozen=True)
class Infilling:
    """Which tasks, and how many fills of each."""

    folder: Path
    kind: Literal["single-line", "random-span"] = "single-line"
    tasks: int | None = None
    tries: int = 1

    def __post_init__(self) -> None:
        for name in ("tasks", "tries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed is an integer >= 1")

    def chosen(self) -> list[code.Task]:
        """As many as asked for, evenly among all."""
        tasks = code.infilling_tasks(self.folder, self.kind)
        count = min(self.tasks or len(tasks), len(tasks))
        return [tasks[i * len(tasks) // count] for i in range(count)]

    def measure(self, sampler: Sampler, tokenizer, length: int, seed: int, **options: Any) -> dict[str, Any]:
        """Fills, runs, prints, and gives all figures with their settings. Holes have as many tokens as what stood there."""
        layers = permitted_layers()  # first, so that a machine without a sandbox is told at once
        tasks = self.chosen()
        rows = []
        for task in tasks:
            pieces = [task.kept[0], task.removed[0], task.kept[1]]
            encoded = iter(encode_pieces(tokenizer, [piece for piece in pieces if piece]))
            before, hole, after = (next(encoded) if piece else [] for piece in pieces)
            rows.append(window(before, max(len(hole), 1), after, length))
        tokens, given = zip(*rows, strict=True)
        fills: list[list[str]] = [[] for _ in tasks]
        nfe = 0
        for i in range(self.tries):
            result = sampler.infill(
                list(map(torch.tensor, tokens)), given, seed=seed + i, progress=sys.stderr.isatty(), **options
            )
            nfe = max(nfe, result.nfe)
            for found, row, free in zip(fills, result.tokens, given, strict=True):
                found.append(tokenizer.decode(row.cpu()[~torch.tensor(free)].tolist()))
        ks = sorted({1, self.tries})
        figures = {
            "left empty": code.summary([[code.score(task, [""], timeout=TIMEOUT)] for task in tasks]),
            "filled": code.summary(
                [
                    [code.score(task, [fill], timeout=TIMEOUT) for fill in found]
                    for task, found in zip(tasks, fills, strict=True)
                ],
                ks,
            ),
        }
        print(
            f"\n{len(tasks)} tasks of HumanEval-infilling, {self.kind}, {self.tries} fills each, at most {nfe} passes:"
        )
        for name, row in figures.items():
            print(f"  {name:<12}" + "  ".join(f"{measure} {value}" for measure, value in row.items()), flush=True)
        return {
            "kind": self.kind, "tasks": len(tasks), "tries": self.tries, "nfe": nfe, "seed": seed, "window": length, **options,
            "hole": "as many tokens as what stood there, at most half of the window",
            "sandbox": {"layers": layers, "timeout": TIMEOUT, "memory": 2**29},
            "figures": {
                name: {measure: value._asdict() for measure, value in row.items()} for name, row in figures.items()
            },
        }  # fmt: skip
