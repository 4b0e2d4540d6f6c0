"""Generated code: tasks with holes, and how many of what was put into them compile, pass their tests and are what stood there."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klflow_ext.checks import check_choice, check_int, check_scalar
from klflow_ext.evaluate.sandbox import run_program
from klflow_ext.evaluate.text import Interval, mean_interval

INFILLING = {
    "single-line": "HumanEval-SingleLineInfilling.jsonl.gz",
    "random-span": "HumanEval-RandomSpanInfillingLight.jsonl.gz",
}


@dataclass(frozen=True)
class Task:
    """A program with holes. kept: the texts around them, one more than removed, which is what stood in them."""

    name: str
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    tests: str

    def text(self, fills: Sequence[str]) -> str:
        """The program with these in its holes."""
        if isinstance(fills, str) or len(fills) != len(self.removed):
            raise ValueError(f"fills: got {fills!r}, allowed is a list of {len(self.removed)} texts")
        parts = [self.kept[0]]
        for fill, after in zip(fills, self.kept[1:], strict=True):
            parts += [fill, after]
        return "".join(parts)

    def program(self, fills: Sequence[str]) -> str:
        """With its tests behind it."""
        return f"{self.text(fills)}\n{self.tests}\n"


@dataclass(frozen=True)
class Score:
    exact: bool
    compiles: bool
    passed: bool
    reason: str


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"tasks: {path} cannot be read: {error}") from None


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def infilling_tasks(folder: str | Path, kind: str = "single-line") -> list[Task]:
    """HumanEval-infilling (Bavarian et al. 2022): one hole in each. kind: "single-line" or "random-span"."""
    check_choice("kind", kind, tuple(INFILLING))
    return [
        Task(
            row["task_id"],
            (row["prompt"], row["suffix"]),
            (row["canonical_solution"],),
            f"{row['test']}\ncheck({row['entry_point']})",
        )
        for row in _lines(Path(folder) / INFILLING[kind])
    ]


def mbpp_tasks(path: str | Path, share: float = 0.1, seed: int = 0) -> list[Task]:
    """MBPP with a share of the lines of each program removed, at least one; what it is to do stands above it as a comment.

    Which lines depends on the seed and the task's number only. Neighbouring ones are one hole. Blank lines stay.
    """
    share = check_scalar("share", share, 0, 1, "a number in (0, 1]", open_low=True)
    tasks = []
    for row in _lines(Path(path)):
        lines = _unix(row["code"]).split("\n")
        written = [i for i, line in enumerate(lines) if line.strip()]
        chosen = random.Random(f"{seed} {row['task_id']}")
        gone = set(chosen.sample(written, max(1, round(share * len(written)))))
        removed: list[str] = []
        kept = ["# " + " ".join(row["text"].split()) + "\n"]
        for i, line in enumerate(lines):
            end = "\n" if i + 1 < len(lines) else ""
            if i not in gone:
                kept[-1] += line + end
            elif i - 1 in gone:
                removed[-1] += "\n" + line
                kept[-1] = end
            else:
                removed.append(line)
                kept.append(end)
        tests = "\n".join([_unix(row["test_setup_code"]), *row["test_list"]])
        tasks.append(Task(f"MBPP/{row['task_id']}", tuple(kept), tuple(removed), tests))
    return tasks


def exact_match(found: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether all holes hold what stood there, but for blank space at the ends of lines and of a hole."""
    bare = lambda text: "\n".join(line.rstrip() for line in text.strip().split("\n"))  # noqa: E731
    return [bare(text) for text in found] == [bare(text) for text in wanted]


def score(task: Task, fills: Sequence[str], *, timeout: float = 10.0, memory: int = 2**29) -> Score:
    """What these fills are worth. Both compiling and running happen in the sandbox."""
    outcome = run_program(task.program(fills), timeout=timeout, memory=memory)
    compiles = outcome.passed or compile_passes(task.text(fills))
    return Score(exact_match(fills, task.removed), compiles, outcome.passed, outcome.reason)


def compile_passes(source: str) -> bool:
    """Whether Python compiles it: asked in the sandbox, as some text takes the compiler down."""
    return run_program(f"compile({source!r}, 'program', 'exec')").passed


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that of k samples one passes, unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).

    Args: samples: n of one task; passed: c of them; k: at most n.
    """
    samples = check_int("samples", samples, 1, 2**31, "an integer >= 1", ValueError)
    passed = check_int("passed", passed, 0, samples, f"an integer in [0, samples = {samples}]", ValueError)
    k = check_int("k", k, 1, samples, f"an integer in [1, samples = {samples}]", ValueError)
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def summary(scores: Sequence[Sequence[Score]], ks: Sequence[int] = (1,)) -> dict[str, Interval]:
    """{"pass@1", "compiles@1", "exact@1", ...: means over tasks, with bootstrap intervals} of the scores of each task's samples."""
    if not scores:
        raise ValueError("scores: got none, allowed is those of one task or more")
    found = {}
    for k in ks:
        for name, field in (("pass", "passed"), ("compiles", "compiles"), ("exact", "exact")):
            each = [pass_at_k(len(task), sum(bool(vars(s)[field]) for s in task), k) for task in scores]
            found[f"{name}@{k}"] = mean_interval(each)
    return found
