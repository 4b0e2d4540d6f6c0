"""Small runs that the tests of training share."""

import functools

import numpy as np
import torch

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    LogitPath,
    Run,
    TrainConfig,
    Trainer,
)

V = 40


def small_model(input="posterior", **options):
    torch.manual_seed(0)
    path = LogitPath(V)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "max_length": 32, **options}
    return Denoiser(DenoiserConfig(V, input=input, **shape), path), path


def trainer(steps, out=None, input="posterior", shape=None, **options):
    model, path = small_model(input, **(shape or {}))
    # Runs of the cyclic text 0 1 2 ... 9 0 1 ...: a context shows its neighbours exactly.
    stream = (np.arange(5000) % 10).astype(np.int32)
    return Trainer(model, path, stream, TrainConfig(steps=steps, batch_size=8, length=16, **options), out)


def saved(folder):
    """What the last checkpoint of a run has for its training to go on from."""
    with Run(folder).last().check().training() as state:
        return state


def contents(folder):
    """Every file below a folder, by its name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def cyclic_next(model, sequences=4):
    """The share of next tokens of the cyclic text that a causal model finds."""
    x = torch.arange(12)[None].add(torch.arange(sequences)[:, None]) % 10
    return (model(x, 0.0)[:, 1:-1].argmax(-1) == x[:, 2:]).float().mean().item()


def first_gradient(run):
    """(loss, gradients by name) of the run's next step, which changes no weight."""
    run.optimizers = []
    loss = run.train_step()
    return loss, {name: p.grad for name, p in run.model.named_parameters()}


def eager_backend(monkeypatch):
    """torch.compile without the code generation, which takes a minute; what it captures is the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
