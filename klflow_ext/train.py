"""Training: AdamW and Muon, averaged weights, one progress line, a JSONL log, checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import atexit
import copy
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from klflow_ext import data
from klflow_ext.model import Denoiser
from klflow_ext.muon import Muon, multiplies_bfloat16
from klflow_ext.path import IGNORE
from klflow_ext.path import Path as NoisePath
from klflow_ext.run import FORMAT, load_run, reading, write_files

__all__ = ["TrainConfig", "Trainer", "load_run"]

DTYPES = ("float32", "bfloat16")
TIME_SAMPLINGS = (None, "middle", "uniform", "learned")


@dataclass(frozen=True)
class TrainConfig:
    """What a Trainer does.

    steps: optimizer steps, at least 1. max_seconds: stop earlier, the learning rate following the clock (None: no limit; an
        exact resume needs None). batch_size: sequences of a step, of all processes together. accumulate: in how many parts
        each process computes its share, to save memory; the gradient is that of the whole.
    given_share: share of sequences that see a part in the clear: the beginnings of equal segments (half of them; see
        `Sampler.infill`), scattered tokens (a quarter), a prefix, or all but one hole. Of half of them the rest is at t = 0.
    time_sampling: how times are drawn, low-discrepancy over the batch. "uniform": from [0, t_max]. "middle": from the middle
        [.2, .8] t_max, where the loss moves. "learned": where the loss is measured to fall fastest (`LossCurve`). None:
        "middle", or "uniform" where t_max = 1. middle_share: the share drawn so by the last two; the rest is uniform.
    ema: decay d of the average of the weights, in [0, 1), as d = min(ema, (1 + step) / (10 + step)); 0: none. The average
        is what `load_run` and `Trainer.averaged_model` give.
    dtype: "bfloat16" runs matrix products in bfloat16 (autocast); weights, their gradients, loss and sums stay float32. On
        processors without AVX-512 that is many times slower, and warned of.
    compile: torch.compile of the loss, in one graph.
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
    given_share: float = 0.6
    middle_share: float = 0.8
    seed: int = 0
    checkpoint_seconds: float = 60.0
    accumulate: int = 1
    time_sampling: str | None = None
    ema: float = 0.0
    dtype: str = "float32"
    compile: bool = False

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("length", 2), ("accumulate", 1)):
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
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: got {self.ema!r}, allowed is a number in [0, 1)")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: got {self.accumulate}, allowed is a divisor of batch_size = {self.batch_size}"
            )
        for name, allowed in (("dtype", DTYPES), ("time_sampling", TIME_SAMPLINGS), ("compile", (False, True))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is one of {allowed}")


def low_discrepancy(count: int, generator: np.random.Generator) -> np.ndarray:
    """count points in [0, 1), one in each of count equal cells, in random order."""
    return (generator.permutation(count) + generator.random()) / count % 1.0


class LossCurve:
    """A running estimate of the loss at times in [0, t_max], and times drawn where it falls fastest.

    Their density is proportional to -d loss / d t, so that the loss falls by the same amount between any two neighbours:
    the time warping of CDCD (Dieleman et al. 2022, arXiv 2211.15089), here from bins instead of a fitted curve. Bins count
    free tokens, and forget with a factor of KEEP per measurement.
    """

    BINS, KEEP = 32, 0.99

    def __init__(self, t_max: float):
        self.t_max = t_max
        self.sums = torch.zeros(2, self.BINS, dtype=torch.float64)  # loss, tokens

    def measurement(self, t: Tensor, losses: Tensor, counts: Tensor) -> Tensor:
        """(2, BINS): losses (B,) of sequences, summed over their counts (B,) of tokens, by their times (B,)."""
        bins = (t.double() / self.t_max * self.BINS).long().clamp(0, self.BINS - 1)
        return torch.zeros_like(self.sums).index_add(1, bins, torch.stack([losses.double(), counts.double()]))

    def add(self, measurement: Tensor) -> None:
        self.sums.mul_(self.KEEP).add_(measurement)

    def density(self) -> np.ndarray:
        """(BINS,) shares, sum 1: of the slope; uniform until every bin has been seen and the loss falls somewhere."""
        loss, tokens = self.sums.numpy()
        if not tokens.all():
            return np.full(self.BINS, 1 / self.BINS)
        means = loss / tokens
        falls = np.maximum(means[:-1] - means[1:], 0)  # between the centres of neighbours
        slopes = (np.concatenate([falls[:1], falls]) + np.concatenate([falls, falls[-1:]])) / 2
        total = slopes.sum()
        return slopes / total if total > 0 else np.full(self.BINS, 1 / self.BINS)

    def times(self, u: np.ndarray, share: float) -> np.ndarray:
        """Times of u in [0, 1), by the inverse of share x density + (1 - share) x uniform."""
        shares = share * self.density() + (1 - share) / self.BINS
        below = np.concatenate([[0.0], shares.cumsum()])
        return np.interp(u, below / below[-1], np.linspace(0, self.t_max, self.BINS + 1))


def join_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number) of the processes that train together: torch.distributed's, started here under torchrun; else (0, 1)."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return 0, 1
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # where nobody left
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """The end of training with several processes: all are here, then the group goes while its threads still can."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _interrupts() -> Iterator[list]:
    """A list that SIGINT fills, so that a step is finished; the second one is a KeyboardInterrupt at once.

    Where SIGINT is ignored, as in a job that a script put in the background, it stays ignored.
    """
    caught: list = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield caught
        return

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt("stopped within a step, which is not saved")
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """Trains a Denoiser on a token stream; everything random depends on (seed, step) alone, so resuming is exact.

    Under torchrun (or an initialised torch.distributed) each process computes its share of the same batches, whose
    gradients are then summed: the run is that of one process, to rounding. All start from the weights of process 0, which
    alone logs and saves; the model must be on the process's own device.

    Args:
        model, path: what to train; its device is where it is trained. stream: int tokens, one long array. out: the run
        folder (made if needed); None: no files.
    """

    MOST_SKIPPED = 20  # steps one after another
    MEASURE_EVERY = 4  # steps between looks at the loss of each sequence, for which the logits are made once more

    def __init__(
        self, model: Denoiser, path: NoisePath, stream: np.ndarray, config: TrainConfig, out: Path | None = None
    ):
        if config.length > model.config.max_length:
            raise ValueError(f"length: got {config.length}, allowed is at most max_length = {model.config.max_length}")
        if len(stream) <= config.length:
            raise ValueError(f"stream: got {len(stream)} tokens, allowed are more than length = {config.length}")
        self.model, self.path, self.stream, self.config, self.out = model, path, stream, config, out
        if out is not None:
            import safetensors  # noqa: F401  (missing, it is so before any work)
        self.device = model.embedding.device
        self.rank, self.processes = join_processes(self.device)
        if config.batch_size % (config.accumulate * self.processes):
            allowed = f"a multiple of accumulate x processes = {config.accumulate} x {self.processes}"
            raise ValueError(f"batch_size: got {config.batch_size}, allowed is {allowed}")
        if self.processes > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
        if config.dtype == "bfloat16" and not multiplies_bfloat16(self.device):
            warnings.warn(
                "dtype: got 'bfloat16', whose matrix products take this processor (without AVX-512) many times longer than those "
                "of 'float32'",
                stacklevel=2,
            )
        hidden = model.hidden_matrices()
        names = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in names]
        self.optimizers = [
            torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
            Muon(hidden, lr=config.lr, weight_decay=config.weight_decay),
        ]
        self.step, self.seconds = 0, 0.0
        self.skipped = self.skipped_last = 0  # steps without an update: in all, and the last ones
        self.gradient_norm = math.nan
        self.average = self._weights() if config.ema else {}
        sampling = config.time_sampling or ("middle" if path.t_max < 1 else "uniform")
        self.time_sampling, self.curve = sampling, LossCurve(path.t_max) if sampling == "learned" else None
        self._loss = torch.compile(self._path_loss, fullgraph=True) if config.compile else self._path_loss

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def averaged_model(self) -> Denoiser:
        """What a run is judged by: a copy of the model with the averaged weights; with ema = 0 the model itself."""
        if not self.average:
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average, strict=False)  # without the buffers, which are constant
        return model

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
        """(B,) times of a batch, as config.time_sampling says."""
        c = self.config
        u = low_discrepancy(c.batch_size, generator)
        if self.time_sampling == "learned":
            return torch.from_numpy(self.curve.times(u, c.middle_share)).float()
        if self.time_sampling == "middle":
            u = np.where(generator.random(c.batch_size) < c.middle_share, 0.2 + 0.6 * u, u)
        return torch.from_numpy(self.path.time(u)).float()

    def given_mask(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """given (B, L) and blank (B,), as config.given_share says; blank: nothing but what is given is to be seen, t = 0."""
        b, length = self.config.batch_size, self.config.length
        mask, positions = np.zeros((b, length), bool), np.arange(length)
        chosen = generator.random(b) < self.config.given_share
        for row in np.flatnonzero(chosen):
            kind = generator.random()
            if kind < 0.5:  # the first tokens of each segment, of a length from 4 to L, uniform in its logarithm
                segment = round(4 * (length / 4) ** generator.random()) if length > 4 else length
                mask[row] = positions % segment < generator.integers(0, segment)
            elif kind < 0.75:
                mask[row] = generator.random(length) < generator.random()
                mask[row, generator.integers(length)] = False  # a batch of nothing but given tokens has no loss
            elif kind < 0.875:
                mask[row, : generator.integers(1, length)] = True
            else:
                size = generator.integers(1, length)
                start = generator.integers(0, length - size + 1)
                mask[row] = True
                mask[row, start : start + size] = False
        return torch.from_numpy(mask), torch.from_numpy(chosen & (generator.random(b) < 0.5))

    def _path_loss(self, tokens: Tensor, t: Tensor, given: Tensor, rng: Tensor, reduction: str, row_offset: int):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.path.loss(self.model, tokens, t, rng, given=given, reduction=reduction, row_offset=row_offset)

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per free token, the mean over the whole batch.

        A step whose loss or gradient is not finite changes nothing but the count of skipped steps.

        A free position that the path's loss leaves out (MaskPath: one that shows its token) counts with a loss of 0.
        """
        c = self.config
        self.model.train()  # a path may condition a model on itself in training only
        tokens = data.batch(self.stream, c.batch_size, c.length, c.seed, self.step)
        generator = np.random.default_rng((c.seed, self.step, 1))
        t = self.times(generator)
        given, blank = self.given_mask(generator)
        t = t.masked_fill(blank, 0.0)
        counts = ((tokens != IGNORE) & ~given).sum(1)
        lr = self.learning_rate(self.progress())
        loss, losses = self._gradients(tokens, t, given, int(counts.sum()))
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip))
        finite = math.isfinite(loss) and math.isfinite(self.gradient_norm)  # the same on all processes
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not finite:
            self._skip(loss)
            return loss
        self.skipped_last = 0
        if self.average:
            decay = min(c.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.model.parameters()], 1 - decay)
        if losses is not None:
            self.curve.add(self.curve.measurement(t[~blank], losses[~blank], counts[~blank]))
        self.step += 1
        return loss

    def _skip(self, loss: float) -> None:
        self.step += 1
        self.skipped += 1
        self.skipped_last += 1
        if self.skipped_last >= self.MOST_SKIPPED:
            raise ValueError(
                f"loss: got {loss:g} with a gradient of norm {self.gradient_norm:g} in step {self.step}, the last of "
                f"{self.skipped_last} that were skipped one after another; the weights are those of before"
            )

    def _gradients(self, tokens: Tensor, t: Tensor, given: Tensor, count: int) -> tuple[float, Tensor | None]:
        """Fills .grad with the gradient of the whole batch's loss, over its count of free tokens.

        The noise of a row depends on its number in the whole batch alone. Returns that loss, and the sums (B,) of each
        sequence where they are measured in this step.
        """
        c = self.config
        size = c.batch_size // (c.accumulate * self.processes)
        first = self.rank * c.accumulate * size
        measure = self.curve is not None and self.step % self.MEASURE_EVERY == 0
        rng = torch.tensor([c.seed, self.step], dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        losses = torch.zeros(c.batch_size, dtype=torch.float32, device=self.device)
        for start in range(first, first + c.accumulate * size, size):
            part = slice(start, start + size)
            batch = [x[part].to(self.device) for x in (tokens, t, given)]
            sums = self._loss(*batch, rng, "none" if measure else "sum", start * c.length)
            if measure:
                losses[part] = sums.detach().sum(1)
            mean = sums.sum() / count
            mean.backward()
            loss += mean.detach()
        gradients = []
        for p in self.model.parameters():
            if p.grad is None:  # not used by this batch; the processes must agree
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        if self.processes > 1:
            pending = [dist.all_reduce(x, async_op=True) for x in (loss, losses, *gradients)]
            for work in pending:
                work.wait()
        return loss.item(), losses.cpu() if measure else None

    # ---- the loop

    def fit(self, progress: bool = True) -> None:
        """Runs to the end of the budget, logging and saving on the way; a checkpoint is written at the end too.

        Ctrl-C ends it after the step, which is saved; a second one ends it at once.

        Raises:
            ValueError: MOST_SKIPPED steps one after another were not finite (what was learned before is saved), or a file cannot
                be written (the last checkpoint stays whole).
            KeyboardInterrupt: Ctrl-C; its text says what is kept.
        """
        files = self.out is not None and self.rank == 0
        if files:
            self.out.mkdir(parents=True, exist_ok=True)
        log = open(self.out / "log.jsonl", "a") if files else None
        try:
            with _interrupts() as interrupts:
                self._steps(interrupts, log, progress and self.rank == 0)
        finally:
            if log is not None:
                log.close()
            if files and sys.exc_info()[0] in (None, ValueError):
                self.save()
        if interrupts:
            kept = "nothing is kept"
            if files:
                self.save()
                kept = f"step {self.step} is saved: klflow train --resume {self.out} goes on from there"
            raise KeyboardInterrupt(kept)

    def _steps(self, interrupts: list, log, progress: bool) -> None:
        begin, start_seconds = time.perf_counter(), self.seconds
        last_line = last_save = begin
        average = None
        terminal = sys.stdout.isatty()
        while self.progress() < 1.0 and not interrupts:
            loss = self.train_step()
            now = time.perf_counter()
            self.seconds = self._agreed(start_seconds + now - begin)
            if math.isfinite(loss):
                average = loss if average is None else 0.95 * average + 0.05 * loss
            if log is not None:
                record = {"step": self.step, "loss": loss, "seconds": round(self.seconds, 3)}
                record |= {"gradient_norm": self.gradient_norm, "skipped": self.skipped}
                log.write(json.dumps(record) + "\n")
            if progress and now - last_line > (0.5 if terminal else 15.0):
                last_line = now
                done = self.progress()
                left = self.seconds / done * (1 - done) if done > 0 else math.nan
                rate = self.step * self.config.batch_size * self.config.length / self.seconds
                text = f"step {self.step}  loss {average or math.nan:.3f}  {rate:,.0f} tokens/s  {left:.0f} s left"
                text += f"  {self.skipped} skipped" * (self.skipped > 0)
                print(f"\r{text:<70}" if terminal else text, end="" if terminal else "\n", flush=True)
            if log is not None and now - last_save > self.config.checkpoint_seconds:
                last_save = now
                log.flush()
                self.save()
        if progress and terminal:
            print()

    def _agreed(self, seconds: float) -> float:
        """The clock of process 0, by which all end at the same step."""
        if self.processes == 1 or self.config.max_seconds is None:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(clock, 0)
        return clock.item()

    # ---- files

    def save(self) -> None:
        """Writes the run folder: config.json, model.safetensors (the averaged weights, if any), checkpoint.pt for `load`."""
        from safetensors.torch import save_file

        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "curve": None if self.curve is None else self.curve.sums,
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        weights = {**self.model.state_dict(), **self.average}
        bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
        if bad:
            raise ValueError(f"{bad[0]}: got numbers that are not finite, which are never saved")
        config = {
            "format": FORMAT,
            "model": self.model.config.to_dict(),
            "path": self.path.to_dict(),
            "train": asdict(self.config),
        }
        write_files(
            self.out,
            {
                "checkpoint.pt": lambda p: torch.save(state, p),
                "model.safetensors": lambda p: save_file(weights, p),
                "config.json": lambda p: p.write_text(json.dumps(config, indent=2) + "\n"),
            },
        )

    def load(self) -> None:
        """Takes up the checkpoint of the run folder. An average or a loss curve that it lacks starts anew from there."""
        with reading(self.out / "checkpoint.pt") as path:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if self.config.ema:
                self.average = state.get("average") or self._weights()
            if self.curve is not None and state.get("curve") is not None:
                self.curve.sums = state["curve"].cpu()
            self.step, self.seconds = state["step"], state["seconds"]
            self.skipped = state.get("skipped", 0)
