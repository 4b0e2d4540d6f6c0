"""The judge."""

import numpy as np

from klflow_ext import (
    data,
    evaluate,
)


def test_judge_tells_text_from_shuffled_words(data_folder):
    judge = evaluate.Judge(data_folder / "stories260K")
    text = (data_folder / "tinystories" / "tinystories_heldout.txt").read_text()
    stories = [s[:300] for s in text.split(f"\n{data.END}\n")[:6]]
    generator = np.random.default_rng(0)
    shuffled = [" ".join(generator.permutation(s.split())) for s in stories]
    assert 0.7 < judge.bits_per_byte(stories) < 1.3 and judge.bits_per_byte(shuffled) > 2.3
