"""What losses and samplers ask of a network. Any `model(x_t, t) -> logits` will do; one that is a `Network` offers more, by
which no logits and no noisy rows are built. Nothing else about a model is guessed from the names of its attributes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from klflow_ext import ops
from klflow_ext.path.state import Prediction

Model = Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """A model whose logits are head(hidden(embed(x_t, t), t)): logits of a few rows exist at a time.

    A subclass defines
        embed(x_t, t) -> (B, L, D), hidden(h, t) -> (B, L, D), at times t (B,) or (B, L);
        head: a torch.nn.Linear from D to V, with a bias or without.
    It may define
        embed_noise(target, t, rng, given=, row_offset=, boost=) -> (B, L, D): embed of a LogitPath's noise, straight from tokens
            and seed; then `makes_noise` is True;
        cache(B), for an Autoregressive path; then `caches` is True.
    """

    makes_noise: bool = False
    caches: bool = False
    reads_posterior: bool = False  # embed_noise also takes boosts
    self_conditions: bool = False  # hidden takes previous=, its own result of the pass before
    causal: bool | None = None  # None: unknown
    max_length: int | None = None

    head: nn.Linear

    def logits_width(self) -> int:
        return self.head.weight.shape[0]


def network_of(model: Model) -> Network | None:
    """The model, where it is a Network (compiled or not), else None: then all that is known of it is how it is called."""
    if isinstance(model, Network):
        return model
    inner = getattr(model, "_orig_mod", None)  # of torch.compile
    return inner if isinstance(inner, Network) else None


def hidden_of(network: Network, h: Tensor, t: Tensor, row_offset: int) -> Tensor:
    """network.hidden(h, t). In training, every other sequence of a network that self-conditions also gets its own first
    estimate, made without a gradient (Chen et al. 2023, "Analog Bits").
    """
    if not network.self_conditions or not network.training:
        return network.hidden(h, t)
    chosen = slice((row_offset // h.shape[1]) % 2, None, 2)  # by number in the whole batch, of which h may be a part
    with torch.no_grad():
        previous = torch.zeros_like(h)
        previous[chosen] = network.hidden(h[chosen], t[chosen]).to(h.dtype)
    return network.hidden(h, t, previous=previous)


def loss_of_hidden(network: Network, h: Tensor, label: Tensor, vocab_size: int, **options) -> Tensor:
    """The cross-entropy of head(h), h (B, L, D)."""
    _check_width(f"head: got {network.logits_width()} outputs", network.logits_width(), vocab_size)
    return ops.linear_cross_entropy(h, network.head.weight, label, bias=network.head.bias, **options)


def loss_of_logits(model: Model, x: Tensor, t: Tensor, label: Tensor, vocab_size: int, **options) -> Tensor:
    """The cross-entropy of model(x, t)."""
    return ops.cross_entropy(_logits(model, x, t, label.shape, vocab_size), label, **options)


def predict_from_hidden(network: Network, h: Tensor, vocab_size: int) -> Prediction:
    """What head(h) says, h (B, L, D)."""
    _check_width(f"head: got {network.logits_width()} outputs", network.logits_width(), vocab_size)
    return Prediction(None, h, network.head.weight, network.head.bias)


def predict_from_logits(model: Model, x: Tensor, t: Tensor, vocab_size: int) -> Prediction:
    """What model(x, t) says, x (B, L, ...)."""
    return Prediction(_logits(model, x, t, x.shape[:2], vocab_size).float())


def _logits(model: Model, x: Tensor, t: Tensor, shape: torch.Size, vocab_size: int) -> Tensor:
    logits = model(x, t)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (*shape, vocab_size):
        raise ValueError(f"model: got logits of shape {got}, allowed is (B, L, V) = {(*shape, vocab_size)}")
    return logits


def _check_width(got: str, width: int, vocab_size: int) -> None:
    if width != vocab_size:
        raise ValueError(f"{got}, allowed is V = {vocab_size}")
