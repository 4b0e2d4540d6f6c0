"""Muon against AdamW over learning rates (the paper's figure 4): held-out loss after the same steps.

The optimizer is that of the hidden matrices; embeddings and head have AdamW in both, at the same learning rate. Muon's step is scaled
to the size of AdamW's, so that one axis serves both.
"""

from __future__ import annotations

import sys

from matched import Bench, cell, figure, markdown, mean_over_seeds, of, run, values

TITLE = "Muon against AdamW"
RATES = (1e-2, 3e-3, 3e-2, 1e-3)  # the middle first


def measure(bench: Bench) -> None:
    bench.table.expected = len(bench.seeds) * 2 * len(RATES)
    for seed in bench.seeds:
        for rate in RATES:
            for optimizer in ("muon", "adamw"):

                def make(rate=rate, optimizer=optimizer, seed=seed):
                    return bench.trained("simplex uniform", seed, optimizer=optimizer, lr=rate)[1]

                bench.table.row({"optimizer": optimizer, "lr": rate, "seed": seed}, make)


def table(rows) -> list[str]:
    lines = [
        [f"{rate:g}", *(cell(of(rows, lr=rate, optimizer=name), field, 3) for field in ("loss", "nats") for name in ("muon", "adamw"))]
        for rate in sorted(values(rows, "lr"))
    ]  # fmt: skip
    titles = [
        "learning rate",
        "Muon: held-out loss, mean over t",
        "AdamW: the same",
        "Muon: bound, nats per token",
        "AdamW: the same",
    ]
    return [
        *markdown(titles, lines),
        "",
        f"Seeds: {len(values(rows, 'seed'))}. Loss is in nats per token, lower is better.",
    ]


def plot(rows):
    chart, axis = figure(figsize=(5, 4))
    for name, title in (("muon", "Muon"), ("adamw", "AdamW")):
        rates = sorted(values(of(rows, optimizer=name), "lr"))
        means = [mean_over_seeds(of(rows, optimizer=name, lr=rate), "loss")[0] for rate in rates]
        axis.plot(rates, means, marker="o", label=title)
    axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats per token, mean over t")
    axis.legend()
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
