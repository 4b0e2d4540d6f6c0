"""The energy distance of features."""

import itertools
import math
import sys

import numpy as np
import pytest

from klflow_ext import Sampler, data, evaluate, load_run
from klflow_ext.evaluate.distance import energy_distance, mauve


def test_by_hand():
    x, y = np.array([[0.0], [1.0], [4.0]]), np.array([[1.0], [3.0]])  # whose standard deviation is 1
    between = np.mean([1, 3, 0, 2, 3, 1])
    wanted = 2 * between - np.mean([1, 4, 3]) - 2
    assert energy_distance(x, y).mean == pytest.approx(wanted)
    assert energy_distance(7 * x, 7 * y).mean == pytest.approx(wanted)
    flat = np.ones((2, 1))
    both = energy_distance(np.hstack([x, np.ones((3, 1))]), np.hstack([y, flat]))  # a feature that says nothing
    assert both.mean == pytest.approx(wanted)


def test_it_is_unbiased_and_its_interval_holds_the_truth():
    """Over many draws of one distribution its mean is 0; of two, 95 % intervals mostly hold what many texts give."""
    generator = np.random.default_rng(0)
    draw = generator.normal
    same = [energy_distance(draw(size=(6, 3)), draw(size=(60, 3)), rounds=1).mean for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5
    real = generator.normal(size=(1000, 3))
    truth = energy_distance(generator.normal(0.5, 1, (1000, 3)), real, rounds=1).mean
    found = [
        energy_distance(generator.normal(0.5, 1, (40, 3)), generator.normal(size=(60, 3)), rounds=200)
        for _ in range(60)
    ]
    assert 0.8 < np.mean([one.low < truth < one.high for one in found]) and truth > 0.1
    assert np.mean([one.mean for one in found]) == pytest.approx(truth, abs=0.03)


@pytest.mark.parametrize(
    "found, real",
    [
        (np.ones((1, 2)), np.ones((3, 2))),
        (np.ones((3, 2)), np.ones((3, 1))),
        (np.ones(3), np.ones(3)),
        (np.full((3, 1), math.nan), np.ones((3, 1))),
    ],
)
def test_wrong_features(found, real):
    with pytest.raises(ValueError, match="found: got"):
        energy_distance(found, real)


@pytest.mark.slow
def test_held_out_text_is_nearer_than_shuffled_text_and_samples(data_folder):
    judge = evaluate.open_judge(data_folder / "stories260K")
    model, path, tokenizer = load_run()
    text = (data_folder / "tinystories" / "tinystories_heldout.txt").read_text()
    stream = data.encode(tokenizer, text.split(f"\n{data.END}\n")[:300])
    windows = data.batch(stream, 144, 32, seed=0, step=0)
    texts = {
        "held-out": [tokenizer.decode(row) for row in windows[:48].tolist()],
        "shuffled": [tokenizer.decode(row[np.random.default_rng(0).permutation(32)].tolist()) for row in windows[:48]],
        "samples": Sampler(model, path, tokenizer=tokenizer).sample((48, 32), steps=2).texts,
    }
    real = judge.features([tokenizer.decode(row) for row in windows[48:].tolist()])
    found = {name: energy_distance(judge.features(some), real) for name, some in texts.items()}
    assert found["held-out"].low < 0.1 and abs(found["held-out"].mean) < 0.3
    for name in ("shuffled", "samples"):
        assert found[name].low > found["held-out"].high, found
    alike = energy_distance(judge.features(list(itertools.islice(itertools.cycle(texts["held-out"][:3]), 48))), real)
    assert alike.low > 0.3  # real, and all alike


def test_mauve_of_one_distribution_and_of_two():
    pytest.importorskip("mauve")
    draw = np.random.default_rng(0).normal
    found = [mauve(draw(size=(80, 3)), draw(size=(100, 3)), seed=i) for i in range(20)]
    assert np.mean([one.mean for one in found]) > 0.97 and all(one.low <= one.mean <= one.high <= 1 for one in found)
    far = mauve(draw(4, 1, (80, 3)), draw(size=(100, 3)))
    assert far.high < 0.1 and far.low >= 0
    some = [mauve(draw(0.7, 1, (80, 3)), draw(size=(100, 3)), seed=i) for i in range(40)]
    spread, half = (np.std([one.mean for one in some]), np.mean([one.high - one.low for one in some]) / 2)
    assert far.mean < np.mean([one.mean for one in some]) < found[0].mean
    assert 0.6 * spread < half / 1.96 < 1.7 * spread  # what many draws vary by


def test_mauve_tells_shuffled_text(data_folder):
    pytest.importorskip("mauve")
    judge = evaluate.open_judge(data_folder / "stories260K")
    text = (data_folder / "tinystories" / "tinystories_heldout.txt").read_text().split(f"\n{data.END}\n")
    texts = [" ".join(story.split()[:24]) for story in text[:120]]
    generator = np.random.default_rng(0)
    mixed = [" ".join(generator.permutation(one.split())) for one in texts[:60]]
    real, held, shuffled = (judge.features(some) for some in (texts[60:], texts[:60], mixed))
    assert mauve(held, real).low > mauve(shuffled, real).high
    assert mauve(held, real).mean > 0.8


def test_mauve_refuses(monkeypatch):
    with pytest.raises(ValueError, match="found: got .39, 2. beside .60, 2., allowed are .* N, M >= 40"):
        mauve(np.ones((39, 2)), np.ones((60, 2)))
    with pytest.raises(ValueError, match="seed: got -1"):
        mauve(np.ones((40, 2)), np.ones((60, 2)), seed=-1)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match="mauve extra"):
        mauve(np.ones((40, 2)), np.ones((60, 2)))
