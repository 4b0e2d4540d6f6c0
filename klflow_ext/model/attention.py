"""Which rows a row of the denoiser sees, and the keys and values that are kept from one pass to the next.

An `Attend` takes queries, keys and values (B, H, R, size) of a block's rows, and the number of the block, to (B, H, R, size).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from klflow_ext.model.config import DenoiserConfig
from klflow_ext.path.network import Streams

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Cache:
    """Keys and values of the rows that later ones see; `Denoiser.hidden(..., cache=cache)` appends to it.

    length: rows held. Holds 2 n_layer B max_length D numbers; no gradient goes through it.
    """

    def __init__(self, config: DenoiserConfig, batch: int, weight: Tensor):
        size = config.n_embd // config.n_head
        self.length = 0
        self.pairs = weight.new_empty(config.n_layer, 2, batch, config.n_head, config.max_length, size)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new rows of one layer behind those held, and returns all; length is moved after the last layer."""
        pair, end = self.pairs[layer], self.length + k.shape[2]
        for old, new in zip(pair, (k, v), strict=True):
            old[:, :, self.length : end] = new.detach()
        return pair[0, :, :, :end], pair[1, :, :, :end]


def _weigh(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None, causal: bool = False) -> Tensor:
    if q.is_cpu:
        v = v.to(q.dtype)
    with torch.autocast("cpu", enabled=False):  # a CPU's 16-bit attention is four times slower in the backward pass
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=causal)


def one_stream(causal: bool) -> Attend:
    """Every row sees all, or those up to itself."""
    return lambda q, k, v, layer: _weigh(q, k, v, causal=causal)


def behind_cache(cache: Cache) -> Attend:
    """Every row sees those of the cache and the new ones up to itself; all are put into the cache."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        length = q.shape[2]
        k, v = cache.extend(layer, k, v)
        sees = None
        if length > 1:
            sees = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(cache.length)
        return _weigh(q, k, v, sees)

    return attend


def two_streams(streams: Streams) -> Attend:
    """Clean rows and queries of many slices at once, as `Streams` says who sees whom."""
    assert streams.slices is not None
    sees = streams.sees()[:, None]
    return lambda q, k, v, layer: _weigh(q, k, v, sees)


def in_blocks(streams: Streams) -> Attend:
    """As `two_streams`, without a mask of all pairs: blocks of rows that do not see each other are skipped (FlexAttention).

    The rows are those of `Streams.by_slice`, so that most blocks are seen whole or not at all. Not yet run on a GPU.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slices, count = streams.slices, streams.tokens.shape[1]
    assert slices is not None

    def sees(b: Tensor, head: Tensor, row: Tensor, other: Tensor) -> Tensor:
        own, its = slices[b, row], slices[b, other]
        clean = other < count
        before = torch.where(row < count, its <= own, its < own)
        return torch.where(clean, before, (row >= count) & (its == own))

    batch, rows = slices.shape
    mask = create_block_mask(sees, batch, None, rows, rows, device=slices.device)
    weigh = torch.compile(flex_attention) if slices.is_cuda else flex_attention  # uncompiled it builds all pairs

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return weigh(q, k.to(q.dtype), v.to(q.dtype), block_mask=mask)

    return attend


def next_slice(streams: Streams, cache: Cache) -> Attend:
    """Clean rows of one slice, which are put into the cache, and the queries of the one after it: no mask is needed."""
    count = streams.tokens.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        held_k, held_v = cache.extend(layer, k[:, :, :count], v[:, :, :count])
        clean = _weigh(q[:, :, :count], held_k, held_v) if count else q[:, :, :0]
        all_k, all_v = (
            torch.cat([held, new[:, :, count:].to(held.dtype)], 2) for held, new in ((held_k, k), (held_v, v))
        )
        return torch.cat([clean, _weigh(q[:, :, count:], all_k, all_v)], 2)

    return attend
