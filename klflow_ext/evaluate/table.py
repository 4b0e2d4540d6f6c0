"""The figures of some texts side by side: what the judge says of them never stands without how varied they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klflow_ext.evaluate.judge import Scorer
from klflow_ext.evaluate.losses import token_entropy
from klflow_ext.evaluate.text import (
    Corpus,
    Interval,
    distinct,
    mean_interval,
    ngram_entropy,
    repetition,
    self_bleu,
)

Figures = dict[str, Interval | float]
SELF_BLEU_TEXTS = 200  # its work grows with the square
COLUMNS = {  # what the table shows, of all that `figures` gives
    "bits_per_byte": "bits per byte",
    "token_entropy": "token entropy",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "repetition_4": "repetition",
    "copied": "copied",
}
DEFINITIONS = {
    "bits_per_byte": "bits of all texts under the judge over their UTF-8 bytes, each text cut at the judge's context",
    "token_entropy": "mean over texts of the entropy of the text's own tokens, nats",
    "unigram_entropy": "entropy of the tokens of all texts together, nats; bigram_entropy: of their pairs",
    "distinct_2": "different pairs of tokens over all pairs, of all texts together",
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
    seed: int = 0,
) -> Figures:
    """All of DEFINITIONS of texts and their tokens, means with a 95 % bootstrap interval; without a judge no bits per byte."""
    found: Figures = {}
    if judge is not None:
        pairs = judge.bits(texts)
        found["bits_per_byte"] = mean_interval(
            [bits / size if size else 0.0 for bits, size in pairs], [size for _, size in pairs], seed=seed
        )
    found["token_entropy"] = mean_interval([token_entropy([tokens]) for tokens in sequences], seed=seed)
    found["unigram_entropy"], found["bigram_entropy"] = ngram_entropy(sequences, 1), ngram_entropy(sequences, 2)
    found["distinct_2"] = distinct(sequences, 2)
    found["self_bleu"] = mean_interval(self_bleu(texts[:SELF_BLEU_TEXTS]), seed=seed)
    found["repetition_4"] = mean_interval([repetition(tokens, 4) for tokens in sequences], seed=seed)
    found["copied"] = mean_interval([corpus.copied(tokens) for tokens in sequences], seed=seed)
    return found


def as_table(rows: Mapping[str, Figures]) -> str:
    """A line for each, the interval beside bits per byte."""
    shown = {name: title for name, title in COLUMNS.items() if any(name in row for row in rows.values())}
    lines = [["", *shown.values()]]
    for name, row in rows.items():
        cells = []
        for column in shown:
            value = row[column]
            mean = value.mean if isinstance(value, Interval) else value
            cells.append(str(value) if column == "bits_per_byte" else f"{mean:.{1 if column == 'self_bleu' else 3}f}")
        lines.append([name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def as_json(row: Figures) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in row.items()}
