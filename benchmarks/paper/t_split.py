"""Where the hybrid scheme turns from basic to sampling. The paper has 0.28 of 0.30; 0 is the sampling scheme, 1 the basic one."""

from __future__ import annotations

import sys

from matched import Bench, cell, figure, markdown, mean_over_seeds, of, run, values

TITLE = "Where the hybrid turns"
METHODS = {"KL": "simplex uniform", "KL, posterior input": "posterior"}
SHARES = (0.0, 0.25, 0.5, 0.75, 28 / 30, 1.0)  # of t_max


def measure(bench: Bench) -> None:
    bench.data_row()
    bench.table.expected = 1 + len(bench.seeds) * len(METHODS) * len(SHARES)
    for seed in bench.seeds:
        for name, method in METHODS.items():
            for share in SHARES:

                def make(method=method, seed=seed, share=share):
                    sampler, _ = bench.trained(method, seed)
                    options = {"method": "hybrid", "t_split": share * sampler.path.t_max, "top_k": 20}
                    return bench.judged(sampler, seed, bench.scale.passes, **options)

                bench.table.row({"method": name, "share": round(share, 4), "seed": seed}, make)


def table(rows) -> list[str]:
    names = [name for name in METHODS if of(rows, method=name)]
    fields = (("bits_per_byte", "bits per byte"), ("entropy", "entropy"))
    lines = [["held-out text itself", *[cell(of(rows, method="data"), field) for field, _ in fields] * len(names)]]
    for share in sorted(values(rows, "share")):
        lines.append(
            [
                f"{share:.2f}",
                *(cell(of(rows, method=name, share=share), field) for name in names for field, _ in fields),
            ]
        )
    titles = ["turn, share of t_max", *(f"{name}: {title}" for name in names for _, title in fields)]
    return [*markdown(titles, lines), "", f"Seeds: {len(values(rows, 'seed'))}."]


def plot(rows):
    chart, axes = figure(1, 2, figsize=(10, 4))
    for axis, field, title in zip(axes, ("bits_per_byte", "entropy"), ("bits per byte under the judge", "entropy of a sample's tokens, nats"), strict=True):  # fmt: skip
        for name in METHODS:
            shares = sorted(values(of(rows, method=name), "share"))
            axis.plot(
                shares,
                [mean_over_seeds(of(rows, method=name, share=share), field)[0] for share in shares],
                marker="o",
                label=name,
            )
        for row in of(rows, method="data"):
            axis.axhline(row[field][0], color="black", linestyle=":", label="held-out text")
        axis.set(xlabel="turn from basic to sampling, share of t_max", ylabel=title)
    axes[0].legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
