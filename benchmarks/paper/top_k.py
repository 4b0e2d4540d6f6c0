"""Bits per byte and entropy over top-k and temperature, with the line of the data (the paper's figure 3).

A method can be made to look better by drawing less variedly. It is better than another where its curve is lower at the same entropy.
"""

from __future__ import annotations

import sys

from matched import JUDGED, Bench, earlier_results, figure, judged_cell, markdown, mean_over_seeds, of, run, values

TITLE = "Top-k and temperature"
METHODS = {
    "KL, sampling": ("simplex uniform", "sampling"),
    "KL, posterior input, sampling": ("posterior", "sampling"),
    "mask DFM": ("mask", "basic"),
    "autoregressive": ("autoregressive", None),
}
EARLIER = {
    "simplex": "KL, sampling",
    "posterior": "KL, posterior input, sampling",
    "mask": "mask DFM",
    "autoregressive": "autoregressive",
}
SETTINGS = ((1, 1.0), (5, 1.0), (20, 1.0), (100, 1.0), (None, 1.0), (None, 0.8), (None, 0.6))  # (top_k, temperature)


def measure(bench: Bench) -> None:
    if bench.arguments.scale == "cpu":
        earlier(bench)
    bench.data_row()
    bench.table.expected = 1 + len(bench.seeds) * len(METHODS) * len(SETTINGS)
    for seed in bench.seeds:
        for top_k, temperature in SETTINGS:
            for name, (method, scheme) in METHODS.items():
                options = {"method": scheme, "top_k": top_k, "temperature": temperature}
                make = lambda method=method, seed=seed, options=options: bench.judged(  # noqa: E731
                    bench.trained(method, seed)[0], seed, bench.scale.passes, **options
                )
                bench.table.row({"method": name, "top_k": top_k, "temperature": temperature, "seed": seed}, make)


def earlier(bench: Bench) -> None:
    """Takes up what benchmarks/method has measured with a wider network and more steps, by 32 passes (left to right 64)."""
    for found, said in earlier_results("*-V2048-1075-*.json"):
        for row in found.get("samples", []):
            passes = 64 if found["name"] == "autoregressive" else 32
            if found["name"] in EARLIER and row["steps"] == passes and row["method"] in ("basic", "sampling"):
                key = {"earlier": EARLIER[found["name"]], "top_k": row["top_k"], "seed": found["seed"]}
                bench.table.take(key, {field: row[field] for field in ("bits_per_byte", "entropy", "count")} | said)


def setting(top_k, temperature) -> str:
    return ("all tokens" if top_k is None else f"top-{top_k}") + (
        f", temperature {temperature}" if temperature != 1 else ""
    )


def table(rows) -> list[str]:
    names, data = [name for name in METHODS if of(rows, method=name)], of(rows, method="data")
    lines = []
    if names:
        drawn = [
            [setting(*one), *(judged_cell(of(rows, method=name, top_k=one[0], temperature=one[1])) for name in names)]
            for one in SETTINGS
        ]
        lines += [
            *markdown(["drawn from", *names], [["held-out text itself", *[judged_cell(data)] * len(names)], *drawn]),
            "",
        ]
    names = values(rows, "earlier")
    if names:
        counts = sorted({row["key"]["top_k"] for row in rows if "earlier" in row["key"]})
        taken = [
            [setting(count, 1.0), *(judged_cell(of(rows, earlier=name, top_k=count)) for name in names)]
            for count in counts
        ]
        lines += [
            "What `benchmarks/method` has measured with a network twice as wide, V = 2,048 and 1,075 steps, not made again here:",
            "",
        ]
        lines += [*markdown(["drawn from", *names], taken), ""]
    return [*lines, JUDGED]


def plot(rows):
    chart, axis = figure(figsize=(7, 4.5))
    for i, name in enumerate(METHODS):
        for settings, style in ((SETTINGS[:5], "-"), (SETTINGS[4:], "--")):
            found = [(one, of(rows, method=name, top_k=one[0], temperature=one[1])) for one in settings]
            line(
                axis,
                [(f"{k or 'all'}" if t == 1 else f"{t}", part) for (k, t), part in found],
                style,
                f"C{i}",
                name if style == "-" else None,
            )
        counts = sorted(values(of(rows, earlier=name), "top_k"))
        line(axis, [(str(k), of(rows, earlier=name, top_k=k)) for k in counts], ":", f"C{i}", f"{name}, wider network")
    for row in of(rows, method="data"):
        axis.axhline(row["bits_per_byte"][0], color="black", linestyle=":")
        axis.axvline(row["entropy"][0], color="black", linestyle=":", label="held-out text")
    axis.set(xlabel="entropy of a sample's tokens, nats", ylabel="bits per byte under the judge",
             title="numbers: top-k; on dashed lines the temperature")  # fmt: skip
    axis.legend(fontsize=7)
    chart.tight_layout()
    return chart


def line(axis, parts, style: str, color: str, label: str | None) -> None:
    """A line through the means of rows, each with its text."""
    points = [
        (text, *(mean_over_seeds(rows, field)[0] for field in ("entropy", "bits_per_byte")))
        for text, rows in parts
        if rows
    ]
    for text, x, y in points:
        axis.annotate(text, (x, y), fontsize=6)
    if points:
        axis.plot([x for _, x, _ in points], [y for _, _, y in points], style, marker=".", color=color, label=label)


if __name__ == "__main__":
    run(sys.modules[__name__])
