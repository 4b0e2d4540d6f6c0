"""The interface of a path, and what all paths share: times, the loss, re-noising, and the way to and from a dict."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from klflow_ext.checks import check_field, check_int, check_scalar
from klflow_ext.ops.arguments import INTEGERS, check_tensor, check_tokens, looks_at_values
from klflow_ext.path.evidence import Evidence
from klflow_ext.path.layout import slice_order
from klflow_ext.path.likelihood import Likelihood
from klflow_ext.path.network import Called, Model, Network, Streams, as_network, evaluating
from klflow_ext.path.state import Move, Prediction, State

IGNORE = -100  # a target with this value is padding: no loss, and its row carries noise only


class Path:
    """How a text turns into noise (`sample`), what a network learns from it (`loss`), and the way back (`step`).

    Args:
        vocab_size: V, at least 2.
        t_max: where training and sampling stop, in (0, 1]. 1 itself, where nothing is left to say, is never visited: a
            time grid then ends one cell before it.
        t_split: where the hybrid sampler turns from `basic` to `sampling`, in [0, 1]. None: a quarter of t_max. The paper has
            0.28 of 0.30; late splits were measured to give worse text (benchmarks/NOTES.md).

    Attributes:
        kind: name in a dict. reads: what `sample` makes and a model reads, "rows" (..., V) on the simplex or "tokens" (...).
        closed_form: whether the posterior of a token given its own row has one, that of `ops.noise_posterior`. Then `c` and
            `beta` are there.
        way: the one way through a text that this path allows (`klflow_ext.sample.ways`), or None.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    kind: ClassVar[str]
    reads: ClassVar[str] = "rows"
    way: ClassVar[str | None] = None
    likelihood_kind: ClassVar[Literal["exact", "bound"] | None] = None  # what `likelihood` gives
    fields: ClassVar[tuple[str, ...]] = ("vocab_size", "t_max", "t_split")  # the arguments, all of them attributes
    _kinds: ClassVar[dict[str, type[Path]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            Path._kinds[cls.kind] = cls

    def __init__(self, vocab_size: int, t_max: float = 1.0, t_split: float | None = None) -> None:
        check_field("vocab_size", vocab_size, 2)
        check_scalar("t_max", t_max, 0, 1, "a number in (0, 1]", open_low=True)
        if t_split is not None:
            check_scalar("t_split", t_split, 0, 1, "None or a number in [0, 1]")
        self.vocab_size = vocab_size
        self.t_max = float(t_max)
        self.t_split = self.t_max / 4 if t_split is None else float(t_split)

    @property
    def closed_form(self) -> bool:
        return False

    @property
    def has_likelihood(self) -> bool:
        """Whether `likelihood` gives one."""
        return self.likelihood_kind is not None

    # ---- times

    def time(self, u: Any) -> Any:
        """Training times of u in [0, 1): u t_max."""
        return u * self.t_max

    def time_grid(self, moves: int, power: float = 1.0) -> Tensor:
        """Times of `moves` moves: (moves + 1,) float64 from 0, at which the network is asked; no moves: just 0.

        With t_max < 1 the grid is tau_i = tau_max (i / moves)^power, tau = -log(1 - t), and ends at t_max. With t_max = 1 it
        is t_i = (i / (moves + 1))^power, and ends one cell before 1. A power below 1 puts more times late.
        """
        if moves < 0:
            raise ValueError(f"moves: got {moves!r}, allowed is an integer >= 0")
        if not 0 < power < math.inf:
            raise ValueError(f"power: got {power!r}, allowed is a positive number")
        if self.t_max == 1:
            return (torch.arange(moves + 1, dtype=torch.float64, device="cpu") / (moves + 1)) ** power
        tau = torch.linspace(0, 1, moves + 1, dtype=torch.float64, device="cpu") ** power * -math.log1p(-self.t_max)
        grid = -torch.expm1(-tau)
        if moves:
            grid[-1] = self.t_max
        return grid

    def model_times(self, t: Tensor, given: Tensor | None, by_position: bool) -> Tensor:
        """The times (B,) or (B, L) that a network is called with, from those of the sequences (B,).

        by_position: whether it tells positions apart; given rows are then at time 1.
        """
        if given is None or self.reads == "tokens" or not by_position:
            return t
        return torch.where(given, 1.0, t[:, None])

    # ---- training

    def scaled(self, x: Tensor) -> Tensor:
        """Rows x_t (..., V) as a layer is to read them: (x_t - 1 / V) sqrt(V).

        All entries of noise are near 1 / V, and what tells one row from another is as small. A matrix that reads x_t itself hardly
        learns. The weights W of the layer need a variance of 1: then scaled(x_t) @ W has it too, for pure noise (alpha = 1), and
        positions or times can be added. torch.nn.Linear starts sqrt(3 V) times smaller, so the text drowns beside what is added:
        call torch.nn.init.normal_(layer.weight). The Denoiser's "simplex" input is this.

        Raises:
            ValueError: a path of tokens, whose ids belong into an embedding; rows that are not V wide.
        """
        if self.reads != "rows":
            raise ValueError(f"path: got {self!r}, whose x_t are ids, allowed where they are scaled is a path of rows")
        if x.dim() < 1 or x.shape[-1] != self.vocab_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is (..., V = {self.vocab_size})")
        return scaled(x, 1 / self.vocab_size, self.vocab_size)

    def sample(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """Draw x_t of the tokens `target`.

        Args:
            target: (...) tokens in [0, V); padding (`IGNORE`) comes out as pure noise, so that nothing leaks from it.
            t: time in [0, 1], broadcastable to target's shape.
            rng: int seed, `torch.Generator`, or int64 tensor (2,) = (seed, step), (..., 2); (B, 2) for a target (B, L) is a
                state for each sequence, whose noise then does not depend on the batch.
            given: (...) bool; these positions show their token at every t.
            row_offset: global index of the first row.

        Returns:
            (..., V) float32 rows on the simplex, or (...) int64 ids, as `reads` says.
        """
        raise NotImplementedError

    def loss(
        self, model: Model, target: Tensor, t: Tensor, rng, *, given: Tensor | None = None, order: Tensor | None = None,
        evidence: Evidence | None = None, reduction: str = "mean", row_offset: int = 0,
    ) -> Tensor:  # fmt: skip
        """-log p(k | x_t, t), averaged over the positions that are neither given nor padding (the paper's equation 13).

        Args:
            model: `model(x_t, t) -> logits`, (B, L, V) or (B, L), and (B,), to (B, L, V). Of a Network (Denoiser) the logits
                are never built whole; it may be one that `fully_shard` split over processes.
            target: (B, L) tokens; `IGNORE` marks padding.
            t: (B,) times in [0, 1].
            given: (B, L) bool, positions that the model sees in the clear.
            order: (B, L) int64, for a network with `slices`: the slice of each position, 0 where it is given, in place of `given`.
                A position is then asked for by what stands in the slices before its own, and hidden in the noise of time t. None:
                what is not given is one slice.
            evidence: what was observed of the positions that are asked for, for a network that reads posteriors. The loss is then
                -log p(k | what was observed too): the network is left to say what the others tell of a position, for its own
                likelihood is a factor. Tokens that are not listed cannot be (other = -inf).
            reduction: "mean" (NaN where no position counts), "sum" or "none" ((B, L), zero where a position does not count).
        """
        network = as_network(model, self)
        if network.max_length is not None and target.dim() == 2 and target.shape[1] > network.max_length:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, allowed is a length of at most max_length = {network.max_length}"
            )
        if order is not None:
            _check_order(network, order, target)
            given = order == 0
        if evidence is not None and not network.reads_posterior:
            raise ValueError("evidence: got some, allowed is None for a network that reads no posteriors")
        if evidence is not None and looks_at_values(target):
            _check_listed(evidence, target)

        def loss() -> Tensor:
            state = self.noisy(target, t[:, None], rng, given=given, row_offset=row_offset)
            label = target if given is None else target.masked_fill(given, IGNORE)
            if evidence is None:
                prediction = self.predict(network, state, target, t, given, order)
                return self._cross_entropy(prediction, state, label, reduction)
            seen = state.evidence = evidence.without(label == IGNORE)
            prediction = self.predict(network, state, target, t, given, order)
            unseen = self._cross_entropy(prediction, state, label.masked_fill(seen.observed, IGNORE), "none")
            losses = unseen + prediction.loss_among(seen, label)
            if reduction == "none":
                return losses
            return losses.sum() if reduction == "sum" else losses.sum() / (label != IGNORE).sum()

        return network.gathered(loss)

    def predict(
        self, network: Network | Called, state: State, target: Tensor, t: Tensor, given: Tensor | None,
        order: Tensor | None = None,
    ) -> Prediction:  # fmt: skip
        """What a network says of a state of the tokens target (B, L) at times t (B,); given and order as in `loss`."""
        if order is None and network.slices and given is not None:
            order = slice_order(given, 1)
        if order is None:
            return network.predict(state, self.model_times(t, given, network.times_by_position))
        _check_order(network, order, target)
        padding = target == IGNORE
        streams = Streams.of_text(target.masked_fill(padding, 0), order.masked_fill(padding, 2**62))  # unseen by others
        return network.predict(state, self.model_times(t, None, network.times_by_position), streams=streams)

    def _cross_entropy(self, prediction: Prediction, state: State, label: Tensor, reduction: str) -> Tensor:
        return prediction.cross_entropy(label, ignore_index=IGNORE, reduction=reduction)

    def noisy(self, target: Tensor, t: Tensor, rng, *, given: Tensor | None = None, row_offset: int = 0) -> State:
        """The state that a network is trained on: `sample`, with the same arguments."""
        return State(self.sample(target, t, rng, given=given, row_offset=row_offset))

    def likelihood(
        self, model: Model, target: Tensor, *, given: Tensor | None = None, seed: int = 0, strata: int = 32
    ) -> Likelihood:
        """-log p of texts to a model of this path, or an upper bound of it, as `_nats` of the path says.

        Args:
            model: as in `loss`.
            target: (B, L) tokens; `IGNORE` marks padding.
            given: (B, L) bool, positions whose tokens are known, and not counted.
            seed: of the noise that a bound is estimated with, >= 0.
            strata: passes of a bound, at least 1, equally spaced in the noise.

        Raises:
            ValueError: this path has none, or an argument is outside its range.
        """
        if not self.has_likelihood:
            raise ValueError(
                f"path: got {self!r}, allowed where a likelihood is asked for is logit, mask or autoregressive"
            )
        strata = check_int("strata", strata, 1, 2**20, "an integer in [1, 2^20]")
        network = as_network(model, self)
        label, count = check_text(target, given)
        with torch.no_grad(), evaluating(network):
            nats = self._nats(network, target, label, given, seed, strata)
        return Likelihood(nats, count, exact=self.likelihood_kind == "exact")

    def _nats(
        self, network: Network | Called, target: Tensor, label: Tensor, given: Tensor | None, seed: int, strata: int
    ) -> Tensor:
        """(B,) float64, -log p of each text or its bound; label: target with IGNORE where a token is not counted."""
        raise NotImplementedError

    # ---- sampling

    def renoise(self, tokens: Tensor, t: float | Tensor, rng: Tensor, given: Tensor) -> State:
        """The state at time t of sequences whose tokens (B, L) are known or guessed, with fresh noise; rng (B, 2)."""
        return State(self.sample(tokens, t, rng, given=given))

    def step(self, state: State, prediction: Prediction, move: Move) -> State:
        """The basic scheme: the path's own marginal dynamics from move.t to move.t_next (an ODE, or a jump process)."""
        raise NotImplementedError

    def resample(self, state: State, prediction: Prediction, move: Move) -> State:
        """The sampling scheme: draw every token, then re-noise it freshly to move.t_next (the paper's Algorithm 2)."""
        return self.renoise(self.resolve(state, move.draw(prediction)), move.t_next, move.rng, move.given)

    def resolve(self, state: State, drawn: Tensor) -> Tensor:
        """The tokens of a state (B, L): those that it shows already, else those drawn."""
        return drawn

    # ---- files

    def to_dict(self) -> dict:
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}

    @classmethod
    def from_dict(cls, values: dict) -> Path:
        """The path that `to_dict` described. `Path.from_dict` takes any kind, a class its own only.

        Raises:
            ValueError: an unknown kind or name of a setting, or a bad value.
        """
        values = dict(values)
        kind = values.pop("kind", "logit")
        kinds = {name: path for name, path in Path._kinds.items() if issubclass(path, cls)}
        if kind not in kinds:
            raise ValueError(f"kind: got {kind!r}, allowed is one of {sorted(kinds)}")
        path = kinds[kind]
        for name in values:
            if name not in path.fields:
                raise ValueError(f"{name}: got {values[name]!r}, allowed are the settings {', '.join(path.fields)}")
        return path(**values)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.fields)
        return f"{type(self).__name__}({settings})"


