"""One Sampler, and one model, from several threads at once: the tokens of each as alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from test_replay import CallsAgain, small_denoiser

from klflow_ext import Sampler
from klflow_ext.path import as_network
from klflow_ext.path.network import evaluating
from klflow_ext.sample import replay

METHODS = ["basic", "sampling", "hybrid", "segments", "confidence", "race"]


def test_evaluating_ends_with_the_last_of_its_threads():
    model, path = small_denoiser()
    network, entered, left = as_network(model.train(), path), Event(), Event()
    model.blocks.eval()

    def longer():
        with evaluating(network):
            entered.set()
            assert left.wait(10)
            return any(part.training for part in model.modules())

    with ThreadPoolExecutor(1) as pool:
        with evaluating(network):
            later = pool.submit(longer)
            assert entered.wait(10)
        left.set()
        assert not later.result()
    assert model.training and not model.blocks.training


@pytest.mark.parametrize("method", METHODS)
def test_a_sampler_from_eight_threads(method):
    model, path = small_denoiser()
    model.train()
    sampler, barrier = Sampler(model, path), Barrier(8)

    def draw(seed):
        return sampler.sample((1 + seed % 3, 4 + seed % 4), steps=5, method=method, seed=seed, top_k=None).tokens

    alone = [draw(seed) for seed in range(8)]

    def several(seed):
        barrier.wait()
        return all(torch.equal(draw(seed), alone[seed]) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(several, range(8)))
    assert model.training


def test_recorded_steps_from_eight_threads(monkeypatch):
    """They share buffers: one call after the other."""
    monkeypatch.setattr(replay, "Recorder", CallsAgain)
    monkeypatch.setattr(Sampler, "_recordable", lambda self: self.network)
    model, path = small_denoiser()
    sampler = Sampler(model, path, cuda_graph=True)

    def draw(seed):
        return sampler.sample((2, 8), steps=5, method="sampling", seed=seed, top_k=None).tokens

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(draw, range(8)), alone, strict=True))
