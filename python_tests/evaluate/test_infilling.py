"""Samplers fill the holes of programs, by one window or several."""

from types import SimpleNamespace

import pytest
import torch

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, LogitPath, MaskPath, Sampler, data
from klflow_ext.evaluate import code
from klflow_ext.evaluate.infilling import fill_tasks, infill_tasks, next_window
from klflow_ext.sample.samples import seeds_of


class Letters:
    """A tokenizer of characters."""

    def encode(self, text, add_special_tokens=True):
        return SimpleNamespace(ids=[ord(c) for c in text])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


class Knows:
    """A sampler that reads the answer off what is given: the characters of a program are consecutive."""

    tokenizer, network = Letters(), SimpleNamespace(max_length=None)

    def __init__(self):
        self.seen, self.seeds = [], []

    def infill(self, tokens, given, *, seed, progress, steps=1):
        found = []
        for row, flags in zip(tokens, given, strict=True):
            at = flags.index(True)
            found.append(torch.arange(len(row)) + int(row[at]) - at)
            assert all(int(a) == int(b) for a, b, known in zip(row, found[-1], flags, strict=True) if known)
            self.seen.append((len(row), flags.count(False)))
        self.seeds.append(seed)
        return SimpleNamespace(tokens=found, nfe=steps)


def split(text, *ends):
    """A task of this text, whose holes are every second piece."""
    pieces = [text[a:b] for a, b in zip((0, *ends), (*ends, len(text)), strict=True)]
    return code.Task("t", tuple(pieces[::2]), tuple(pieces[1::2]), None)


def test_a_sampler_that_knows_the_answer_fills_any_holes():
    text = "".join(map(chr, range(100, 200)))
    tasks = [split(text, 40, 50), split(text, 2, 9, 12, 90), split(text, 1, 100), split(text, 30, 31, 50, 55)]
    for window in (None, 16, 8, 2):
        found = fill_tasks(tasks, Knows(), window=window, tries=2, steps=3)
        assert found.texts == [[list(task.removed)] * 2 for task in tasks]
        assert (found.windows == 1) == (window is None) and found.nfe == 3 * found.windows
    sampler = Knows()
    fill_tasks(tasks[:1], sampler, window=12, tries=2, seed=7)
    assert sampler.seen == [(12, 9)] * 2 + [(12, 1)] * 2
    assert sampler.seeds[0] == seeds_of(7, 1) + seeds_of(8, 1) and len({*sampler.seeds[0], *sampler.seeds[1]}) == 4


def test_next_window():
    def window(before, hole, after, length):
        place = next_window([True] * before + [False] * hole + [True] * after, length)
        return before - place.start, place.stop - before - hole

    assert window(10, 2, 10, 8) == (3, 3)
    assert window(1, 2, 10, 8) == (1, 5) and window(10, 2, 0, 8) == (6, 0) and window(1, 2, 1, 100) == (1, 1)
    assert window(10, 5, 10, 8) == (2, 1)  # the first 4 of 5 are the hole, and the fifth is in sight too
    assert window(10, 50, 10, 8) == (2, -44) and window(0, 50, 0, 8) == (0, -42)


def small_sampler(kind=LogitPath):
    tokenizer = data.train_tokenizer(["def f(x):\n    return x"], 300)
    path = kind(data.vocab_size_of(tokenizer))
    torch.manual_seed(0)
    kwargs = {"input": "posterior"} if kind is LogitPath else {"input": "tokens"}
    kwargs |= {"causal": True} if kind is Autoregressive else {}
    model = Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 32, time="none", **kwargs), path)
    return Sampler(model, path, tokenizer=tokenizer)


TASK = code.Task("t", ("def f(x):\n", "\n    return y"), ("    y = x + 1",), "assert f(1) == 2")


@pytest.mark.parametrize("kind", [LogitPath, MaskPath, Autoregressive])
def test_samplers_of_any_path(kind):
    """Each fills, the same again by the same seed, and what one try writes does not depend on the tries beside it."""
    sampler = small_sampler(kind)
    found = fill_tasks([TASK, TASK], sampler, steps=3, tries=2, seed=4, window=12)
    assert found.texts[0][0] != found.texts[0][1] and found.texts[0] != found.texts[1]
    assert fill_tasks([TASK, TASK], sampler, steps=3, seed=5, window=12).texts[1][0] == found.texts[1][1]
    assert found.windows == 2 and found.nfe > 3
    with pytest.raises(ValueError, match="window: got 33, allowed is 2 to max_length = 32"):
        fill_tasks([TASK], sampler, window=33)


def test_figures_and_settings():
    sampler = small_sampler()
    found = infill_tasks([TASK] * 2, sampler, window=24, tries=2, steps=3, top_k=5)
    assert (found["tasks"], found["holes"], found["tries"], found["window"], found["nfe"]) == (2, 2, 2, 24, 3)
    assert found["options"] == {"steps": 3, "top_k": 5} and found["sandbox"]["layers"] and found["seconds"] > 0
    assert set(found["figures"]) == {f"{name}@{k}" for name in ("pass", "compiles", "exact") for k in (1, 2)}
    with pytest.raises(ValueError, match="tries: got 0"):
        infill_tasks([TASK], sampler, tries=0)
    with pytest.raises(ValueError, match="sampler: got a Sampler without a tokenizer"):
        fill_tasks([TASK], Sampler(sampler.model, sampler.path))