def scaled(x: Tensor, mean: Tensor | float, vocab_size: int) -> Tensor:
    """(x - mean) sqrt(V): of rows, whose mean is 1 / V, or of their products with a matrix, whose mean is that of its rows."""
    return (x - mean) * math.sqrt(vocab_size)


def check_targets(target: Tensor, vocab_size: int) -> None:
    """IndexError for a target outside [0, V) that is no padding, where values may be read (as the kernels do)."""
    check_tensor("target", target, INTEGERS)
    if looks_at_values(target):
        check_tokens("target", target.reshape(-1), vocab_size, ignore_index=IGNORE)


def _check_order(network: Network | Called, order: Tensor, target: Tensor) -> None:
    if not network.slices:
        raise ValueError("order: got one, allowed is None for a network without slices")
    if order.shape != target.shape or order.dtype != torch.int64:
        raise ValueError(
            f"order: got {order.dtype} of shape {tuple(order.shape)}, allowed is int64 of target's, {tuple(target.shape)}"
        )


def _check_listed(evidence: Evidence, target: Tensor) -> None:
    """ValueError where what was observed leaves a token possible that is not listed, or excludes the true one."""
    seen = evidence.observed & (target != IGNORE)
    if bool((seen & (evidence.other > -math.inf)).any()):
        raise ValueError("evidence: got one whose unlisted tokens can be, allowed in a loss is other = -inf")
    possible = ((evidence.ids == target[..., None]) & (evidence.log_likelihood > -math.inf)).any(2)
    if bool((seen & ~possible).any()):
        raise ValueError("evidence: got one that excludes the true token, allowed in a loss is one that lists it")


