"""Left to right: the way of an Autoregressive path, whose networks read [start, x_1 .. x_(i-1)] for position i."""

from __future__ import annotations

import torch
from torch import Tensor

from klflow_ext.path import Network, ResolvedOptions, State
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.ways import register_way


@register_way("left_to_right", of_path=True, ordered=True, hears=True)
def left_to_right(passes: Passes, options: ResolvedOptions) -> Tensor:
    """A pass over the prefix that all sequences are given, then one for each position, to the last that is free in any.

    A given token takes the place of the draw, whatever the network says; positions before it do not see it. A network with a
    cache reads new positions only, others read all so far.
    """
    network, given, tokens = passes.network, passes.given, passes.known.clone()
    temperatures = options.temperatures(tokens.shape[1])
    free = (~given).any(0).nonzero()
    first, last = int(free[0]), int(free[-1])
    passes.expect(last - first + 1)
    inputs = torch.cat([torch.full_like(tokens[:, :1], passes.path.vocab_size), tokens[:, :-1]], 1)
    cache = network.cache(len(tokens)) if isinstance(network, Network) and network.caches else None
    for i in range(first, last + 1):
        held = 0 if cache is None else cache.length
        place = torch.full_like(tokens[:, :1], i)
        prediction = passes.predict(State(inputs[:, held : i + 1]), 0.0, given, cache=cache).last()
        prediction = prediction.with_evidence(passes.observed(place))
        drawn = passes.draw(prediction, place, options.last_top_k, 0, temperatures[i], options.top_p, row_offset=i)
        drawn = torch.where(given[:, i : i + 1], tokens[:, i : i + 1], drawn)
        tokens[:, i : i + 1] = drawn
        inputs[:, i + 1 : i + 2] = drawn[:, : inputs.shape[1] - i - 1]
        if passes.keeps:
            stands = given.clone()
            stands[:, : i + 1] = True
            passes.keep(tokens, prediction, places=place, stands=stands)
    return tokens
