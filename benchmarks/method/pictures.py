"""The pictures of the results: what a network of each kind learns, how likely held-out text is to it, and what it writes."""

from __future__ import annotations

import json

import numpy as np
from compared import ROOT, TEXT, beside, grouped, placed, results, sampled_as, titled

V, STEPS = 2048, 1075  # of the runs that are drawn
SHORT = (8192, 540)  # V and steps of the others
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # of losses

# Told apart without colour: marker and line. Colours are those of Okabe and Ito.
STYLES = {
    "autoregressive": ("black", "P", ":"),
    "slices": ("#0072B2", "o", "-"),
    "mask slices": ("#D55E00", "s", "-"),
    "segments": ("#56B4E9", "^", "--"),
    "mask, segments": ("#E69F00", "v", "--"),
    "posterior": ("#009E73", "D", "-."),
    "simplex": ("#CC79A7", "X", "-."),
    "mask": ("#7f7f7f", "d", "-."),
}


def style(name: str) -> dict:
    """Of a line; runs with half the steps have hollow markers."""
    name, half, _ = name.partition(", half the steps")
    colour, marker, line = STYLES[name]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 6, "markerfacecolor": "white" if half else colour}  # fmt: skip


def seeds_of(runs: list[dict]) -> str:
    count = len({r["seed"] for r in runs})
    return f"{count} seed{'s' * (count > 1)}"


def plot(arguments) -> None:
    """Writes results/method_{loss,frontier,likelihood}.png."""
    import matplotlib

    matplotlib.use("Agg")
    found = results()
    for name, draw in (("loss", loss), ("frontier", frontier), ("likelihood", likelihood)):
        figure = draw(found)
        figure.savefig(ROOT / "results" / f"method_{name}.png", dpi=110)


def figure_of(rows: int, columns: int, size: tuple[float, float], **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def loss(found: list[dict]):
    """Held-out loss of the networks of the logit path, by time and as they learned: the mean over seeds, and each seed as a thin line."""
    shown = ("slices", "segments", "posterior", "simplex")
    figure, axes = figure_of(2, 2, (11, 7))
    for (by_time, by_step), place in zip(axes, ((V, STEPS), SHORT), strict=True):
        for name in shown:
            runs = [r for r in found if (r["vocab_size"], r["steps"], r["name"]) == (*place, name) and r.get("losses")]
            if not runs:
                continue
            look = style(name)
            for axis, points in (
                (by_time, [[(float(t), v) for t, v in r["losses"].items()] for r in runs]),
                (by_step, [[(c["step"], c["loss"]) for c in r["curve"]] for r in runs]),
            ):
                for line in points:
                    axis.plot(*zip(*line, strict=True), color=look["color"], linewidth=0.6, alpha=0.6)
                xs = [x for x, _ in points[0]]
                ys = np.mean([[y for _, y in line] for line in points], axis=0)
                axis.plot(xs, ys, label=f"{titled(name)} ({seeds_of(runs)})", **look)
        by_time.set(xlabel="t, from noise to text", ylabel="held-out loss, nats per token", yscale="log", title=f"V = {place[0]:,}, {place[1]:,} steps: by time")  # fmt: skip
        by_step.set(
            xlabel="training step", ylabel="mean over six times, nats per token", title="the mean, as it trains"
        )
        by_time.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        by_time.set_yticks([], minor=True)
        by_time.legend(fontsize=8)
    return figure


def frontier(found: list[dict]):
    """Bits per byte against entropy at each number of passes; the points of a line are values of top-k."""
    runs = [r for r in found if beside(r)[:2] == (V, STEPS) and r.get("samples")]
    figure, axes = figure_of(2, 2, (11, 9), sharex=True, sharey=True)
    groups: dict[str, list[tuple[dict, dict]]] = {}
    for r in runs:
        for s in r["samples"]:
            groups.setdefault(sampled_as(r["name"], s["method"]) + beside(r)[2], []).append((r, s))
    names = sorted((name for name in groups if name.partition(", half")[0] in STYLES), key=placed)
    text = json.loads(TEXT.read_text())[str(V)] if TEXT.exists() else None
    for axis, nfe in zip(axes.flat, (8, 16, 32, 64), strict=True):
        for name in names:
            every = name == "autoregressive"  # one token a pass, for comparison in every panel
            by_k = grouped([s for _, s in groups[name] if every or s["steps"] == nfe], lambda s: s["top_k"])
            points = sorted((np.mean([s["entropy"] for s in g]), np.mean([s["bits_per_byte"] for s in g])) for g in by_k.values())  # fmt: skip
            if points:
                label = f"{titled(name)} ({seeds_of([r for r, _ in groups[name]])})"
                axis.plot(*zip(*points, strict=True), label=label + ", 64 passes" * every, **style(name))
        if text:
            axis.plot(text["entropy"], text["bits_per_byte"], marker="*", color="black", markersize=13, linestyle="", label="real text, held out")  # fmt: skip
        axis.set_title(f"{nfe} passes")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("entropy of a sample's tokens, nats")
    for axis in axes[:, 0]:
        axis.set_ylabel("bits per byte under the judge")
    counts = sorted({s["top_k"] for r in runs for s in r["samples"]})
    figure.suptitle(
        f"TinyStories, V = {V:,}, {STEPS:,} training steps. Lower and further right is better. A line joins top-k {', '.join(map(str, counts))}, "
        "as far as measured.",
        fontsize=10,
    )
    handles: dict[str, object] = {}
    for axis in axes.flat:
        for line in axis.get_lines():
            handles.setdefault(line.get_label(), line)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def likelihood(found: list[dict]):
    """Nats per token of held-out text, exactly, against the number of passes in which a text is written."""
    places = [
        place for place in ((V, STEPS), SHORT) if any(beside(r)[:2] == place and "likelihood" in r for r in found)
    ]
    figure, axes = figure_of(1, len(places), (5.5 * len(places), 4.4))
    for axis, place in zip(axes[0], places, strict=True):
        groups = grouped([r for r in found if beside(r)[:2] == place and "likelihood" in r], lambda r: (r["name"] + beside(r)[2],))  # fmt: skip
        for (name,), runs in sorted(groups.items(), key=lambda item: placed(item[0][0])):
            label = f"{titled(name)} ({seeds_of(runs)})"
            rows = [row for r in runs for row in r["likelihood"] if row["exact"]]
            by_steps = grouped(rows, lambda row: (row["steps"] or 0,))
            points = [(steps, np.mean([row["nats"] for row in g])) for (steps,), g in sorted(by_steps.items())]
            if name == "autoregressive":
                colour, _, line = STYLES[name]
                axis.axhline(points[0][1], color=colour, linestyle=line, label=f"{label}, 64 passes")
            else:
                axis.plot(*zip(*points, strict=True), label=label, **style(name))
        axis.set_xscale("log", base=2)
        axis.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axis.set(xlabel="passes for 64 tokens", ylabel="-log p of held-out text, nats per token", title=f"V = {place[0]:,}, {place[1]:,} steps")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
