"""Data whose distribution is known, and small models and paths, that the tests of samplers share."""

import itertools
from types import SimpleNamespace

import torch

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    LinearPath,
    LogitPath,
    MaskPath,
    SpherePath,
    UniformPath,
)
from klflow_ext.path import Network

# ---- the other paths, on a smaller chain

SMALL = 3


EVERY = [LogitPath(50), LogitPath(50, alpha=0.5), LinearPath(50), SpherePath(50), MaskPath(50), UniformPath(50)]


name = lambda path: f"{path.kind}-{getattr(path, 'alpha', getattr(path, 'schedule', ''))}"  # noqa: E731


METHODS = ["basic", "sampling", "hybrid", "segments"]


def sticky_chain(vocab, length, stays=0.8, start=None):
    """All sequences (S, L) of a chain that stays with a probability, else goes anywhere, and their probabilities (S,).

    start: (V,) weights of the first token; None: all alike.
    """
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    start = torch.ones(vocab).double() if start is None else start
    same = sequences[:, 1:] == sequences[:, :-1]
    moves = torch.where(same, stays, (1 - stays) / (vocab - 1)).double().prod(-1)
    return sequences, (start / start.sum())[sequences[:, 0]] * moves


def small_chain():
    return sticky_chain(SMALL, 3)


def small_variation(tokens, draws):
    index = (tokens * (SMALL ** torch.arange(2, -1, -1))).sum(-1)
    return 0.5 * (torch.bincount(index, minlength=SMALL**3) / draws - small_chain()[1]).abs().sum().item()


class Counting:
    """Fixed random logits of what a position shows; counts its calls."""

    def __init__(self, vocab):
        self.calls, self.weight = 0, torch.randn(vocab + 1, vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, x, t):
        self.calls += 1
        return self.weight[x] * 3 if x.dim() == 2 else (x @ self.weight[:-1]) * 30


# ---- left to right


class Causal(Network):
    """Reads the sum of all that came before; with a cache, which is that sum."""

    def __init__(self, vocab, cached):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.randn(vocab + 1, 16), torch.nn.Linear(16, vocab, bias=False)
        self.causal, self.caches, self.max_length, self.read = True, cached, 9, []
        if cached:
            self.cache = lambda batch: SimpleNamespace(length=0, total=torch.zeros(batch, 1, 16))

    def embed(self, x, t):
        assert (t == 0).all()
        self.read.append(x.shape[1])
        return self.table[x]

    def hidden(self, h, t, cache=None):
        h = h.cumsum(1)
        if cache is not None:
            h = h + cache.total
            cache.total, cache.length = h[:, -1:], cache.length + h.shape[1]
        return torch.sin(h)

    def forward(self, x, t):
        return self.head(self.hidden(self.embed(x, t), t))


# ---- models of every kind


def every_model(vocab=50):
    """(path, Denoiser) of every input, time and path."""
    kinds = [
        (LogitPath(vocab), "posterior", {}),
        (LogitPath(vocab), "posterior", {"top": 5}),
        (LogitPath(vocab), "simplex", {}),
        (LogitPath(vocab, alpha=0.5, t_max=0.4), "simplex", {}),
        (LinearPath(vocab), "simplex", {}),
        (SpherePath(vocab), "simplex", {}),
        (MaskPath(vocab), "tokens", {}),
        (UniformPath(vocab), "tokens", {}),
        (Autoregressive(vocab), "tokens", {"causal": True, "time": "none"}),
    ]
    for i, (path, reads, options) in enumerate(kinds):
        options = {"time": ("token", "add", "adaln", "none")[i % 4], "self_conditioning": i % 2 == 1} | options
        options["self_conditioning"] &= not options.get("causal", False)
        torch.manual_seed(0)
        model = Denoiser(DenoiserConfig(vocab, 2, 2, 16, 16, input=reads, **options), path)
        torch.nn.init.normal_(model.head.weight, std=0.1)
        yield path, model
