"""What a network with an embedding matrix reads: rows of the simplex, their posteriors, or ids, made or not."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klflow_ext import ops
from klflow_ext.checks import check_field
from klflow_ext.model.config import Input
from klflow_ext.ops.arguments import INTEGERS, looks_at_values
from klflow_ext.path import LogitPath, Network, Path
from klflow_ext.path.base import scaled
from klflow_ext.path.logit import log_evidence


class Reader(Network):
    """A Network that reads what its path makes through one embedding matrix, so that no tensor of positions x V is built.

    A subclass defines `table`, `hidden` and `head`; embed, embed_noise, embed_posterior and embed_certain are here.

        class Encoder(Reader):
            def __init__(self, path):
                super().__init__(path)
                self.embedding = torch.nn.Embedding(path.vocab_size, 64)
                self.encoder = ...
                self.head = torch.nn.Linear(64, path.vocab_size)

            @property
            def table(self):
                return self.embedding.weight

            def hidden(self, h, t):
                return self.encoder(h)

    Args:
        path: what makes x_t.
        input: what a position feeds to the matrix, as in `DenoiserConfig.input`; None: "tokens" on a path of tokens, "posterior"
            where it has a closed form, else "simplex".
        top: as in `DenoiserConfig.top`.
        log_prior: (V,) log unigram frequencies for the posterior input; None: uniform.

    Raises:
        ValueError: an input that the path does not make, or an argument outside its range; the message names it.
    """

    path: Path
    log_prior: Tensor

    def __init__(self, path: Path, input: Input | None = None, top: int | None = 512, log_prior: Tensor | None = None):
        super().__init__()
        allowed: tuple[Input, ...] = ("posterior", "simplex") if path.closed_form else ("simplex",)
        allowed = ("tokens",) if path.reads == "tokens" else allowed
        if input is not None and input not in allowed:
            raise ValueError(f"input: got {input!r}, allowed is one of {allowed} for {path!r}")
        if top is not None:
            check_field("top", top, 1, "None or an integer >= 1")
        vocab = path.vocab_size
        self.path, self.input, self.top = path, input or allowed[0], top
        self.reads_posterior, self.makes_noise = self.input == "posterior", path.closed_form
        self.c: float | None = None
        self.beta: float | None = None
        if isinstance(path, LogitPath) and path.closed_form:
            self.c, self.beta = path.c, path.beta
        if log_prior is not None and log_prior.shape != (vocab,):
            raise ValueError(f"log_prior: got shape {tuple(log_prior.shape)}, allowed is ({vocab},)")
        uniform = torch.full((vocab,), -math.log(vocab), dtype=torch.float32)
        self.register_buffer("log_prior", uniform if log_prior is None else log_prior.float())

    def _apply(self, fn, recurse=True):
        """Casts parameters only: in 16 bits the prior would lose what it is made for."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    @property
    def table(self) -> Tensor:
        """The embedding matrix (V, D); for input="tokens" (V + 1, D), the last row being that of the mask or start."""
        raise NotImplementedError("table")

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
        vocab, longest = self.path.vocab_size, self.max_length
        tokens = self.input == "tokens"
        too_long = longest is not None and x.dim() > 1 and x.shape[1] > longest
        if x.dim() != 3 - tokens or too_long or (not tokens and x.shape[2] != vocab):
            length = "L" if longest is None else f"L <= {longest}"
            allowed = f"(B, {length})" if tokens else f"(B, {length}, {vocab})"
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is {allowed}")
        table = self.table
        if tokens:
            if x.dtype not in INTEGERS:
                raise ValueError(f"x: got {x.dtype}, allowed is {' or '.join(map(str, INTEGERS))}")
            if looks_at_values(x) and x.numel() and not 0 <= x.min() <= x.max() <= vocab:
                bad = x[(x < 0) | (x > vocab)][0].item()
                raise ValueError(f"x: got the id {bad}, allowed is 0 to V = {vocab}, which is the mask or start")
            return F.embedding(x, table)
        t = self._times(t, *x.shape[:2])
        if self.input == "posterior":
            x = x.float()
            top, beta = self.top, self.beta
            if not self._is_sparse or top is None or beta is None:
                return self.posterior(x, t).to(table.dtype) @ table
            ids, q, rest = ops.token_posterior(x.log(), t.reshape(len(t), -1), self.log_prior, top=top, beta=beta)
            return ops.posterior_embedding(ids, q, rest, table, self.log_prior)
        return self.scaled_rows(x.to(table.dtype) @ table, t.reshape(len(t), -1) == 1)

    def embed_certain(self, tokens: Tensor) -> Tensor:
        """embed of rows that show their tokens (B, L), which are never built."""
        h = F.embedding(tokens, self.table)
        return self.scaled_rows(h, torch.ones_like(tokens, dtype=torch.bool)) if self.input == "simplex" else h

    def embed_posterior(self, ids: Tensor, q: Tensor, rest: Tensor) -> Tensor:
        """embed of rows whose posterior is q (B, L, K) at ids, and `rest` (B, L) spread over the others as the prior is."""
        return ops.posterior_embedding(ids, q, rest, self.table, self.log_prior)

    def embed_noise(
        self, target: Tensor, t: Tensor | float, rng, *, given: Tensor | None = None, row_offset: int = 0,
        boost: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """embed(x_t, t) of x_t = noise_interpolate(target, t, rng), whose rows are never built.

        target (B, L); t a number, (B,) or (B, L); rng, given, row_offset as in `ops.noise_embedding`. With a posterior of
        more than 4 top tokens, all but its `top` largest entries are embedded as their mean. With boost, target and boost
        are (B, L, K): rows on the way of the basic scheme (`ops.noise_posterior`), for a posterior only.
        """
        if self.input == "tokens" or self.beta is None:
            raise ValueError(f"input: got {self.input!r}, allowed in embed_noise are rows of a LogitPath")
        if self.max_length is not None and target.shape[1] > self.max_length:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, allowed is a length of at most max_length = {self.max_length}"
            )
        t = self._times(t, *target.shape[:2])
        options: dict[str, Any] = {"beta": self.beta, "given": given, "row_offset": row_offset}
        t = t.reshape(len(t), -1)
        table = self.table
        if self.input == "posterior":
            top = self.top if self._is_sparse else None if boost is None else self.path.vocab_size
            options |= {"log_prior": self.log_prior, "top": top, "boost": boost}
            return ops.noise_embedding(target, t, table, rng, **options)
        certain = t == 1 if given is None else given | (t == 1)
        return self.scaled_rows(ops.noise_embedding(target, t, table, rng, **options), certain)

    @property
    def _is_sparse(self) -> bool:
        return self.top is not None and self.path.vocab_size > 4 * self.top

    def scaled_rows(self, h: Tensor, certain: Tensor) -> Tensor:
        """path.scaled(x) @ table, from h = x @ table; for input="simplex". The mean takes part as a number, not in the gradient.

        certain: (B, L) or (B, 1) bool, rows that show their tokens, for networks that read those otherwise.
        """
        return scaled(h, self.table.detach().mean(0), self.path.vocab_size)

    def _times(self, t: Tensor | float, b: int, length: int) -> Tensor:
        """t as (B,) or (B, L)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=self.log_prior.device)
        if t.shape not in ((), (b,), (b, length)):
            raise ValueError(f"t: got shape {tuple(t.shape)}, allowed is a number, ({b},) or ({b}, {length})")
        return t if t.dim() == 2 else t.expand(b)