def check_text(target: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """(label, count) of texts whose likelihood is asked for: target (B, L) with IGNORE where a token is not counted, and how
    many are, (B,)."""
    if target.dim() != 2:
        raise ValueError(f"target: got shape {tuple(target.shape)}, allowed is (B, L)")
    if given is not None and (given.shape != target.shape or given.dtype != torch.bool):
        raise ValueError(
            f"given: got {given.dtype} of shape {tuple(given.shape)}, allowed is bool of target's, {tuple(target.shape)}"
        )
    label = target if given is None else target.masked_fill(given, IGNORE)
    count = (label != IGNORE).sum(1)
    if target.numel() == 0 or not bool(count.sum()):
        raise ValueError("target: got no token that is neither given nor padding, allowed is at least one")
    return label, count


def hide_padding(
    target: Tensor, t: Tensor | float, given: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(target, t, given) with padding as rows of pure noise: nothing is known of them, at time 0."""
    t = torch.as_tensor(t, dtype=dtype, device=target.device)
    if looks_at_values(target) and bool((~((t >= 0) & (t <= 1))).any()):
        raise ValueError(f"t: got {t.min().item():g} to {t.max().item():g}, allowed are numbers in [0, 1]")
    padding = target == IGNORE
    t = torch.where(padding, torch.zeros((), dtype=dtype, device=target.device), t)
    return target.masked_fill(padding, 0), t, None if given is None else given & ~padding
