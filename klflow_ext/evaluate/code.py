"""Generated code: tasks with holes, and how many of what was put into them compile, pass their tests and are what stood there."""

from __future__ import annotations

import ast
import math
import random
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from klflow_ext.checks import check_choice, check_int, check_scalar
from klflow_ext.evaluate.rows import read_rows
from klflow_ext.evaluate.sandbox import run_program
from klflow_ext.evaluate.text import Interval, mean_interval

INFILLING = {
    "single-line": "HumanEval-SingleLineInfilling.jsonl.gz",
    "random-span": "HumanEval-RandomSpanInfillingLight.jsonl.gz",
}
HUMANEVAL = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str)
MBPP = {"task_id": int, "text": str, "code": str, "test_setup_code": str, "test_list": list}
SHARES = tuple(i / 10 for i in range(1, 11))  # of the lines that are removed, as the curves over it are drawn
COMPILED_AT_ONCE = 256  # programs, by one process of the sandbox


@dataclass(frozen=True)
class Task:
    """A program with holes. kept: the texts around them, one more than removed, which is what stood in them.

    tests: a program that follows it; None: there is none, and the program is compiled only.
    """

    name: str
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    tests: str | None

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
        return f"{self.text(fills)}\n{self.tests or ''}\n"


@dataclass(frozen=True)
class Score:
    exact: bool
    compiles: bool
    passed: bool | None  # None: there are no tests
    reason: str


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
        for row in read_rows("tasks", Path(folder) / INFILLING[kind], {**HUMANEVAL, "suffix": str})
    ]


def remove_lines(name: str, before: str, lines: Sequence[str], share: float, seed: int, tests: str | None) -> Task:
    """A task of which a share in (0, 1] of these lines is removed, at least one; `before` stands above them and stays.

    Which lines depends on the seed and the name only, and a larger share removes those of a smaller one and more. Neighbouring
    ones are one hole. Blank lines stay.
    """
    share = check_scalar("share", share, 0, 1, "a number in (0, 1]", open_low=True)
    written = [i for i, line in enumerate(lines) if line.strip()]
    if not written:
        raise ValueError(f"lines: got none but blank ones in {name}, allowed is one or more")
    count = max(1, round(share * len(written)))
    random.Random(f"{seed} {name}").shuffle(written)
    gone = set(written[:count])
    kept, removed = [before], list[str]()
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
    return Task(name, tuple(kept), tuple(removed), tests)


def mbpp_tasks(path: str | Path, share: float = 0.1, seed: int = 0) -> list[Task]:
    """MBPP with a share of the lines of each program removed; what it is to do stands above it as a comment.

    The line with the function's name may be among them, which nothing but the tests then tells.
    """
    check_scalar("share", share, 0, 1, "a number in (0, 1]", open_low=True)
    return [
        remove_lines(
            f"MBPP/{row['task_id']}",
            "# " + " ".join(row["text"].split()) + "\n",
            _unix(row["code"]).split("\n"),
            share,
            seed,
            "\n".join([_unix(row["test_setup_code"]), *row["test_list"]]),
        )
        for row in read_rows("tasks", path, MBPP)
    ]


def humaneval_tasks(path: str | Path, share: float, seed: int = 0) -> list[Task]:
    """HumanEval (a file) with a share of the lines of each function's body removed; its head and docstring stay."""
    check_scalar("share", share, 0, 1, "a number in (0, 1]", open_low=True)
    return [
        remove_lines(
            row["task_id"],
            row["prompt"],
            row["canonical_solution"].rstrip("\n").split("\n"),
            share,
            seed,
            f"{row['test']}\ncheck({row['entry_point']})",
        )
        for row in read_rows("tasks", path, HUMANEVAL)
    ]


def function_tasks(
    sources: Sequence[str], share: float, seed: int = 0, *, lines: tuple[int, int] = (3, 20)
) -> list[Task]:
    """The functions and methods of Python sources with a share of the lines of their bodies removed; they have no tests.

    Head and docstring stay. lines: the fewest and the most lines of a body, those of a docstring and blank ones not counted. A
    function within another is part of that one.
    """
    check_scalar("share", share, 0, 1, "a number in (0, 1]", open_low=True)
    tasks = []
    for number, source in enumerate(sources):
        for name, head, body in _functions(source):
            if lines[0] <= sum(bool(line.strip()) for line in body) <= lines[1]:
                above = "".join(line + "\n" for line in head)
                tasks.append(remove_lines(f"{number}:{name}", above, body, share, seed, None))
    return tasks


