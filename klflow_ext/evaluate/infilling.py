"""A sampler fills the holes of programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klflow_ext.checks import check_int
from klflow_ext.data import encode_pieces
from klflow_ext.evaluate import code
from klflow_ext.evaluate.sandbox import permitted_layers
from klflow_ext.sample import Sampler
from klflow_ext.sample.samples import needed, seeds_of

MEMORY = 2**29  # bytes of a program
HOLES = "as many tokens as what stood there; a program longer than the window is filled by several, from left to right"


@dataclass(frozen=True)
class Fills:
    """What was put into the holes.

    texts: texts[task][try][hole]. nfe: passes of the program that took most. windows: of the program that took most.
    """

    texts: list[list[list[str]]]
    nfe: int
    windows: int


def infill_tasks(
    tasks: Sequence[code.Task],
    sampler: Sampler,
    *,
    window: int | None = None,
    tries: int = 1,
    seed: int = 0,
    timeout: float = 10.0,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fills the holes of tasks, tests the programs, and gives the figures with their settings, in the types of JSON.

    The curve over the share of lines that are removed, for any sampler that has a tokenizer:

        sampler = Sampler(*load_run(folder)[:2], tokenizer=load_run(folder)[2])     # any path, network and method
        for share in code.SHARES:                                                   # 10 % to 100 %
            row = infill_tasks(code.humaneval_tasks(file, share)[:40], sampler, steps=32, method="segments", tries=5)
            print(share, row["nfe"], row["figures"]["exact@1"]["mean"], row["figures"]["pass@5"]["low"])

    Tasks come from `code.infilling_tasks`, `code.humaneval_tasks`, `code.mbpp_tasks`, all with tests, and `code.function_tasks`,
    of any Python source, without: of these no pass@k is given. The same tasks, seed and window make two samplers comparable.

    Args:
        tasks: one or more.
        sampler: with a tokenizer.
        window: tokens that the sampler sees at once, at least 2; None: its network's max_length. A text longer than what the
            network was trained on is filled badly: say here how long that was.
        tries: fills of each task, at least 1; pass@k and the others are given for k = 1 and k = tries.
        seed: of the first try; the next has the next.
        timeout: seconds of each program in the sandbox.
        progress: shows a line with the time left.
        options: of `Sampler.infill`: steps, method, temperature, top_k.

    Returns: {"tasks", "holes", "tries", "nfe", "windows", "window", "seed", "seconds", "options", "hole", "sandbox", "figures":
        {"exact@1": {"mean", "low", "high"}, "compiles@1", "pass@1", ...}}. nfe: passes of the program that took most, all its windows
        together. seconds: of sampling alone.

    Raises:
        ValueError: an argument is outside its range, or the tokenizer changes a program; the message names it.
        RuntimeError: the sandbox cannot be set up on this machine.
    """
    layers = permitted_layers()  # first, so that a machine without a sandbox is told at once
    tries = check_int("tries", tries, 1, 2**31, "an integer >= 1", ValueError)
    start = time.perf_counter()
    fills = fill_tasks(tasks, sampler, window=window, tries=tries, seed=seed, progress=progress, **options)
    seconds = time.perf_counter() - start
    figures = code.summary(code.scores(tasks, fills.texts, timeout=timeout, memory=MEMORY), sorted({1, tries}))
    return {
        "tasks": len(tasks), "holes": sum(len(task.removed) for task in tasks), "tries": tries, "nfe": fills.nfe,
        "windows": fills.windows, "window": window or sampler.network.max_length, "seed": seed, "seconds": seconds,
        "options": options, "hole": HOLES, "sandbox": {"layers": layers, "timeout": timeout, "memory": MEMORY},
        "figures": {name: figure._asdict() for name, figure in figures.items()},
    }  # fmt: skip


def check_tasks(tasks: Sequence[code.Task], tokenizer: Any) -> None:
    """Raises what `infill_tasks` would, of the machine and of what the tokenizer does to the programs, before any work."""
    permitted_layers()
    for task in tasks:
        _Program.of(task, tokenizer)


def fill_tasks(
    tasks: Sequence[code.Task],
    sampler: Sampler,
    *,
    window: int | None = None,
    tries: int = 1,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Fills:
    """As `infill_tasks`, without a look at what the fills are worth."""
    tokenizer = needed(sampler.tokenizer, "sampler")
    most = sampler.network.max_length
    longest = 2**31 if most is None else most
    window = check_int(
        "window", longest if window is None else window, 2, longest, f"2 to max_length = {most}", ValueError
    )
    rows = [_Program.of(task, tokenizer) for task in tasks]
    programs = [row.copy() for _ in range(tries) for row in rows]
    passes, windows = [0] * len(programs), 0
    while open_ := [j for j, row in enumerate(programs) if not all(row.given)]:
        seeds = [one for i in range(tries) for one in seeds_of(seed + i + (windows << 32), len(tasks))]
        places = [next_window(programs[j].given, window) for j in open_]
        found = sampler.infill(
            [torch.tensor(programs[j].tokens[place]) for j, place in zip(open_, places, strict=True)],
            [programs[j].given[place] for j, place in zip(open_, places, strict=True)],
            seed=[seeds[j] for j in open_],
            progress=progress,
            **options,
        )
        for j, place, ids in zip(open_, places, found.tokens, strict=True):
            programs[j].tokens[place] = ids.tolist()
            programs[j].given[place] = [True] * len(ids)
            passes[j] += found.nfe
        windows += 1
    fills = [[tokenizer.decode(row.tokens[hole]) for hole in row.holes] for row in programs]
    return Fills([fills[i :: len(tasks)] for i in range(len(tasks))], max(passes, default=0), windows)


@dataclass
class _Program:
    """The tokens of a program, whether each is given, and where its holes are."""

    tokens: list[int]
    given: list[bool]
    holes: list[slice]

    @classmethod
    def of(cls, task: code.Task, tokenizer: Any) -> _Program:
        pieces = [piece for pair in zip(task.kept, (*task.removed, ""), strict=True) for piece in pair][:-1]
        encoded = iter(encode_pieces(tokenizer, [piece for piece in pieces if piece]))
        row = cls([], [], [])
        for i, piece in enumerate(pieces):
            ids = next(encoded) if piece else [0] * (i % 2)  # a hole of nothing is one token wide
            if i % 2:
                row.holes.append(slice(len(row.tokens), len(row.tokens) + len(ids)))
                ids = [0] * len(ids)
            row.tokens += ids
            row.given += [i % 2 == 0] * len(ids)
        return row

    def copy(self) -> _Program:
        return _Program(list(self.tokens), list(self.given), self.holes)


def next_window(given: Sequence[bool], length: int) -> slice:
    """Where at most `length` positions are looked at next: the first hole, with as much before it as behind it where there is text.

    Of a hole longer than half of that the first half window counts as the hole.
    """
    first = given.index(False)
    end = first
    while end < len(given) and not given[end] and end - first < max(length // 2, 1):
        end += 1
    room = length - (end - first)
    left = min(first, max((room + 1) // 2, room - (len(given) - end)))
    return slice(first - left, min(len(given), first - left + length))
