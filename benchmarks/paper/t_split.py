"""Where the hybrid scheme turns from basic to sampling. The paper has 0.28 of 0.30; 0 is the sampling scheme, 1 the basic one."""

from __future__ import annotations

import sys

from matched import Bench, cell, draw_curve, earlier_results, figure, markdown, of, run, values

TITLE = "Where the hybrid turns"
METHODS = {"KL": "simplex uniform", "KL, posterior input": "posterior"}
SHARES = (0.0, 0.25, 0.5, 0.75, 28 / 30, 1.0)  # of t_max


def measure(bench: Bench) -> None:
    if bench.arguments.scale == "cpu":
        earlier(bench)
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


def earlier(bench: Bench) -> None:
    """Takes up what benchmarks/method has measured with wider networks and more steps, by 16 passes."""
    for found, said in earlier_results("posterior-*.json"):
        for row in found.get("sweep", []):
            if row["grid_power"] == 1:
                name = f"KL, posterior input, V = {found['vocab_size']:,}, {found['steps']:,} steps"
                key = {"earlier": name, "share": round(row["t_split"], 4), "seed": found["seed"]}
                bench.table.take(
                    key, {field: row[field] for field in ("bits_per_byte", "entropy")} | {"nfe": row["steps"], **said}
                )


def table(rows) -> list[str]:
    lines = []
    if values(rows, "method"):
        lines += [*split_table(rows, "method", [name for name in METHODS if of(rows, method=name)]), ""]
    if values(rows, "earlier"):
        title = "What `benchmarks/method` has measured with a network twice as wide by 16 passes, one seed, not made again here:"
        lines += [title, "", *split_table(rows, "earlier", values(rows, "earlier")), ""]
    return lines[:-1]


def split_table(rows, kind: str, names: list[str]) -> list[str]:
    fields = {"bits_per_byte": "bits per byte", "entropy": "entropy"}
    shares = sorted({row["key"]["share"] for row in rows if kind in row["key"] and "share" in row["key"]})
    lines = [
        [f"{share:.2f}", *(cell(of(rows, **{kind: name}, share=share), field) for name in names for field in fields)]
        for share in shares
    ]
    data = of(rows, method="data")
    if kind == "method" and data:
        lines.insert(0, ["held-out text itself", *[cell(data, field) for field in fields] * len(names)])
    return markdown(
        ["turn, share of t_max", *(f"{name}: {title}" for name in names for title in fields.values())], lines
    )


def plot(rows):
    chart, axes = figure(1, 2, figsize=(10, 4))
    for axis, field, title in zip(axes, ("bits_per_byte", "entropy"), ("bits per byte under the judge", "entropy of a sample's tokens, nats"), strict=True):  # fmt: skip
        for kind, name in [("method", name) for name in METHODS] + [
            ("earlier", name) for name in values(rows, "earlier")
        ]:
            draw_curve(axis, of(rows, **{kind: name}), "share", field, label=name)
        for row in of(rows, method="data"):
            axis.axhline(row[field][0], color="black", linestyle=":", label="held-out text")
        axis.set(xlabel="turn from basic to sampling, share of t_max", ylabel=title)
    axes[0].legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
