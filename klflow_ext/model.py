"""The denoiser: a transformer that reads noisy rows, or tokens, and predicts the token of every position."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klflow_ext import ops
from klflow_ext.ops.arguments import INTEGERS, looks_at_values
from klflow_ext.oracle import log_evidence
from klflow_ext.path import LogitPath, Network

INPUTS = ("simplex", "posterior", "tokens")
TIMES = ("token", "add", "adaln", "none")


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a Denoiser.

    input: what a position feeds to the embedding matrix. "simplex": x_t itself, as the paper does. "posterior": the exact
        posterior of the token given its own noisy row and the unigram prior (ExactDenoiser for one position), in closed form.
        "tokens": an id in [0, V], V itself being a mask or a start; for paths of tokens.
    top: how many entries of the posterior are embedded exactly, the others as their mean (`ops.noise_embedding`); None: all.
        Below 4 top tokens the dense product is as fast, and is used.
    time: how the network learns t (the paper's figure 5). "token": a position before all others. "add": added to the
        embedding of every position. "adaln": scales, shifts and gates every block (DiT, Peebles & Xie 2023). "none": not.
    causal: a position sees itself and those before it; needs time="none". Gives `Denoiser.cache`.
    self_conditioning: `Denoiser.hidden` also reads its own previous result (Chen et al. 2023, "Analog Bits").
    """

    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    max_length: int = 256
    input: str = "posterior"
    top: int | None = 512
    time: str = "token"
    causal: bool = False
    self_conditioning: bool = False

    PRESETS: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        "demo": (4, 4, 256, 256),
        "small": (6, 6, 384, 256),
        "150m": (12, 12, 768, 1024),
        "1.5b": (48, 25, 1600, 1024),
    }

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "max_length"):
            value, least = getattr(self, name), 2 if name == "vocab_size" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, allowed is an integer >= {least}")
        if self.top is not None and (isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1):
            raise ValueError(f"top: got {self.top!r}, allowed is None or an integer >= 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd: got {self.n_embd}, allowed is a multiple of 2 n_head = {2 * self.n_head}")
        for name, allowed in (("input", INPUTS), ("time", TIMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is one of {allowed}")
        for name in ("causal", "self_conditioning"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is True or False")
        if self.causal and self.time != "none":
            raise ValueError(f"time: got {self.time!r}, allowed is 'none' where causal is True")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **overrides) -> DenoiserConfig:
        """A known shape, in layers / heads / width / max_length; overrides are any fields of the config.

        "demo" 4 / 4 / 256 / 256, "small" 6 / 6 / 384 / 256, "150m" 12 / 12 / 768 / 1024 (GPT-2's: 85 M parameters in the
        blocks, 163 M in all at V = 50,258), "1.5b" 48 / 25 / 1600 / 1024 (GPT-2 XL's: 1.47 G in the blocks, 1.64 G in all).
        """
        if name not in cls.PRESETS:
            raise ValueError(f"name: got {name!r}, allowed is one of {sorted(cls.PRESETS)}")
        shape = dict(zip(("n_layer", "n_head", "n_embd", "max_length"), cls.PRESETS[name], strict=True))
        return cls(vocab_size, **{**shape, **overrides})

    def to_dict(self) -> dict:
        return asdict(self)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class Cache:
    """Keys and values of the positions that a causal Denoiser has read; `Denoiser.hidden(..., cache=cache)` appends to it.

    length: positions held. Holds 2 n_layer B max_length D numbers; no gradient goes through it.
    """

    def __init__(self, config: DenoiserConfig, batch: int, weight: Tensor):
        size = config.n_embd // config.n_head
        self.length = 0
        self.pairs = weight.new_empty(config.n_layer, 2, batch, config.n_head, config.max_length, size)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new positions of one layer behind those held, and returns all; length is moved after the last layer."""
        pair, end = self.pairs[layer], self.length + k.shape[2]
        for old, new in zip(pair, (k, v), strict=True):
            old[:, :, self.length : end] = new.detach()
        return pair[0, :, :, :end], pair[1, :, :, :end]


class _Block(nn.Module):
    def __init__(self, config: DenoiserConfig):
        super().__init__()
        d = config.n_embd
        self.n_head, self.causal = config.n_head, config.causal
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.mlp_in = nn.Linear(d, 4 * d, bias=False)
        self.mlp_out = nn.Linear(4 * d, d, bias=False)
        if config.time == "adaln":
            self.modulation = nn.Linear(d, 6 * d, bias=False)
            nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, time: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        if time is None:
            x = x + self._attention(_norm(x), cos, sin, cache, layer)
            return x + self._mlp(_norm(x))
        # The gates start at 1, not at DiT's 0: the output projections are 0 already, and the product of two zeros would
        # have no gradient.
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(time).chunk(6, -1)
        x = x + (1 + gate) * self._attention(_norm(x) * (1 + scale) + shift, cos, sin, cache, layer)
        return x + (1 + mlp_gate) * self._mlp(_norm(x) * (1 + mlp_scale) + mlp_shift)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int) -> Tensor:
        b, length, d = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(_norm(z), cos, sin) for z in (q, k))
        sees = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            if length > 1:
                sees = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        if x.is_cpu:
            v = v.to(q.dtype)
        with torch.autocast("cpu", enabled=False):  # a CPU's 16-bit attention is four times slower in the backward pass
            causal = self.causal and cache is None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=causal)
        return self.attention_out(y.transpose(1, 2).reshape(b, length, d))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)).square())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


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
        config: see DenoiserConfig. path: the path that makes x_t: a LogitPath for the posterior input, of which its c is a
            part; a path of tokens for input="tokens".
        log_prior: (V,) log unigram frequencies for the posterior input; None: uniform.

    Parameters are of torch's default dtype, but float32 where that is float64. `.bfloat16()` and `.half()` cast them alone.
    """

    def __init__(self, config: DenoiserConfig, path: LogitPath, log_prior: Tensor | None = None):
        super().__init__()
        if path.vocab_size != config.vocab_size:
            raise ValueError(
                f"path: its vocab_size is {path.vocab_size}, allowed is that of config, {config.vocab_size}"
            )
        allowed = ("tokens",) if getattr(path, "reads", "rows") == "tokens" else ("simplex", "posterior")
        if not hasattr(path, "c") or getattr(path, "alpha", 1) != 1:  # the closed form is that of uniform noise
            allowed = tuple(name for name in allowed if name != "posterior")
        if config.input not in allowed:
            raise ValueError(f"input: got {config.input!r}, allowed is one of {allowed} for {path!r}")
        self.reads_posterior, self.self_conditions = config.input == "posterior", config.self_conditioning
        self.makes_noise = config.input != "tokens" and hasattr(path, "beta")
        self.caches, self.causal, self.max_length = config.causal, config.causal, config.max_length
        self.config, self.c, self.beta = config, getattr(path, "c", None), getattr(path, "beta", None)
        d = config.n_embd
        self.embedding = nn.Parameter(torch.randn(config.vocab_size + (config.input == "tokens"), d))
        if config.time != "none":
            self.time_in = nn.Linear(128, d, bias=False)
            self.time_out = nn.Linear(d, d, bias=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
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
        """An empty cache for `batch` sequences of up to max_length positions; needs a causal model."""
        if not self.config.causal:
            raise ValueError(f"causal: got {self.config.causal}, allowed is True where keys and values are cached")
        return Cache(self.config, batch, self.embedding)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """q_k proportional to pi_k (1 - (1 - e^-s) u_k)^-V, u = softmax(log x_t / (1 - t)), s = c t / (1 - t).

        x (B, L, V), t (B,) or (B, L). A row that is certain already (a given one) stays as it is.
        """
        t = t.reshape(len(x), -1).clamp_max(1 - 1e-6)  # at t = 1 a row is one-hot, whatever divides its logarithm
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
            if not self._is_sparse:
                return self.posterior(x, t).to(self.embedding.dtype) @ self.embedding
            entries = ops.token_posterior(
                x.log(), t.reshape(len(t), -1), self.log_prior, top=self.config.top, beta=self.beta
            )
            return ops.posterior_embedding(*entries, self.embedding, self.log_prior)
        return self._centred(x.to(self.embedding.dtype) @ self.embedding)

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
        options = {"beta": self.beta, "given": given, "row_offset": row_offset}
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
        self, h: Tensor, t: Tensor | float, *, previous: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Embeddings h (B, L, D) at times t (a number, (B,) or (B, L)) to what the head reads, (B, L, D).

        A time token carries the least time of a sequence, that of its free rows; "add" and "adaln" use each position's own.

        Args:
            previous: (B, L, D), what this returned for the same sequences before (no gradient goes through it); zeros, or
                None for all, where there is none. It is read as h + self_in(previous), and needs config.self_conditioning.
            cache: of `cache(B)`. h then holds the positions behind those of the cache, which takes them up.
        """
        config = self.config
        held = 0 if cache is None else cache.length
        if h.dim() != 3 or h.shape[2] != config.n_embd or held + h.shape[1] > config.max_length:
            allowed = f"(B, L <= {config.max_length - held}, {config.n_embd})"
            raise ValueError(
                f"h: got shape {tuple(h.shape)}, allowed is {allowed}" + f" behind {held} cached" * (held > 0)
            )
        b, length, _ = h.shape
        if cache is not None and (not config.causal or cache.pairs.shape[2] != b):
            raise ValueError(f"cache: got one of {cache.pairs.shape[2]} sequences, allowed is a causal model's of {b}")
        if previous is not None:
            if not config.self_conditioning or previous.shape != h.shape:
                allowed = f"{tuple(h.shape)}" if config.self_conditioning else "None without config.self_conditioning"
                raise ValueError(f"previous: got shape {tuple(previous.shape)}, allowed is {allowed}")
            h = h + self.self_in(previous.detach())
        t = self._times(t, b, length)
        h, time = _norm(h), None
        if config.time == "token":
            least = t.reshape(b, -1).amin(1) if length else t.expand(b)
            h = torch.cat([_norm(self._time(least))[:, None], h], 1)
        elif config.time == "add":
            h = h + self._time(t.reshape(b, -1))
        elif config.time == "adaln":
            time = F.silu(self._time(t.reshape(b, -1)))
        positions = slice(held, held + h.shape[1])
        cos, sin = self.cos[positions].to(h.dtype), self.sin[positions].to(h.dtype)
        for layer, block in enumerate(self.blocks):
            h = block(h, cos, sin, time, cache, layer)
        if cache is not None:
            cache.length += length
        return _norm(h[:, 1:] if config.time == "token" else h)

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
