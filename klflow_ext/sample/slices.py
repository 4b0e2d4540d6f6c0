"""Slices: every pass draws a slice of the positions for good; what stands is read once, and its keys and values are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import ResolvedOptions
from klflow_ext.path.layout import Layout
from klflow_ext.path.network import Network, Streams
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.ways import register_way


@register_way("slices", ordered=True, same_free=True)
def slices(passes: Passes, options: ResolvedOptions) -> Tensor:
    """Slice i holds the positions of set i of the layout; what is given stands before all.

    A pass reads the tokens of the slice before, and asks for those of its own: each position is computed once as a question
    and once as it stands, whatever the number of slices. With slice_steps > 1 a slice is asked for again after its draws were
    re-noised, as in the sampling scheme.
    """
    network, path = passes.network, passes.path
    if not isinstance(network, Network) or not network.slices:
        raise ValueError(
            "method: got 'slices', allowed is another for a network that was not trained with them (DenoiserConfig.slices)"
        )
    free = int((~passes.given[0]).sum())  # of all
    if options.layout is not None:
        options.layout.check_fits(passes.given)
    layout = options.layout or Layout.for_passes(max(1, options.steps // options.slice_steps), free)
    order = layout.order(passes.given)
    steps = 1 if len(layout) == free else options.slice_steps  # single positions gain nothing by more
    # not of the passes made, which depend on the batch
    temperatures = options.temperatures(max(options.steps, len(layout) * options.slice_steps))
    grid = path.time_grid(steps - 1, options.grid_power).tolist()
    passes.expect(len(layout) * steps)
    found, cache, clean = passes.known, network.cache(len(order)), _places(order == 0)
    for i in range(len(layout)):
        query = _places(order == i + 1)
        drawn = torch.zeros_like(query)
        for j, t in enumerate(grid):
            number = i * steps + j
            shown = torch.zeros_like(query, dtype=torch.bool)
            state = path.renoise(drawn, t, passes.rng(number), shown)
            streams = Streams(found.gather(1, clean), torch.cat([clean, query], 1), None)
            prediction = passes.predict(state, t, shown, cache=cache, streams=streams)
            clean = clean[:, :0]  # they are in the cache now
            top_k = options.top_k if j < steps - 1 or steps == 1 else options.last_top_k
            drawn = passes.draw(prediction, query, top_k, number + 1, temperatures[number], options.top_p)
            drawn = path.resolve(state, drawn)
        found, clean = found.scatter(1, query, drawn), query
        if passes.keeps:
            passes.keep(found)
    return found


def _places(flags: Tensor) -> Tensor:
    """(B, N): where flags (B, L), of which every row has N, are set."""
    return flags.nonzero()[:, 1].view(len(flags), -1)
