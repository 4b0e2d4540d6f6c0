"""Bits per byte and entropy over top-k and temperature, with the line of the data (the paper's figure 3).

A method can be made to look better by drawing less variedly. It is better than another where its curve is lower at the same entropy.
"""

from __future__ import annotations

import sys

from matched import Bench, cell, figure, markdown, mean_over_seeds, of, run, values

TITLE = "Top-k and temperature"
METHODS = {
    "KL, sampling": ("simplex uniform", "sampling"),
    "KL, posterior input, sampling": ("posterior", "sampling"),
    "mask DFM": ("mask", "basic"),
    "autoregressive": ("autoregressive", None),
}
SETTINGS = ((1, 1.0), (5, 1.0), (20, 1.0), (100, 1.0), (None, 1.0), (None, 0.8), (None, 0.6))  # (top_k, temperature)


def measure(bench: Bench) -> None:
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


def setting(top_k, temperature) -> str:
    return ("all tokens" if top_k is None else f"top-{top_k}") + (
        f", temperature {temperature}" if temperature != 1 else ""
    )


def table(rows) -> list[str]:
    names = [name for name in METHODS if of(rows, method=name)]
    data = of(rows, method="data")
    lines = [["held-out text itself", *[f"{cell(data, 'bits_per_byte')} ({cell(data, 'entropy')})"] * len(names)]]
    for top_k, temperature in SETTINGS:
        cells = []
        for name in names:
            found = of(rows, method=name, top_k=top_k, temperature=temperature)
            bits, entropy = (mean_over_seeds(found, field) for field in ("bits_per_byte", "entropy"))
            cells.append("" if bits is None or entropy is None else f"{bits[0]:.2f} ({entropy[0]:.2f})")
        lines.append([setting(top_k, temperature), *cells])
    return [*markdown(["drawn from", *names], lines), "",
            f"Each cell: bits per byte under the judge (entropy of a sample's tokens, nats). Seeds: {len(values(rows, 'seed'))}."]  # fmt: skip


def plot(rows):
    chart, axis = figure(figsize=(7, 4.5))
    for i, name in enumerate(name for name in METHODS if of(rows, method=name)):
        for settings, style in ((SETTINGS[:5], "-"), (SETTINGS[4:], "--")):
            points = []
            for top_k, temperature in settings:
                found = of(rows, method=name, top_k=top_k, temperature=temperature)
                if found:
                    points.append([mean_over_seeds(found, field)[0] for field in ("entropy", "bits_per_byte")])
                    axis.annotate(f"{top_k or 'all'}" if temperature == 1 else f"{temperature}", points[-1], fontsize=6)
            axis.plot(
                *zip(*points, strict=True), style, marker=".", color=f"C{i}", label=name if style == "-" else None
            )
    for row in of(rows, method="data"):
        axis.axhline(row["bits_per_byte"][0], color="black", linestyle=":")
        axis.axvline(row["entropy"][0], color="black", linestyle=":", label="held-out text")
    axis.set(xlabel="entropy of a sample's tokens, nats", ylabel="bits per byte under the judge",
             title="numbers: top-k; on dashed lines the temperature")  # fmt: skip
    axis.legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
