"""Stories written to prompts: BLEU, chrF and ROUGE-L, mean and best of five (the paper has BLEU on Lamini and WMT14).

Trained on the prompts and the beginnings of their stories, and asked of prompts that were held out. What was written is also compared
with what another prompt wanted: a model that hears its prompt is nearer to its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from matched import Bench, as_json, cell, figure, markdown, mean_over_seeds, of, run, values

from klflow_ext.evaluate.conditional import Pair, measure_conditional, read_pairs
from klflow_ext.evaluate.text import Interval

TITLE = "Stories written to prompts"
METHODS = {
    "KL, sampling": ("simplex uniform", "sampling"),
    "KL, hybrid": ("simplex uniform", "hybrid"),
    "KL, posterior input, sampling": ("posterior", "sampling"),
    "mask DFM": ("mask", "basic"),
    "autoregressive": ("autoregressive", None),
}
MEASURES = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}


def measure(bench: Bench) -> None:
    bench.table.expected = len(bench.seeds) * len(METHODS)
    if bench.arguments.scale == "test":
        pairs = [
            Pair(f"def {name}", "the = tom\n    cat = mat(the)\n    return cat\n") for name in ("cat", "dog", "hen")
        ]
    else:
        pairs = read_pairs(Path(os.environ["KLFLOW_DATA"]) / "snakes" / "llm_stories.jsonl.gz")[1]
    for seed in bench.seeds:
        for name in METHODS:
            bench.table.row(
                {"method": name, "seed": seed}, lambda name=name, seed=seed: scores(bench, name, pairs, seed)
            )


def scores(bench: Bench, name: str, pairs: list[Pair], seed: int) -> dict:
    method, scheme = METHODS[name]
    options = {} if scheme is None else {"given_share": 0.6}
    sampler, losses = bench.trained(method, seed, "snakes", steps=bench.scale.short_steps, **options)
    asked = {"steps": bench.scale.passes, "method": scheme, "top_k": 20}
    count, new = bench.scale.samples // 2, bench.scale.length // 2
    with bench.autocast():
        found = measure_conditional(
            pairs, sampler, count=count, new_tokens=new, window=bench.scale.length, tries=5, seed=seed, **asked
        )
    figures = found.pop("figures")
    flat = {
        f"{measure}_{which}{suffix}": as_json(Interval(**figures[kind][measure][which]))
        for kind, suffix in (("samples", ""), ("other_prompt", "_other_prompt"), ("other_text", "_other_text"))
        for measure in MEASURES
        for which in figures[kind][measure]
    }
    return {**losses, **found, "texts": found["texts"][:3], **flat}


def table(rows) -> list[str]:
    titles = ["method", *(f"{title}, {which}" for title in MEASURES.values() for which in ("best of 5", "mean")), "BLEU mean, another prompt's story", "passes", "seeds"]  # fmt: skip
    lines = []
    for name in values(rows, "method"):
        found = of(rows, method=name)
        cells = [cell(found, f"{measure}_{which}", 1) for measure in MEASURES for which in ("best", "mean")]
        lines.append([name, *cells, cell(found, "bleu_mean_other_prompt", 1), str(found[0]["nfe"]), str(len(found))])
    if rows:
        cells = [cell for measure in MEASURES for cell in ("", cell_of_text(rows[0], measure))]
        lines.append(["a real story of another prompt", *cells, "", "", ""])
    return markdown(titles, lines)


def cell_of_text(row, measure: str) -> str:
    return f"{row[f'{measure}_mean_other_text'][0]:.1f}"


def plot(rows):
    names = values(rows, "method")
    chart, axis = figure(figsize=(7, 3.5))
    for shift, which, title in ((-0.2, "best", "best of 5"), (0.2, "mean", "mean")):
        means = [mean_over_seeds(of(rows, method=name), f"bleu_{which}")[0] for name in names]
        axis.barh([i + shift for i in range(len(names))], means, 0.38, label=title)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="BLEU against the prompt's own story")
    axis.invert_yaxis()
    axis.legend()
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
