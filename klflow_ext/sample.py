"""Sampling: the paper's basic, sampling and hybrid schemes, for whole texts, prompts and holes.

A scheme is a plain function `step(state, prediction, move) -> state` registered by name; the Sampler runs the network,
counts its passes, and keeps given tokens as they are. Every sequence has its own seed, so its tokens do not depend on the
batch. With a Denoiser, a sampling step holds tokens and seeds: neither the noisy rows nor all logits exist at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klflow_ext import ops
from klflow_ext.ops.linear import LOGIT_BYTES
from klflow_ext.path import LogitPath


@dataclass
class Move:
    """One move of the time grid and all that a step may need."""

    index: int
    t: float
    t_next: float
    path: LogitPath
    rng: Tensor  # (B, 2): (seed, step) of each sequence for this move; step 0 is the initial noise
    given: Tensor  # (B, L) bool
    known: Tensor  # (B, L) int64
    top_k: int
    top_p: float
    temperature: float
    t_split: float
    euler: str


@dataclass
class State:
    """Where the sequences are: rows x (B, L, V) on the simplex, or tokens (B, L) and the noise that hides them.

    x: None stands for noise_interpolate(tokens, t, rng), which is built only where it is asked for.
    log_x: log x for the basic scheme; None once a row has been re-noised.
    """

    x: Tensor | None
    log_x: Tensor | None = None
    tokens: Tensor | None = None
    t: float = 0.0
    rng: Tensor | None = None


class Prediction:
    """What the network says of a state: its logits, or draws from them, for which they exist a few sequences at a time.

    Args:
        logits: (B, L, V), or None: those of hidden (B, L, D) @ weight.T, weight (V, D).
    """

    def __init__(self, logits: Tensor | None, hidden: Tensor | None = None, weight: Tensor | None = None):
        self._logits, self.hidden, self.weight = logits, hidden, weight

    @property
    def is_dense(self) -> bool:
        return self._logits is not None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = (self.hidden @ self.weight.T).float()
        return self._logits

    def draw(self, k: int, rng: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
        """(B, L) tokens of `ops.topk_sample`, rng (B, 2)."""
        options = {"temperature": temperature, "top_p": top_p}
        if self.is_dense:
            return ops.topk_sample(self.logits, k, rng, **options)[0]
        b, length, _ = self.hidden.shape
        some = max(1, LOGIT_BYTES // (4 * length * self.weight.shape[0]))
        parts = [
            ops.topk_sample(self.hidden[i : i + some] @ self.weight.T, k, rng[i : i + some], **options)[0]
            for i in range(0, b, some)
        ]
        return torch.cat(parts)


@dataclass
class Samples:
    """tokens (B, L) int64; nfe: network passes; seconds; history: tokens after each pass, if asked for."""

    tokens: Tensor
    nfe: int
    seconds: float
    history: list[Tensor] = field(default_factory=list)


Step = Callable[[State, Prediction, Move], State]
_samplers: dict[str, Step] = {}


def register_sampler(name: str) -> Callable[[Step], Step]:
    """Decorator: makes a step function available as `method=name`."""

    def register(step: Step) -> Step:
        _samplers[name] = step
        return step

    return register


def _log_rows(state: State, path: LogitPath, given: Tensor) -> Tensor:
    if state.tokens is None:
        return state.x.log()
    options = {"vocab_size": path.vocab_size, "beta": path.beta, "given": given, "log": True}
    return ops.noise_interpolate(state.tokens, state.t, state.rng, **options)


@register_sampler("basic")
def basic_step(state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 1: the marginal ODE dl/dtau = c p - l, by the exact exponential step or the paper's Euler step."""
    rate = 1 - (1 - move.t_next) / (1 - move.t)  # 1 - e^-h
    if move.euler == "paper":
        rate = -torch.log1p(torch.tensor(-rate, dtype=torch.float64)).item()  # h
    log_x = _log_rows(state, move.path, move.given) if state.log_x is None else state.log_x
    out = torch.empty_like(log_x) if state.x is None else state.x
    log_x, x = ops.euler_step(
        log_x, prediction.logits, rate, temperature=move.temperature, beta=move.path.beta, given=move.given,
        known=move.known, inplace=True, out=out,
    )  # fmt: skip
    return State(x, log_x)


