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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from klflow_ext.model import Denoiser
from klflow_ext.muon import Muon, multiplies_bfloat16
from klflow_ext.path import Evidence
from klflow_ext.path import Path as NoisePath
from klflow_ext.run import Run
from klflow_ext.train.batch import Batch, Batches
from klflow_ext.train.config import TrainConfig


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
        model: what to train, on the device where it is trained.
        path: from noise to text.
        stream: int tokens, one long array.
        config: how.
        out: the run, or its folder (made if needed), to which process 0 writes; None: no files.

    Raises:
        ValueError: an argument does not fit another; the message names it.
    """

    MOST_SKIPPED = 20  # steps one after another
    MEASURE_EVERY = 4  # steps between looks at the loss of each sequence, for which the logits are made once more

    def __init__(
        self,
        model: Denoiser,
        path: NoisePath,
        stream: np.ndarray,
        config: TrainConfig,
        out: Run | str | Path | None = None,
    ):
        if config.length > model.config.max_length:
            raise ValueError(f"length: got {config.length}, allowed is at most max_length = {model.config.max_length}")
        if len(stream) <= config.length:
            raise ValueError(f"stream: got {len(stream)} tokens, allowed are more than length = {config.length}")
        self.model, self.path, self.stream, self.config = model, path, stream, config
        self.run = Run(out) if isinstance(out, (str, Path)) else out
        if self.run is not None:
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
        prior = model.log_prior.double().softmax(0).cpu().numpy() if model.reads_posterior else None
        self.batches = Batches(stream, path, config, slices=model.slices, prior=prior)
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

    def _path_loss(
        self,
        tokens: Tensor,
        t: Tensor,
        given: Tensor,
        order: Tensor | None,
        evidence: Evidence | None,
        rng: Tensor,
        reduction: str,
        row_offset: int,
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.path.loss(
                self.model,
                tokens,
                t,
                rng,
                given=given,
                order=order,
                evidence=evidence,
                reduction=reduction,
                row_offset=row_offset,
            )

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per free token, the mean over the whole batch.

        A step whose loss or gradient is not finite changes nothing but the count of skipped steps.

        A free position that the path's loss leaves out (MaskPath: one that shows its token) counts with a loss of 0.
        """
        c = self.config
        self.model.train()  # a path may condition a model on itself in training only
        batch = self.batches.batch(self.step)
        lr = self.learning_rate(self.progress())
        loss, losses = self._gradients(batch)
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
            noisy, curve = ~batch.blank, self.batches.curve
            assert curve is not None
            curve.add(curve.measurement(batch.t[noisy], losses[noisy], batch.counts[noisy]))
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

    def _gradients(self, batch: Batch) -> tuple[float, Tensor | None]:
        """Fills .grad with the gradient of the whole batch's loss, over its count of free tokens.

        The noise of a row depends on its number in the whole batch alone. Returns that loss, and the sums (B,) of each
        sequence where they are measured in this step.
        """
        c, count = self.config, int(batch.counts.sum())
        size = c.batch_size // (c.accumulate * self.processes)
        first = self.rank * c.accumulate * size
        measure = self.batches.curve is not None and self.step % self.MEASURE_EVERY == 0
        rng = torch.tensor([c.seed, self.step], dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        losses = torch.zeros(c.batch_size, dtype=torch.float32, device=self.device)
        for start in range(first, first + c.accumulate * size, size):
            part = slice(start, start + size)
            tokens, t, given = (x[part].to(self.device) for x in (batch.tokens, batch.t, batch.given))
            order = None if batch.order is None else batch.order[part].to(self.device)
            evidence = None if batch.evidence is None else batch.evidence[part].to(self.device)
            sums = self._loss(tokens, t, given, order, evidence, rng, "none" if measure else "sum", start * c.length)
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
        run = self.run if self.rank == 0 else None
        log = None if run is None else run.open_log()
        try:
            with _interrupts() as interrupts:
                self._steps(interrupts, log, progress and self.rank == 0)
        finally:
            if log is not None:
                log.close()
            if run is not None and sys.exc_info()[0] in (None, ValueError):
                self.save()
        if interrupts:
            kept = "nothing is kept"
            if run is not None:
                self.save()
                kept = f"step {self.step} is saved: klflow train --resume {run.folder} goes on from there"
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

    def _folder(self) -> Run:
        if self.run is None:
            raise ValueError("out: got None, allowed is a run folder where files are written or read")
        return self.run

    def save(self) -> None:
        """Writes the run folder: what `load_run` gives, and what `load` goes on from.

        Raises:
            ValueError: a weight is not finite, or a file cannot be written; what was saved before stays whole.
        """
        curve = self.batches.curve
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "curve": None if curve is None else curve.sums,
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        weights = {**self.model.state_dict(), **self.average}
        config = {
            "model": self.model.config.to_dict(),
            "path": self.path.to_dict(),
            "train": asdict(self.config),
        }
        self._folder().save(config, weights, state, self.stream)

    def load(self) -> None:
        """Takes up the checkpoint of the run folder. An average or a loss curve that it lacks starts anew from there."""
        with self._folder().checkpoint(self.device) as state:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if self.config.ema:
                self.average = state.get("average") or self._weights()
            if self.batches.curve is not None and state.get("curve") is not None:
                self.batches.curve.sums = state["curve"].cpu()
            self.step, self.seconds = state["step"], state["seconds"]
            self.skipped = state.get("skipped", 0)
