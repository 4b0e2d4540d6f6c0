"""Confidence: every pass asks for all that is free, and draws the positions for good that it is surest of."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import ResolvedOptions
from klflow_ext.path.network import Network, Streams
from klflow_ext.sample.passes import Passes, places_of
from klflow_ext.sample.ways import register_way


@register_way("confidence", same_free=True, hears=True)
def confidence(passes: Passes, options: ResolvedOptions) -> Tensor:
    """As many positions in each pass, those whose likeliest token has the largest probability (MaskGIT, Chang et al. 2022).

    A network with slices keeps what stands in its cache; others read everything again.
    """
    network, path = passes.network, passes.path
    found, shown = passes.known, passes.given
    free = int((~shown[0]).sum())  # of all
    count = min(options.steps, free)
    temperatures = options.temperatures(options.steps)  # not of the passes made, which depend on the batch
    passes.expect(count)
    cache = network.cache(len(shown)) if isinstance(network, Network) and network.slices else None
    clean = places_of(shown)
    for i in range(count):
        asked = places_of(~shown)
        if cache is None:
            state = path.renoise(found, 0.0, passes.rng(i), shown)
            prediction = passes.predict(state, 0.0, shown, evidence=passes.observed_beyond(shown)).at(asked)
        else:
            nothing = torch.zeros_like(asked)
            state = path.renoise(nothing, 0.0, passes.rng(i), nothing.bool())
            streams = Streams(found.gather(1, clean), torch.cat([clean, asked], 1), None)
            evidence = passes.observed(asked)
            prediction = passes.predict(state, 0.0, nothing.bool(), cache=cache, streams=streams, evidence=evidence)
        size = free * (i + 1) // count - free * i // count
        sure = prediction.largest(1)[1][..., 0]
        chosen = sure.topk(size, 1).indices.sort(1).values
        clean = asked.gather(1, chosen)
        drawn = passes.draw(prediction.at(chosen), clean, options.top_k, i + 1, temperatures[i], options.top_p)
        found, shown = found.scatter(1, clean, drawn), shown.scatter(1, clean, True)
        if passes.keeps:
            passes.keep(passes.guess(found, shown, prediction, asked), prediction, places=asked, stands=shown)
    return found