@register_sampler("sampling")
def sampling_step(state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 2: draw every token from the top-k of p, re-noise it freshly to the next time."""
    options = {"temperature": move.temperature, "top_p": move.top_p}
    if prediction.is_dense:
        _, x = ops.topk_renoise(
            prediction.logits, move.top_k, move.t_next, move.rng, beta=move.path.beta, given=move.given,
            known=move.known, out=state.x, **options,
        )  # fmt: skip
        return State(x)
    drawn = prediction.draw(move.top_k, move.rng, **options)
    return State(None, tokens=torch.where(move.given, move.known, drawn), t=move.t_next, rng=move.rng)


@register_sampler("hybrid")
def hybrid_step(state: State, prediction: Prediction, move: Move) -> State:
    """basic while t < t_split, sampling from there."""
    return (basic_step if move.t < move.t_split else sampling_step)(state, prediction, move)


def _sequence_seed(seed: int, i: int) -> int:
    """A well mixed 63-bit seed of sequence i (SplitMix64)."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 1


class Sampler:
    """Generates tokens with a denoiser `model(x_t, t) -> logits`, (B, L, V) and (B,) to (B, L, V).

    Of a model that has `embed_noise`, `hidden` and `head` (Denoiser), re-noised rows and logits are never built whole.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], path: LogitPath, device: str | torch.device = "cpu"):
        self.model, self.path, self.device = model, path, torch.device(device)

    def sample(self, shape: tuple[int, int], **options) -> Samples:
        """(B, L) sequences from nothing; options as in `infill`."""
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return self.infill(tokens, torch.zeros(shape, dtype=torch.bool, device=self.device), **options)

    def complete(self, prompts: list[list[int]], length: int, **options) -> Samples:
        """Continues prompts of any lengths to `length` tokens each; options as in `infill`."""
        tokens = torch.zeros((len(prompts), length), dtype=torch.int64, device=self.device)
        given = torch.zeros_like(tokens, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            if len(prompt) > length:
                raise ValueError(f"prompts: number {i} has {len(prompt)} tokens, allowed are at most length = {length}")
            tokens[i, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64)
            given[i, : len(prompt)] = True
        return self.infill(tokens, given, **options)

    @torch.no_grad()
    def infill(
        self,
        tokens: Tensor,
        given: Tensor,
        *,
        steps: int = 64,
        method: str = "hybrid",
        top_k: int | None = 20,
        top_p: float = 1.0,
        temperature: float = 1.0,
        t_split: float | None = None,
        final: str = "argmax",
        euler: str = "exact",
        seed: int | list[int] = 0,
        progress: bool = False,
        return_history: bool = False,
    ) -> Samples:
        """Fills the positions that are not given; given tokens come back as they went in.

        Args:
            tokens: (B, L) ids; values where given is False are ignored. given: (B, L) bool.
            steps: network passes (NFE), at least 1: steps - 1 moves from t = 0 to path.t_max, and a last pass there.
            method: "basic", "sampling", "hybrid" or a registered name.
            top_k: of each draw, None for all V; top_p in (0, 1]; temperature > 0.
            t_split: where hybrid turns to sampling (path.t_split). final: "argmax", or "draw" from the last p.
            euler: "exact" (1 - e^-h) or "paper" (h) rate of the basic step.
            seed: one seed, or one for each sequence: the same seed gives the same tokens in any batch.
        """
        if method not in _samplers:
            raise ValueError(f"method: got {method!r}, allowed is one of {sorted(_samplers)}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: got {steps!r}, allowed is an integer >= 1")
        if final not in ("argmax", "draw"):
            raise ValueError(f"final: got {final!r}, allowed is 'argmax' or 'draw'")
        if euler not in ("exact", "paper"):
            raise ValueError(f"euler: got {euler!r}, allowed is 'exact' or 'paper'")
        if tokens.dim() != 2 or given.shape != tokens.shape or given.dtype != torch.bool:
            raise ValueError(
                f"given: got {given.dtype} of shape {tuple(given.shape)}, allowed is bool of the (B, L) shape of tokens, "
                f"{tuple(tokens.shape)}"
            )
        vocab = self.path.vocab_size
        top_k = vocab if top_k is None else top_k
        if not 1 <= top_k:
            raise ValueError(f"top_k: got {top_k}, allowed is None or an integer >= 1")
        top_k = min(top_k, vocab)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p}, allowed is a number in (0, 1]")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, allowed is a positive number")
        seeds = [_sequence_seed(seed, i) for i in range(len(tokens))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(tokens):
            raise ValueError(f"seed: got {len(seeds)} seeds, allowed is one or {len(tokens)}, one for each sequence")

        start = time.perf_counter()
        tokens, given = tokens.to(self.device), given.to(self.device)
        known = torch.where(given, tokens, 0).long()
        if bool((given & ((tokens < 0) | (tokens >= vocab))).any()):
            raise ValueError(f"tokens: a given token lies outside [0, {vocab})")
        if tokens.numel() == 0 or bool(given.all()):
            return Samples(tokens.clone(), 0, time.perf_counter() - start)
        own_seeds = torch.tensor(seeds, device=self.device)[:, None]

        def rng(step: int) -> Tensor:
            return torch.cat([own_seeds, torch.full_like(own_seeds, step)], 1)

        state = State(None, tokens=known, t=0.0, rng=rng(0))
        grid = self.path.time_grid(steps - 1).tolist()
        history, nfe = [], 0

        def predict(t: float) -> Prediction:
            nonlocal nfe
            nfe += 1
            if progress and time.perf_counter() - start > 2:
                left = (time.perf_counter() - start) / nfe * (steps - nfe)
                print(f"\rsampling: pass {nfe}/{steps}, {left:.0f} s left ", end="", flush=True)
            prediction = self._predict(state, t, given)
            if return_history:
                history.append(torch.where(given, tokens, prediction.draw(1, rng(0))))
            return prediction

        for index in range(steps - 1):
            move = Move(
                index, grid[index], grid[index + 1], self.path, rng(index + 1), given, known, top_k, top_p, temperature,
                self.path.t_split if t_split is None else t_split, euler,
            )  # fmt: skip
            prediction = predict(grid[index])
            state = _samplers[method](state, prediction, move)
        k = 1 if final == "argmax" else top_k
        drawn = predict(grid[-1]).draw(k, rng(steps), temperature, top_p)
        if progress and time.perf_counter() - start > 2:
            print("\r" + " " * 50 + "\r", end="", flush=True)
        return Samples(torch.where(given, tokens, drawn), nfe, time.perf_counter() - start, history)

    def _predict(self, state: State, t: float, given: Tensor) -> Prediction:
        fused = hasattr(self.model, "embed_noise")
        if fused and state.x is None:
            h = self.model.embed_noise(state.tokens, state.t, state.rng, given=given)
            return Prediction(None, self.model.hidden(h, t), self.model.head.weight)
        if state.x is None:
            state.x = ops.noise_interpolate(
                state.tokens, state.t, state.rng, vocab_size=self.path.vocab_size, beta=self.path.beta, given=given
            )
        times = torch.full((len(given),), t, device=self.device)
        if fused:
            return Prediction(None, self.model.hidden(self.model.embed(state.x, t), t), self.model.head.weight)
        return Prediction(self.model(state.x, times).float())
