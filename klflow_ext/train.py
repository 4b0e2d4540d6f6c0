"""Training: AdamW and Muon, one progress line, a JSONL log, and checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from klflow_ext import data
from klflow_ext.model import Denoiser, DenoiserConfig
from klflow_ext.path import LogitPath

RUN_FORMAT = 1  # of the run folder: config.json says which


@dataclass(frozen=True)
class TrainConfig:
    """What a Trainer does.

    steps: optimizer steps, at least 1. max_seconds: stop earlier, the learning rate following the clock (None: no limit; an
        exact resume needs None). given_share: share of sequences that see a random prefix or random spans in the clear, so
        that prompts and holes are learned. middle_share: share of times drawn from the middle [.2, .8] t_max, where the
        loss moves; the rest from [0, t_max].
    """

    steps: int = 1000
    max_seconds: float | None = None
    batch_size: int = 32
    length: int = 64
    lr: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.4
    weight_decay: float = 0.01
    clip: float = 1.0
    given_share: float = 0.4
    middle_share: float = 0.8
    seed: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("length", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, allowed is an integer >= {least}")
        for name in ("warmup", "decay", "given_share", "middle_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is a number in [0, 1]")
        for name in ("lr", "clip", "checkpoint_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is a positive number")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed!r}, allowed is an integer in [0, 2^63)")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: got {self.max_seconds!r}, allowed is None or a positive number")


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def low_discrepancy(count: int, generator: np.random.Generator) -> np.ndarray:
    """count points in [0, 1), one in each of count equal cells, in random order."""
    return (generator.permutation(count) + generator.random()) / count % 1.0


class Trainer:
    """Trains a Denoiser on a token stream; everything random depends on (seed, step) alone, so resuming is exact.

    Args:
        model, path: what to train. stream: int tokens, one long array. out: the run folder (made if needed); None: no files.
    """

    def __init__(
        self, model: Denoiser, path: LogitPath, stream: np.ndarray, config: TrainConfig, out: Path | None = None
    ):
        if config.length > model.config.max_length:
            raise ValueError(f"length: got {config.length}, allowed is at most max_length = {model.config.max_length}")
        if len(stream) <= config.length:
            raise ValueError(f"stream: got {len(stream)} tokens, allowed are more than length = {config.length}")
        self.model, self.path, self.stream, self.config, self.out = model, path, stream, config, out
        hidden = model.hidden_matrices()
        names = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in names]
        self.optimizers = [
            torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        ]
        self.step, self.seconds = 0, 0.0

    # ---- one step

    def progress(self) -> float:
        """How much of the budget is used, in [0, 1]."""
        done = self.step / self.config.steps
        if self.config.max_seconds is not None:
            done = max(done, self.seconds / self.config.max_seconds)
        return min(done, 1.0)

    def learning_rate(self, progress: float) -> float:
        """Warm-up, stable, then linear decay to zero."""
        c = self.config
        up = min(1.0, (progress + 1e-3) / max(c.warmup, 1e-3))
        down = min(1.0, (1 - progress) / max(c.decay, 1e-9))
        return c.lr * min(up, down)

    def times(self, generator: np.random.Generator) -> Tensor:
        u = low_discrepancy(self.config.batch_size, generator)
        middle = generator.random(self.config.batch_size) < self.config.middle_share
        return torch.from_numpy(np.where(middle, 0.2 + 0.6 * u, u) * self.path.t_max).float()

    def given_mask(self, generator: np.random.Generator) -> Tensor:
        """(B, L): mostly nothing; else a random prefix, or everything but one random hole."""
        b, length = self.config.batch_size, self.config.length
        mask = np.zeros((b, length), bool)
        for row in np.flatnonzero(generator.random(b) < self.config.given_share):
            if generator.random() < 0.5:
                mask[row, : generator.integers(1, length)] = True
            else:
                size = generator.integers(1, length)
                start = generator.integers(0, length - size + 1)
                mask[row] = True
                mask[row, start : start + size] = False
        return torch.from_numpy(mask)

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per free token."""
        c = self.config
        tokens = data.batch(self.stream, c.batch_size, c.length, c.seed, self.step)
        generator = np.random.default_rng((c.seed, self.step, 1))
        t, given = self.times(generator), self.given_mask(generator)
        lr = self.learning_rate(self.progress())
        rng = torch.tensor([c.seed, self.step])
        loss = self.path.loss(self.model, tokens, t, rng, given=given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    # ---- the loop

    def fit(self, progress: bool = True) -> None:
        """Runs to the end of the budget, logging and saving on the way; a checkpoint is written at the end too."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        log = open(self.out / "log.jsonl", "a") if self.out is not None else None
        begin, start_seconds = time.perf_counter(), self.seconds
        last_line = last_save = begin
        average = None
        terminal = sys.stdout.isatty()
        try:
            while self.progress() < 1.0:
                loss = self.train_step()
                now = time.perf_counter()
                self.seconds = start_seconds + now - begin
                average = loss if average is None else 0.95 * average + 0.05 * loss
                if log is not None:
                    record = {"step": self.step, "loss": loss, "seconds": round(self.seconds, 3)}
                    log.write(json.dumps(record) + "\n")
                if progress and now - last_line > (0.5 if terminal else 15.0):
                    last_line = now
                    done = self.progress()
                    left = self.seconds / done * (1 - done) if done > 0 else math.nan
                    rate = self.step * self.config.batch_size * self.config.length / self.seconds
                    text = f"step {self.step}  loss {average:.3f}  {rate:,.0f} tokens/s  {left:.0f} s left"
                    print(f"\r{text:<70}" if terminal else text, end="" if terminal else "\n", flush=True)
                if self.out is not None and now - last_save > self.config.checkpoint_seconds:
                    last_save = now
                    self.save()
        finally:
            if log is not None:
                log.close()
        if progress and terminal:
            print()
        if self.out is not None:
            self.save()

    # ---- files

    def save(self) -> None:
        from safetensors.torch import save_file

        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        config = {
            "format": RUN_FORMAT,
            "model": self.model.config.to_dict(),
            "path": self.path.to_dict(),
            "train": asdict(self.config),
        }
        write_atomically(self.out / "config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
        write_atomically(self.out / "model.safetensors", lambda p: save_file(self.model.state_dict(), p))
        write_atomically(self.out / "checkpoint.pt", lambda p: torch.save(state, p))

    def load(self) -> None:
        """Takes up the checkpoint of the run folder."""
        with reading(self.out / "checkpoint.pt") as path:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]


@contextmanager
def reading(path: Path):
    """Any failure to read a file of a run folder becomes a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"run: {path.parent} is no whole run folder: it has no {path.name}")
    try:
        yield path
    except Exception as error:  # each library has its own exceptions for a broken file
        raise ValueError(f"run: {path} cannot be read: {str(error).splitlines()[0]}") from error


def read_config(run: Path) -> dict:
    """config.json of a run folder; ValueError where the folder is none, is broken, or is of another version."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"run: {run} is no run folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"run: {path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"run: {run} has format {found!r}, allowed is {RUN_FORMAT}: train it again with this version")
    return config


def load_run(run: str | Path):
    """(model, path, tokenizer) of a run folder, the model in evaluation mode."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    run = Path(run)
    config = read_config(run)
    with reading(run / "config.json"):
        path = LogitPath.from_dict(config["path"])
        model = Denoiser(DenoiserConfig(**config["model"]), path)
    with reading(run / "model.safetensors") as file:
        model.load_state_dict(load_file(file))
    with reading(run / "tokenizer.json") as file:
        tokenizer = Tokenizer.from_file(str(file))
    return model.eval(), path, tokenizer
