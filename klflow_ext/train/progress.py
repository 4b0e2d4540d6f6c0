"""The line that tells how far a training run is."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

WIDE = 70  # columns from which there is room for a bar beside the words
EVERY, ELSEWHERE = 0.5, 15.0  # seconds between lines, in a terminal and elsewhere


class ProgressLine:
    """One line on stderr, used as a context: written over in a terminal of any width (by rich), elsewhere a line now and then."""

    def __init__(self) -> None:
        self.bar = _bar()
        self.average = math.nan  # of the loss
        self.last = time.perf_counter()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, record: dict[str, Any], done: float) -> None:
        """record: what the log gets of a step. done: share of the budget, in [0, 1]."""
        loss, heldout = record["loss"], record["heldout_loss"]
        if math.isfinite(loss):
            self.average = loss if math.isnan(self.average) else 0.95 * self.average + 0.05 * loss
        now = time.perf_counter()
        if now - self.last < (ELSEWHERE if self.bar is None else EVERY) and heldout is None and done < 1:
            return
        self.last = now
        left = record["seconds"] / done * (1 - done) if done > 0 else math.nan
        text = f"step {record['step']}  loss {self.average:.3f}  {record['tokens_per_second']:,.0f} tokens/s  {span(left)} left"
        if record["skipped"]:
            text += f"  {record['skipped']} skipped"
        looked = "" if heldout is None else f"  held-out loss {heldout:.3f}"
        if self.bar is None:
            print(text + looked, file=sys.stderr, flush=True)
            return
        self.bar.update(self.bar.task_ids[0], description=text, completed=done)
        self.bar.start()  # once
        if looked:  # which stays on the screen
            self.bar.print(f"step {record['step']}{looked}", markup=False, highlight=False)
        self.bar.refresh()


def _bar() -> Progress | None:
    """None where there is no terminal for it, or no rich."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column
    except ImportError:
        return None
    console = Console(stderr=True)
    if console.is_dumb_terminal:
        return None
    words = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (words, BarColumn(bar_width=12)) if console.width >= WIDE else (words,)
    # What goes to a file or a pipe is left alone.
    bar = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    bar.add_task("", total=1.0)
    return bar


def span(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
