"""How the network learns the time (the paper's figure 5): a token before all others, added to every position, adaptive norms, not."""

from __future__ import annotations

import sys

from matched import Bench, cell, figure, markdown, mean_over_seeds, of, run, values

TITLE = "Time insertion"
TIMES = {"token": "prepended token", "add": "added to each position", "adaln": "adaptive norm", "none": "none"}
INPUTS = {"simplex": "simplex uniform", "posterior": "posterior"}


def measure(bench: Bench) -> None:
    bench.table.expected = len(bench.seeds) * len(INPUTS) * len(TIMES)
    for seed in bench.seeds:
        for input, method in INPUTS.items():
            for time in TIMES:

                def make(method=method, time=time, seed=seed):
                    sampler, losses = bench.trained(method, seed, model={"time": time}, steps=bench.scale.short_steps)
                    return {**losses, **bench.judged(sampler, seed, bench.scale.passes, method="sampling", top_k=20)}

                bench.table.row({"input": input, "time": time, "seed": seed}, make)


def table(rows) -> list[str]:
    inputs = values(rows, "input")
    fields = {
        "loss": ("held-out loss", 3),
        "nats": ("bound", 3),
        "bits_per_byte": ("bits per byte", 2),
        "entropy": ("entropy", 2),
    }
    titles = ["time", *(f"{input} input: {title}" for input in inputs for title, _ in fields.values())]
    lines = []
    for time, title in TIMES.items():
        found = [of(rows, input=input, time=time) for input in inputs]
        lines.append([title, *(cell(part, field, digits) for part in found for field, (_, digits) in fields.items())])
    return [
        *markdown(titles, lines),
        "",
        f"Seeds: {len(values(rows, 'seed'))}. Loss (mean over t) and bound are in nats per token.",
    ]


def plot(rows):
    chart, axis = figure(figsize=(6, 4))
    for shift, input in ((-0.2, "simplex"), (0.2, "posterior")):
        means = [mean_over_seeds(of(rows, input=input, time=time), "nats") for time in TIMES]
        shown = [(i + shift, *mean) for i, mean in enumerate(means) if mean is not None]
        axis.bar(
            [x for x, _, _ in shown],
            [y for _, y, _ in shown],
            0.38,
            yerr=[e for _, _, e in shown],
            label=f"{input} input",
        )
    nats = [row["nats"] for row in rows] or [0]
    axis.set(ylim=(min(nats) - 0.3, max(nats) + 0.1), ylabel="held-out bound, nats per token (lower is better)")
    axis.set_xticks(range(len(TIMES)), TIMES.values())
    axis.legend()
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
