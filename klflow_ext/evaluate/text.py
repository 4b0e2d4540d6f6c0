"""Figures of generated text: how varied it is, what of it was copied, and how near it comes to what was wanted.

Of tokens: sequences of integers. Of texts: BLEU and chrF by sacrebleu (the extra "eval"), ROUGE-L here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from klflow_ext.checks import check_int, check_scalar


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    level: float = 0.95,
    rounds: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean and its percentile bootstrap interval over values; by weights, sum(w v) / sum(w), pairs drawn together."""
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    level = check_scalar("level", level, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
    rounds = check_int("rounds", rounds, 1, 10**7, "an integer in [1, 10**7]")
    if x.ndim != 1 or not len(x) or w.shape != x.shape:
        raise ValueError(f"values: got shape {x.shape} and weights of {w.shape}, allowed are equal ones of one axis")
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise ValueError("values: got some not finite or weights below 0 or all 0, allowed are finite ones")
    generator = np.random.default_rng(seed)
    means = np.empty(rounds)
    for i in range(rounds):
        chosen = generator.integers(len(x), size=len(x))
        total = w[chosen].sum()
        means[i] = (w[chosen] * x[chosen]).sum() / total if total else np.nan
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float((w * x).sum() / w.sum()), float(low), float(high))


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    tokens = [int(token) for token in tokens]
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _pooled(sequences: Iterable[Sequence[int]], n: int) -> Counter:
    n = check_int("n", n, 1, 2**31, "an integer >= 1")
    counts = Counter(gram for tokens in sequences for gram in _ngrams(tokens, n))
    if not counts:
        raise ValueError(f"sequences: got none of {n} tokens, allowed is one or more")
    return counts


def distinct(sequences: Iterable[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of all sequences over all n-grams (Li et al. 2016). It falls with the number of tokens."""
    counts = _pooled(sequences, n)
    return len(counts) / counts.total()


def ngram_entropy(sequences: Iterable[Sequence[int]], n: int = 1) -> float:
    """Entropy in nats of the n-grams of all sequences together."""
    counts = _pooled(sequences, n)
    total = counts.total()
    return math.fsum(-c / total * math.log(c / total) for c in counts.values())


def distinct_interval(sequences: Sequence[Sequence[int]], n: int = 2, *, level: float = 0.95) -> Interval:
    """`distinct` with a jackknife interval over sequences: a bootstrap would count a sequence drawn twice as its own repetition."""
    whole, own = _pooled(sequences, n), [Counter(_ngrams(tokens, n)) for tokens in sequences]
    rest = [whole.total() - some.total() for some in own]
    kept = [len(whole) - sum(whole[gram] == count for gram, count in some.items()) for some in own]
    return _jackknife(len(whole) / whole.total(), [a / b for a, b in zip(kept, rest, strict=True) if b], level)


def ngram_entropy_interval(sequences: Sequence[Sequence[int]], n: int = 1, *, level: float = 0.95) -> Interval:
    """`ngram_entropy` with such an interval. Of few tokens it lies below that of the source, the more so the larger n is: only
    figures of as many tokens compare."""
    whole = _pooled(sequences, n)
    total, logs = whole.total(), {count: count * math.log(count) for count in {*whole.values()}}
    weight = math.fsum(logs[count] for count in whole.values())
    left_out = []
    for some in (Counter(_ngrams(tokens, n)) for tokens in sequences):
        rest = total - some.total()
        less = sum(logs[whole[gram]] - _xlogx(whole[gram] - count) for gram, count in some.items())
        if rest:
            left_out.append(math.log(rest) - (weight - less) / rest)
    return _jackknife(math.log(total) - weight / total, left_out, level)


def _xlogx(x: int) -> float:
    return x * math.log(x) if x else 0.0


def _jackknife(figure: float, left_out: Sequence[float], level: float) -> Interval:
    """Of the figures with each sequence left out: the figure and its interval by a normal distribution."""
    level = check_scalar("level", level, 0, 1, "a number in (0, 1)", open_low=True, open_high=True)
    error = float(np.std(left_out)) * math.sqrt(max(len(left_out) - 1, 0)) if left_out else 0.0
    half = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(figure, figure - half, figure + half)


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a sequence's n-grams that stood in it before; 0 of one that is shorter."""
    grams = _ngrams(tokens, check_int("n", n, 1, 2**31, "an integer >= 1"))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Corpus:
    """Tokens in which runs are looked for, such as those a model was trained on."""

    def __init__(self, tokens: Sequence[int] | np.ndarray):
        self.text = _as_text(np.asarray(tokens))

    def longest_run(self, tokens: Sequence[int]) -> int:
        """Length of the longest run of these tokens that stands in the corpus."""
        text, longest = _as_text(np.asarray(tokens)), 0
        for start in range(len(text)):
            while start + longest < len(text) and text[start : start + longest + 1] in self.text:
                longest += 1
        return longest

    def copied(self, tokens: Sequence[int]) -> float:
        """That length as a share of all of them."""
        return self.longest_run(tokens) / len(tokens) if len(tokens) else 0.0


def _as_text(tokens: np.ndarray) -> str:
    """A character for each token, as the search in strings is fast."""
    if tokens.size and not (0 <= tokens.min() and tokens.max() < 0x110000):
        raise ValueError(f"tokens: got {tokens.min()} to {tokens.max()}, allowed are 0 to {0x110000 - 1}")
    return tokens.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def need_sacrebleu():
    """The library. ValueError where it is not here."""
    try:
        import sacrebleu
    except ImportError:
        raise ValueError("BLEU and chrF need the eval extra: pip install 'klflow_ext[eval]'") from None
    return sacrebleu


def self_bleu(texts: Sequence[str]) -> list[float]:
    """Of each text its BLEU, 0 to 100, against all others: high where they are alike (Zhu et al. 2018)."""
    if len(texts) < 2:
        raise ValueError(f"texts: got {len(texts)}, allowed are 2 or more")
    metric = need_sacrebleu().BLEU(effective_order=True)
    return [metric.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, of one reference each."""
    return need_sacrebleu().corpus_bleu(list(found), [_as_many(found, wanted)]).score


def chrf(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus chrF2, 0 to 100."""
    return need_sacrebleu().corpus_chrf(list(found), [_as_many(found, wanted)]).score


def sentence_scores(found: str, wanted: str) -> dict[str, float]:
    """{"bleu", "chrf", "rouge_l"} of one text, each 0 to 100; BLEU of as many orders as the text has."""
    metrics = need_sacrebleu()
    return {
        "bleu": metrics.sentence_bleu(found, [wanted], use_effective_order=True).score,
        "chrf": metrics.sentence_chrf(found, [wanted]).score,
        "rouge_l": 100 * rouge_l(found, wanted),
    }


def _as_many(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    if len(found) != len(wanted) or not found:
        raise ValueError(f"found: got {len(found)} texts for {len(wanted)}, allowed are as many, one or more")
    return list(wanted)


def rouge_l(found: str, wanted: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, lower-case, between blank space."""
    a, b = found.lower().split(), wanted.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # of the row above, one to the left
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 0.0
