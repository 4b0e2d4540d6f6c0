"""klflow sample, complete and infill."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from klflow_ext.cli.command import Command
from klflow_ext.cli.prompts import given_texts
from klflow_ext.cli.results import print_results
from klflow_ext.cli.show import Show
from klflow_ext.cli.terminal import VERBOSE, choose_device, note, shows_progress
from klflow_ext.path import SampleOptions
from klflow_ext.run import load_run
from klflow_ext.sample import Sampler, Samples

MOST = 1_000_000  # results of a prompt, and tokens of a result


@dataclass(frozen=True)
class Options(SampleOptions):
    """How to generate."""

    layout: str | None = None
    """Of slices and segments, the order of the positions, such as "0 4 | 2 6 | 1 3 5 7": there are then as many passes as sets."""
    temperature: float | tuple[float, float] = 1.0
    """Of all passes, or of the first and the last. 0 alone is the likeliest token of each draw, as --top-k 1."""


@dataclass
class Generation(Command):
    """How to generate."""

    run_folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run folder, or one of save_pretrained. Without it, the model of English stories that comes with the package."""
    options: Annotated[tyro.conf.OmitArgPrefixes[Options], tyro.conf.arg(name="sampling")] = field(
        default_factory=Options
    )
    show: tyro.conf.OmitArgPrefixes[Show] = field(default_factory=Show)
    seed: int = 0
    """Of all results together: each has a seed of its own, made of this one."""
    seeds: tuple[int, ...] = ()
    """In its place the seed of each result, as --jsonl shows it, to make some of them again."""
    jsonl: bool = False
    """Print an object of JSON for each result: text, tokens, seed, prompt, method, steps, passes."""
    log_likelihood: bool = False
    """With --jsonl, log_likelihood of each result: exact, in nats per generated token, of the method at temperature 1 and among all
    tokens; null where the method has no exact one. It takes as many passes again."""
    device: str | None = None
    """cuda where torch sees a GPU and the kernels were built for it, else cpu."""

    def check_run(self, option: str) -> None:
        """ValueError where what stands in the place of the run folder is meant as the text of an option, which has none."""
        folder = self.run_folder
        if folder is not None and not folder.exists():
            raise ValueError(f"run: {folder} is no run folder (did you mean --{option} {shlex.quote(str(folder))}?)")

    def generate(self, make: Callable[[Sampler, dict[str, Any]], Samples], prompts: Sequence[str | None]) -> None:
        """Prints what `make(sampler, options of infill)` gives, a result for each prompt."""
        if self.log_likelihood and not self.jsonl:
            raise ValueError("log_likelihood: got it without jsonl, allowed is both: --jsonl --log-likelihood")
        model, path, tokenizer = load_run(self.run_folder)
        if tokenizer is None:
            raise ValueError(f"run: {self.run_folder} has no tokenizer.json, without which there is no text")
        device = choose_device(self.device)
        sampler = Sampler(model.to(device), path, device, tokenizer=tokenizer)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        note(
            f"model: {self.run_folder or 'the stories of the package'}, {size:.1f} M parameters on {device}; {path!r}",
            VERBOSE,
        )
        note(f"method: {self.options.method or sampler.default_method}; {self.options}", VERBOSE)
        options = {"options": self.options, "seed": self.seeds or self.seed, "progress": shows_progress()}
        with self.show.start(tokenizer, path.vocab_size) as showing:
            result = make(sampler, options | showing.options)
        method = self.options.method or sampler.default_method
        name = "stories" if self.run_folder is None else self.run_folder.name
        showing.end(result, f"{name}, {method}, {result.nfe} passes, seed {self.seed}")
        print_results(sampler, result, self.options, prompts, self.jsonl, showing.on_screen, self.log_likelihood)


def times(prompts: list[str], count: int) -> list[str]:
    """Each of them `count` times, side by side."""
    return [prompt for prompt in prompts for _ in range(checked("count", count))]


def checked(name: str, value: int) -> int:
    """More than MOST would fill the memory before anything refuses them."""
    if not 1 <= value <= MOST:
        raise ValueError(f"{name}: got {value}, allowed is an integer in [1, {MOST:,}]")
    return value


@dataclass
class Sample(Generation):
    """Generate texts from nothing."""

    count: int = 4
    """Texts."""
    length: int | None = None
    """Tokens of each; 64, or the model's max_length where that is less."""

    def run(self):
        none: list[list[int]] = [[]] * checked("count", self.count)
        if self.length is not None:
            checked("length", self.length)
        self.generate(lambda sampler, options: sampler.complete(none, self.length, **options), [None] * self.count)


@dataclass
class Complete(Generation):
    """Continue prompts."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """May be given several times. A line end is $'...\\n...' in most shells."""
    prompts_file: Path | None = None
    """More of them, one a line, or JSONL with "prompt"; - is stdin."""
    count: int = 1
    """Results for each prompt."""
    length: int | None = None
    """Tokens of each result, its prompt included."""
    new_tokens: int | None = None
    """Tokens after each prompt, in place of length; 64 where neither is given, or as many as the model has room for."""

    def run(self):
        given = given_texts("prompt", self.prompt, self.prompts_file)
        if not given:
            self.check_run("prompt")
        prompts = times(given or [""], self.count)
        if self.length is not None:
            checked("length", self.length)

        def make(sampler, options):
            return sampler.complete(prompts, self.length, new_tokens=self.new_tokens, **options)

        self.generate(make, prompts)


@dataclass
class Infill(Generation):
    """Fill the {?n} holes of texts, each of n tokens."""

    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """May be given several times. A line end is $'...\\n...' in most shells."""
    texts_file: Path | None = None
    """More of them, one a line, or JSONL with "text"; - is stdin."""
    count: int = 1
    """Results for each text."""

    def run(self):
        texts = times(given_texts("text", self.text, self.texts_file), self.count)
        if not texts:
            self.check_run("text")
            raise ValueError("text: got none, allowed is a text with a hole such as {?8}")
        self.generate(lambda sampler, options: sampler.infill(texts, **options), texts)
