"""The paper's table of geometries: the KL geodesic, the Fisher-Rao geodesic and the straight line, all else equal.

The paper has perplexities of 41 / 53 / 62 for KL, 192 / 298 / 379 for Fisher-Rao and above 1300 for the straight line, under three
judges. There each path is trained on all of [0, 1], or on its t_max. At a large V the other two say all they have to say in a
small part of [0, 1]; rows "short" train and sample them on that part alone, where the token just becomes readable.
"""

from __future__ import annotations

import math
import sys

from matched import Bench, cell, figure, markdown, of, run, values

TITLE = "Geometry of the path"


def readable(vocab_size: int) -> float:
    """The share of a row at which a token stands out from Dirichlet(1) noise, whose largest entry is near log(V) / V."""
    return (math.log(vocab_size) + 4) / vocab_size


def paths(vocab_size: int) -> dict[str, tuple[str, dict]]:
    """name: (method of benchmarks/method, what differs of its path)."""
    share = readable(vocab_size)
    return {
        "KL": ("simplex uniform", {}),
        "Fisher-Rao": ("sphere", {}),
        "linear": ("linear", {}),
        "KL, posterior input": ("posterior", {}),
        "Fisher-Rao, short": ("sphere", {"t_max": round(2 / math.pi * math.asin(math.sqrt(share)), 4)}),
        "linear, short": ("linear", {"t_max": round(share, 4)}),
    }


def measure(bench: Bench) -> None:
    bench.data_row()
    known = paths(bench.scale.vocab_size)
    bench.table.expected = 1 + 2 * len(known) * len(bench.seeds)
    for seed in bench.seeds:
        for name, (method, path) in known.items():
            for scheme in ("sampling", "basic"):

                def make(scheme=scheme, method=method, path=path, seed=seed):
                    sampler, losses = bench.trained(method, seed, path=path)
                    return {**losses, **bench.judged(sampler, seed, bench.scale.passes, method=scheme, top_k=20)}

                bench.table.row({"path": name, "scheme": scheme, "seed": seed}, make)


def table(rows) -> list[str]:
    lines = [
        [
            "held-out text itself",
            "",
            cell(of(rows, method="data"), "bits_per_byte"),
            cell(of(rows, method="data"), "entropy"),
            "",
            "",
        ]
    ]
    for name in values(rows, "path"):
        for scheme in ("sampling", "basic"):
            found = of(rows, path=name, scheme=scheme)
            if found:
                lines.append(
                    [
                        name,
                        scheme,
                        *(cell(found, field) for field in ("bits_per_byte", "entropy", "nats")),
                        str(len(found)),
                    ]
                )
    return markdown(
        ["path", "scheme", "bits per byte", "token entropy", "held-out bound, nats per token", "seeds"], lines
    )


def plot(rows):
    names = values(rows, "path")
    chart, axis = figure(figsize=(7, 4))
    for marker, scheme in zip("os", ("sampling", "basic"), strict=True):
        for i, name in enumerate(names):
            for row in of(rows, path=name, scheme=scheme):
                axis.scatter(row["entropy"][0], row["bits_per_byte"][0], color=f"C{i}", marker=marker,
                             label=f"{name}, {scheme}" if row["key"]["seed"] == min(values(rows, "seed")) else None)  # fmt: skip
    for row in of(rows, method="data"):
        axis.scatter(row["entropy"][0], row["bits_per_byte"][0], color="black", marker="*", s=90, label="held-out text")
    axis.set(xlabel="entropy of a sample's tokens, nats", ylabel="bits per byte under the judge (lower is better)")
    axis.legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
