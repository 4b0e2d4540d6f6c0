"""klflow eval --infilling: a run fills the holes of code, and the tests of each task say what that was worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from klflow_ext.cli.terminal import shows_progress
from klflow_ext.evaluate import code
from klflow_ext.evaluate.infilling import check_tasks, infill_tasks
from klflow_ext.sample import Sampler

Kind = Literal["single-line", "random-span", "humaneval", "mbpp", "functions"]


@dataclass(frozen=True)
class Infilling:
    """Which tasks, and how many fills of each. share: of the lines that are removed, of the last three kinds."""

    source: Path
    kind: Kind = "single-line"
    tasks: int | None = None
    tries: int = 1
    share: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        for name in ("tasks", "tries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed is an integer >= 1")
        if not self.share:
            raise ValueError("share: got none, allowed are one or more")

    def chosen(self) -> dict[float | None, list[code.Task]]:
        """For each share as many tasks as asked for, evenly among all; holes that come with the tasks are of share None."""
        if self.kind in code.INFILLING:
            return {None: self._some(code.infilling_tasks(self.source, self.kind))}
        return {share: self._some(self._removed(share)) for share in self.share}

    def _removed(self, share: float) -> list[code.Task]:
        if self.kind == "humaneval":
            return code.humaneval_tasks(self.source, share)
        if self.kind == "mbpp":
            return code.mbpp_tasks(self.source, share)
        files = sorted(self.source.rglob("*.py")) if self.source.is_dir() else [self.source]
        return code.function_tasks([_read(file) for file in files], share)

    def _some(self, tasks: list[code.Task]) -> list[code.Task]:
        if not tasks:
            raise ValueError(f"infilling: got {self.source} without a task, allowed is one with some")
        count = min(self.tasks or len(tasks), len(tasks))
        return [tasks[i * len(tasks) // count] for i in range(count)]

    def check(self, tokenizer: Any) -> None:
        """Raises what `measure` would, before any work."""
        try:
            for tasks in self.chosen().values():
                check_tasks(tasks, tokenizer)
        except RuntimeError as error:  # a machine without a sandbox is no mistake of the package
            raise ValueError(f"infilling: {error}") from None

    def measure(self, sampler: Sampler, window: int, seed: int, **options: Any) -> list[dict[str, Any]]:
        """Fills, runs, prints, and gives all figures with their settings, of each share."""
        rows = []
        for share, tasks in self.chosen().items():
            row = infill_tasks(
                tasks, sampler, window=window, tries=self.tries, seed=seed, progress=shows_progress(), **options
            )
            empty = code.summary(code.scores(tasks, [[[""] * len(task.removed)] for task in tasks]))
            what = self.kind if share is None else f"{self.kind} with {share:.0%} of the lines removed"
            print(f"\n{len(tasks)} tasks of {what}, {self.tries} fills each, at most {row['nfe']} passes:")
            for name, figures in (("left empty", empty), ("filled", row["figures"])):
                cells = [
                    f"{measure} {code.Interval(*figure.values()) if isinstance(figure, dict) else figure}"
                    for measure, figure in figures.items()
                ]
                print(f"  {name:<12}" + "  ".join(cells), flush=True)
            empty_row = {name: figure._asdict() for name, figure in empty.items()}
            rows.append({"kind": self.kind, "share": share, **row, "left_empty": empty_row})
        return rows


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"infilling: {file} cannot be read: {error}") from None
