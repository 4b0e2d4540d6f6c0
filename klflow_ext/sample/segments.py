"""Segments: positions go from pure noise to their tokens at once, some after others, from left to right in each segment."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import ResolvedOptions
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.ways import register_way


@register_way("segments", ordered=True, hears=True)
def segments(passes: Passes, options: ResolvedOptions) -> Tensor:
    """Pass i draws the positions of set i of the layout, a stride where none is asked for."""
    layout = passes.layout(options, min(options.steps, int((~passes.given).sum(1).max())))
    order, found = layout.order(passes.given), passes.known
    passes.expect(len(layout))
    # not of the passes made, which depend on the batch
    temperatures = options.temperatures(max(options.steps, len(layout)))
    for i in range(len(layout)):
        now, shown = order == i + 1, order <= i
        state = passes.path.renoise(found, 0.0, passes.rng(i), shown)
        prediction = passes.predict(state, 0.0, shown, evidence=passes.observed_beyond(shown))
        most = int(now.sum(1).max())
        places = (~now).long().argsort(dim=1, stable=True)[:, :most]
        chosen, wanted = prediction.at(places), now.gather(1, places)
        drawn = passes.draw(chosen, places, options.top_k, i + 1, temperatures[i], options.top_p, wanted=wanted)
        found = torch.where(now, found.scatter(1, places, drawn), found)
        if passes.keeps:
            stands = now | shown
            passes.keep(torch.where(stands, found, passes.best(prediction)), prediction, stands=stands)
    return found
