"""klflow eval."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import klflow_ext
from klflow_ext import data, evaluate
from klflow_ext.cli.command import Command
from klflow_ext.cli.infilling import Infilling, Kind
from klflow_ext.cli.plot import check_picture, figure_class, write_picture
from klflow_ext.cli.samples import LEAST_MAUVE, check_mauve, draw, others_beside, own_method, precision_of, print_table
from klflow_ext.cli.terminal import choose_device, shows_progress
from klflow_ext.evaluate.conditional import choose, measure_conditional, read_pairs
from klflow_ext.evaluate.text import Interval, need_sacrebleu
from klflow_ext.files import write_file
from klflow_ext.path import Likelihood, SampleOptions, as_network
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
        texts, held_texts = data.documents(data.one_file(paths, weights))
        return data.encode(tokenizer, texts), data.encode(tokenizer, held_texts)
    data.same_tokenizer(paths, tokenizer)
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

    path, progress = sampler.path, shows_progress()
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


def print_conditional(row: dict[str, Any]) -> None:
    """BLEU, chrF and ROUGE-L of what was written to prompts, and what they are worth for nothing."""
    print(
        f"\n{row['prompts']} prompts, {row['tries']} texts of {row['new_tokens']} tokens each, at most {row['nfe']} passes; "
        "means and 95 % bootstrap intervals over prompts, best of its tries:"
    )
    titles = {"samples": "written", "other_prompt": "written to another prompt", "other_text": "another prompt's text"}
    for name, title in titles.items():
        for kind in row["figures"][name]["bleu"]:
            cells = [f"{measure} {Interval(**kinds[kind])}" for measure, kinds in row["figures"][name].items()]
            print(f"  {title + (', best' if kind == 'best' else ''):<33}" + "  ".join(cells), flush=True)


@dataclass
class Eval(Command):
    """Held-out loss by time of a run; with --likelihood its -log p; with --samples or --judge, one table of what can be said
    of its samples, real text first, with --judge what another model says of them too; with --infilling, what it puts into the
    holes of code is worth; with --conditional, what it writes to prompts."""

    run_folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run folder. Or one of save_pretrained, or none for the model that comes with the package: both with --data."""
    likelihood: bool = False
    """-log p of `count` held-out texts, exactly where the method allows it, else as a bound."""
    judge: Path | None = None
    """Folder of stories260K, of an autoregressive run of this package, or of a causal model of `transformers`."""
    count: int = 32
    """Held-out texts of the likelihood."""
    length: int = 64
    """Tokens of each text of the losses, the likelihood and the table."""
    steps: int = 64
    """Passes of each sample."""
    samples: int | None = None
    """How many texts of each row of the table, at least 2; None: `count` with --judge, else no table."""
    mauve: bool = False
    """MAUVE of each row of the table too, of the same features of the judge as the distance: of at least 40 samples."""
    method: tuple[str, ...] = ()
    """Of the table, one or more ways to sample; none: the run's own."""
    temperature: tuple[float, ...] = (1.0,)
    """Of the table, one or more."""
    top_k: tuple[int, ...] = (20,)
    """Of the table, one or more; 0: all V."""
    infilling: Path | None = None
    """Code whose holes are filled with the first method, temperature and top-k, and tested: by its kind the folder of HumanEval-infilling, the file of HumanEval or MBPP, or Python files."""
    kind: Kind = "single-line"
    """Of infilling: holes of HumanEval-infilling, or lines removed from HumanEval, MBPP, or the functions of Python files."""
    share: tuple[float, ...] = (0.1,)
    """Of infilling, where lines are removed, one or more shares of them."""
    tasks: int | None = None
    """Of infilling, how many, evenly among all; None: all."""
    conditional: Path | None = None
    """JSONL with "prompt" and "text", .gz or not: of held-out prompts BLEU, chrF and ROUGE-L of what the first method writes."""
    prompts: int = 32
    """Of conditional, how many, at least 2."""
    new_tokens: int = 64
    """Of conditional, the tokens of each text."""
    tries: int | None = None
    """Fills of each task of infilling, texts for each prompt of conditional; None: 1 and 5."""
    window: int | None = None
    """Of infilling and conditional, the tokens that the run sees at once; None: as many as it was trained on."""
    seed: int = 0
    """Of the samples of the table, of infilling and of conditional."""
    plot: Path | None = None
    """A PNG of the table under the judge: bits per byte over entropy, for all temperatures and top-k, the data marked."""
    json: Path | None = None
    """A file for the table, infilling and conditional, with all settings and intervals."""
    data: tuple[str, ...] = ()
    """Where the token folders of the run are, if they have moved. Of a model without a run: a file of texts, or token folders."""
    device: str | None = None
    """cuda where torch sees a GPU and the kernels were built for it, else cpu."""

    def run(self):
        for least, names in (
            (1, ("count", "steps", "new_tokens", "tries", "tasks")),
            (2, ("length", "samples", "prompts")),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name}: got {value}, allowed is an integer >= {least}")
        samples = max(self.count, 2) if self.samples is None and self.judge is not None else self.samples
        if samples is not None or self.conditional is not None:
            need_sacrebleu()
        if self.mauve:
            check_mauve(samples, self.judge)
        if self.json is not None and samples is None and self.infilling is None and self.conditional is None:
            raise ValueError(
                f"json: got {self.json}, allowed is only with --samples, --judge, --infilling or --conditional"
            )
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ValueError(f"json: got {self.json}, allowed is a file in a folder that is there")
        if self.plot is not None:
            if self.judge is None:
                raise ValueError(f"plot: got {self.plot}, allowed is only with --judge")
            check_picture("plot", self.plot)
            figure_class()
        for name in ("temperature", "top_k"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got none, allowed are one or more")
        holes = None
        if self.infilling is not None:
            holes = Infilling(
                self.infilling, self.kind, self.tasks, 1 if self.tries is None else self.tries, self.share
            )
        pairs = None if self.conditional is None else read_pairs(self.conditional)[1]
        folder = STORIES if self.run_folder is None else self.run_folder
        saved = self.run_folder is None or is_saved_model(folder)
        while True:  # until no training has put a later one in its place meanwhile
            checkpoint = None if saved else Run(folder).last().folder.name
            model, path, tokenizer = load_run(self.run_folder)
            if saved or Run(folder).last().folder.name == checkpoint:
                break
        writes = samples is not None or holes is not None or pairs is not None
        if writes and tokenizer is None:
            raise ValueError(f"run: {folder} has no tokenizer.json, without which there is no text")
        longest = as_network(model, path).max_length
        if longest is not None and self.length > longest:
            raise ValueError(f"length: got {self.length}, allowed is at most the run's max_length, {longest}")
        trained = (longest or 1024) if saved else Run(folder).config()["train"]["length"]
        window = trained if self.window is None else self.window
        if window < 2 or (longest is not None and window > longest):
            raise ValueError(f"window: got {window}, allowed is 2 to the run's max_length, {longest}")
        device = choose_device(self.device)
        sampler = Sampler(model.to(device), path, device, tokenizer=tokenizer)
        for method, temperature, top_k in itertools.product(self.method or (None,), self.temperature, self.top_k):
            options = SampleOptions(min(self.steps, 2), method, top_k=top_k or None, temperature=temperature)
            sampler.sample((1, self.length), options, seed=self.seed)  # what is refused is refused here
        if holes is not None:
            holes.check(tokenizer)
        if pairs is not None:
            choose(pairs, tokenizer, self.prompts, self.new_tokens, window)
        stream, held = texts_for(tokenizer, self.data) if saved else Run(folder).streams(self.data)
        if self.mauve and others_beside(samples or 0, self.length, held) < LEAST_MAUVE:
            raise ValueError(
                f"mauve: got {len(held)} held-out tokens, allowed with {samples} texts of {self.length} are {LEAST_MAUVE} more such texts"
            )
        judge = None if self.judge is None else evaluate.open_judge(self.judge, device)
        print_losses(model, path, stream, held, self.length)
        if self.likelihood:
            print_likelihoods(
                sampler, tokenizer, data.batch(held, self.count, self.length, seed=12345, step=0).to(device)
            )
        found: dict[str, Any] = {}
        if samples is not None:
            found |= print_table(
                sampler, stream, held, judge, samples=samples, length=self.length, steps=self.steps,
                methods=self.method or (None,), temperatures=self.temperature, top_ks=self.top_k, with_mauve=self.mauve, seed=self.seed,
            )  # fmt: skip
        if self.plot is not None:
            name = folder.name if saved else folder.resolve().name
            write_picture(draw(found, f"{name}: bits per byte against entropy"), self.plot)
            print(f"picture: {self.plot}")
        one: dict[str, Any] = {
            "method": self.method[0] if self.method else None, "steps": self.steps, "temperature": self.temperature[0],
            "top_k": self.top_k[0] or None,
        }  # fmt: skip
        if holes is not None:
            found["infilling"] = holes.measure(sampler, window, self.seed, **one)
        if pairs is not None:
            found["conditional"] = measure_conditional(
                pairs, sampler, count=self.prompts, new_tokens=self.new_tokens, window=window, seed=self.seed,
                tries=5 if self.tries is None else self.tries, progress=shows_progress(), **one,
            )  # fmt: skip
            print_conditional(found["conditional"])
        if self.json is not None:
            found |= {
                "version": klflow_ext.__version__, "torch": torch.__version__, "python": platform.python_version(),
                "run": folder.name if saved else str(folder), "checkpoint": checkpoint, "path": repr(path), "device": str(device),
                "precision": precision_of(sampler),
                "default_method": own_method(sampler),
            }  # fmt: skip
            write_file(self.json, lambda file: file.write_text(json.dumps(found, indent=2) + "\n", "utf-8"))
