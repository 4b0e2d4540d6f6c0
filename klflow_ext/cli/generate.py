"""klflow sample, complete and infill."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from klflow_ext.cli.show import Show
from klflow_ext.cli.terminal import choose_device, given_text, printable
from klflow_ext.data import parse_holes
from klflow_ext.path import SampleOptions, as_network
from klflow_ext.run import Run
from klflow_ext.sample import Sampler, Samples


@dataclass(frozen=True)
class Options(SampleOptions):
    """How to generate."""

    temperature: float | tuple[float, float] = 1.0
    """Of all passes, or of the first and the last."""


@dataclass
class Generation:
    """How to generate."""

    run_folder: tyro.conf.Positional[Path]
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    show: tyro.conf.OmitArgPrefixes[Show] = field(default_factory=Show)
    seed: int = 0
    device: str | None = None

    def generate(
        self, make: Callable[[Sampler, Any, dict[str, Any]], Samples], length: int = 1, count: int = 1
    ) -> None:
        """Prints what `make(sampler, tokenizer, options of infill)` gives."""
        run = Run(self.run_folder)
        model, path = run.model()
        tokenizer = run.tokenizer()
        if tokenizer is None:
            raise ValueError(f"run: {self.run_folder} has no tokenizer.json, without which there is no text")
        if count < 1:
            raise ValueError(f"count: got {count}, allowed is an integer >= 1")
        longest = as_network(model, path.vocab_size).max_length
        if length < 1 or (longest is not None and length > longest):
            most = "" if longest is None else f" to the run's max_length, {longest}"
            raise ValueError(f"length: got {length}, allowed is 1{most}")
        device = choose_device(self.device)
        sampler = Sampler(model.to(device), path, device)
        options = {"options": self.options, "seed": self.seed, "progress": sys.stderr.isatty()}
        with self.show.start(tokenizer, path.vocab_size) as showing:
            result = make(sampler, tokenizer, options | showing.options)
        method = self.options.method or sampler.default_method
        showing.end(result, f"{run.folder.name}, {method}, {result.nfe} passes, seed {self.seed}")
        for tokens in [] if showing.on_screen else result.tokens:
            print(printable(tokenizer.decode(tokens.tolist())) + "\n   .")
        print(f"{result.nfe} passes, {result.seconds:.1f} s")


@dataclass
class Sample(Generation):
    """Generate texts with a trained run."""

    count: int = 4
    length: int = 64

    def run(self):
        def make(sampler, tokenizer, options):
            return sampler.sample((self.count, self.length), **options)

        self.generate(make, self.length, self.count)


@dataclass
class Complete(Generation):
    """Continue a prompt."""

    prompt: str = ""
    length: int = 64

    def run(self):
        prompt = given_text("prompt", self.prompt)

        def make(sampler, tokenizer, options):
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            return sampler.complete([ids], self.length, **options)

        self.generate(make, self.length)


@dataclass
class Infill(Generation):
    """Fill the {?n} holes of a text, each of n tokens."""

    text: str = ""

    def run(self):
        def make(sampler, tokenizer, options):
            tokens, given = parse_holes(given_text("text", self.text), tokenizer)
            return sampler.infill(torch.tensor([tokens]), torch.tensor([given]), **options)

        self.generate(make)
