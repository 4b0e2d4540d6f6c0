"""Sampling: the paper's basic, sampling and hybrid schemes over any path, and segments, for whole texts, prompts and holes.

A scheme is a plain function `step(state, prediction, move) -> state` registered by name; the Sampler runs the network,
counts its passes, and keeps given tokens as they are. SEGMENTS is no such step: it moves positions from time 0 to 1 one by
one. Every sequence has its own seed, so its tokens do not depend on the batch. With a Denoiser, a sampling step holds tokens
and seeds: neither the noisy rows nor all logits exist at once.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from klflow_ext.data import encode_pieces
from klflow_ext.graph import Buffers, Replays
from klflow_ext.ops.arguments import DEBUG_CHECK, LEAST, MOST, check_int, check_scalar
from klflow_ext.path import Autoregressive, LogitPath, Move, Path, Prediction, State
from klflow_ext.path.network import network_of, predict_from_hidden, predict_from_logits

Temperature = float | tuple[float, float] | Callable[[float], float]


@dataclass
class Samples:
    """tokens (B, L) int64, or a list of (L_i,) where lengths differ; nfe: network passes of a sequence; seconds; history:
    tokens after each pass, if asked for."""

    tokens: Tensor | list[Tensor]
    nfe: int
    seconds: float
    history: list[Tensor] | list[list[Tensor]] = field(default_factory=list)


Step = Callable[[State, Prediction, Move], State]
_samplers: dict[str, Step] = {}
SEGMENTS = "segments"


def register_sampler(name: str) -> Callable[[Step], Step]:
    """Decorator: makes a step function available as `method=name`."""

    def register(step: Step) -> Step:
        _samplers[name] = step
        return step

    return register


@register_sampler("basic")
def basic_step(state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 1: the path's own marginal dynamics, an ODE on the simplex or a jump process of tokens."""
    return move.path.step(state, prediction, move)


