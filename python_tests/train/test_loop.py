"""A loop of one's own and a Trainer make the same steps, whatever the model."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from klflow_ext import Batches, Denoiser, DenoiserConfig, LogitPath, MaskPath, TrainConfig, Trainer
from klflow_ext.train import make_optimizers

ROOT = Path(__file__).resolve().parent.parent.parent
V = 20
STREAM = np.arange(600) * 3 % V


def own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def denoiser(path, **options):
    options = {"input": "tokens" if path.reads == "tokens" else None} | options
    options = {name: value for name, value in options.items() if value is not None}
    return Denoiser(DenoiserConfig(V, 1, 2, 16, 16, **options), path)


MODELS = {
    "plain": (LogitPath(V), lambda path: own_loop().Plain(path, 16)),
    "denoiser": (LogitPath(V), denoiser),
    "slices": (LogitPath(V), lambda path: denoiser(path, slices=True, time="none")),
    "mask": (MaskPath(V), denoiser),
}


@pytest.mark.parametrize("kind", MODELS)
def test_own_losses_are_those_of_the_trainer(kind):
    path, make = MODELS[kind]
    config = TrainConfig(steps=8, batch_size=4, length=12, lr=1e-2, evidence_share=0.25 if kind == "slices" else 0.0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make(path))
    losses = own_loop().train(models[0], path, STREAM, config)
    trainer = Trainer(models[1], path, STREAM, config)
    assert losses == [trainer.train_step() for _ in range(8)]
    assert len(set(losses)) == 8
    for ours, its in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, its)


def test_noise_differs_from_step_to_step():
    batches = Batches.of(STREAM, LogitPath(V), TrainConfig(batch_size=4, length=12, seed=5), lambda x, t: x)
    assert [batches.batch(i).rng.tolist() for i in (0, 7)] == [[5, 0], [5, 7]]
    moved = batches.batch(3).to("meta")
    assert moved.tokens.device.type == moved.rng.device.type == "meta" and moved.order is None


def test_what_is_refused():
    path = LogitPath(V)
    config = TrainConfig(steps=1, batch_size=2, length=12)
    frozen = own_loop().Plain(path).requires_grad_(False)
    short = denoiser(path)
    short.max_length = 8
    for model, settings, message in (
        (lambda x, t: x, config, "model: got a function, allowed where it is trained is a torch.nn.Module"),
        (frozen, config, "model: got one without a parameter that needs a gradient"),
        (short, config, "length: got 12, allowed is at most max_length = 8"),
        (own_loop().Plain(path), TrainConfig(length=12, recompute=True), "recompute: got True, allowed is False"),
        (own_loop().Plain(path), TrainConfig(length=12, evidence_share=0.5), "evidence_share: got 0.5, allowed is 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Trainer(model, path, STREAM, settings)


def test_frozen_parameters_stay():
    path = LogitPath(V)
    model = denoiser(path)
    model.embedding.requires_grad_(False)
    kept = model.embedding.clone()
    optimizers = make_optimizers(model, path, TrainConfig())
    assert all(p is not model.embedding for o in optimizers for g in o.param_groups for p in g["params"])
    trainer = Trainer(model, path, STREAM, TrainConfig(steps=2, batch_size=2, length=12, ema=0.5))
    trainer.train_step()
    assert torch.equal(model.embedding, kept) and model.head.weight.any()
