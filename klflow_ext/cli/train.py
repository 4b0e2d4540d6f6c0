"""klflow demo and klflow train."""

from __future__ import annotations

import math
import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from klflow_ext.cli.command import Command
from klflow_ext.cli.evaluate import print_losses
from klflow_ext.cli.terminal import QUIET, USUAL, VERBOSE, choose_device, note, printable, spoken
from klflow_ext.data import Stream, removed_lines
from klflow_ext.run import Run
from klflow_ext.sample import Sampler
from klflow_ext.train import NetworkChoice, Prepared, TrainConfig, Trainer, join_processes, leave_processes, prepare
from klflow_ext.train.processes import is_first, noticing_loss, restarts
from klflow_ext.train.progress import span
from klflow_ext.train.tensorboard import TensorBoard, summary_writer

ENDLESS, FEW = 1_000_000, 100  # steps that are meant as no limit; steps that are worth a warning


def say(line: str) -> None:
    """A line of the first of several processes; one that warns is said in any case."""
    if is_first():
        note(line, QUIET if line.startswith("warning: ") else USUAL)


def say_estimate(trainer: Trainer) -> None:
    """How long the run will take and what it holds, from a step that is measured and thrown away."""
    if is_first():
        note(f"training: {trainer.config}", VERBOSE)
    c, second = trainer.config, trainer.time_step()
    left = c.steps - trainer.step
    seconds = left * second
    clock = math.inf if c.max_seconds is None else max(c.max_seconds - trainer.seconds, 0.0)
    line = f"{min(left, int(clock / second)) if clock < seconds else left:,} steps of {second:.2f} s: about {span(min(seconds, clock))}"
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(trainer.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(f"{line}; {memory / 2**30:.1f} GB of memory so far")
    if clock < seconds and c.steps < ENDLESS:
        say(
            f"warning: {c.steps:,} steps take about {span(trainer.seconds + seconds)}, so --seconds {c.max_seconds:g} ends the run at about step "
            f"{trainer.step + int(clock / second):,}"
        )
    if min(left, clock / second) < FEW:
        say(f"warning: in fewer than {FEW} steps a model learns hardly anything")


@dataclass(frozen=True)
class Plan(TrainConfig):
    """How to train."""

    max_seconds: Annotated[float | None, tyro.conf.arg(name="seconds")] = None
    """Training time, which ends a run before its steps do; the learning rate follows what ends first."""
    heldout_every: int = 250
    """Steps between looks at the loss of held-out text, the mean over times; 0: none. The checkpoint where it was lowest stays beside
    the last ones."""


@dataclass
class Training(Command):
    """Text and training, shared by demo, train and adapt."""

    data: tuple[str, ...] = ()
    """A file of texts (UTF-8, JSONL or Parquet, also .gz and .zst) that memory holds, or token folders (klflow prepare), of
    several each as FOLDER=WEIGHT; without it, the source of this Python's standard library."""
    out: Path = Path("runs/demo")
    """Run folder to write."""
    overwrite: bool = False
    """Replace a run that is there."""
    train: tyro.conf.OmitArgPrefixes[Plan] = field(default_factory=Plan)
    config: Path | None = None
    """A JSON file of options by their names, {"steps": 2000, "lr": 0.001}, or the config.json of a run's checkpoint. Options on the
    command line are stronger."""
    device: str | None = None
    """cuda where torch sees a GPU and the kernels were built for it, else cpu."""

    show_every: int = 0
    """Steps between texts that the model writes as it learns, which are printed and stand in log.jsonl; 0: none."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into the folder tensorboard of the run (pip install tensorboard)."""

    def check(self) -> None:
        """ValueError, before any work, for an option that cannot be."""
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.show_every < 0 or (self.show_every and processes > 1):
            allowed = "an integer >= 0, and 0 with several processes, whose weights may lie apart"
            raise ValueError(f"show_every: got {self.show_every}, allowed is {allowed}")
        if self.tensorboard:
            summary_writer()

    def fit(self, trainer: Trainer) -> Any:
        """Says how long it takes, and trains; the model that the run gives, in evaluation mode."""
        say_estimate(trainer)
        with ExitStack() as stack:
            callbacks = [self.show(trainer)] if self.show_every else []
            if self.tensorboard and trainer.run is not None and trainer.rank == 0:
                board = TensorBoard(trainer.run.folder / "tensorboard", trainer.step)
                callbacks.append(stack.enter_context(board))

            def callback(record: dict[str, Any]) -> None:
                for one in callbacks:
                    one(record)

            trainer.fit(spoken() >= USUAL, callback if callbacks else None)
        model = trainer.averaged_model().eval()
        leave_processes()
        return model

    def show(self, trainer: Trainer):
        """A callback that prints a text of the model now and then, and adds it to the log."""
        tokenizer = trainer.tokenizer or (None if trainer.run is None else trainer.run.tokenizer())
        if tokenizer is None:
            raise ValueError(f"show_every: got {self.show_every}, allowed is 0 for a run without a tokenizer")

        def callback(record):
            if record["step"] % self.show_every == 0:
                sampler = Sampler(trainer.averaged_model(), trainer.path, trainer.device)
                length = min(64, trainer.config.length)
                tokens = sampler.sample((1, length), steps=min(32, length), seed=trainer.config.seed).tokens[0]
                record["sample"] = tokenizer.decode(tokens.tolist())
                print(f"\n--- step {record['step']}: {printable(record['sample'])}", flush=True)

        return callback

    def report(self, trainer: Trainer, model: Any, heldout: Stream) -> None:
        """What the run is worth, and where it is."""
        if trainer.rank == 0:
            print_losses(model, trainer.path, trainer.stream, heldout, trainer.config.length)
            print(f"run folder: {self.out if trainer.run is None else trainer.run.folder}")


@dataclass
class Settings(Training):
    """Text, model and training, shared by demo and train."""

    tokenizer: str | None = None
    """A tokenizers file (tokenizer.json), a folder that has one, or the name of a model whose files the Hub's cache has, instead of one
    trained here."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained here."""
    network: tyro.conf.OmitArgPrefixes[NetworkChoice] = field(default_factory=NetworkChoice)

    def prepare(self) -> Prepared:
        return prepare(
            self.data or None,
            self.out,
            train=self.train,
            network=self.network,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            overwrite=self.overwrite,
            device=choose_device(self.device),
            report=say,
        )


@dataclass
class Demo(Settings):
    """Train a small denoiser on real text (250 steps, about four minutes), show its loss by time, sample, and fill a removed line."""

    train: tyro.conf.OmitArgPrefixes[Plan] = field(default_factory=lambda: Plan(steps=250))

    def run(self):
        self.check()
        prepared = self.prepare()
        trainer, tokenizer = prepared.trainer, prepared.tokenizer
        model, path = self.fit(trainer), trainer.path
        if trainer.rank:
            return
        length, seed = self.train.length, self.train.seed
        print_losses(model, path, trainer.stream, prepared.heldout, length)
        sampler = Sampler(model, path, trainer.device)
        methods = ("basic", "sampling", "hybrid", sampler.default_method)
        for method in methods if path.way is None else methods[-1:]:
            result = sampler.sample((2, length), steps=32, method=method, seed=seed)
            print(f"\n--- {path.way or method}, {result.nfe} passes, {result.seconds:.1f} s")
            texts = [tokenizer.decode(tokens.tolist(), skip_special_tokens=False) for tokens in result.tokens]
            print("\n\n".join(map(printable, texts)))
        self.fill(sampler, tokenizer, prepared.held_texts)
        print(
            f"\nrun folder: {self.out}  (next: klflow sample {self.out}; klflow train --resume {self.out} "
            "--more-steps 250)"
        )

    def fill(self, sampler, tokenizer, held_texts):
        """Removes the middle line of a piece of held-out text and lets the model write it again."""
        for tokens, given, (before, line, after) in removed_lines(held_texts, tokenizer, self.train.length):
            result = sampler.infill(tokens, given, steps=32, seed=self.train.seed)
            filled = tokenizer.decode(result.tokens[~given.to(result.tokens.device)].tolist())
            print(f"\n--- a removed line, filled in ({result.nfe} tokens)\n{printable(f'{before}>>> {filled}{after}')}")
            print(f"    (the line was: {printable(line.strip())})")
            break


@dataclass
class Train(Settings):
    """Train on a text or token folders, or go on with a run (--resume RUN)."""

    out: Path = Path("runs/train")
    resume: Path | None = None
    """A run folder: its run is finished as it was meant, with its own settings, on its own data (--data says where its token
    folders have moved)."""
    more_steps: int = 0
    """With --resume: steps that are added to the run."""
    more_seconds: float = 0.0
    """With --resume: seconds that are added to it."""
    RESUMED = (
        "resume",
        "more_steps",
        "more_seconds",
        "device",
        "data",
        "show_every",
        "tensorboard",
        "quiet",
        "verbose",
    )  # may stand beside --resume

    def run(self):
        self.check()
        with ExitStack() as owned:
            owned.enter_context(noticing_loss(lambda: "start it again with --resume"))
            trainer, held = self.begin(owned)
            model = self.fit(trainer)
        self.report(trainer, model, held)

    def begin(self, owned: ExitStack):
        if self.resume is not None:
            self.check_resume()
            return self.go_on(self.resume, owned)
        return self.go_on(self.out, owned) if restarts() and self.is_begun() else self.start()

    def is_begun(self) -> bool:
        """Whether the run in `out` is this one, which `torchrun --max-restarts` starts again."""
        try:
            return Run(self.out).config()["train"] == asdict(self.train)
        except ValueError:
            return False

    def start(self):
        for name in ("more_steps", "more_seconds"):
            if getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is only with --resume")
        prepared = self.prepare()
        return prepared.trainer, prepared.heldout

    def check_resume(self):
        given = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in sys.argv[2:]
                 if word.startswith("--")}  # fmt: skip
        foreign = sorted(given - set(self.RESUMED))
        if foreign:
            names = ", ".join("--" + name.replace("_", "-") for name in foreign)
            raise ValueError(
                f"resume: got {names} beside it, allowed are --more-steps, --more-seconds, --show-every, --tensorboard, --device and --data (where its token "
                "folders are now): a run goes on with its own settings"
            )
        if self.more_steps < 0 or not 0 <= self.more_seconds < float("inf"):
            raise ValueError(
                f"more_steps, more_seconds: got {self.more_steps}, {self.more_seconds}, allowed are numbers >= 0"
            )

    def go_on(self, folder: Path, owned: ExitStack):
        """(trainer, held-out tokens); the folder is this process's own until `owned` ends."""
        run, device = Run(folder), choose_device(self.device)
        checkpoint = run.last_good(lambda line: say(f"warning: {line}"))
        config = TrainConfig.of(checkpoint)
        if join_processes(device, config.timeout)[0] == 0:
            owned.enter_context(run.owned())
        model, path = checkpoint.model()
        stream, held = run.streams(self.data if self.resume is not None else (), checkpoint)
        trainer = Trainer(model.train().to(device), path, stream, config, run, heldout=held)
        trainer.load(checkpoint)
        if not restarts():  # else what is added was added before
            self.add(trainer)
        say(f"going on with {folder} from step {trainer.step}")
        return trainer, held

    def add(self, trainer: Trainer):
        """What --more-steps and --more-seconds say, which is then a part of the run."""
        if self.more_steps:
            trainer.config = replace(trainer.config, steps=trainer.step + self.more_steps, max_seconds=None)
        if self.more_seconds:
            steps = max(trainer.config.steps, trainer.step + self.more_steps if self.more_steps else 2**31)
            trainer.config = replace(trainer.config, steps=steps, max_seconds=trainer.seconds + self.more_seconds)
        if trainer.progress() >= 1:
            raise ValueError(
                f"resume: the run of {self.resume} is finished, at step {trainer.step} after {trainer.seconds:.0f} s; "
                "--more-steps or --more-seconds add to it"
            )
        if trainer.processes > 1 and (self.more_steps or self.more_seconds):
            trainer.save()  # for a process that is started again
