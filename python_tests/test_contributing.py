"""The examples of CONTRIBUTING.md, as they stand there, and the files that it names."""

import re
from pathlib import Path

import pytest
import torch

from klflow_ext import LogitPath, Sampler
from klflow_ext.sample import ways

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text()
V = 20


@pytest.fixture(scope="module")
def examples():
    names, registered = {}, dict(ways._ways)
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    yield names
    ways._ways.clear()
    ways._ways.update(registered)


def model(x, t):
    """Certain of token 7 everywhere."""
    return torch.full((*x.shape[:2], V), -30.0).index_fill(-1, torch.tensor([7]), 0.0)


def test_the_files_are_there():
    names = re.findall(r"\]\((\S+)\)", TEXT)
    missing = [name for name in names if not (Path(__file__).resolve().parent.parent / name).exists()]
    assert names and not missing


@pytest.mark.parametrize("method,passes", [("cooled", 4), ("halves", 2)])
def test_schemes_and_ways(examples, method, passes):
    result = Sampler(model, LogitPath(V)).complete([[1, 2], []], 6, steps=4, method=method)
    assert result.nfe == passes and result.tokens[0].tolist() == [1, 2, 7, 7, 7, 7] and (result.tokens[1] == 7).all()


@pytest.mark.parametrize("method", ["basic", "sampling", "segments"])
def test_paths(examples, method):
    path = examples["RepeatPath"](V)
    target, t = torch.randint(V, (3, 8)), torch.tensor([0.1, 0.5, 0.9])
    assert path.loss(lambda x, t: torch.zeros(*x.shape, V), target, t, 0).item() == pytest.approx(torch.tensor(V).log())
    assert (Sampler(model, path).sample((2, 6), steps=3, method=method).tokens == 7).float().mean() > 0.3


def test_networks(examples):
    torch.manual_seed(0)
    path = LogitPath(V)
    network = examples["Convolutions"](path)
    assert isinstance(examples["Convolutions"].from_dict(network.to_dict(), path), examples["Convolutions"])
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    target = torch.arange(16).expand(8, -1) % 4
    losses = []
    for step in range(60):
        loss = path.loss(network, target, torch.full((8,), 0.3), rng=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert Sampler(network, path).sample((2, 16), steps=4).tokens.max() < V
