"""klflow eval --samples: what can be said of samples, beside what is said of real text, as a table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from klflow_ext import data, evaluate
from klflow_ext.cli.plot import figure_class
from klflow_ext.cli.terminal import shows_progress
from klflow_ext.evaluate import table
from klflow_ext.evaluate.distance import MAUVE_TEXTS, mauve_settings, need_mauve
from klflow_ext.evaluate.text import Corpus
from klflow_ext.sample import Sampler

REAL, SHUFFLED = "held-out text", "its tokens shuffled"  # the rows that are no samples
LEAST_MAUVE = 2 * MAUVE_TEXTS  # texts of two buckets
LEAST_OTHERS = 128  # held-out texts that the distance is measured from, where there are as many
LABELS = ((4, 5), (4, -12), (-26, 5), (-26, -12))  # points from a mark to its temperature, of one curve after the other
MOST_SEARCHED = 2**24  # training tokens in which copied runs are looked for


def corpus_of(stream: data.Stream) -> Corpus:
    """The first tokens of the training text, of a mixture those of each source."""
    streams = stream.streams if isinstance(stream, data.Mixture) else [stream]
    return Corpus(np.concatenate([np.asarray(one[0 : MOST_SEARCHED // len(streams)]) for one in streams]))


def own_method(sampler: Sampler) -> str:
    return "left to right" if sampler.path.way is not None else sampler.default_method


def precision_of(sampler: Sampler) -> str:
    module = sampler.network.module
    return "unknown" if module is None else str(next(module.parameters()).dtype).removeprefix("torch.")


def others_beside(samples: int, length: int, held: data.Stream) -> int:
    """How many held-out texts the distance is measured from, each once and none of those of the table."""
    return max(min(max(samples, LEAST_OTHERS), len(held) // length - samples), 0)


def check_mauve(samples: int | None, judge: Path | None) -> None:
    """ValueError: what MAUVE needs was not asked for, or is not here."""
    if samples is None or judge is None:
        raise ValueError("mauve: got it without --judge, allowed is only with it")
    if samples < LEAST_MAUVE:
        raise ValueError(f"samples: got {samples}, allowed with --mauve is an integer >= {LEAST_MAUVE}")
    need_mauve()


def print_table(
    sampler: Sampler,
    stream: data.Stream,
    held: data.Stream,
    judge: evaluate.Scorer | None,
    *,
    samples: int,
    length: int,
    steps: int,
    methods: Sequence[str | None],
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    with_mauve: bool,
    seed: int,
) -> dict[str, Any]:
    """Prints the table, real text first, then a row for each method, temperature and top-k (0: all V); gives it with its settings,
    in the types of JSON."""
    corpus, tokenizer = corpus_of(stream), sampler.tokenizer
    others = others_beside(samples, length, held)
    windows = data.batch(held, samples + others, length, seed=0, step=0).tolist()
    seen = None
    if judge is not None and others > 1:
        seen = judge.features([tokenizer.decode(tokens) for tokens in windows[samples:]])

    def measured(sequences: list[list[int]]) -> table.Figures:
        texts = [tokenizer.decode(tokens) for tokens in sequences]
        return table.figures(sequences, texts, corpus, judge, real=seen, with_mauve=with_mauve)

    real, generator = windows[:samples], np.random.default_rng(0)
    rows = {REAL: measured(real), SHUFFLED: measured([generator.permutation(tokens).tolist() for tokens in real])}
    settings: dict[str, dict[str, Any]] = dict.fromkeys(rows, {"seed": 0})
    for method, temperature, top_k in itertools.product(methods, temperatures, top_ks):
        result = sampler.sample(
            (samples, length), steps=steps, method=method, temperature=temperature, top_k=top_k or None, seed=seed,
            progress=shows_progress(),
        )  # fmt: skip
        used = method or own_method(sampler)
        name = f"{used}, NFE {result.nfe}, T {temperature:g}, top-k {top_k or 'all'}"
        rows[name] = measured([tokens.tolist() for tokens in result.tokens])
        settings[name] = {
            "method": used, "nfe": result.nfe, "temperature": temperature, "top_k": top_k or None, "top_p": 1.0, "seed": seed,
            "seconds": result.seconds,
        }  # fmt: skip
    said = None if judge is None else judge.describe()
    print(
        f"\n{samples} texts of {length} tokens each, samples of a {precision_of(sampler)} model, 95 % intervals over texts:"
    )
    if said is not None:
        print(f"judge {judge_name(said)}: {said['pooling']}")
    print(table.as_table(rows), flush=True)
    return {
        "samples": samples, "length": length, "steps": steps, "judge": said,
        "intervals": {"level": 0.95, "over": "texts", "rounds": 2000, "seed": 0},
        "distance_from": None if seen is None else others,
        "mauve": {"library": f"mauve-text {version('mauve-text')}", **mauve_settings(samples, others)} if with_mauve else None,
        "searched_for_copies": {"tokens": len(corpus.text), "of": len(stream)}, "definitions": table.DEFINITIONS,
        "rows": [{"name": name, **settings[name], **table.as_json(row)} for name, row in rows.items()],
    }  # fmt: skip


def judge_name(said: dict[str, Any]) -> str:
    return f"{said['folder']} ({said['kind']}, {said['precision']}, context {said['context']})"


def draw(found: dict[str, Any], title: str) -> Any:
    """A figure of a table under a judge: bits per byte over entropy, a curve over temperatures for each method and top-k, the data
    marked. A low figure at less entropy than the data has is no better model, and the picture says so.

    Raises:
        ImportError: matplotlib is not here.
    """
    figure = figure_class()(figsize=(8, 5.6), layout="constrained")
    panel = figure.add_subplot()
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["name"] == REAL:
            x, y = row["token_entropy"], row["bits_per_byte"]
            panel.axvline(x["mean"], color="black", linewidth=0.8, linestyle=":")
            panel.axhline(y["mean"], color="black", linewidth=0.8, linestyle=":")
            _points(panel, [row], color="black", marker="*", markersize=15, linestyle="none", label=REAL)
        elif row["name"] != SHUFFLED:
            name = f"{row['method']}, NFE {row['nfe']}, top-k {row['top_k'] or 'all'}"
            curves.setdefault(name, []).append(row)
    for i, (name, rows) in enumerate(curves.items()):
        rows = sorted(rows, key=lambda row: row["temperature"])
        _points(panel, rows, marker="o", markersize=5, color=f"C{i % 10}", label=name)
        for row in rows:
            at, beside = [row[key]["mean"] for key in ("token_entropy", "bits_per_byte")], LABELS[i % len(LABELS)]
            text = f"T {row['temperature']:g}"
            panel.annotate(text, at, beside, textcoords="offset points", fontsize=8, color=f"C{i % 10}")
    panel.set(xlabel="entropy of a text's tokens, nats", ylabel="bits per byte under the judge", title=title)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.supxlabel(
        f"{found['samples']} texts of {found['length']} tokens each; bars: 95 % bootstrap intervals over texts; "
        f"judge {judge_name({**found['judge'], 'folder': Path(found['judge']['folder']).name})}",
        fontsize=7,
    )
    return figure


def _points(panel: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    x, y = (np.array([list(row[name].values()) for row in rows]).T for name in ("token_entropy", "bits_per_byte"))
    bars = [np.maximum([mean - low, high - mean], 0) for mean, low, high in (x, y)]
    panel.errorbar(x[0], y[0], xerr=bars[0], yerr=bars[1], elinewidth=0.8, capsize=2, **style)
