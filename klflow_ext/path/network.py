"""The protocol: what losses, samplers and trainers ask of a network, all of it. Any `model(x_t, t) -> logits` will do, if rows
x_t go through `path.scaled` first, and then into weights of variance 1. A `Network` offers more, by which no logits and no noisy
rows are built. Nothing about a model is guessed from the names of its attributes. `State`, `Prediction` and `Move` (state.py) are
what is asked, said and done.

    network = as_network(model, path)
    prediction = network.predict(state, times)      # then prediction.cross_entropy(label), or prediction.draw(k, rng)
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from klflow_ext.checks import fail
from klflow_ext.path.state import Prediction, State, capped
from klflow_ext.sharding import is_sharded

Result = TypeVar("Result")
Model = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Settings(Protocol):
    """What a network knows of its path, which stands above it (base.py)."""

    vocab_size: int

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Streams:
    """Clean rows, which stand before those of a state, the queries: what a network with `slices` reads.

    Every position of a text belongs to a slice; what is given is slice 0. A clean row sees the clean rows of its own slice and
    of those before. A query sees the clean rows of the slices before its own, and the queries of its own slice. So no query
    sees its own token, and a clean row never depends on what is written later: its keys and values can be kept.

    Args:
        tokens: (B, C), of the clean rows.
        places: (B, C + Q), the position in its text of each row.
        slices: (B, C + Q), its slice. With a cache None: the clean rows are of one slice, behind all that the cache holds, and the
            queries of the one after it.
    """

    tokens: Tensor
    places: Tensor
    slices: Tensor | None

    @classmethod
    def of_text(cls, tokens: Tensor, order: Tensor) -> Streams:
        """A whole text (B, L) twice, with the slice of each position, order (B, L)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(2).expand(len(tokens), -1)
        return cls(tokens, places, order.repeat(1, 2))

    def by_slice(self) -> tuple[Tensor, Streams]:
        """(rows, streams): the clean rows by their slices, then the queries by theirs, row i being row rows[b, i] of these.

        Whom a row sees then lies in two stretches, which block-sparse attention is made for.
        """
        assert self.slices is not None
        count = self.tokens.shape[1]
        clean, query = (
            self.slices[:, :count].argsort(dim=1, stable=True),
            self.slices[:, count:].argsort(dim=1, stable=True),
        )
        rows = torch.cat([clean, query + count], 1)
        return rows, Streams(self.tokens.gather(1, clean), self.places.gather(1, rows), self.slices.gather(1, rows))

    def sees(self) -> Tensor:
        """(B, C + Q, C + Q) bool: whom each row sees."""
        assert self.slices is not None
        count = self.tokens.shape[1]
        own, other = self.slices[:, :, None], self.slices[:, None, :]
        sees = other == own
        sees[:, :count, :count] = other[:, :, :count] <= own[:, :count]
        sees[:, count:, :count] = other[:, :, :count] < own[:, count:]
        sees[:, :count, count:] = False
        return sees


