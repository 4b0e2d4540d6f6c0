"""Each figure of text against one by hand, or by a library."""

import math
import sys

import numpy as np
import pytest

from klflow_ext.evaluate import text


def test_distinct():
    assert text.distinct([[1, 2, 1, 2], [1, 2, 3]], 1) == 3 / 7
    assert text.distinct([[1, 2, 1, 2], [1, 2, 3]], 2) == 3 / 5  # 12, 21, 23 of 12 21 12 12 23
    assert text.distinct(np.array([[1, 2]]), 2) == 1
    with pytest.raises(ValueError, match="sequences: got none of 3 tokens"):
        text.distinct([[1, 2]], 3)
    with pytest.raises(ValueError, match="n: got 0"):
        text.distinct([[1]], 0)


def test_ngram_entropy():
    assert text.ngram_entropy([[1, 2], [3, 4]], 1) == pytest.approx(math.log(4))
    assert text.ngram_entropy([[1, 1, 1, 2]], 1) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert text.ngram_entropy([[1, 1, 1, 2]], 2) == pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3))


@pytest.mark.parametrize(
    "interval, figure", [(text.distinct_interval, text.distinct), (text.ngram_entropy_interval, text.ngram_entropy)]
)
@pytest.mark.parametrize("n", [1, 2])
def test_jackknife_intervals(interval, figure, n):
    """By leaving out each sequence in turn; they hold the spread of the figure over other sequences of one source."""
    sequences = [[1, 2, 1, 2], [1, 2, 3], [3, 4, 4, 1, 2], [5]]
    found = interval(sequences, n)
    left_out = [figure(sequences[:i] + sequences[i + 1 :], n) for i in range(4)]
    half = 1.959964 * np.sqrt(3 / 4 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    assert found == pytest.approx((figure(sequences, n), figure(sequences, n) - half, figure(sequences, n) + half))
    assert interval(sequences[:1], n) == pytest.approx((figure(sequences[:1], n),) * 3)
    generator = np.random.default_rng(0)
    draws = [generator.zipf(1.5, (40, 12)) for _ in range(60)]
    spread = np.std([figure(some, n) for some in draws]) * 1.96
    widths = [(one.high - one.low) / 2 for one in (interval(some, n) for some in draws)]
    assert 0.8 * spread < np.mean(widths) < 1.6 * spread
    with pytest.raises(ValueError, match="sequences: got none of 3 tokens"):
        interval([[1, 2]], 3)


def test_repetition():
    assert text.repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(3 / 5)
    assert text.repetition(range(9)) == 0 and text.repetition([1], 4) == 0
    assert text.repetition([7] * 8, 4) == pytest.approx(4 / 5)


def test_longest_run_in_a_corpus():
    corpus = text.Corpus([5, 6, 7, 8, 0xD800, 9, 70000, 5])
    assert corpus.longest_run([1, 6, 7, 8, 2, 9]) == 3 and corpus.copied([1, 6, 7, 8, 2, 9]) == 0.5
    assert corpus.longest_run([0xD800, 9, 70000]) == 3 and corpus.longest_run([1, 2]) == corpus.longest_run([]) == 0
    assert corpus.longest_run([8, 5, 6]) == 2 and corpus.copied([]) == 0
    with pytest.raises(ValueError, match="tokens: got -1"):
        text.Corpus([-1])
    generator = np.random.default_rng(0)
    stream = generator.integers(3, size=200).tolist()
    for _ in range(20):
        some = generator.integers(3, size=12).tolist()
        wanted = max(
            b - a
            for a in range(13)
            for b in range(a, 13)
            if any(stream[i : i + b - a] == some[a:b] for i in range(200))
        )
        assert text.Corpus(stream).longest_run(some) == wanted


def test_self_bleu():
    same = ["the cat sat on the mat today"] * 3
    assert text.self_bleu(same) == pytest.approx([100] * 3)
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 and 1 of 2: (4/5 3/4 2/3 1/2) ** (1/4)
    assert text.self_bleu(["a b c d e", "a b c d f"]) == pytest.approx([100 * 0.2**0.25] * 2)
    apart = text.self_bleu(["one two three four", "five six seven eight"])
    assert max(apart) < 20
    with pytest.raises(ValueError, match="texts: got 1"):
        text.self_bleu(["a"])


def test_bleu_and_chrf():
    assert text.bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(100 * 0.2**0.25)
    assert text.bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 4))  # too short
    assert text.chrf(["abc"], ["abc"]) == pytest.approx(100) and text.chrf(["abc"], ["xyz"]) == 0
    for figure in (text.bleu, text.chrf):
        with pytest.raises(ValueError, match="found: got 1 texts for 2"):
            figure(["a"], ["a", "b"])


def test_without_sacrebleu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match="eval extra: pip install"):
        text.bleu(["a"], ["a"])


def test_rouge_l():
    # Lin's examples: "police kill the gunman" and "the gunman kill police" against "police killed the gunman"
    assert text.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert text.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert text.rouge_l("A b", "a B c d") == pytest.approx(2 * 2 / 6)
    assert text.rouge_l("", "a") == text.rouge_l("", "") == 0


def test_interval_of_a_mean():
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = text.mean_interval(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found == text.mean_interval(values)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert found != text.mean_interval(values, seed=1)
    assert text.mean_interval(values, level=0.5).high < found.high
    assert text.mean_interval([2.0, 2.0]) == (2, 2, 2)
    assert str(text.mean_interval([2.0])) == "2.000 [2.000, 2.000]"


def test_interval_by_weights():
    found = text.mean_interval([1.0, 3.0], [3.0, 1.0])
    assert found == (1.5, 1.0, 3.0)
    for values, weights in (([], None), ([1.0], [1.0, 2.0]), ([math.nan], None), ([1.0], [-1.0]), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="values: got"):
            text.mean_interval(values, weights)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).exponential(size=60)
    wanted = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    found = text.mean_interval(values, rounds=4000)
    assert found.low == pytest.approx(wanted.low, rel=0.02) and found.high == pytest.approx(wanted.high, rel=0.02)
    assert text.ngram_entropy([[1, 1, 2, 3]], 1) == pytest.approx(stats.entropy([2, 1, 1]))
