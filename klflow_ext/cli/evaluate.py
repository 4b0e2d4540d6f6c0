"""klflow eval."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from klflow_ext import data, evaluate
from klflow_ext.cli.terminal import choose_device
from klflow_ext.path import Likelihood, as_network
from klflow_ext.run import STORIES, Run, is_saved_model, load_run
from klflow_ext.sample import Sampler


def print_losses(model, path, stream, held, length):
    prior = evaluate.unigram_log_prior(stream, path.vocab_size)
    print(
        f"held-out loss, nats per token (unigram entropy {evaluate.unigram_entropy(held, path.vocab_size, prior):.3f}):"
    )
    losses = evaluate.loss_by_time(model, path, data.batch(held, 64, length, seed=12345, step=0))
    print("  t    " + "  ".join(f"{t:6.3f}" for t in losses))
    print("  loss " + "  ".join(f"{v:6.3f}" for v in losses.values()))


def texts_for(tokenizer: Any, names: Sequence[str]) -> tuple[data.Stream, data.Stream]:
    """(training, held-out) tokens for a model that came without its text: of a file of texts, or of token folders.

    Raises:
        ValueError: there is none, or token folders have another tokenizer.
    """
    paths, weights = data.parse_sources(names)
    if not paths or tokenizer is None:
        what = "no text" if not paths else "a model without a tokenizer"
        raise ValueError(f"data: got {what}, allowed is --data with a text for a model that came without its own")
    if not any(map(data.is_token_folder, paths)):
        if len(paths) > 1:
            raise ValueError(f"data: got {len(paths)} files, allowed are one file of texts or token folders")
        texts, held_texts = data.documents(paths[0])
        return data.encode(tokenizer, texts), data.encode(tokenizer, held_texts)
    for path in paths:
        if data.TokenFolder(path).tokenizer().to_str() != tokenizer.to_str():
            raise ValueError(f"data: {path} has another tokenizer, allowed is that of the model")
    return data.open_streams(paths, weights)


def print_likelihoods(sampler: Sampler, tokenizer, tokens: torch.Tensor) -> None:
    """-log p of held-out texts (B, L): exactly of the sampler that draws positions for good, by passes, and the path's bound."""
    count, length = tokens.shape
    size = None if tokenizer is None else sum(len(tokenizer.decode(row.tolist()).encode()) for row in tokens)
    print(f"\n-log p of {count} held-out texts of {length} tokens, with its standard error:")

    def show(name: str, found: Likelihood) -> None:
        line = f"  {name:<34} {found.per_token:.3f} +- {found.standard_error:.3f} nats per token"
        if size is not None:
            line += f", {found.bits_per_byte(size):.3f} bits per byte"
        print(line + ("" if found.exact else " (upper bound)"), flush=True)

    path, progress = sampler.path, sys.stdout.isatty()
    if path.way is None:
        for steps in sorted({min(n, length) for n in (4, 8, 16, 32, length)}):
            show(
                f"{sampler.default_method}, {steps} passes", sampler.likelihood(tokens, steps=steps, progress=progress)
            )
    if path.has_likelihood:
        name = {"logit": "all at once, race of the noise", "mask": "masks, in random order"}.get(
            path.kind, "left to right"
        )
        show(name, path.likelihood(sampler.model, tokens))


@dataclass
class Eval:
    """Held-out loss by time of a run; with --likelihood its -log p; with --judge, bits per byte of its samples under a llama2.c
    model."""

    run_folder: tyro.conf.Positional[Path | None] = None
    """A run folder. Or one of save_pretrained, or none for the model that comes with the package: both with --data."""
    likelihood: bool = False
    """-log p of `count` held-out texts, exactly where the method allows it, else as a bound."""
    judge: Path | None = None
    """Folder with stories260K.bin and tok512.bin."""
    count: int = 32
    length: int = 64
    steps: int = 64
    data: tuple[str, ...] = ()
    """Where the token folders of the run are, if they have moved. Of a model without a run: a file of texts, or token folders."""
    device: str | None = None

    def run(self):
        for name, least in (("count", 1), ("length", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is an integer >= {least}")
        model, path, tokenizer = load_run(self.run_folder)
        longest = as_network(model, path.vocab_size).max_length
        if longest is not None and self.length > longest:
            raise ValueError(f"length: got {self.length}, allowed is at most the run's max_length, {longest}")
        device = choose_device(self.device)
        model = model.to(device)
        folder = STORIES if self.run_folder is None else self.run_folder
        stream, held = texts_for(tokenizer, self.data) if is_saved_model(folder) else Run(folder).streams(self.data)
        # First, so that a wrong folder fails at once.
        judge = None if self.judge is None else evaluate.Judge(self.judge)
        print_losses(model, path, stream, held, self.length)
        sampler = Sampler(model, path, device)
        if self.likelihood:
            print_likelihoods(
                sampler, tokenizer, data.batch(held, self.count, self.length, seed=12345, step=0).to(device)
            )
        if judge is None:
            return
        generator = np.random.default_rng(0)
        real = data.batch(held, self.count, self.length, seed=0, step=0).tolist()
        counts = data.token_counts(stream, path.vocab_size)
        unigram = generator.choice(path.vocab_size, (self.count, self.length), p=counts / counts.sum())
        rows: dict[str, Iterable] = {"real text": real, "unigram-sampled": unigram}
        schemes: dict[str, dict[str, Any]] = {
            "basic": {"method": "basic"},
            "sampling, top-k 20": {"method": "sampling", "top_k": 20},
            "sampling, top-k 1": {"method": "sampling", "top_k": 1},
            "hybrid, top-k 20": {"method": "hybrid", "top_k": 20},
        }
        schemes[f"{sampler.default_method}, top-k 20"] = {"top_k": 20}
        if path.way is not None:
            schemes = {"left to right, top-k 20": {"top_k": 20}}
        for name, options in schemes.items():
            result = sampler.sample((self.count, self.length), steps=self.steps, **options)
            rows[f"{name}, NFE {result.nfe}"] = [tokens.tolist() for tokens in result.tokens]
        print(f"{self.count} texts of {self.length} tokens: bits per byte under the judge (token entropy, nats)")
        for name, sequences in rows.items():
            texts = [tokenizer.decode([int(i) for i in tokens]) for tokens in sequences]
            print(
                f"  {name:<34} {judge.bits_per_byte(texts):.2f} ({evaluate.token_entropy(sequences):.2f})", flush=True
            )
