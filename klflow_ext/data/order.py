"""In which order training sees a stream of tokens: sequence i of all that it will ever see is a function of (seed, i).

Nothing is drawn twice within an epoch. There is no array of the order: a permutation is computed place by place, so that
resuming needs no state, and processes that take different numbers have different sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from klflow_ext.data.tokens import Tokens

ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(numbers: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a permutation of range(size), chosen by the key, puts these numbers: a Feistel network over a power of four,
    taken again until it ends below `size`."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(key).integers(0, 2**64, ROUNDS, np.uint64)
    out = np.asarray(numbers).astype(np.uint64)
    going = np.arange(len(out))
    while len(going):
        left, right = out[going] >> half, out[going] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & mask)
        out[going] = left << half | right
        going = going[out[going] >= size]
    return out.astype(np.int64)


class Windows:
    """Neighbouring windows of a stream, in a new order in each epoch, which also moves their edges.

    Fewer than two windows' tokens at the ends of the stream are left out of an epoch.

    Args:
        stream: what is sliced, an array or Tokens. length: tokens of a window. key: of all that is random.

    Attributes:
        epoch: sequences of one.
    """

    def __init__(self, stream: Any, length: int, key: tuple[int, ...]):
        self.stream, self.length, self.key = stream, length, key
        self.slack = min(length, len(stream) - length + 1)  # places where the first window may begin
        self.epoch = (len(stream) - self.slack + 1) // length

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """(n, length) int64: the sequences of these numbers, from 0 on without end."""
        found = np.empty((len(numbers), self.length), np.int64)
        epochs = numbers // self.epoch
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            key = (*self.key, int(epoch))
            first = int(np.random.default_rng((*key, 1)).integers(self.slack))
            for row, window in zip(rows, permuted(numbers[rows] % self.epoch, self.epoch, key), strict=True):
                start = first + int(window) * self.length
                found[row] = self.stream[start : start + self.length]
        return found


class Packed:
    """Documents in a new order in each epoch, one after another, cut into sequences. Arguments as of Windows.

    What is kept of the order are the tokens before every BLOCK documents, summed once an epoch: 1 / 8 byte a document.
    """

    BLOCK = 64

    def __init__(self, stream: Any, length: int, key: tuple[int, ...]):
        if not isinstance(stream, Tokens):
            raise ValueError(f"shuffle: got 'documents', allowed with {type(stream).__name__} is 'windows'")
        self.stream, self.length, self.key = stream, length, key
        self.epoch = len(stream) // length
        self._before: dict[int, np.ndarray] = {}  # by epoch, of the last two

    def _places(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first token, tokens) of documents by their numbers in the epoch's order."""
        return self.stream.places(permuted(numbers, self.stream.documents, (*self.key, epoch)))

    def _sums(self, epoch: int) -> np.ndarray:
        if epoch not in self._before:
            sums = [np.zeros(1, np.int64)]
            step = 4096 * self.BLOCK
            for first in range(0, self.stream.documents, step):
                sizes = self._places(epoch, np.arange(first, min(first + step, self.stream.documents)))[1]
                sums.append(np.add.reduceat(sizes, np.arange(0, len(sizes), self.BLOCK)))
            self._before = {**dict(list(self._before.items())[-1:]), epoch: np.concatenate(sums).cumsum()}
        return self._before[epoch]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """As of Windows."""
        found = np.empty((len(numbers), self.length), np.int64)
        epochs = numbers // self.epoch
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            found[rows] = self._take(int(epoch), numbers[rows] % self.epoch * self.length)
        return found

    def _take(self, epoch: int, places: np.ndarray) -> list[np.ndarray]:
        """The sequences that begin at these places of the epoch's order."""
        sums = self._sums(epoch)
        first = np.searchsorted(sums, places, "right") - 1
        last = np.searchsorted(sums, places + self.length - 1, "right")
        blocks = np.unique(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)]))
        documents = (blocks[:, None] * self.BLOCK + np.arange(self.BLOCK)).ravel()
        documents = documents[documents < self.stream.documents]
        begins, sizes = self._places(epoch, documents)
        # Where each document ends in the epoch's order: its block's place, and the sizes within the block up to it.
        index = np.searchsorted(blocks, documents // self.BLOCK)
        total = np.concatenate([[0], sizes.cumsum()])
        heads = np.searchsorted(documents, blocks * self.BLOCK)
        ends = (sums[blocks] - total[heads])[index] + total[1:]
        return [self._sequence(int(place), begins, sizes, ends) for place in places]

    def _sequence(self, place: int, begins: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> np.ndarray:
        at, stop = int(np.searchsorted(ends, place, "right")), place + self.length
        found: list[np.ndarray] = []
        while place < stop:
            begin = int(begins[at] + sizes[at] - ends[at]) + place  # in the stream
            count = min(stop, int(ends[at])) - place
            found.append(self.stream[begin : begin + count])
            place, at = place + count, at + 1
        return np.concatenate(found)


class Mixed:
    """Sequences of several orders in turn, as weights say: in any stretch each has its share, to within a few sequences.

    Args:
        orders: Windows or Packed. weights: positive, of sum 1.
    """

    ONE = 1 << 40

    def __init__(self, orders: list[Windows | Packed], weights: list[float]):
        self.orders = orders
        left = [sum(weights[i:]) for i in range(len(weights))]
        # Each against all behind it, in integers: of the first i sequences that are left it has i * share // ONE, the last all.
        self.shares = [round(self.ONE * w / rest) for w, rest in zip(weights, left, strict=True)]

    def place(self, number: int) -> tuple[int, int]:
        """(order, number within it) of a sequence."""
        order = 0
        while (mine := number * self.shares[order] // self.ONE) == (number + 1) * self.shares[order] // self.ONE:
            number -= mine
            order += 1
        return order, mine

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """As of Windows."""
        places = [self.place(int(i)) for i in numbers]
        found = np.empty((len(numbers), self.orders[0].length), np.int64)
        for order, source in enumerate(self.orders):
            rows = [row for row, (which, _) in enumerate(places) if which == order]
            if rows:
                found[rows] = source.take(np.array([places[row][1] for row in rows]))
        return found
