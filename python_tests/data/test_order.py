"""The order of training: nothing twice within an epoch, everything by its number alone, weights kept in any stretch."""

import numpy as np
import pytest
from texts import token_folder

from klflow_ext import data
from klflow_ext.data.order import Mixed, Packed, Windows, permuted

KEY = (3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_permutations(size):
    whole = permuted(np.arange(size), size, KEY)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert permuted(some, size, KEY).tolist() == whole[some].tolist()
    if size > 100:
        assert permuted(np.arange(size), size, (3, 2)).tolist() != whole.tolist()
        assert abs(np.corrcoef(np.arange(size), whole)[0, 1]) < 4 / size**0.5
        assert (np.diff(whole) == 1).mean() < 10 / size


def test_permutations_of_a_few_are_even():
    places = np.array([permuted(np.arange(6), 6, (seed,)) for seed in range(6000)])
    counts = np.array([[(places[:, i] == j).mean() for j in range(6)] for i in range(6)])
    assert abs(counts - 1 / 6).max() < 0.025


def test_permutations_of_a_great_many():
    size = 10**13 + 7
    found = permuted(np.arange(size - 1000, size), size, KEY)
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.05


@pytest.mark.parametrize("count", [17, 18, 31, 32, 33, 5000])
def test_windows_once_an_epoch(count):
    order = Windows(np.arange(count), 16, KEY)
    assert order.epoch >= 1 and count - order.epoch * 16 < 32
    firsts = set()
    for epoch in range(20):
        rows = order.take(np.arange(epoch * order.epoch, (epoch + 1) * order.epoch))
        assert (np.diff(rows) == 1).all()  # each a window of the text
        assert len(np.unique(rows)) == rows.size  # no token twice
        firsts.add(rows.min())
    assert len(firsts) == 1 if count == 16 else len(firsts) > 1
    assert max(firsts) < 16
    numbers = np.array([7, 0, 3 * order.epoch + 1, 10**12])  # in any company, at any time
    assert order.take(numbers).tolist() == [order.take(np.array([n]))[0].tolist() for n in numbers]


def test_documents_in_a_new_order_each_epoch(folder):
    stream = folder.train
    assert len(folder.index["splits"]["train"]) > 3 and stream.documents > 2 * Packed.BLOCK
    order = Packed(stream, 16, KEY)
    whole = [stream.document(i).tolist() for i in range(stream.documents)]
    assert sum(whole, []) == stream[:].tolist() and all(d[-1] == 0 and 0 not in d[:-1] for d in whole)
    epochs = []
    for epoch in range(2):
        rows = order.take(np.arange(epoch * order.epoch, (epoch + 1) * order.epoch)).ravel().tolist()
        assert len(stream) - len(rows) < 16
        ends = [i + 1 for i, token in enumerate(rows) if token == 0]
        found = [tuple(rows[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        missing = sorted(map(tuple, whole))
        for document in found:  # each once
            missing.remove(document)
        assert len(missing) <= 16
        epochs.append(found)
    assert epochs[0] != epochs[1] and epochs[0] != [tuple(d) for d in whole[: len(epochs[0])]]
    numbers = np.array([7, order.epoch, 0, 5 * order.epoch + 1])
    assert order.take(numbers).tolist() == [Packed(stream, 16, KEY).take(np.array([n]))[0].tolist() for n in numbers]


def test_a_sequence_longer_than_a_block_of_documents(folder):
    stream, length = folder.train, 5000
    order = Packed(stream, length, KEY)
    short = Packed(stream, 10, KEY)
    assert (folder.train[:] == 0).mean() * length > Packed.BLOCK
    assert order.take(np.array([1]))[0].tolist() == short.take(np.arange(500, 1000)).ravel().tolist()


def test_a_mixture_keeps_its_weights_in_any_stretch():
    streams = [np.arange(1000) + 1000 * i for i in range(3)]
    weights = [0.6, 0.3, 0.1]
    mixed = Mixed([Windows(s, 10, (0, i)) for i, s in enumerate(streams)], weights)
    which = mixed.take(np.arange(3000))[:, 0] // 1000
    for start in range(0, 2900, 7):
        for source, weight in enumerate(weights):
            assert abs((which[start : start + 100] == source).sum() - 100 * weight) <= 3
    rows = mixed.take(np.arange(3000))
    for source, stream in enumerate(streams):  # the sequences of each are its own, one after the other
        mine = rows[which == source]
        assert mine.tolist() == Windows(stream, 10, (0, source)).take(np.arange(len(mine))).tolist()
    assert mixed.take(np.array([2999, 10**15]))[0].tolist() == rows[2999].tolist()
    alone = Mixed([Windows(streams[0], 10, (0, 0))], [1.0])
    assert alone.take(np.arange(50)).tolist() == Windows(streams[0], 10, (0, 0)).take(np.arange(50)).tolist()


def test_parts_of_a_batch_are_disjoint():
    """What processes and accumulation take of a step are rows of one batch; the rows of an epoch are different windows."""
    stream = np.arange(16 * 8 * 20 + 15)
    rows = np.concatenate([data.batch(stream, 8, 16, 5, step).numpy() for step in range(20)])
    assert len(np.unique(rows)) == rows.size == 16 * 8 * 20
    assert not np.array_equal(rows[:8], data.batch(stream, 8, 16, 6, 0).numpy())
