"""klflow plot."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from klflow_ext.cli.command import Command
from klflow_ext.cli.terminal import note, printable
from klflow_ext.files import write_file
from klflow_ext.run import Run

LOSS = {"loss": "training", "heldout_loss": "held-out"}
PANELS = {  # title: axis, and the names of the log with their labels
    "Loss": ("nats per token", LOSS),
    "Norm of the gradient": ("norm, before clipping", {"gradient_norm": "gradient_norm"}),
    "Learning rate": ("learning rate", {"lr": "lr"}),
    "Speed": ("tokens per second", {"tokens_per_second": "tokens_per_second"}),
}
SHORTEST = 5  # points of a curve that is drawn smoothed too
TEXTS, LINES = 6, 2  # texts below the curves, and lines of each


@dataclass
class Plot(Command):
    """Draw the log of a run as one PNG: loss, held-out loss, norm of the gradient, learning rate, tokens per second, and below them
    what the model wrote as it learned (klflow train --show-every)."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    out: Path | None = None
    """The PNG to write; None: <name of the run>.png here."""

    def run(self):
        out = Path(f"{self.run_folder.resolve().name}.png") if self.out is None else self.out
        check_picture("out", out)
        figure, missing = draw(Run(self.run_folder).read_log(), self.run_folder.resolve().name)
        write_picture(figure, out)
        if missing:
            note(f"left out, as the log does not hold it: {', '.join(missing)}")
        print(f"picture: {out}")


def check_picture(name: str, out: Path) -> None:
    """ValueError where no PNG can be written; name: of the argument."""
    if out.suffix.lower() != ".png" or out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{name}: got {out}, allowed is a file that ends with .png, in a folder that is there")


def write_picture(figure: Any, out: Path) -> None:
    write_file(out, lambda new: figure.savefig(new, format="png", dpi=120))


def figure_class() -> Any:
    """matplotlib's Figure. ImportError where it is not here."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs the plot extra: pip install 'klflow_ext[plot]'") from None
    return Figure


def curves(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that hold a finite number by this name."""
    found = [(r["step"], r[name]) for r in records if _is_number(r.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """Running mean that forgets a value after about a fiftieth of them all."""
    weight = 1 / max(1.0, len(values) / 50)
    mean, share, found = 0.0, 0.0, []
    for value in values:
        mean, share = mean + weight * (value - mean), share + weight * (1 - share)
        found.append(mean / share)  # as the mean started from 0
    return found


def draw(records: list[dict[str, Any]], title: str) -> tuple[Any, list[str]]:
    """(a figure with a panel of each quantity that the log holds, names that it does not hold).

    Raises:
        ValueError: it holds none. ImportError: matplotlib is not here.
    """
    make = figure_class()
    from matplotlib.ticker import MaxNLocator

    names = [name for _, labels in PANELS.values() for name in labels]
    held = [name for name in names if curves(records, name)[0]]
    if not held:
        raise ValueError(f"run: got a log without numbers to draw, allowed is one that holds one of {', '.join(names)}")
    panels = {name: panel for name, panel in PANELS.items() if set(panel[1]) & set(held)}
    columns = min(2, len(panels))
    rows, texts = -(-len(panels) // columns), chosen_texts(records)
    heights = [3.4] * rows + [0.4 + 0.2 * (LINES + 1) * len(texts)] * bool(texts)
    figure = make(figsize=(6 * columns, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    figure.suptitle(title)
    for place, (heading, (axis, labels)) in enumerate(panels.items()):
        panel = figure.add_subplot(grid[divmod(place, columns)])
        for name, label in labels.items():
            if name in held:
                _curve(
                    panel, *curves(records, name), label, rough=name in ("loss", "gradient_norm", "tokens_per_second")
                )
        panel.set(title=heading, xlabel="training step", ylabel=axis)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        if heading == "Loss":
            panel.legend()
    if texts:
        _write(figure.add_subplot(grid[rows, :]), texts, 75 * columns)
    return figure, [name for name in names if name not in held]


def chosen_texts(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(step, text) of TEXTS records that hold a text of the model, from the first to the last at about equal distances."""
    found = [(r["step"], r["sample"]) for r in records if isinstance(r.get("sample"), str)]
    count = min(TEXTS, len(found))
    return [found[i * (len(found) - 1) // max(1, count - 1)] for i in range(count)]


def _write(panel: Any, texts: list[tuple[int, str]], width: int) -> None:
    """Each text on LINES lines of so many characters, its step above it."""
    panel.axis("off")
    panel.set_title("What the model wrote", loc="left")
    for i, (step, text) in enumerate(texts):
        lines = textwrap.wrap(printable(text), width, max_lines=LINES, placeholder=" ...")
        panel.text(0, 1 - i / len(texts), f"step {step}", va="top", fontsize=8, weight="bold")
        below = 1 - (i + 0.8 / (LINES + 1)) / len(texts)
        panel.text(0, below, "\n".join(lines), va="top", fontsize=8, parse_math=False)


def _curve(panel: Any, steps: list[int], values: list[float], label: str, rough: bool) -> None:
    """A curve; a rough one thin, with its running mean."""
    if rough and len(values) >= SHORTEST:
        (thin,) = panel.plot(steps, values, linewidth=0.6, alpha=0.35)
        panel.plot(steps, smoothed(values), linewidth=1.8, color=thin.get_color(), label=f"{label}, smoothed")
    else:
        few = len(values) < 100
        panel.plot(steps, values, linewidth=1.8, marker="o" if few else None, markersize=4, label=label)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
