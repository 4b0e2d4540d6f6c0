"""The denoiser: a bidirectional transformer that reads noisy rows and predicts the token of every position."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klflow_ext import ops
from klflow_ext.path import LogitPath


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a Denoiser.

    input: what a position feeds to the embedding matrix. "simplex": x_t itself, as the paper does. "posterior": the exact
        posterior of the token given its own noisy row and the unigram prior (ExactDenoiser for one position), in closed form.
    top: how many entries of the posterior are embedded exactly, the others as their mean (`ops.noise_embedding`); None: all.
        Below 4 top tokens the dense product is as fast, and is used.
    """

    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    max_length: int = 256
    input: str = "posterior"
    top: int | None = 512

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "max_length"):
            value, least = getattr(self, name), 2 if name == "vocab_size" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, allowed is an integer >= {least}")
        if self.top is not None and (isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1):
            raise ValueError(f"top: got {self.top!r}, allowed is None or an integer >= 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd: got {self.n_embd}, allowed is a multiple of 2 n_head = {2 * self.n_head}")
        if self.input not in ("simplex", "posterior"):
            raise ValueError(f"input: got {self.input!r}, allowed is 'simplex' or 'posterior'")

    def to_dict(self) -> dict:
        return asdict(self)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class _Block(nn.Module):
    def __init__(self, config: DenoiserConfig):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.mlp_in = nn.Linear(d, 4 * d, bias=False)
        self.mlp_out = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, length, d = x.shape
        q, k, v = self.qkv(_norm(x)).view(b, length, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(_norm(z), cos, sin) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attention_out(y.transpose(1, 2).reshape(b, length, d))
        return x + self.mlp_out(F.relu(self.mlp_in(_norm(x))).square())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Denoiser(nn.Module):
    """model(x_t, t) -> logits of p(k | x_t, t) for every position: head(hidden(embed(x_t, t), t)).

    embed_noise makes the same embedding from tokens, a time and a seed, and head is a plain matrix, so that training and
    sampling (`LogitPath.loss`, `Sampler`) need no tensor of positions x V.

    Pre-norm transformer without biases: RMSNorm, RoPE, QK-norm, ReLU^2, the time as a prepended token. Output projections
    start at zero, so that the first prediction is uniform. The embedded input is centred and scaled: x_t @ W of a noisy row
    averages V random rows (mean square near 1e-8 at V = 50k, below any eps), so (x_t @ W - mean W) sqrt(V) is used, whose
    entries have unit variance for pure noise; the mean takes part as a number, not in the gradient.

    Args:
        config: see DenoiserConfig. path: the LogitPath that makes x_t (its c is part of the posterior input).
        log_prior: (V,) log unigram frequencies for the posterior input; None: uniform.
    """

    def __init__(self, config: DenoiserConfig, path: LogitPath, log_prior: Tensor | None = None):
        super().__init__()
        if path.vocab_size != config.vocab_size:
            raise ValueError(
                f"path: its vocab_size is {path.vocab_size}, allowed is that of config, {config.vocab_size}"
            )
        self.config, self.c, self.beta = config, path.c, path.beta
        d = config.n_embd
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, d))
        self.time_in = nn.Linear(128, d, bias=False)
        self.time_out = nn.Linear(d, d, bias=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        for block in self.blocks:
            nn.init.zeros_(block.attention_out.weight)
            nn.init.zeros_(block.mlp_out.weight)
        nn.init.zeros_(self.head.weight)
        uniform = torch.full((config.vocab_size,), -math.log(config.vocab_size))
        if log_prior is not None and log_prior.shape != uniform.shape:
            raise ValueError(f"log_prior: got shape {tuple(log_prior.shape)}, allowed is ({config.vocab_size},)")
        self.register_buffer("log_prior", uniform if log_prior is None else log_prior.float())
        half = d // config.n_head // 2
        angles = torch.outer(torch.arange(config.max_length + 1.0), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between the embeddings and the head: what Muon is for."""
        return [p for block in self.blocks for p in block.parameters()]

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """q_k proportional to pi_k (1 - (1 - e^-s) u_k)^-V, u = softmax(log x_t / (1 - t)), s = c t / (1 - t).

        x (B, L, V), t (B,) or (B, L). A row that is certain already (a given one) stays as it is.
        """
        t = t.reshape(len(x), -1, 1)
        u = (x.log() / (1 - t)).softmax(-1)
        certainty = -torch.expm1(-self.c * t / (1 - t))
        evidence = -x.shape[-1] * torch.log1p(-certainty * u)
        q = (self.log_prior + evidence).softmax(-1)
        return torch.where(x.amax(-1, keepdim=True) >= 1, x, q)

    def embed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Rows x (B, L, V) on the simplex at times t (a number, (B,) or (B, L)) as embeddings (B, L, D)."""
        b, length, vocab = x.shape
        if vocab != self.config.vocab_size or length > self.config.max_length:
            allowed = f"(B, L <= {self.config.max_length}, {self.config.vocab_size})"
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is {allowed}")
        x = x.to(self.embedding.dtype)
        if self.config.input == "posterior":
            return self.posterior(x, self._times(t, b, length)) @ self.embedding
        return self._centred(x @ self.embedding)

    def embed_noise(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """embed(x_t, t) of x_t = noise_interpolate(target, t, rng), whose rows are never built.

        target (B, L); t a number, (B,) or (B, L); rng, given, row_offset as in `ops.noise_embedding`. With a posterior of
        more than 4 top tokens, all but its `top` largest entries are embedded as their mean.
        """
        config = self.config
        t = self._times(t, *target.shape)
        options = {"beta": self.beta, "given": given, "row_offset": row_offset}
        t = t.reshape(len(t), -1)
        if config.input == "posterior":
            top = config.top if config.top is not None and config.vocab_size > 4 * config.top else None
            return ops.noise_embedding(target, t, self.embedding, rng, log_prior=self.log_prior, top=top, **options)
        return self._centred(ops.noise_embedding(target, t, self.embedding, rng, **options))

    def _centred(self, h: Tensor) -> Tensor:
        vocab = self.config.vocab_size
        return (h - self.embedding.detach().mean(0)) * math.sqrt(vocab)

    def _times(self, t: Tensor | float, b: int, length: int) -> Tensor:
        """t as (B,) or (B, L)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=self.embedding.device)
        if t.shape not in ((), (b,), (b, length)):
            raise ValueError(f"t: got shape {tuple(t.shape)}, allowed is a number, ({b},) or ({b}, {length})")
        return t if t.dim() == 2 else t.expand(b)

    def hidden(self, h: Tensor, t: Tensor | float) -> Tensor:
        """Embeddings h (B, L, D) at times t to what the head reads, (B, L, D).

        The time token carries the least time of a sequence, that of its free rows.
        """
        b, length, _ = h.shape
        t = self._times(t, b, length)
        least = t.reshape(b, -1).amin(1) if length else t.expand(b)
        phases = 1000 * least[:, None] * torch.exp(-math.log(10000) * torch.arange(64, device=h.device) / 64)
        time = self.time_out(F.silu(self.time_in(torch.cat([phases.sin(), phases.cos()], -1))))
        h = torch.cat([_norm(time)[:, None], _norm(h)], 1)
        cos, sin = self.cos[: length + 1], self.sin[: length + 1]
        for block in self.blocks:
            h = block(h, cos, sin)
        return _norm(h[:, 1:])

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """x (B, L, V) rows on the simplex, t a number, (B,) or (B, L), in [0, 1); returns logits (B, L, V).

        Each row's posterior uses its own time.
        """
        return self.head(self.hidden(self.embed(x, t), t))
