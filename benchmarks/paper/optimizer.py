"""Muon against AdamW over learning rates (the paper's figure 4): held-out loss after the same steps.

The optimizer is that of the hidden matrices; embeddings and head have AdamW in both, at the same learning rate. Muon's step is scaled
to the size of AdamW's, so that one axis serves both.
"""

from __future__ import annotations

import sys

from matched import Bench, cell, draw_curve, figure, markdown, of, run, values

TITLE = "Muon against AdamW"
RATES = (1e-2, 3e-3, 3e-2, 1e-3)  # the middle first


OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}
INPUTS = {"simplex": "simplex uniform", "posterior": "posterior"}


def measure(bench: Bench) -> None:
    bench.table.expected = len(bench.seeds) * len(INPUTS) * len(OPTIMIZERS) * len(RATES)
    for seed in bench.seeds:
        for input, method in INPUTS.items():
            for rate in RATES:
                for optimizer in OPTIMIZERS:

                    def make(method=method, rate=rate, optimizer=optimizer, seed=seed):
                        return bench.trained(method, seed, optimizer=optimizer, lr=rate, steps=bench.scale.short_steps)[
                            1
                        ]

                    bench.table.row({"input": input, "optimizer": optimizer, "lr": rate, "seed": seed}, make)


def table(rows) -> list[str]:
    inputs = values(rows, "input")
    lines = [
        [f"{rate:g}", *(cell(of(rows, input=input, lr=rate, optimizer=name), "loss", 3) for input in inputs for name in OPTIMIZERS)]
        for rate in sorted(values(rows, "lr"))
    ]  # fmt: skip
    titles = ["learning rate", *(f"{title}, {input} input" for input in inputs for title in OPTIMIZERS.values())]
    note = (
        f"Each cell: held-out loss in nats per token, mean over t; lower is better. Seeds: {len(values(rows, 'seed'))}."
    )
    return [*markdown(titles, lines), "", note]


def plot(rows):
    chart, axis = figure(figsize=(5, 4))
    for input, style in zip(INPUTS, ("-", "--"), strict=True):
        for i, (name, title) in enumerate(OPTIMIZERS.items()):
            found = of(rows, input=input, optimizer=name)
            draw_curve(axis, found, "lr", "loss", style, color=f"C{i}", label=f"{title}, {input} input")
    axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats per token, mean over t")
    axis.legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
