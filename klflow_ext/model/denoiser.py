"""The denoiser: a transformer that reads noisy rows, or tokens, and predicts the token of every position."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from klflow_ext import ops
from klflow_ext.model.attention import Cache, behind_cache, in_blocks, next_slice, one_stream, two_streams
from klflow_ext.model.blocks import Block, norm
from klflow_ext.model.config import DenoiserConfig
from klflow_ext.ops.arguments import INTEGERS, looks_at_values
from klflow_ext.path import LogitPath, Network, Path
from klflow_ext.path.logit import log_evidence
from klflow_ext.path.network import Streams


class Denoiser(Network):
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

    log_prior: Tensor
    cos: Tensor
    sin: Tensor
    recompute: bool = False

    def __init__(self, config: DenoiserConfig, path: Path, log_prior: Tensor | None = None):
        super().__init__()
        if path.vocab_size != config.vocab_size:
            raise ValueError(
                f"path: its vocab_size is {path.vocab_size}, allowed is that of config, {config.vocab_size}"
            )
        allowed = (
            ("tokens",) if path.reads == "tokens" else ("simplex", "posterior") if path.closed_form else ("simplex",)
        )
        if config.input not in allowed:
            raise ValueError(f"input: got {config.input!r}, allowed is one of {allowed} for {path!r}")
        self.reads_posterior, self.self_conditions = config.input == "posterior", config.self_conditioning
        self.makes_noise = path.closed_form
        self.causal, self.slices, self.max_length = config.causal, config.slices, config.max_length
        self.caches = config.causal or config.slices
        self.config = config
        self.c: float | None = None
        self.beta: float | None = None
        if isinstance(path, LogitPath) and path.closed_form:
            self.c, self.beta = path.c, path.beta
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
        uniform = torch.full((config.vocab_size,), -math.log(config.vocab_size), dtype=torch.float32)
        if log_prior is not None and log_prior.shape != uniform.shape:
            raise ValueError(f"log_prior: got shape {tuple(log_prior.shape)}, allowed is ({config.vocab_size},)")
        self.register_buffer("log_prior", uniform if log_prior is None else log_prior.float())
        half = d // config.n_head // 2
        angles = torch.outer(
            torch.arange(config.max_length + 1, dtype=torch.float32),
            10000.0 ** -(torch.arange(half, dtype=torch.float32) / half),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        if self.embedding.dtype == torch.float64:  # torch's default dtype, in which there are no kernels
            self.float()

    def _apply(self, fn, recurse=True):
        """Casts parameters only: in 16 bits the prior and the rotations would lose what they are made for."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

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

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """q_k proportional to pi_k (1 - (1 - e^-s) u_k)^-V, u = softmax(log x_t / (1 - t)), s = c t / (1 - t).

        x (B, L, V), t (B,) or (B, L). A row that is certain already (a given one) stays as it is.
        """
        t = t.reshape(len(x), -1).clamp_max(1 - 1e-6)  # at t = 1 a row is one-hot, whatever divides its logarithm
        assert self.c is not None, "only the posterior input asks for it"
        evidence = log_evidence(x.log(), t, self.c)
        return (self.log_prior + evidence).softmax(-1)

    def embed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What a path makes, at times t (a number, (B,) or (B, L)), as embeddings (B, L, D).

        x: rows (B, L, V) on the simplex; for input="tokens" integer ids (B, L) in [0, V], of which the CPU checks the range.
        """
        vocab, longest = self.config.vocab_size, self.config.max_length
        tokens = self.config.input == "tokens"
        if x.dim() != 3 - tokens or x.shape[1] > longest or (not tokens and x.shape[2] != vocab):
            allowed = f"(B, L <= {longest})" if tokens else f"(B, L <= {longest}, {vocab})"
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is {allowed}")
        if tokens:
            if x.dtype not in INTEGERS:
                raise ValueError(f"x: got {x.dtype}, allowed is {' or '.join(map(str, INTEGERS))}")
            if looks_at_values(x) and x.numel() and not 0 <= x.min() <= x.max() <= vocab:
                bad = x[(x < 0) | (x > vocab)][0].item()
                raise ValueError(f"x: got the id {bad}, allowed is 0 to V = {vocab}, which is the mask or start")
            return F.embedding(x, self.embedding)
        if self.config.input == "posterior":
            x, t = x.float(), self._times(t, *x.shape[:2])
            top, beta = self.config.top, self.beta
            if not self._is_sparse or top is None or beta is None:
                return self.posterior(x, t).to(self.embedding.dtype) @ self.embedding
            ids, q, rest = ops.token_posterior(x.log(), t.reshape(len(t), -1), self.log_prior, top=top, beta=beta)
            return ops.posterior_embedding(ids, q, rest, self.embedding, self.log_prior)
        return self._centred(x.to(self.embedding.dtype) @ self.embedding)

    def embed_certain(self, tokens: Tensor) -> Tensor:
        """embed of rows that show their tokens (B, L), which are never built."""
        h = F.embedding(tokens, self.embedding)
        return self._centred(h) if self.config.input == "simplex" else h

    def embed_posterior(self, ids: Tensor, q: Tensor, rest: Tensor) -> Tensor:
        """embed of rows whose posterior is q (B, L, K) at ids, and `rest` (B, L) spread over the others as the prior is."""
        return ops.posterior_embedding(ids, q, rest, self.embedding, self.log_prior)

    def embed_noise(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0,
        boost: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """embed(x_t, t) of x_t = noise_interpolate(target, t, rng), whose rows are never built.

        target (B, L); t a number, (B,) or (B, L); rng, given, row_offset as in `ops.noise_embedding`. With a posterior of
        more than 4 top tokens, all but its `top` largest entries are embedded as their mean. With boost, target and boost
        are (B, L, K): rows on the way of the basic scheme (`ops.noise_posterior`), for a posterior only.
        """
        config = self.config
        if config.input == "tokens" or self.beta is None:
            raise ValueError(f"input: got {config.input!r}, allowed in embed_noise are rows of a LogitPath")
        t = self._times(t, *target.shape[:2])
        options: dict[str, Any] = {"beta": self.beta, "given": given, "row_offset": row_offset}
        t = t.reshape(len(t), -1)
        if config.input == "posterior":
            top = config.top if self._is_sparse else None if boost is None else config.vocab_size
            options |= {"log_prior": self.log_prior, "top": top, "boost": boost}
            return ops.noise_embedding(target, t, self.embedding, rng, **options)
        return self._centred(ops.noise_embedding(target, t, self.embedding, rng, **options))

    @property
    def _is_sparse(self) -> bool:
        return self.config.top is not None and self.config.vocab_size > 4 * self.config.top

    def _centred(self, h: Tensor) -> Tensor:
        vocab = self.config.vocab_size
        return (h - self.embedding.detach().mean(0)) * math.sqrt(vocab)

    def _times(self, t: Tensor | float, b: int, length: int) -> Tensor:
        """t as (B,) or (B, L)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=self.embedding.device)
        if t.shape not in ((), (b,), (b, length)):
            raise ValueError(f"t: got shape {tuple(t.shape)}, allowed is a number, ({b},) or ({b}, {length})")
        return t if t.dim() == 2 else t.expand(b)

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
