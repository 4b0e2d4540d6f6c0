"""The table of figures."""

import json

import numpy as np
import pytest

from klflow_ext.evaluate import Judge, table, text
from klflow_ext.evaluate.distance import energy_distance


def test_figures_are_those_of_each_measure():
    sequences, corpus = [[1, 2, 1, 2], [1, 2, 3, 4]], text.Corpus([1, 2, 3, 9])
    found = table.figures(sequences, ["a b a b", "a b c d"], corpus)
    assert set(found) == set(table.DEFINITIONS) - {"bits_per_byte", "distance", "mauve"}
    assert found["distinct_2"].mean == 4 / 6 and found["copied"].mean == (2 / 4 + 3 / 4) / 2
    assert found["token_entropy"].mean == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert found["repetition_4"].mean == 0
    assert found["unigram_entropy"].mean == pytest.approx(text.ngram_entropy(sequences, 1))
    assert found["bigram_entropy"].mean == pytest.approx(text.ngram_entropy(sequences, 2))
    assert found["self_bleu"].mean == np.mean(text.self_bleu(["a b a b", "a b c d"]))
    assert all(isinstance(value, text.Interval) and value.low <= value.mean <= value.high for value in found.values())


def test_table_by_hand():
    row = {name: text.Interval(0.5, 0.25, 1) for name in table.COLUMNS}
    row |= {"bits_per_byte": text.Interval(1, 0.5, 2), "self_bleu": text.Interval(12.34, 1, 2)}
    lines = table.as_table({"real": row, "other one": row}).split("\n")
    assert lines[0].split("  ")[-1].strip() == "copied" and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[1].split("  ") if cell.strip()]
    assert cells[:3] == ["real", "1.000 [0.500, 2.000]", "0.500 +-0.375"] and "12.3 +-0.5" in cells
    assert len(cells) == 1 + len(table.COLUMNS)
    without = {name: value for name, value in row.items() if name != "bits_per_byte"}
    assert "bits" not in table.as_table({"real": without})
    assert json.loads(json.dumps(table.as_json(row)))["bits_per_byte"] == {"mean": 1, "low": 0.5, "high": 2}


def test_bits_of_the_judge_are_pooled(data_folder):
    judge = Judge(data_folder / "stories260K")
    texts = ["Once upon a time there was a cat.", "The dog.", ""]
    found = table.figures([[1, 2], [3, 4], [5, 6]], texts, text.Corpus([1]), judge)["bits_per_byte"]
    pairs = judge.bits(texts)
    assert found.mean == pytest.approx(sum(bits for bits, _ in pairs[:2]) / sum(size for _, size in pairs))
    assert found.low < found.mean < found.high
    features = judge.features(["A cat sat.", "One day a dog ran.", "It was fun."])
    distance = table.figures([[1, 2], [3, 4], [5, 6]], texts, text.Corpus([1]), judge, real=features)["distance"]
    assert distance == energy_distance(judge.features(texts), features)
    assert judge.bits_per_byte(texts[:2]) == pytest.approx(found.mean)
    assert pairs[0][1] == len(texts[0]) and pairs[2] == (pytest.approx(pairs[2][0]), 0)
