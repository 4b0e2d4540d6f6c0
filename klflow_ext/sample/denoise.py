"""The paper's schemes: all positions move from noise to text together, a step after each pass of the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from klflow_ext.path import Move, Path, Prediction, ResolvedOptions, State
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.ways import register_way

Step = Callable[[Path, State, Prediction, Move], State]


def denoise(passes: Passes, options: ResolvedOptions, *, step: Step) -> Tensor:
    """steps - 1 moves from t = 0 over the time grid, a pass at each of its times; the last pass gives the tokens."""
    path, given, steps = passes.path, passes.given, options.steps
    temperatures = options.temperatures(steps)
    grid = options.times or path.time_grid(steps - 1, options.grid_power).tolist()
    passes.expect(steps)
    state, previous = path.renoise(passes.known, 0.0, passes.rng(0), given), None
    for i in range(steps - 1):
        prediction = passes.predict(state, grid[i], given, previous=previous)
        previous = prediction.hidden
        move = Move(
            t=grid[i],
            t_next=grid[i + 1],
            rng=passes.rng(i + 1),
            given=given,
            known=passes.known,
            temperature=temperatures[i],
            options=options,
        )
        before, state = state, step(path, state, prediction, move)
        if passes.keeps:
            best = path.resolve(before, passes.best(prediction))
            # what a path shows already it shows whatever is drawn
            shown = path.resolve(state, torch.zeros_like(best)) == path.resolve(state, torch.ones_like(best))
            passes.keep(path.resolve(state, best), prediction, stands=given | shown)
    prediction = passes.predict(state, grid[-1], given, previous=previous)
    drawn = prediction.draw(options.last_top_k, passes.rng(steps), temperatures[-1], options.top_p)
    tokens = path.resolve(state, drawn)
    if passes.keeps:
        passes.keep(tokens, prediction, stands=torch.ones_like(given))
    return tokens


def register_sampler(name: str) -> Callable[[Step], Step]:
    """Decorator: makes a step function available as `method=name`, by which `denoise` then moves."""

    def register(step: Step) -> Step:
        register_way(name)(partial(denoise, step=step))
        return step

    return register


@register_sampler("basic")
def basic_step(path: Path, state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 1: the path's own marginal dynamics, an ODE on the simplex or a jump process of tokens."""
    return path.step(state, prediction, move)


@register_sampler("sampling")
def sampling_step(path: Path, state: State, prediction: Prediction, move: Move) -> State:
    """Algorithm 2: draw every token from the top-k of p, re-noise it freshly to the next time."""
    return path.resample(state, prediction, move)


@register_sampler("hybrid")
def hybrid_step(path: Path, state: State, prediction: Prediction, move: Move) -> State:
    """basic while t < t_split, sampling from there."""
    step = basic_step if move.t < move.options.t_split else sampling_step
    return step(path, state, prediction, move)
