"""What a step sees: times, and which tokens are given."""

import dataclasses

import numpy as np
import pytest
import torch
from runs import V, trainer

from klflow_ext import (
    LogitPath,
    TrainConfig,
    Trainer,
)
from klflow_ext.train import LossCurve


@pytest.mark.parametrize("sampling", [None, "middle", "uniform", "learned"])
def test_times(sampling):
    run = trainer(1, time_sampling=sampling, middle_share=0.8)
    run.batches.config = dataclasses.replace(run.config, batch_size=4000)
    shares = run.batches.times(np.random.default_rng(0)).sort().values / run.path.t_max
    middle = ((shares > 0.2) & (shares < 0.8)).float().mean().item()
    assert shares.min() >= 0 and shares.max() <= 1
    if sampling in ("uniform", "learned"):  # nothing is learned yet; one time in each cell
        assert (shares - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.01 / 4000
    else:
        assert abs(middle - (0.8 + 0.2 * 0.6)) < 0.02
    path = LogitPath(V)
    path.t_max = 1.0
    others = Trainer(run.model, path, run.stream, TrainConfig(length=16, time_sampling=sampling))
    assert others.batches.time_sampling == (sampling or "uniform")


def test_what_is_given_in_training():
    """Segments from their beginnings, scattered tokens, prefixes, holes; half of them with nothing else to be seen."""
    run = trainer(1, given_share=0.6)
    run.batches.config = dataclasses.replace(run.config, batch_size=8000, length=64)
    given, blank = run.batches.given_mask(np.random.default_rng(0))
    assert abs(given.any(1).float().mean() - 0.6) < 0.06  # segments and scattered masks may be empty by chance
    assert abs(blank.float().mean() - 0.3) < 0.02
    assert not given.all(1).any()
    changes = (given[:, 1:] != given[:, :-1]).sum(1)
    prefix = given[:, 0] & (changes == 1)
    assert prefix.float().mean() > 0.6 / 8
    periodic = torch.zeros(8000, dtype=torch.bool)
    for size in range(4, 33):
        repeats = (given[:, size:] == given[:, :-size]).all(1) & given.any(1)
        first = (given[:, 1:size] <= given[:, : size - 1]).all(1)  # once free, free until the next segment
        periodic |= repeats & first
    assert 0.15 < periodic.float().mean() < 0.3
    nothing = trainer(1, given_share=0.0).batches.given_mask(np.random.default_rng(0))
    assert not nothing[0].any() and not nothing[1].any()


def test_blank_sequences_are_trained_at_time_zero(monkeypatch):
    run = trainer(1, given_share=1.0)
    found = []
    loss = run.path.loss
    monkeypatch.setattr(run.path, "loss", lambda *a, **k: found.append((a[2], k["given"])) or loss(*a, **k))
    for _ in range(8):
        run.train_step()
    times = torch.cat([t for t, _ in found])
    assert abs((times == 0).float().mean() - 0.5) < 0.2 and ((times > 0).sum() > 0)


def test_times_are_drawn_where_the_loss_falls():
    curve = LossCurve(0.3)
    edges = np.linspace(0, 1, curve.BINS + 1)
    assert np.allclose(curve.times(edges, 1.0), 0.3 * edges)  # nothing measured: uniform
    t = torch.linspace(0, 0.3, 3201)[:-1]
    losses = 4 - 3 * ((t - 0.15) / 0.06).clamp(0, 1)  # falls from .15 to .21 only
    for _ in range(3):
        curve.add(curve.measurement(t, 5 * losses, torch.full_like(t, 5)))
    assert curve.sums[1].sum() == pytest.approx(5 * 3200 * (1 + curve.KEEP + curve.KEEP**2))
    times = curve.times((np.arange(10000) + 0.5) / 10000, 0.8)
    inside = (times > 0.15 - 0.3 / 32) & (times < 0.21 + 0.3 / 32)
    assert inside.mean() == pytest.approx(0.8 + 0.2 * (0.06 + 0.6 / 32) / 0.3, abs=0.01)
    steps = np.diff(curve.times((np.arange(100) + 0.5) / 100, 1.0))  # alone, it cuts the fall into equal pieces
    assert np.allclose(steps[25:75], 0.06 / 100, rtol=0.01)
    flat = LossCurve(0.3)
    flat.add(flat.measurement(t, torch.ones_like(t), torch.ones_like(t)))
    assert np.allclose(flat.density(), 1 / 32)
