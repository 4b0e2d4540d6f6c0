"""Quality over network passes (NFE): the paper's three schemes against discrete flow matching and a model that writes left to right.

Held-out likelihood comes first: it cannot be improved by repeating oneself. Then bits per byte under the judge, each beside the
entropy of the tokens. All methods have the same network, text, steps and optimizer.
"""

from __future__ import annotations

import sys

from matched import JUDGED, Bench, cell, draw_curve, earlier_results, figure, judged_cell, markdown, of, run, values

TITLE = "Quality over network passes"
METHODS = {  # name: (method of benchmarks/method, scheme)
    "KL, basic": ("simplex uniform", "basic"),
    "KL, sampling": ("simplex uniform", "sampling"),
    "KL, hybrid": ("simplex uniform", "hybrid"),
    "KL, posterior input, sampling": ("posterior", "sampling"),
    "KL, posterior input, hybrid": ("posterior", "hybrid"),
    "mask DFM": ("mask", "basic"),
    "uniform DFM": ("uniform", "basic"),
    "autoregressive": ("autoregressive", None),
}
EARLIER = {"simplex": "KL, sampling", "posterior": "KL, posterior input, sampling", "mask": "mask DFM", "autoregressive": "autoregressive"}  # fmt: skip


def measure(bench: Bench) -> None:
    if bench.arguments.scale == "cpu":
        earlier(bench)
    bench.data_row()
    bench.table.expected = len(bench.table.rows) + len(METHODS) * len(bench.scale.nfe) * len(bench.seeds)
    for nfe in bench.scale.nfe:  # many passes last long, and come last
        for seed in bench.seeds:
            for name, (method, scheme) in METHODS.items():
                passes = bench.scale.length if scheme is None else nfe  # left to right there is one way

                def make(method=method, scheme=scheme, passes=passes, seed=seed):
                    sampler, losses = bench.trained(method, seed)
                    return {**losses, **bench.judged(sampler, seed, passes, method=scheme, top_k=20)}

                bench.table.row({"method": name, "nfe": passes, "seed": seed}, make)


def earlier(bench: Bench) -> None:
    """Takes up what benchmarks/method has measured with a wider network and more steps, at top-k 20."""
    for found, said in earlier_results("*-V2048-1075-*.json"):
        nats = next((row["nats"] for row in found.get("likelihood", []) if row["steps"] is None), None)
        for row in found.get("samples", []):
            if found["name"] in EARLIER and row["top_k"] == 20 and row["method"] in ("basic", "sampling"):
                key = {"earlier": EARLIER[found["name"]], "nfe": row["steps"], "seed": found["seed"]}
                figures = {field: row[field] for field in ("bits_per_byte", "entropy", "count", "top_k")} | said
                bench.table.take(key, figures if nats is None else {**figures, "nats": nats})


def table(rows) -> list[str]:
    lines = [*passes_table(rows, "method"), "", JUDGED]
    if values(rows, "earlier"):
        title = "What `benchmarks/method` has measured with a network twice as wide, V = 2,048 and 1,075 steps, not made again here:"
        lines += ["", title, "", *passes_table(rows, "earlier")]
    return lines


def passes_table(rows, kind: str) -> list[str]:
    counts = sorted({row["key"]["nfe"] for row in rows if kind in row["key"] and "nfe" in row["key"]})
    titles = ["method", "held-out text, nats per token", *(f"NFE {nfe}" for nfe in counts), "seeds"]
    data = of(rows, method="data") if kind == "method" else []
    lines = [["held-out text itself", "", *[judged_cell(data)] * len(counts), ""]] if data else []
    for name in values(rows, kind):
        found = of(rows, **{kind: name})
        if name != "data":
            cells = [likelihood(found), *(judged_cell(of(found, nfe=nfe)) for nfe in counts)]
            lines.append([name, *cells, str(len(values(found, "seed")))])
    return markdown(titles, lines)


def likelihood(rows) -> str:
    """One figure of each seed, whatever the passes."""
    known = {row["key"]["seed"]: row for row in rows if "nats" in row}
    exact = all(row.get("nats_exact", "autoregressive" in row["key"].values()) for row in known.values())
    return cell(list(known.values()), "nats") + ("" if exact else " (bound)")


def plot(rows):
    chart, axes = figure(1, 2, figsize=(11, 4))
    for i, name in enumerate(name for name in METHODS if of(rows, method=name)):
        found = of(rows, method=name)
        for axis, field in zip(axes, ("bits_per_byte", "entropy"), strict=True):
            draw_curve(axis, found, "nfe", field, color=f"C{i}", label=name)
    for axis, field, title in zip(axes, ("bits_per_byte", "entropy"), ("bits per byte under the judge", "entropy of a sample's tokens, nats"), strict=True):  # fmt: skip
        for row in of(rows, method="data"):
            axis.axhline(row[field][0], color="black", linestyle=":", label="held-out text")
        axis.set(xscale="log", xlabel="network passes", ylabel=title)
    axes[0].legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
