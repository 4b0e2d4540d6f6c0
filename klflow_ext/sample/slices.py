"""Slices: every pass draws a slice of the positions for good; what stands is read once, and its keys and values are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import ResolvedOptions
from klflow_ext.path.network import Network, Streams
from klflow_ext.sample.passes import Passes, places_of
from klflow_ext.sample.ways import register_way


@register_way("slices", ordered=True, same_free=True, hears=True)
def slices(passes: Passes, options: ResolvedOptions) -> Tensor:
    """Slice i holds the positions of set i of the layout; what is given stands before all.

    A pass reads the tokens of the slice before, and asks for those of its own: each position is computed once as a question
    and once as it stands, whatever the number of slices. With slice_steps > 1 a slice is asked for again after its draws were
    re-noised, as in the sampling scheme. With evidence a pass also asks for all that comes later, of a network
    that hears it: so what was observed there is a part of what it reads.
    """
    network, path = passes.network, passes.path
    if not isinstance(network, Network) or not network.slices:
        raise ValueError(
            "method: got 'slices', allowed is another for a network that was not trained with them (DenoiserConfig.slices)"
        )
    if passes.evidence is not None and options.slice_steps > 1:
        raise ValueError(f"slice_steps: got {options.slice_steps} with evidence, allowed with it is 1")
    ahead = passes.evidence is not None and network.reads_posterior
    free = int((~passes.given[0]).sum())  # of all
    layout = passes.layout(options, min(max(1, options.steps // options.slice_steps), free))
    order = layout.order(passes.given)
    steps = 1 if len(layout) == free else options.slice_steps  # single positions gain nothing by more
    # not of the passes made, which depend on the batch
    temperatures = options.temperatures(max(options.steps, len(layout) * options.slice_steps))
    grid = path.time_grid(steps - 1, options.grid_power).tolist()
    passes.expect(len(layout) * steps)
    found, cache, clean = passes.known, network.cache(len(order)), places_of(order == 0)
    for i in range(len(layout)):
        places = places_of(order == i + 1)
        query = places_of(order > i) if ahead else places
        drawn = torch.zeros_like(query)
        for j, t in enumerate(grid):
            number = i * steps + j
            shown = torch.zeros_like(query, dtype=torch.bool)
            state = path.renoise(drawn, t, passes.rng(number), shown)
            streams = Streams(found.gather(1, clean), torch.cat([clean, query], 1), None)
            evidence = passes.observed(query)
            prediction = passes.predict(state, t, shown, cache=cache, streams=streams, evidence=evidence)
            said = prediction
            if ahead:
                prediction = prediction.at(places_of(order.gather(1, query) == i + 1))
            clean = clean[:, :0]  # they are in the cache now
            top_k = options.top_k if j < steps - 1 or steps == 1 else options.last_top_k
            drawn = passes.draw(prediction, places, top_k, number + 1, temperatures[number], options.top_p)
            drawn = path.resolve(state, drawn)
            found = found.scatter(1, places, drawn)
            if passes.keeps:
                stands = order <= (i + 1 if j == steps - 1 else i)
                passes.keep(passes.guess(found, order <= i + 1, said, query), said, places=query, stands=stands)
        clean = places
    return found