def _functions(source: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(name with its line, lines of head and docstring, lines of the body) of the outermost functions, those of classes too.

    Left out are bodies on the line of the head, those of a docstring alone, and what does not compile without its indent.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[ast.AST] = [] if (tree := _parsed(source)) is None else [tree]
        while found:
            node = found.pop(0)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[:0] = ast.iter_child_nodes(node)
                continue
            start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            above = node.body[0].lineno - 1
            if ast.get_docstring(node, clean=False) is not None:
                above = node.body[0].end_lineno or above
            rows = textwrap.dedent("\n".join(source.split("\n")[start : node.end_lineno])).split("\n")
            head, body = rows[: above - start], rows[above - start :]
            if node.lineno <= above and any(line.strip() for line in body) and _parsed("\n".join(rows)) is not None:
                yield f"{node.lineno}:{node.name}", head, body


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def exact_match(found: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether all holes hold what stood there, but for blank space at the ends of lines and of a hole."""
    bare = lambda text: "\n".join(line.rstrip() for line in text.strip().split("\n"))  # noqa: E731
    return [bare(text) for text in found] == [bare(text) for text in wanted]


def score(task: Task, fills: Sequence[str], *, timeout: float = 10.0, memory: int = 2**29) -> Score:
    """What these fills are worth. Both compiling and running happen in the sandbox."""
    return scores([task], [[fills]], timeout=timeout, memory=memory)[0][0]


def scores(
    tasks: Sequence[Task], fills: Sequence[Sequence[Sequence[str]]], *, timeout: float = 10.0, memory: int = 2**29
) -> list[list[Score]]:
    """The score of each of the fills of each task: fills[task][try][hole] is a text.

    Many programs are compiled by one process of the sandbox. What compiles and has tests is then run in a process of its own,
    equal fills of a task once.

    Args:
        timeout: seconds of each program. memory: bytes of its address space.
    """
    if len(tasks) != len(fills):
        raise ValueError(f"fills: got those of {len(fills)} tasks, allowed are those of {len(tasks)}")
    different = [{tuple(some): task.text(some) for some in tries} for task, tries in zip(tasks, fills, strict=True)]
    compiled = iter(compile_passes([text for texts in different for text in texts.values()]))
    found = []
    for task, texts, tries in zip(tasks, different, fills, strict=True):
        worth = {}
        for some in texts:
            error = next(compiled)
            passed, reason = None if task.tests is None else False, error or "compiles"
            if not error and task.tests is not None:
                outcome = run_program(task.program(some), timeout=timeout, memory=memory)
                passed, reason = outcome.passed, outcome.reason
            worth[some] = Score(exact_match(some, task.removed), not error, passed, reason)
        found.append([worth[tuple(some)] for some in tries])
    return found


def compile_passes(sources: Sequence[str]) -> list[str]:
    """Of each source "" where Python compiles it, or why not: the class of the error, or how the process of the sandbox ended."""
    found: list[str] = []
    for start in range(0, len(sources), COMPILED_AT_ONCE):
        found += _compiled(sources[start : start + COMPILED_AT_ONCE])
    return found


def _compiled(sources: Sequence[str]) -> list[str]:
    """By one process; where a source takes the compiler down, by two of half as many each."""
    outcome = run_program(_COMPILE.format(sources=list(sources)), timeout=20.0)
    said = outcome.output.split("\n")[:-1]
    if outcome.passed and len(said) == len(sources):
        return said
    if len(sources) == 1:
        return [outcome.reason]
    half = len(sources) // 2
    return _compiled(sources[:half]) + _compiled(sources[half:])


_COMPILE = """
import warnings
warnings.simplefilter("ignore")
for source in {sources!r}:
    try:
        compile(source, "program", "exec")
        print()
    except BaseException as error:
        print(type(error).__name__)
"""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that of k samples one passes, unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).

    Args: samples: n of one task; passed: c of them; k: at most n.
    """
    samples = check_int("samples", samples, 1, 2**31, "an integer >= 1", ValueError)
    passed = check_int("passed", passed, 0, samples, f"an integer in [0, samples = {samples}]", ValueError)
    k = check_int("k", k, 1, samples, f"an integer in [1, samples = {samples}]", ValueError)
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def summary(scores: Sequence[Sequence[Score]], ks: Sequence[int] = (1,)) -> dict[str, Interval]:
    """{"pass@1", "compiles@1", "exact@1", ...: means over tasks, with bootstrap intervals} of the scores of each task's samples.

    Where a task has no tests, no pass@k is given.
    """
    if not scores:
        raise ValueError("scores: got none, allowed is those of one task or more")
    fields = {"pass": "passed", "compiles": "compiles", "exact": "exact"}
    if any(one.passed is None for task in scores for one in task):
        del fields["pass"]
    found = {}
    for k in ks:
        for name, field in fields.items():
            each = [pass_at_k(len(task), sum(bool(vars(s)[field]) for s in task), k) for task in scores]
            found[f"{name}@{k}"] = mean_interval(each)
    return found