class Network(nn.Module):
    """The protocol of a model: its logits are head(hidden(embed(x_t, t), t)), and those of a few rows exist at a time.

    A subclass defines
        embed(x_t, t) -> (B, L, D), of what the path makes: rows (B, L, V), or ids (B, L). A layer that reads rows is given
            path.scaled(x_t), and its weights start with variance 1: torch.nn.init.normal_(layer.weight);
        hidden(h, t) -> (B, L, D);
        head: a torch.nn.Linear from D to V, with a bias or without.
    Times t are float32 tensors (B,), or (B, L) where some tokens are given and the path makes rows: those are then at time 1. A
    network that cannot read (B, L) says `times_by_position = False` and is told (B,).

    `klflow_ext.Reader` defines embed and the next three for a network with an embedding matrix. One without may define
        embed_noise(target, t, rng, given=, row_offset=) -> (B, L, D): embed of a LogitPath's noise, straight from tokens and
            seed; then `makes_noise` is True. If it reads posteriors, it also takes boost=, and `reads_posterior` is True;
        embed_posterior(ids, q, rest) -> (B, L, D): embed of posteriors by their entries, and log_prior (V,), of one that reads them;
        embed_certain(tokens) -> (B, C, D): embed of rows that show their tokens; if hidden takes streams=, `slices` is True;
        cache(B), for an Autoregressive path or slices, which hidden then takes as cache=; then `caches` is True;
        to_dict() and from_dict(values, path): what a run folder keeps to make the network again (see there);
        hidden_matrices() and sharded_units(): what Muon trains, and what `fully_shard` splits one by one.
    All else that a Trainer or a Sampler needs is below, with its default.

    Attributes:
        self_conditions: hidden takes previous=, its own result of the pass before, or zeros.
        causal: whether a position sees only itself and those before it; None: unknown.
        max_length: the longest sequence it reads; None: any.
        softcap: c where the logits are c tanh(head(h) / c); None: they are head(h). No further logits are built for it.
        vocab_size: V, of a network whose head is wider (a padded vocabulary); None: as wide as the head. The rows of the head behind V
            are of no token: they get no probability, in no loss and no draw, and no gradient. Their view costs one more tensor of
            the weight's size in the backward pass.
        recompute: whether the backward pass computes parts of `hidden` again instead of keeping them; None: it cannot.
        path: that for which it was made, where what it reads depends on its settings; another one is refused, but for t_max and
            t_split. None: any of V.
    """

    makes_noise: bool = False
    reads_posterior: bool = False
    caches: bool = False
    slices: bool = False
    self_conditions: bool = False
    causal: bool | None = None
    max_length: int | None = None
    softcap: float | None = None
    vocab_size: int | None = None
    recompute: bool | None = None
    times_by_position: bool = True
    path: Settings | None = None

    embed: Callable[..., Tensor]
    embed_noise: Callable[..., Tensor]
    embed_certain: Callable[[Tensor], Tensor]
    embed_posterior: Callable[[Tensor, Tensor, Tensor], Tensor]
    log_prior: Tensor
    hidden: Callable[..., Tensor]
    cache: Callable[[int], Any]
    head: nn.Linear

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def _tokens(self) -> int:
        """V."""
        return self.head.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t at times t to all logits (B, L, V). No loss and no sampler calls it."""
        return capped(self.head(self.hidden(self.embed(x, t), t))[..., : self._tokens], self.softcap)

    def to_dict(self) -> dict[str, Any] | None:
        """What `from_dict` makes such a network of, in the types of JSON; a run folder keeps it. None: nothing does, and
        `load_run(folder, model=...)` takes a network that was made by hand."""
        return None

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: Any) -> Network:
        """The network that `to_dict` described, on a path, with any weights."""
        raise NotImplementedError(f"{cls.__name__}.from_dict")

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices from hidden states to hidden states, which Muon trains; all other parameters AdamW does."""
        return hidden_matrices(self, self._tokens, self.head)

    def sharded_units(self) -> list[nn.Module]:
        """The modules that `fully_shard` splits one by one, so that the parameters of one are whole at a time."""
        return []

    def gathered(self, function: Callable[[], Result]) -> Result:
        """function(), which asks this network; where `fully_shard` split it over processes, its parameters are whole within."""
        return function()

    def predict(
        self,
        state: State,
        times: Tensor,
        *,
        previous: Tensor | None = None,
        cache: Any = None,
        streams: Streams | None = None,
    ) -> Prediction:
        """What the network says of a state.

        Args:
            state: where the sequences are, x (B, L, ...).
            times: (B,) or (B, L), of the path's `model_times`.
            previous: (B, L, D), the `hidden` of the prediction before, of a network that self-conditions.
            cache: of `cache(B)`; state then holds the positions behind those of the cache.
            streams: the rows that stand before those of the state, and who sees whom; for a network with `slices`.

        Raises:
            ValueError: the parameters are split over processes, and this is not within `gathered`.
        """
        if is_sharded(self.head.weight):
            raise ValueError(
                "model: got one whose parameters are split over processes, allowed here is a whole one (Trainer.averaged_model "
                "gives it); Path.loss takes both"
            )
        if self.makes_noise and not state.is_made:
            boost = {} if state.boost is None else {"boost": state.boost}
            h = self.embed_noise(
                state.tokens, state.t, state.rng, given=state.given, row_offset=state.row_offset, **boost
            )
        else:
            h = self.embed(state.x, times)
        if self.reads_posterior and state.evidence is not None:
            heard = self.embed_posterior(*state.evidence.posterior(self.log_prior))
            h = torch.where(state.evidence.observed[..., None], heard.to(h.dtype), h)
        options: dict[str, Any] = {} if cache is None else {"cache": cache}
        before = 0
        if streams is not None:
            before = streams.tokens.shape[1]
            h = torch.cat([self.embed_certain(streams.tokens).to(h.dtype), h], 1)
            times = times.reshape(len(h), -1).expand(-1, h.shape[1] - before)
            times = torch.cat([torch.ones_like(times[:, :1]).expand(-1, before), times], 1)
            options["streams"] = streams
        if self.self_conditions:
            if previous is None and self.training:
                previous = self._first_estimate(h, times, state.row_offset)
            options["previous"] = previous
        return Prediction(None, self.hidden(h, times, **options)[:, before:], *self._layer(), softcap=self.softcap)

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output layer, without the rows behind V."""
        weight, bias, count = self.head.weight, self.head.bias, self._tokens
        if count == len(weight):
            return weight, bias
        return weight[:count], None if bias is None else bias[:count]

    def _first_estimate(self, h: Tensor, times: Tensor, row_offset: int) -> Tensor:
        """What every other sequence is conditioned on in training: its own estimate, made without a gradient, the others on
        zeros (Chen et al. 2023, "Analog Bits")."""
        chosen = slice(
            (row_offset // h.shape[1]) % 2, None, 2
        )  # by number in the whole batch, of which h may be a part
        with torch.no_grad():
            previous = torch.zeros_like(h)
            previous[chosen] = self.hidden(h[chosen], times[chosen]).to(h.dtype)
        return previous


@dataclass(frozen=True)
class Called:
    """A model of which only the call is known: model(x_t, t) -> (B, L, V), at times (B,) (of a UniformPath (B, L))."""

    model: Model
    vocab_size: int

    makes_noise: ClassVar[bool] = False
    reads_posterior: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    slices: ClassVar[bool] = False
    self_conditions: ClassVar[bool] = False
    causal: ClassVar[bool | None] = None
    max_length: ClassVar[int | None] = None
    times_by_position: ClassVar[bool] = False
    recompute: ClassVar[bool | None] = None

    @property
    def module(self) -> nn.Module | None:
        return self.model if isinstance(self.model, nn.Module) else None

    def hidden_matrices(self) -> list[nn.Parameter]:
        """As `Network.hidden_matrices`; of a model that is no module none."""
        return [] if self.module is None else hidden_matrices(self.module, self.vocab_size)

    def sharded_units(self) -> list[nn.Module]:
        return []

    def gathered(self, function: Callable[[], Result]) -> Result:
        """function(): the model's own call is what gathers parameters."""
        return function()

    def predict(
        self,
        state: State,
        times: Tensor,
        *,
        previous: Tensor | None = None,
        cache: Any = None,
        streams: Streams | None = None,
    ) -> Prediction:
        """As `Network.predict`; previous, cache and streams are None."""
        x = state.x
        logits = self.model(x, times)
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        allowed = (*x.shape[:2], self.vocab_size)
        if got != allowed:
            raise ValueError(f"model: got logits of shape {got}, allowed is (B, L, V) = {allowed}")
        return Prediction(logits)


