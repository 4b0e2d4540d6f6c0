"""Slices: every pass draws a slice of the positions for good; what stands is read once, and its keys and values are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import ResolvedOptions
from klflow_ext.path.network import Network, Streams
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.ways import register_way


@register_way("slices", ordered=True, same_free=True, hears=True)
def slices(passes: Passes, options: ResolvedOptions) -> Tensor:
    """Slice i holds the positions of set i of the layout; what is given stands before all.

    A pass reads the tokens of the slice before, and asks for those of its own: each position is computed once as a question
    and once as it stands, whatever the number of slices. With slice_steps > 1 a slice is asked for again after its draws were
    re-noised, as in the sampling scheme. With evidence a pass also asks for all that comes later, of a network
    that hears it: so what was observed there is a part of what it reads.
    """
    places, counts = slice_places(passes, options)
    return draw_slices(passes, options, places, counts)


def slice_places(passes: Passes, options: ResolvedOptions) -> tuple[Tensor, list[int]]:
    """(places (B, L), counts): the positions that are given, then those of each slice, and how many of each there are.

    Raises:
        ValueError: the network was not trained with slices, or the options do not fit the text.
    """
    if not isinstance(passes.network, Network) or not passes.network.slices:
        raise ValueError(
            "method: got 'slices', allowed is another method for this network, which was not trained for slices, or a network with "
            "DenoiserConfig(slices=True), as klflow train makes it"
        )
    if passes.evidence is not None and options.slice_steps > 1:
        raise ValueError(f"slice_steps: got {options.slice_steps} with evidence, allowed with it is 1")
    free = int((~passes.given[0]).sum())  # of all
    layout = passes.layout(options, min(max(1, options.steps // options.slice_steps), free))
    order = layout.order(passes.given)
    return order.argsort(dim=1, stable=True), torch.bincount(order[0], minlength=len(layout) + 1).tolist()


def slice_passes(options: ResolvedOptions, counts: list[int]) -> tuple[int, list[float]]:
    """(passes for each slice, temperatures of all, at least), of counts as `slice_places` has them."""
    slices, free = len(counts) - 1, sum(counts[1:])
    steps = 1 if slices == free else options.slice_steps  # single positions gain nothing by more
    # not of the passes made, which depend on the batch
    return steps, options.temperatures(max(options.steps, slices * options.slice_steps))


def draw_slices(passes: Passes, options: ResolvedOptions, places: Tensor, counts: list[int]) -> Tensor:
    """The passes themselves, of positions and counts as `slice_places` has them. It looks at no value: a CUDA graph may record it."""
    network, path = passes.network, passes.path
    assert isinstance(network, Network)
    given, *sizes = counts
    ahead = passes.evidence is not None and network.reads_posterior
    steps, temperatures = slice_passes(options, counts)
    grid = path.time_grid(steps - 1, options.grid_power).tolist()
    passes.expect(len(sizes) * steps)
    found, cache, clean, start = passes.known, network.cache(len(places)), places[:, :given], given
    for i, size in enumerate(sizes):
        own = places[:, start : start + size]
        query = places[:, start:] if ahead else own
        drawn = torch.zeros_like(query)
        for j, t in enumerate(grid):
            number = i * steps + j
            shown = torch.zeros_like(query, dtype=torch.bool)
            time = torch.full(
                (), t, dtype=torch.float32, device=places.device
            )  # a number would be copied to the device
            state = path.renoise(drawn, time, passes.rng(number), shown)
            streams = Streams(found.gather(1, clean), torch.cat([clean, query], 1), None)
            evidence = passes.observed(query)
            prediction = passes.predict(state, t, shown, cache=cache, streams=streams, evidence=evidence)
            said = prediction
            if ahead:
                prediction = prediction.at(torch.arange(size, device=own.device).expand(len(own), -1))
            clean = clean[:, :0]  # they are in the cache now
            top_k = options.top_k if j < steps - 1 or steps == 1 else options.last_top_k
            drawn = passes.draw(prediction, own, top_k, number + 1, temperatures[number], options.top_p)
            drawn = path.resolve(state, drawn)
            found = found.scatter(1, own, drawn)
            if passes.keeps:
                drawn_too = torch.zeros_like(passes.given).scatter(1, places[:, : start + size], True)
                before = torch.zeros_like(passes.given).scatter(1, places[:, :start], True)
                stands = drawn_too if j == steps - 1 else before
                passes.keep(passes.guess(found, drawn_too, said, query), said, places=query, stands=stands)
        clean, start = own, start + size
    return found
