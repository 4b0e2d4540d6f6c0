"""The figures of some texts side by side: what the judge says of them never stands without how varied they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klflow_ext.evaluate.distance import energy_distance, mauve
from klflow_ext.evaluate.judge import Scorer
from klflow_ext.evaluate.losses import token_entropy
from klflow_ext.evaluate.text import (
    Corpus,
    Interval,
    distinct_interval,
    mean_interval,
    ngram_entropy_interval,
    repetition,
    self_bleu,
)

Figures = dict[str, Interval]
SELF_BLEU_TEXTS = 200  # its work grows with the square
COLUMNS = {  # what the table shows, of all that `figures` gives
    "bits_per_byte": "bits per byte",
    "distance": "distance",
    "mauve": "MAUVE",
    "token_entropy": "token entropy",
    "unigram_entropy": "of unigrams",
    "bigram_entropy": "of bigrams",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "repetition_4": "repetition",
    "copied": "copied",
}
DEFINITIONS = {
    "bits_per_byte": "bits of all texts under the judge over their UTF-8 bytes, each text cut at the judge's context",
    "distance": "energy distance from other held-out texts of what the judge sees in a text: over its tokens the mean of the last hidden "
    "states, and mean and standard deviation of -log p, each in its standard deviations over those texts; 0 on the average for held-out text",
    "mauve": "MAUVE of the same texts and features, a bucket for every 20 texts; near 1 for held-out text; its interval by the jackknife "
    "over texts, the buckets as they are",
    "token_entropy": "mean over texts of the entropy of the text's own tokens, nats",
    "unigram_entropy": "entropy of the tokens of all texts together, nats; its interval by the jackknife over texts",
    "bigram_entropy": "that of the pairs of neighbouring tokens, with such an interval",
    "distinct_2": "different pairs of tokens over all pairs, of all texts together, with such an interval",
    "self_bleu": f"mean BLEU of each text against the others, the first {SELF_BLEU_TEXTS} texts",
    "repetition_4": "mean over texts of the share of 4-grams of tokens that stood in the text before",
    "copied": "mean over texts of the longest run of tokens that stands in the training text, as a share of the text",
}


def figures(
    sequences: Sequence[Sequence[int]],
    texts: Sequence[str],
    corpus: Corpus,
    judge: Scorer | None = None,
    *,
    real: np.ndarray | None = None,
    with_mauve: bool = False,
    seed: int = 0,
) -> Figures:
    """All of DEFINITIONS of texts and their tokens, with 95 % intervals; without a judge no bits per byte.

    real: (M, D) features that the judge sees in other, real texts; None: no distance. with_mauve: MAUVE beside it.
    """
    found: Figures = {}
    if judge is not None:
        looks = judge.look(texts)
        found["bits_per_byte"] = mean_interval(
            [one.bits / one.size if one.size else 0.0 for one in looks], [one.size for one in looks], seed=seed
        )
        if real is not None:
            features = np.stack([one.feature for one in looks])
            found["distance"] = energy_distance(features, real, seed=seed)
            if with_mauve:
                found["mauve"] = mauve(features, real, seed=seed)
    found["token_entropy"] = mean_interval([token_entropy([tokens]) for tokens in sequences], seed=seed)
    found["unigram_entropy"] = ngram_entropy_interval(sequences, 1)
    found["bigram_entropy"] = ngram_entropy_interval(sequences, 2)
    found["distinct_2"] = distinct_interval(sequences, 2)
    found["self_bleu"] = mean_interval(self_bleu(texts[:SELF_BLEU_TEXTS]), seed=seed)
    found["repetition_4"] = mean_interval([repetition(tokens, 4) for tokens in sequences], seed=seed)
    found["copied"] = mean_interval([corpus.copied(tokens) for tokens in sequences], seed=seed)
    return found


def as_table(rows: Mapping[str, Figures]) -> str:
    """A line for each: bits per byte with its interval, the others with the half of theirs."""
    shown = {name: title for name, title in COLUMNS.items() if any(name in row for row in rows.values())}
    lines = [["", *shown.values()]]
    for name, row in rows.items():
        lines.append([name, *(_cell(column, row[column]) for column in shown)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def _cell(column: str, value: Interval) -> str:
    digits = 1 if column == "self_bleu" else 3
    if column == "bits_per_byte":
        return str(value)
    return f"{value.mean:.{digits}f} +-{(value.high - value.low) / 2:.{digits}f}"


def as_json(row: Figures) -> dict[str, Any]:
    return {name: value._asdict() for name, value in row.items()}