def as_network(model: Model, path: Settings) -> Network | Called:
    """The model as what losses and samplers ask on a path: itself where it is a Network (compiled, by `fully_shard`, or neither),
    else its call.

    Raises:
        ValueError: a Network whose head has not V outputs (see `Network.vocab_size` for a wider one), one that was made for a path
            with other settings (`Network.path`), or one within DistributedDataParallel or another wrapper, which hides what a
            Network offers and works in its own call alone.
        TypeError: the model cannot be called, or the path is none.
    """
    if not isinstance(path, Settings):
        fail(TypeError, "path", f"a {type(path).__name__}", "a Path, such as LogitPath(V)")
    inner = model if isinstance(model, Network) else getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(inner, Network):
        if isinstance(inner, nn.Module) and isinstance(getattr(inner, "module", None), Network):
            kind = type(inner).__name__
            raise ValueError(
                f"model: got a Network within {kind}, allowed is the Network itself; to train it, {kind}(Objective(network, "
                "path)), whose call is the loss"
            )
        if not callable(model):
            raise TypeError(f"model: got a {type(model).__name__}, allowed is a Network or any model(x_t, t) -> logits")
        return Called(model, path.vocab_size)
    vocab_size = path.vocab_size
    head = getattr(inner, "head", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: got {type(head).__name__}, allowed is a torch.nn.Linear from D to V")
    if inner._tokens != vocab_size:
        got = f"{inner._tokens} outputs" if inner.vocab_size is None else f"vocab_size = {inner._tokens}"
        raise ValueError(f"head: got {got}, allowed is V = {vocab_size}")
    if head.weight.shape[0] < vocab_size:
        raise ValueError(f"head: got {head.weight.shape[0]} outputs, allowed are at least vocab_size = {vocab_size}")
    if inner.softcap is not None and not 0 < inner.softcap < math.inf:
        raise ValueError(f"softcap: got {inner.softcap!r}, allowed is None or a positive number")
    if inner.path is not None and _read_by(inner.path) != _read_by(path):
        raise ValueError(f"path: got {path!r}, allowed is that for which the model was made, {inner.path!r}")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a second, and without it nothing is sharded
    if fsdp is not None and isinstance(inner, fsdp.FSDPModule) and "gathered" not in vars(inner):
        fsdp.register_fsdp_forward_method(inner, "gathered")
    return inner


def _read_by(path: Settings) -> dict[str, Any]:
    """What a network depends on of a path: all but where it stops."""
    return {name: value for name, value in path.to_dict().items() if name not in ("t_max", "t_split")}


def hidden_matrices(module: nn.Module, vocab_size: int, head: nn.Module | None = None) -> list[nn.Parameter]:
    """The matrices of a module but those of its head, of a torch.nn.Embedding, and with a side of V, or V + 1 with a mask."""
    tables = {id(p) for m in module.modules() if m is head or isinstance(m, nn.Embedding) for p in m.parameters()}
    sides = {vocab_size, vocab_size + 1}
    return [p for p in module.parameters() if p.dim() == 2 and id(p) not in tables and not sides & set(p.shape)]


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter or buffer is; of a module without any the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def second_names(module: nn.Module) -> dict[str, str]:
    """Of parameters that stand in a module more than once (tied weights): every name but the first, and the first."""
    first: dict[int, str] = {}
    named = [(name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: own for name, own in named if name != own}


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Its state_dict with each tied parameter once, by its first name, as files keep it."""
    others = second_names(module)
    return {name: value for name, value in module.state_dict().items() if name not in others}


def load_own_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Takes up what `own_state` gave."""
    tied = {name: state[own] for name, own in second_names(module).items() if own in state}
    module.load_state_dict({**state, **tied})


_modes = threading.Lock()
_evaluated: WeakKeyDictionary[nn.Module, tuple[list[None], list[nn.Module]]] = WeakKeyDictionary()
if sys.platform != "win32":  # a process that is forked while another thread holds it would wait for ever
    os.register_at_fork(before=_modes.acquire, after_in_parent=_modes.release, after_in_child=_modes.release)


@contextmanager
def evaluating(network: Network | Called) -> Iterator[None]:
    """The network in evaluation mode (dropout would draw other tokens for the same seed), and then as it was: once the last of
    the threads that are in here has left."""
    if (module := network.module) is None:
        yield
        return
    with _modes:
        users, training = _evaluated.setdefault(module, ([], []))
        users.append(None)
        for part in module.modules():
            if part.training:
                training.append(part)
                part.training = False
    try:
        yield
    finally:
        with _modes:
            users.pop()
            if not users:
                del _evaluated[module]
                for part in training:
                    part.training = True
