"""The line that tells how far a training run is."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any


class ProgressLine:
    """One line that is written over in a terminal, at any width of it; elsewhere a line every 15 seconds."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.average = math.nan  # of the loss
        self.last = time.perf_counter()

    def show(self, record: dict[str, Any], done: float) -> None:
        """record: what the log gets of a step. done: share of the budget, in [0, 1]."""
        loss = record["loss"]
        if math.isfinite(loss):
            self.average = loss if math.isnan(self.average) else 0.95 * self.average + 0.05 * loss
        now = time.perf_counter()
        if now - self.last < (0.5 if self.terminal else 15.0) and record["heldout_loss"] is None:
            return
        self.last = now
        left = record["seconds"] / done * (1 - done) if done > 0 else math.nan
        text = f"step {record['step']}  loss {self.average:.3f}  {record['tokens_per_second']:,.0f} tokens/s  {span(left)} left"
        if record["skipped"]:
            text += f"  {record['skipped']} skipped"
        if record["heldout_loss"] is not None:
            text += f"  held-out loss {record['heldout_loss']:.3f}"
        if not self.terminal:
            print(text, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        end = "" if record["heldout_loss"] is None else "\n"  # a look at held-out text stays on the screen
        print(f"\r{text[:width]:<{width}}", end=end, flush=True)

    def close(self) -> None:
        if self.terminal:
            print()


def span(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
