"""The denoiser: a transformer that reads noisy rows, or tokens, and predicts the token of every position."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from klflow_ext.model.attention import Cache, behind_cache, in_blocks, next_slice, one_stream, two_streams
from klflow_ext.model.blocks import Block, norm
from klflow_ext.model.config import DenoiserConfig
from klflow_ext.model.reader import Reader
from klflow_ext.path import Path
from klflow_ext.path.network import Streams


class Denoiser(Reader):
    """model(x_t, t) -> logits of p(k | x_t, t) for every position: head(hidden(embed(x_t, t), t)).

    embed_noise makes the same embedding from tokens, a time and a seed, and head is a plain matrix, so that training and
    sampling (`LogitPath.loss`, `Sampler`) need no tensor of positions x V.

    Pre-norm transformer without biases: RMSNorm, RoPE, QK-norm, ReLU^2, the time as a prepended token or as config.time
    says. Output projections start at zero, so that blocks start as the identity and the first prediction is uniform. The
    embedded input is centred and scaled: x_t @ W of a noisy row averages V random rows (mean square near 1e-8 at V = 50k,
    below any eps), so (x_t @ W - mean W) sqrt(V) is used, whose entries have unit variance for pure noise; the mean takes
    part as a number, not in the gradient.

    Args:
        config: see DenoiserConfig.
        path: the path that makes x_t: a LogitPath for the posterior input, of which its c is a part; a path of
            tokens for input="tokens".
        log_prior: (V,) log unigram frequencies for the posterior input; None: uniform.

    Attributes:
        recompute: whether the backward pass computes each block again (activation checkpointing) instead of keeping what is in it.

    Parameters are of torch's default dtype, but float32 where that is float64. `.bfloat16()` and `.half()` cast them alone.
    """

    cos: Tensor
    sin: Tensor
    recompute: bool = False

    def __init__(self, config: DenoiserConfig, path: Path, log_prior: Tensor | None = None):
        if path.vocab_size != config.vocab_size:
            raise ValueError(
                f"path: its vocab_size is {path.vocab_size}, allowed is that of config, {config.vocab_size}"
            )
        super().__init__(path, config.input, config.top, log_prior)
        self.self_conditions = config.self_conditioning
        self.causal, self.slices, self.max_length = config.causal, config.slices, config.max_length
        self.caches = config.causal or config.slices
        self.config = config
        d = config.n_embd
        self.embedding = nn.Parameter(torch.randn(config.vocab_size + (config.input == "tokens"), d))
        if config.time != "none":
            self.time_in = nn.Linear(128, d, bias=False)
            self.time_out = nn.Linear(d, d, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        if config.self_conditioning:
            self.self_in = nn.Linear(d, d, bias=False)
            nn.init.zeros_(self.self_in.weight)
        nn.init.zeros_(self.head.weight)
        half = d // config.n_head // 2
        angles = torch.outer(
            torch.arange(config.max_length + 1, dtype=torch.float32),
            10000.0 ** -(torch.arange(half, dtype=torch.float32) / half),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        if self.embedding.dtype == torch.float64:  # torch's default dtype, in which there are no kernels
            self.float()

    @property
    def table(self) -> Tensor:
        return self.embedding

    def to_dict(self) -> dict[str, Any]:
        """Its config."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: Path) -> Denoiser:
        return cls(DenoiserConfig(**values), path)

    def sharded_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices from hidden states to hidden states: what Muon is for. Not embeddings, head, or layers of the time."""
        return [
            p
            for name, p in self.named_parameters()
            if name.startswith(("blocks.", "self_in.")) and ".modulation." not in name
        ]

    def cache(self, batch: int) -> Cache:
        """An empty cache for `batch` sequences of up to max_length positions; needs a causal model, or one with slices."""
        if not self.caches:
            raise ValueError("causal: got False, allowed is True, or slices=True, where keys and values are cached")
        return Cache(self.config, batch, self.embedding)

    def hidden(
        self,
        h: Tensor,
        t: Tensor | float,
        *,
        previous: Tensor | None = None,
        cache: Cache | None = None,
        streams: Streams | None = None,
    ) -> Tensor:
        """Embeddings h (B, L, D) at times t (a number, (B,) or (B, L)) to what the head reads, (B, L, D).

        A time token carries the least time of a sequence, that of its free rows; "add" and "adaln" use each position's own.

        Args:
            previous: (B, L, D), what this returned for the same sequences before (no gradient goes through it); zeros, or
                None for all, where there is none. It is read as h + self_in(previous), and needs config.self_conditioning.
            cache: of `cache(B)`. h then holds the positions behind those of the cache, which takes them up.
            streams: h then holds its clean rows and the queries, which needs config.slices; a cache takes up the clean ones.
        """
        config = self.config
        b, length = self._check_rows(h, cache, streams)
        if previous is not None:
            if not config.self_conditioning or previous.shape != h.shape:
                allowed = f"{tuple(h.shape)}" if config.self_conditioning else "None without config.self_conditioning"
                raise ValueError(f"previous: got shape {tuple(previous.shape)}, allowed is {allowed}")
            h = h + self.self_in(previous.detach())
        t = self._times(t, b, length)
        rows = None
        if streams is not None and cache is None and self._in_blocks(h):
            rows, streams = streams.by_slice()
            h, t = h.gather(1, rows[..., None].expand_as(h)), t.expand(b, length).gather(1, rows) if t.dim() == 2 else t
        h, time = norm(h), None
        if config.time == "token":
            least = t.reshape(b, -1).amin(1) if length else t.expand(b)
            h = torch.cat([norm(self._time(least))[:, None], h], 1)
        elif config.time == "add":
            h = h + self._time(t.reshape(b, -1))
        elif config.time == "adaln":
            time = F.silu(self._time(t.reshape(b, -1)))
        if streams is not None:
            cos, sin = (x[streams.places][:, None].to(h.dtype) for x in (self.cos, self.sin))
            whole = two_streams if rows is None else in_blocks
            attend = whole(streams) if cache is None else next_slice(streams, cache)
            new = streams.tokens.shape[1]
        else:
            held = 0 if cache is None else cache.length
            positions = slice(held, held + h.shape[1])
            cos, sin = self.cos[positions].to(h.dtype), self.sin[positions].to(h.dtype)
            attend = one_stream(config.causal) if cache is None else behind_cache(cache)
            new = length
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, time, attend, layer, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin, time, attend, layer)
        if cache is not None:
            cache.length += new
        if rows is not None:
            h = torch.empty_like(h).scatter(1, rows[..., None].expand_as(h), h)
        return norm(h[:, 1:] if config.time == "token" else h)

    @staticmethod
    def _in_blocks(h: Tensor) -> bool:
        """Whether two whole streams are read block by block: where the kernel for it is, and a mask of all pairs would cost."""
        return h.is_cuda and h.shape[1] >= 1024

    def _check_rows(self, h: Tensor, cache: Cache | None, streams: Streams | None) -> tuple[int, int]:
        """(B, L) of h; errors for all that does not fit."""
        config = self.config
        held = 0 if cache is None else cache.length
        rows = 2 * config.max_length if streams is not None else config.max_length - held
        if h.dim() != 3 or h.shape[2] != config.n_embd or h.shape[1] > rows:
            allowed = f"(B, L <= {rows}, {config.n_embd})"
            raise ValueError(
                f"h: got shape {tuple(h.shape)}, allowed is {allowed}" + f" behind {held} cached" * (held > 0)
            )
        b, length, _ = h.shape
        if cache is not None and cache.pairs.shape[2] != b:
            raise ValueError(f"cache: got one of {cache.pairs.shape[2]} sequences, allowed is one of {b}")
        if cache is not None and not (config.causal or streams is not None):
            raise ValueError("cache: got one, allowed is None for a model that is neither causal nor reads streams")
        if streams is None:
            return b, length
        if not config.slices:
            raise ValueError("streams: got some, allowed is None for a model without config.slices")
        if streams.places.shape != (b, length) or (streams.slices is None) == (cache is None):
            raise ValueError(
                f"streams: got places of shape {tuple(streams.places.shape)} and slices {streams.slices is not None}, allowed "
                f"are {(b, length)} and slices or a cache"
            )
        if cache is not None and held + streams.tokens.shape[1] > config.max_length:
            raise ValueError(
                f"cache: got {held} rows and {streams.tokens.shape[1]} more, allowed are {config.max_length}"
            )
        return b, length

    def _time(self, t: Tensor) -> Tensor:
        """Times (...) as vectors (..., D)."""
        rates = torch.exp(-math.log(10000) * torch.arange(64, dtype=torch.float32, device=t.device) / 64)
        phases = 1000 * t[..., None] * rates
        waves = torch.cat([phases.sin(), phases.cos()], -1).to(self.time_in.weight.dtype)
        return self.time_out(F.silu(self.time_in(waves)))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """x (B, L, V) rows on the simplex, or tokens (B, L); t a number, (B,) or (B, L), in [0, 1]; returns logits (B, L, V).

        Each row's posterior uses its own time.
        """
        return self.head(self.hidden(self.embed(x, t), t))