@register_sampler("sampling")
def sampling_step(state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 2: draw every token from the top-k of p, re-noise it freshly to the next time."""
    return move.path.resample(state, prediction, move)


@register_sampler("hybrid")
def hybrid_step(state: State, prediction: Prediction, move: Move) -> State:
    """basic while t < t_split, sampling from there."""
    return (basic_step if move.t < move.t_split else sampling_step)(state, prediction, move)


LONGEST_HOLE = 1_000_000


def parse_holes(text: str, tokenizer) -> tuple[list[int], list[bool]]:
    """(tokens, given) of a text with holes {?n}, each of n >= 1 tokens: "x = {?3} + 1".

    The pieces between holes are encoded by themselves (`data.encode_pieces`).

    Raises:
        ValueError: there is no hole, or one of no tokens or of more than LONGEST_HOLE, or the tokenizer would change the text.
    """
    parts = re.split(r"\{\?(\d+)\}", text)
    for hole in parts[1::2]:
        if len(hole) > 18 or not 1 <= int(hole) <= LONGEST_HOLE:
            raise ValueError(
                f"text: got the hole {{?{hole}}}, allowed are holes of 1 to {LONGEST_HOLE:,} tokens, such as {{?8}}"
            )
    if len(parts) == 1:
        raise ValueError(f"text: got {text!r}, allowed is a text with a hole such as {{?8}}")
    pieces = [part for part in parts[::2] if part]
    encoded = iter(encode_pieces(tokenizer, pieces))
    tokens: list[int] = []
    given: list[bool] = []
    for i, part in enumerate(parts):
        ids = [0] * int(part) if i % 2 else next(encoded) if part else []
        tokens += ids
        given += [i % 2 == 0] * len(ids)
    return tokens, given


def _sequence_seed(seed: int, i: int) -> int:
    """A well mixed 63-bit seed of sequence i (SplitMix64)."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 1


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, (str, bool)) or not hasattr(seed, "__len__") or getattr(seed, "ndim", 1) == 0:
        seed = check_int("seed", seed, -(2**63), 2**64 - 1, "an integer that fits in 64 bits, or one for each sequence")
        return [_sequence_seed(seed, i) for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed: got {len(seed)} seeds, allowed is one or {count}, one for each sequence")
    return [check_int("seed", s, -(2**63), 2**63 - 1, "integers that fit in 64 bits with a sign") for s in seed]


def _token_ids(name: str, value) -> Tensor:
    """The ids as int64; of integers of any kind only, as others would be cut."""
    try:
        ids = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {value!r}, allowed are token ids, a sequence of integers") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"{name}: got {ids.dtype}, allowed are token ids, which are integers")
    return ids.long()


@dataclass
class _Options:
    """The knobs of `Sampler.infill`, checked."""

    path: Path
    steps: int
    method: str | None
    top_k: int | None
    top_p: float
    temperature: Temperature
    t_split: float | None
    grid_power: float
    final: str | None
    euler: str
    boosts: int | None
    progress: bool
    return_history: bool

    def __post_init__(self):
        vocab = self.path.vocab_size
        self.method = self.path.method if self.method is None else self.method
        self.final = self.path.final if self.final is None else self.final
        self.t_split = self.path.t_split if self.t_split is None else self.t_split
        self.top_k = vocab if self.top_k is None else self.top_k
        if self.method not in (*_samplers, SEGMENTS):
            raise ValueError(f"method: got {self.method!r}, allowed is one of {sorted((*_samplers, SEGMENTS))}")
        self.steps = check_int("steps", self.steps, 1, 2**31, "an integer >= 1")
        if self.final not in ("argmax", "draw"):
            raise ValueError(f"final: got {self.final!r}, allowed is 'argmax' or 'draw'")
        if self.euler not in ("exact", "paper"):
            raise ValueError(f"euler: got {self.euler!r}, allowed is 'exact' or 'paper'")
        self.top_k = min(check_int("top_k", self.top_k, 1, 2**63, "None or an integer >= 1"), vocab)
        if self.boosts is not None:
            self.boosts = check_int("boosts", self.boosts, 1, 1024, "None or an integer in [1, 1024]")
        self.top_p = check_scalar("top_p", self.top_p, 0, 1, "a number in (0, 1]", open_low=True)
        self.t_split = check_scalar("t_split", self.t_split, 0, 1, "None or a number in [0, 1]")
        power = check_scalar("grid_power", self.grid_power, 0, math.inf, "a positive number", True, True)
        self.grid_power = power

    def temperatures(self, passes: int) -> list[float]:
        """The temperature of each pass: the schedule at i / (passes - 1), at 1 for a single pass."""
        schedule = self.temperature
        if not callable(schedule):
            pair = schedule if isinstance(schedule, (tuple, list)) else (schedule, schedule)
            if len(pair) != 2:
                raise ValueError(f"temperature: got {schedule!r}, allowed is a number, (first, last) or a function")
            first, last = (self._temperature(value) for value in pair)
            schedule = lambda progress: first + (last - first) * progress  # noqa: E731
        return [self._temperature(schedule(i / (passes - 1) if passes > 1 else 1.0)) for i in range(passes)]

    @staticmethod
    def _temperature(value) -> float:
        return check_scalar(
            "temperature", value, LEAST, MOST, f"a number in [{LEAST}, {MOST}], two or a function to them"
        )


class _Progress:
    """Counts passes; a line with the time left once they have taken two seconds."""

    def __init__(self, total: int, show: bool):
        self.total, self.show, self.start, self.count = total, show, time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def advance(self) -> None:
        self.count += 1
        if self.show and self.seconds > 2:
            left = self.seconds / self.count * (self.total - self.count)
            end = "\r" + " " * 50 + "\r" if self.count == self.total else ""
            print(f"\rsampling: pass {self.count}/{self.total}, {left:.0f} s left {end}", end="", flush=True)


def _predict(model, path: Path, state: State, times: Tensor, given: Tensor, previous: Tensor | None) -> Prediction:
    """The network's word on a state at times (B,); previous: its hidden states of the pass before, if it self-conditions."""
    network, vocab = network_of(model), path.vocab_size
    if network is None or not network.makes_noise or state.x is not None:
        if state.x is None:
            state.x = path.sample(state.tokens, state.t, state.rng, given=given)
        if network is None:
            return predict_from_logits(model, state.x, path.model_times(times, given), vocab)
    times = path.hidden_times(times, given)
    if state.x is None:
        h = network.embed_noise(state.tokens, state.t, state.rng, given=given, boost=state.boost)
    else:
        h = network.embed(state.x, times)
    estimate = {"previous": previous} if network.self_conditions else {}
    return predict_from_hidden(network, network.hidden(h, times, **estimate), vocab)


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """The model in evaluation mode (dropout would draw other tokens for the same seed), and then as it was."""
    training = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Diverged:
    """Raises where logits said nothing, and says in which pass and sequence; on CUDA when it is over, as looking synchronises."""

    def __init__(self, count: int, device: torch.device):
        self.first = torch.zeros(count, dtype=torch.int64, device=device)  # pass, from 1 on, of each sequence
        self.passes = 0

    def look(self, prediction: Prediction) -> None:
        """After what a pass said has been used."""
        self.passes += 1
        if prediction.bad is None:
            return
        self.first = torch.where((self.first == 0) & prediction.bad, self.passes, self.first)
        if self.first.device.type == "cpu":
            self.end()

    def end(self) -> None:
        if not bool(self.first.any()):
            return
        sequence = int(self.first.nonzero()[0])
        raise ValueError(
            f"logits: got a NaN or no finite maximum in pass {int(self.first[sequence])}, sequence {sequence}, allowed are "
            "finite numbers; such a model has diverged"
        )


def _step_in_place(model, path: Path, b: Buffers, top_k: int, top_p: float, temperature: float) -> None:
    """A pass and the sampling step after it, from buffers into them, without a look at their values."""
    state = State(None, tokens=b.tokens, t=b.t, rng=b.rng)
    prediction = _predict(model, path, state, b.t, b.given, b.previous)
    if b.previous is not None:
        b.previous.copy_(prediction.hidden)
    b.rng[:, 1] += 1  # the state's noise has been made: from the draw's seeds the next one will be
    move = Move(0, b.t, b.t, path, b.rng, b.given, b.known, top_k, top_p, temperature, 0.0, "exact", None)
    b.tokens.copy_(sampling_step(state, prediction, move).tokens)
    b.bad |= prediction.bad


class Sampler:
    """Generates tokens with a model of a path: `model(x_t, t) -> logits`, x_t as `path.reads` says, logits (B, L, V).

    Of a Network (Denoiser) logits are never built whole, and of one that makes noise re-noised rows neither. The model is
    in evaluation mode while it samples. With an Autoregressive path, generation goes from left to right: `steps`, `method`, `t_split`,
    `grid_power` and `euler` do not apply, and nfe is the number of positions decoded. A position that is given after one
    that is free keeps its token, but the tokens before it are drawn without seeing it.

    cuda_graph: a pass and its draw are recorded as a CUDA graph, once for each (B, L), top_k, top_p, temperature (also each
    of a schedule) and autocast, and replayed from then on: the same tokens, at the speed of the kernels where Python would be
    slower. Only for a Denoiser on a LogitPath with alpha = 1, on CUDA, with method="sampling" and without history. Weights
    may be trained or loaded between calls; the recordings live as long as the Sampler.

    Raises:
        ValueError: a model that is not causal on an Autoregressive path, or cuda_graph where it cannot be.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        path: Path,
        device: str | torch.device = "cpu",
        cuda_graph: bool = False,
    ):
        network = network_of(model)
        if isinstance(path, Autoregressive) and network is not None and network.causal is False:
            raise ValueError("model: got one whose config.causal is False, allowed is a causal one on this path")
        self.model, self.path, self.device = model, path, torch.device(device)
        self._replays: Replays | None = None
        if cuda_graph:
            self._check_cuda_graph()
            self._replays = Replays(partial(_step_in_place, model, path), model, self.device)

    def _check_cuda_graph(self) -> None:
        model, path, network = self.model, self.path, network_of(self.model)
        if not isinstance(path, LogitPath) or path.alpha != 1 or network is None or not network.makes_noise:
            got, allowed = f"a {type(model).__name__} on {path!r}", "a Denoiser on a LogitPath with alpha = 1"
        elif self.device.type != "cuda":
            got, allowed = f"device {self.device}", "a CUDA device"
        elif DEBUG_CHECK:
            got, allowed = "KLFLOW_CHECK=1, whose checks synchronise", "0"
        else:
            return
        raise ValueError(f"cuda_graph: got True with {got}, allowed with it is {allowed}")

    def sample(self, shape: tuple[int, int], **options) -> Samples:
        """(B, L) sequences from nothing; options as in `infill`."""
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return self.infill(tokens, torch.zeros(shape, dtype=torch.bool, device=self.device), **options)

    def complete(self, prompts: Sequence[Sequence[int] | Tensor], length: int, **options) -> Samples:
        """Continues prompts of any lengths, none at all too, to `length` tokens each; options as in `infill`."""
        length = check_int("length", length, 0, 2**31, "an integer >= 0")
        self._check_length("length", length)
        if isinstance(prompts, str) or not all(hasattr(prompt, "__len__") for prompt in prompts):
            raise TypeError(f"prompts: got {prompts!r}, allowed is a list of them, each a sequence of token ids")
        tokens = torch.zeros((len(prompts), length), dtype=torch.int64, device=self.device)
        given = torch.zeros_like(tokens, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            ids = _token_ids(f"prompts: number {i}", prompt)
            if ids.dim() != 1 or len(ids) > length:
                got = f"{len(prompt)} tokens" if ids.dim() == 1 else f"shape {tuple(ids.shape)}"
                raise ValueError(f"prompts: number {i} has {got}, allowed are at most length = {length}")
            tokens[i, : len(ids)] = ids
            given[i, : len(prompt)] = True
        return self.infill(tokens, given, **options)

    @torch.no_grad()
    def infill(
        self,
        tokens: Tensor | Sequence[Sequence[int] | Tensor],
        given: Tensor | Sequence[Sequence[bool] | Tensor],
        *,
        steps: int = 64,
        method: str | None = None,
        top_k: int | None = 20,
        top_p: float = 1.0,
        temperature: Temperature = 1.0,
        t_split: float | None = None,
        grid_power: float = 1.0,
        final: str | None = None,
        euler: str = "exact",
        boosts: int | None = 64,
        seed: int | Sequence[int] = 0,
        progress: bool = False,
        return_history: bool = False,
    ) -> Samples:
        """Fills the positions that are not given; given tokens come back as they went in.

        Args:
            tokens: (B, L) ids; values where given is False are ignored. given: (B, L) bool. Or a list of sequences for each,
                of any lengths: those of one length are run together, so that none sees padding, and come back in a list.
            steps: network passes (NFE), at least 1: steps - 1 moves, and a last pass whose tokens are the result.
            method: "basic", "sampling", "hybrid" or a registered name (path.method); or "segments", for a model trained on
                sequences of which a part is given: the free positions of a sequence are cut into segments of `steps`, and
                every pass draws the next token of each segment at once, from left to right, given all that stands. What is
                drawn together lies `steps` positions apart, so it hardly depends on each other. All others are pure noise.
                A sequence needs no more passes than it has free positions, and no more are made.
            top_k: of each draw, None for all V; top_p in (0, 1]. The basic scheme of a path on the simplex draws only at the end.
            temperature: a positive number; (first, last), linear over the passes; or a function of the progress in [0, 1].
            t_split: where hybrid turns to sampling (path.t_split). grid_power: of `path.time_grid`, below 1 for more late times.
            final: "argmax", or "draw" from the last p (path.final). It, t_split and grid_power say nothing to segments.
            euler: "exact" (1 - e^-h) or "paper" (h) rate of LogitPath's basic step.
            boosts: of a Denoiser that reads posteriors, the entries of p that each exact basic step adds to the noise, and that
                a position keeps of their sum; None: all, in a state of rows (B, L, V).
            seed: one seed, or one for each sequence: the same seed gives the same tokens in any batch.

        Raises:
            ValueError: an argument is outside its range or of a wrong shape, or not for a Sampler with cuda_graph; the
                message names it.
        """
        options = _Options(
            self.path, steps, method, top_k, top_p, temperature, t_split, grid_power, final, euler, boosts,
            progress, return_history,
        )  # fmt: skip
        if self._replays is not None and (_samplers.get(options.method) is not sampling_step or return_history):
            raise ValueError(
                f"cuda_graph: got True with method={options.method!r} and return_history={return_history}, allowed with it "
                "are 'sampling' and False"
            )
        if not isinstance(tokens, Tensor):
            return self._infill_ragged(tokens, given, _seeds(seed, len(tokens)), options)
        tokens = _token_ids("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, allowed is (B, L)")
        given = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
        if given.shape != tokens.shape or given.dtype != torch.bool:
            raise ValueError(
                f"given: got {given.dtype} of shape {tuple(given.shape)}, allowed is bool of the (B, L) shape of tokens, "
                f"{tuple(tokens.shape)}"
            )
        return self._infill(tokens, given, _seeds(seed, len(tokens)), options)

    def _infill_ragged(self, tokens, given, seeds: list[int], options: _Options) -> Samples:
        if len(given) != len(tokens):
            raise ValueError(f"given: got {len(given)} sequences, allowed are as many as tokens has, {len(tokens)}")
        start = time.perf_counter()
        tokens = [_token_ids(f"tokens: number {i}", x) for i, x in enumerate(tokens)]
        given = [torch.as_tensor(x, dtype=torch.bool, device="cpu") for x in given]
        groups: dict[int, list[int]] = {}
        for i, (row, flags) in enumerate(zip(tokens, given, strict=True)):
            if row.dim() != 1 or flags.shape != row.shape:
                raise ValueError(
                    f"given: number {i} has shape {tuple(flags.shape)}, allowed is that of its tokens, {tuple(row.shape)}"
                )
            self._check_tokens(row, flags)
            groups.setdefault(len(row), []).append(i)
        found: list[Tensor] = list(tokens)
        passes: list[list[Tensor]] = [[] for _ in tokens]
        nfe = 0
        for members in groups.values():
            rows, flags = (torch.stack([x[i] for i in members]) for x in (tokens, given))
            result = self._infill(rows, flags, [seeds[i] for i in members], options)
            nfe = max(nfe, result.nfe)
            for j, i in enumerate(members):
                found[i] = result.tokens[j]
                passes[i] = [x[j] for x in result.history]
        history = [[p[n] if n < len(p) else x for p, x in zip(passes, found, strict=True)] for n in range(nfe)]
        return Samples(found, nfe, time.perf_counter() - start, history if options.return_history else [])

    def _check_length(self, name: str, length: int) -> None:
        network = network_of(self.model)
        most = None if network is None else network.max_length
        if most is not None and length > most:
            raise ValueError(f"{name}: got a length of {length}, allowed is at most the model's max_length, {most}")

    def _check_tokens(self, tokens: Tensor, given: Tensor) -> None:
        self._check_length("tokens", tokens.shape[-1])
        vocab = self.path.vocab_size
        bad = given & ((tokens < 0) | (tokens >= vocab))
        if bool(bad.any()):
            raise ValueError(f"tokens: got {tokens[bad][0].item()} where given, allowed is 0 to V - 1 = {vocab - 1}")

    def _infill(self, tokens: Tensor, given: Tensor, seeds: list[int], options: _Options) -> Samples:
        start = time.perf_counter()
        tokens, given = tokens.to(self.device).long(), given.to(self.device)
        self._check_tokens(tokens, given)
        if tokens.numel() == 0 or bool(given.all()):
            return Samples(tokens.clone(), 0, time.perf_counter() - start)
        own_seeds = torch.tensor(seeds, dtype=torch.int64, device=self.device)[:, None]

        def rng(step: int) -> Tensor:
            return torch.cat([own_seeds, torch.full_like(own_seeds, step)], 1)

        if self._replays is not None:
            run = self._replay
        else:
            run = self._segments if options.method == SEGMENTS else self._denoise
            run = self._left_to_right if isinstance(self.path, Autoregressive) else run
        with _evaluating(self.model):
            found, nfe, history = run(tokens, given, rng, options)
        found = torch.where(given, tokens, found)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)  # seconds are those of the work, not of its launches
        return Samples(found, nfe, time.perf_counter() - start, history)

    def _denoise(self, tokens: Tensor, given: Tensor, rng, options: _Options) -> tuple[Tensor, int, list[Tensor]]:
        """steps - 1 moves from t = 0 over the time grid, a pass at each of its times."""
        path, known = self.path, torch.where(given, tokens, 0)
        temperatures = options.temperatures(options.steps)
        grid = path.time_grid(options.steps - 1, options.grid_power).tolist()
        progress, history, previous = _Progress(options.steps, options.progress), [], None
        diverged = _Diverged(len(given), self.device)

        def predict(t: float) -> Prediction:
            nonlocal previous
            progress.advance()
            times = torch.full((len(given),), t, dtype=torch.float32, device=self.device)
            prediction = _predict(self.model, path, state, times, given, previous)
            previous = prediction.hidden
            if options.return_history:
                history.append(torch.where(given, tokens, path.resolve(state, prediction.draw(1, rng(0)))))
            return prediction

        network = network_of(self.model)
        boosts = options.boosts if network is not None and network.makes_noise and network.reads_posterior else None
        state = path.renoise(known, 0.0, rng(0), given)
        for index in range(options.steps - 1):
            move = Move(
                index, grid[index], grid[index + 1], path, rng(index + 1), given, known, options.top_k, options.top_p,
                temperatures[index], options.t_split, options.euler, boosts,
            )  # fmt: skip
            prediction = predict(grid[index])
            state = _samplers[options.method](state, prediction, move)
            diverged.look(prediction)
        k = 1 if options.final == "argmax" else options.top_k
        prediction = predict(grid[-1])
        drawn = prediction.draw(k, rng(options.steps), temperatures[-1], options.top_p)
        diverged.look(prediction)
        diverged.end()
        return path.resolve(state, drawn), progress.count, history

    def _segments(self, tokens: Tensor, given: Tensor, rng, options: _Options) -> tuple[Tensor, int, list[Tensor]]:
        """Pass i draws the free positions whose number is i modulo the number of passes."""
        free = ~given
        passes = min(options.steps, int(free.sum(1).max()))
        temperatures = options.temperatures(options.steps)  # not of the passes made, which depend on the batch
        progress, history, diverged = _Progress(passes, options.progress), [], _Diverged(len(given), self.device)
        turn = torch.where(free, (free.cumsum(1) - 1) % passes, -1)
        found, times = torch.where(given, tokens, 0), torch.zeros(len(given), dtype=torch.float32, device=self.device)
        for i in range(passes):
            now, shown = turn == i, turn < i
            state = self.path.renoise(found, 0.0, rng(i), shown)
            prediction = _predict(self.model, self.path, state, times, shown, None)
            most = int(now.sum(1).max())
            places = (~now).long().argsort(dim=1, stable=True)[:, :most]
            asked = prediction.at(places)
            drawn = asked.draw(options.top_k, rng(i + 1), temperatures[i], options.top_p)
            diverged.look(asked)
            found = torch.where(now, found.scatter(1, places, drawn), found)
            if options.return_history:
                history.append(torch.where(now | shown, found, prediction.draw(1, rng(0))))
            progress.advance()
        diverged.end()
        return found, progress.count, history

    def _replay(self, tokens: Tensor, given: Tensor, rng, options: _Options) -> tuple[Tensor, int, list[Tensor]]:
        """`_denoise` of the sampling scheme by recorded steps. The last pass is a step, too, of which only the draw counts."""
        top_ks = [options.top_k] * (options.steps - 1) + [1 if options.final == "argmax" else options.top_k]
        temperatures, progress = options.temperatures(options.steps), _Progress(options.steps, options.progress)
        knobs = [(k, options.top_p, temperature) for k, temperature in zip(top_ks, temperatures, strict=True)]
        buffers, replays = self._replays.prepare(tuple(given.shape), knobs)
        buffers.start(given, torch.where(given, tokens, 0), rng(0))
        grid = self.path.time_grid(options.steps - 1, options.grid_power).tolist()
        for t, replay in zip(grid, replays, strict=True):
            buffers.t.fill_(t)
            replay()
            progress.advance()
        diverged = _Diverged(len(given), self.device)
        diverged.first += buffers.bad * options.steps  # in some pass, which a replay does not tell
        diverged.end()
        return buffers.tokens, progress.count, []

    def _left_to_right(self, tokens: Tensor, given: Tensor, rng, options: _Options) -> tuple[Tensor, int, list[Tensor]]:
        temperatures = options.temperatures(tokens.shape[1])
        free = (~given).any(0).nonzero()
        progress, history = _Progress(int(free[-1] - free[0]) + 1, options.progress), []
        k = 1 if options.final == "argmax" else options.top_k

        diverged = _Diverged(len(given), self.device)

        def draw(prediction: Prediction, i: int) -> Tensor:
            drawn = prediction.draw(k, rng(0), temperatures[i], options.top_p, row_offset=i)
            diverged.look(prediction)
            return drawn

        def after(found: Tensor) -> None:
            progress.advance()
            if options.return_history:
                history.append(found.clone())

        found, nfe = self.path.generate(self.model, tokens, given, draw, after)
        diverged.end()
        return found, nfe, history
