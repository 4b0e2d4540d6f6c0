"""Training: AdamW and Muon, averaged weights, one progress line, a JSONL log, checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from klflow_ext import data
from klflow_ext.checkpoint import Checkpoint, pack
from klflow_ext.checks import check_device, check_flag
from klflow_ext.evaluate import loss_by_time
from klflow_ext.log import Log
from klflow_ext.model import describe, remake
from klflow_ext.muon import multiplies_bfloat16
from klflow_ext.path import Path as NoisePath
from klflow_ext.path import as_network
from klflow_ext.path.network import device_of, load_own_state, own_state
from klflow_ext.run import Run
from klflow_ext.sharding import gathered, local, sharded_like, whole
from klflow_ext.train.agreement import check_agreement, code_version, fingerprint
from klflow_ext.train.batch import Batch, Batches, check_tokens
from klflow_ext.train.config import TrainConfig
from klflow_ext.train.engine import make_engine
from klflow_ext.train.optimizers import make_optimizers
from klflow_ext.train.processes import join_processes, noticing_loss
from klflow_ext.train.progress import ProgressLine
from klflow_ext.train.report import BadStep, NotFinite
from klflow_ext.train.signals import Signals, stopped


class Trainer:
    """Trains a Denoiser, another Network, or any module `model(x_t, t) -> logits` on a token stream; everything random depends on
    (seed, step) alone, so resuming is exact.

    Under torchrun (or an initialised torch.distributed) each process computes its share of the same batches, by the engine of
    the config: the run is that of one process, to rounding. All start from the weights of process 0, which alone logs; the
    model must be on the process's own device. Settings, data and code must be the same on all of them.

    Args:
        model: what to train, on the device where it is trained.
        path: from noise to text.
        stream: int tokens, one long array, or what `klflow_ext.data` has of them: `TokenFolder(folder).train`, a `Mixture`.
        config: how.
        out: the run, or its folder (made if needed), to which process 0 writes; None: no files.
        tokenizer: a tokenizers.Tokenizer, which a new run keeps; None: it has the one that is there, or none.
        heldout: int tokens that are kept back, for config.heldout_every.
        overwrite: whether `fit` and `save` replace a run that is in the folder. False: they refuse to, unless it was loaded.

    Raises:
        ValueError: an argument does not fit another, or there are no kernels for the model's device; the message names it.
        TypeError: an argument is of another kind.
    """

    MOST_SKIPPED = 20  # steps one after another
    MEASURE_EVERY = 4  # steps between looks at the loss of each sequence, for which the logits are made once more

    def __init__(
        self,
        model: nn.Module,
        path: NoisePath,
        stream: data.Stream,
        config: TrainConfig,
        out: Run | str | Path | None = None,
        tokenizer: Any = None,
        heldout: data.Stream | None = None,
        overwrite: bool = False,
    ):
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config: got a {type(config).__name__}, allowed is a TrainConfig")
        self.network = as_network(model, path)
        if self.network.module is None:
            raise ValueError(f"model: got a {type(model).__name__}, allowed where it is trained is a torch.nn.Module")
        model = self.network.module
        self.device = device_of(model)
        check_device(self.device)
        self.rank, self.processes = join_processes(self.device, config.timeout)
        if self.processes > 1:  # before anything is refused on some of them only
            alike = {"model": describe(model), "path": path.to_dict(), "device": self.device.type}
            alike |= {"data": fingerprint(stream), "code": code_version()}
            check_agreement({**asdict(config), **alike}, self.device)
        self.batches = Batches.of(stream, path, config, model)
        self.model, self.path, self.stream, self.config = model, path, stream, config
        self.run = Run(out) if isinstance(out, (str, Path)) else out
        self.tokenizer = tokenizer
        check_flag("overwrite", overwrite)
        self.overwrite, self._owns = overwrite, False  # whether the run in the folder is this Trainer's own
        if self.run is not None:
            import safetensors  # noqa: F401  (missing, it is so before any work)
        if config.batch_size % (config.accumulate * self.processes):
            allowed = f"a multiple of accumulate x processes = {config.accumulate} x {self.processes}"
            raise ValueError(f"batch_size: got {config.batch_size}, allowed is {allowed}")
        if config.dtype == "bfloat16" and not multiplies_bfloat16(self.device):
            warnings.warn(
                "dtype: got 'bfloat16', whose matrix products take this processor (without AVX-512) many times longer than those "
                "of 'float32'",
                stacklevel=2,
            )
        self.heldout_texts = self._heldout_texts(heldout)
        self.heldout_loss: float | None = None  # of the last look, after the step
        self.heldout_step = -1
        self._saved = -1  # the step of the last checkpoint of this Trainer
        self.engine = make_engine(model, path, config, self.processes)
        self.optimizers = make_optimizers(model, path, config)
        self.step, self.seconds = 0, 0.0
        self.skipped = self.skipped_last = 0  # steps without an update: in all, and the last ones
        self.gradient_norm = math.nan
        self.bad_step: BadStep | None = None  # the one that ends the run
        self._skipped_step: BadStep | None = None  # the last one, where it may end the run
        self._log: Log | None = None
        self.average = self._weights() if config.ema else {}

    def _heldout_texts(self, heldout: data.Stream | None) -> Tensor | None:
        """(heldout_count, length) tokens, the same in every run of this text."""
        c = self.config
        if not c.heldout_every:
            return None
        if heldout is None:
            raise ValueError(f"heldout: got None, allowed with heldout_every = {c.heldout_every} are tokens")
        check_tokens("heldout", heldout, self.path.vocab_size)
        return data.batch(heldout, c.heldout_count, c.length, seed=12345, step=0)

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def averaged_model(self) -> nn.Module:
        """What a run is judged by: a copy of the model with the averaged weights; with ema = 0 the model itself. Of sharded
        parameters a whole copy in any case, for which all processes must ask."""
        if not self.average and not self.engine.shards:
            return self.model
        weights = whole({**own_state(self.model), **self.average})
        model = remake(describe(self.model), self.path) if self.engine.shards else copy.deepcopy(self.model)
        load_own_state(model.to(self.device), weights)
        return model.train(self.model.training)

    # ---- one step

    def progress(self) -> float:
        """How much of the budget is used, in [0, 1]."""
        done = self.step / self.config.steps
        if self.config.max_seconds is not None:
            done = max(done, self.seconds / self.config.max_seconds)
        return min(done, 1.0)

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per free token, the mean over the whole batch.

        A step whose loss or gradient is not finite changes nothing but the count of skipped steps; the first one is warned of. After MOST_SKIPPED of them, one
        after another, the next is a NotFinite.

        A free position that the path's loss leaves out (MaskPath: one that shows its token) counts with a loss of 0.
        """
        c = self.config
        if self.bad_step is not None:
            raise NotFinite(self.bad_step.lines("nothing was saved since"))
        self.model.train()  # a path may condition a model on itself in training only
        batch = self.batches.batch(self.step)
        lr = c.learning_rate(self.progress())
        loss, losses = self._gradients(batch)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        self.gradient_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(self.gradient_norm)):  # the same on all processes
            self._skip(batch, loss)
            return loss
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), c.clip, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped_last = 0
        if self.average:
            decay = min(c.ema, (1 + self.step) / (10 + self.step))
            weights = [local(p.detach()) for p in self.model.parameters()]
            torch._foreach_lerp_([local(x) for x in self.average.values()], weights, 1 - decay)
        if losses is not None:
            noisy, curve = ~batch.blank, self.batches.curve
            assert curve is not None
            curve.add(curve.measurement(batch.t[noisy], losses[noisy], batch.counts[noisy]))
        self.step += 1
        return loss

    def _skip(self, batch: Batch, loss: float) -> None:
        self.skipped += 1
        self.skipped_last += 1
        ends = self.skipped_last >= self.MOST_SKIPPED
        if ends or self.skipped == self.step + 1:  # all steps until now, and perhaps of the run
            gradients = [(name, whole(p.grad)) for name, p in self.model.named_parameters() if p.grad is not None]
            self._skipped_step = BadStep.of(
                self.step + 1, loss, self.gradient_norm, self.skipped_last, batch.t, self._losses(batch), gradients
            )
        if ends:
            self.bad_step = self._skipped_step
        if self.skipped == 1 and self.rank == 0:
            warnings.warn(
                f"loss: got {loss:g} with a gradient of norm {self.gradient_norm:g} in step {self.step + 1}, allowed are finite ones: the step "
                "is skipped, as later ones will be without a word (the log counts them)",
                stacklevel=3,
            )
        self.model.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def _losses(self, batch: Batch) -> Tensor:
        """(B,): the loss of each sequence, in nats per free token, of all processes."""
        losses = torch.zeros(self.config.batch_size, dtype=torch.float32, device=self.device)
        for part in self._parts():
            losses[part] = self._part_loss(batch, part, "none").sum(1)
        self.engine.sum(losses)
        return losses.cpu() / batch.counts.clamp(min=1)

    def _parts(self) -> list[slice]:
        """Of a batch, those that this process computes."""
        size = self.config.batch_size // (self.config.accumulate * self.processes)
        first = self.rank * self.config.accumulate * size
        return [slice(start, start + size) for start in range(first, first + self.config.accumulate * size, size)]

    def _part_loss(self, batch: Batch, part: slice, reduction: str) -> Tensor:
        """The noise of a row depends on its number in the whole batch alone."""
        c = self.config
        rng = torch.tensor([c.seed, self.step], dtype=torch.int64, device=self.device)
        tokens, t, given = (x[part].to(self.device) for x in (batch.tokens, batch.t, batch.given))
        order = None if batch.order is None else batch.order[part].to(self.device)
        evidence = None if batch.evidence is None else batch.evidence[part].to(self.device)
        options = {"given": given, "order": order, "evidence": evidence, "reduction": reduction}
        return self.engine.loss(tokens, t, rng, **options, row_offset=part.start * c.length)

    def _gradients(self, batch: Batch) -> tuple[float, Tensor | None]:
        """Fills .grad with the gradient of the whole batch's loss, over its count of free tokens.

        Returns that loss, and the sums (B,) of each sequence where they are measured in this step.
        """
        c, count = self.config, int(batch.counts.sum())
        measure = self.batches.curve is not None and self.step % self.MEASURE_EVERY == 0
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        losses = torch.zeros(c.batch_size, dtype=torch.float32, device=self.device)
        parts = self._parts()
        for part in parts:
            with self.engine.part(last=part is parts[-1]):
                sums = self._part_loss(batch, part, "none" if measure else "sum")
                mean = sums.sum() / count
                self.engine.backward(mean)
            if measure:
                losses[part] = sums.detach().sum(1)
            loss += mean.detach()
        self.engine.sum(loss, losses)
        return loss.item(), losses.cpu() if measure else None

    def measure_heldout(self) -> float:
        """The loss of held-out text, in nats per token: the mean of `loss_by_time` of the averaged model. Several processes must all
        ask; the first one measures. Nothing of the training changes."""
        if self.heldout_texts is None:
            raise ValueError("heldout_every: got 0, allowed where held-out text is measured is an integer >= 1")
        model = self.averaged_model()
        if self.rank == 0:
            losses = loss_by_time(model.eval(), self.path, self.heldout_texts).values()
            self.heldout_loss = sum(losses) / len(losses)
        # A clock of 0 on the others: `_agreed` gives all of them what the first one found.
        self.heldout_loss, self.heldout_step = self._agreed(self.heldout_loss or 0.0, 0)[0], self.step
        return self.heldout_loss

    def time_step(self) -> float:
        """Seconds of one step, measured on the next batch without an update (twice: the first call also compiles). All processes must
        ask."""
        seconds = math.nan
        for _ in range(2):
            begin = time.perf_counter()
            self.model.train()
            self._gradients(self.batches.batch(self.step))
            self.model.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - begin
        return seconds

    # ---- the loop

    def fit(self, progress: bool = True, callback: Callable[[dict[str, Any]], object] | None = None) -> None:
        """Runs to the end of the budget, logging and saving on the way; a checkpoint is written at the end too. The first step of a
        compiled run, which waits for the compiler, is not counted as training time.

        Args:
            progress: whether a line tells how far it is.
            callback: called by process 0 after each step with the record that the log gets: step, loss, seconds, gradient_norm,
                skipped, lr, tokens_per_second (since the run began), and heldout_loss (None, but every heldout_every steps).
                What it adds to the record, by names of its own, is logged too. Its time is no training time.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP or SIGUSR1 to any process ends all after the same step, which is saved; a second one
        ends at once what it is sent to.

        Raises:
            NotFinite: MOST_SKIPPED steps one after another, or all of the run, were not finite; what was learned before is saved, and report.json
                says more. It is a ValueError.
            ValueError: a file cannot be written, another process trains in this folder, or it holds a run that was not loaded; the
                last checkpoint stays whole.
            LostProcess: another process ended or gave no answer within config.timeout. It is a ConnectionError.
            KeyboardInterrupt: SIGINT; its text says what is kept.
            Stopped: another signal, in the same way. It is a SystemExit.
        """
        with ExitStack() as stack:
            stack.enter_context(noticing_loss(self._last))
            if self.run is not None and self.rank == 0:
                stack.enter_context(self.run.owned())
                self._take_folder(self.run)
                self._log = self.run.open_log(self.step)
                stack.callback(self._close_log)
            signals = stack.enter_context(Signals())
            line = stack.enter_context(ProgressLine()) if progress and self.rank == 0 else None
            self._steps(signals, line, callback)
            if self.progress() >= 1 and 0 < self.step == self.skipped:
                self.bad_step = self._skipped_step
            if self.bad_step is not None:
                self._give_up(self.bad_step)
            if self.run is not None and self._saved != self.step:
                self.save()
            number = self._agreed(self.seconds, signals.number)[1]  # where the others wait for what is saved
        if number:
            raise stopped(number, self._kept(time.monotonic() - signals.at if signals.number else None))

    def _close_log(self) -> None:
        assert self._log is not None
        self._log.close()
        self._log = None

    def _kept(self, seconds: float | None) -> str:
        """What is kept, `seconds` after this process's signal."""
        if self.run is None:
            return f"nothing of its {self.step} steps is kept"
        after = "" if seconds is None else f" {seconds:.2f} s after the signal"
        return f"step {self.step} is saved{after}: klflow train --resume {self.run.folder} goes on from there"

    def _last(self) -> str:
        """Where training can go on from."""
        found = [] if self.run is None else self.run.checkpoints()
        return f"the last checkpoint is {found[0].folder}" if found else "nothing is kept"

    def _give_up(self, bad: BadStep) -> None:
        last = "nothing is kept"
        if self.run is not None:
            try:
                self.save()
            except ValueError as error:  # the weights themselves
                last = f"not saved: {error}"
            else:
                last = self._last()
        if self.run is not None and self.rank == 0:
            found = self.run.checkpoints()
            path = self.run.write_report({**bad.to_dict(), "checkpoint": str(found[0].folder) if found else None})
            last += f"; {path} has all of this"
        self._agreed(self.seconds, 0)
        raise NotFinite(bad.lines(last))

    def _steps(
        self, signals: Signals, line: ProgressLine | None, callback: Callable[[dict[str, Any]], object] | None
    ) -> None:
        c = self.config
        begin, start_seconds = time.perf_counter(), self.seconds
        last_save = begin
        number, self.bad_step = 0, None
        compiling = c.compile
        while self.progress() < 1.0 and not number and self.bad_step is None:
            lr = c.learning_rate(self.progress())
            loss = self.train_step()
            now = time.perf_counter()
            if compiling:
                begin, compiling = now, False
            due = self.run is not None and now - last_save > c.checkpoint_seconds
            self.seconds, number, due = self._agreed(start_seconds + now - begin, signals.number, due)
            heldout = self._look_at_heldout()
            if heldout is not None:
                begin += time.perf_counter() - now  # looking is no training
                due = due or self._is_best(heldout)
            rate = self.step * c.batch_size * c.length / self.seconds if self.seconds > 0 else math.nan
            record: dict[str, Any] = {"step": self.step, "loss": loss, "seconds": round(self.seconds, 3)}
            record |= {"gradient_norm": self.gradient_norm, "skipped": self.skipped, "lr": lr}
            record |= {"tokens_per_second": round(rate, 1), "heldout_loss": heldout}
            if callback is not None and self.rank == 0:
                now = time.perf_counter()
                callback(record)
                begin += time.perf_counter() - now
            if self._log is not None:
                self._log.write(record)
            if line is not None:
                line.show(record, self.progress())
            if due:
                self.save()
                last_save = time.perf_counter()

    def _look_at_heldout(self) -> float | None:
        """Its loss where it is time to look at it, and before the run ends by its steps."""
        every = self.config.heldout_every
        if every and self.bad_step is None and (self.step % every == 0 or self.step == self.config.steps):
            return self.measure_heldout()
        return None

    def _is_best(self, heldout: float) -> bool:
        """Whether it is lower than that of every checkpoint; process 0 says so to all."""
        better = 0
        if self.run is not None and self.rank == 0:
            best = self.run.best()
            better = int(best is None or heldout < best.config()["heldout_loss"])
        return bool(self._agreed(self.seconds, better)[1])

    def _agreed(self, seconds: float, signal: int, due: bool = False) -> tuple[float, int, bool]:
        """The clock of process 0, the signal that any process has got, and whether it is time to save for process 0: by these all end
        and save at the same step."""
        if self.processes == 1:
            return seconds, signal, due
        first = self.rank == 0
        said = torch.tensor([seconds * first, signal, due and first], dtype=torch.float64, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return said[0].item(), int(said[1]), bool(said[2])

    # ---- files

    def _folder(self) -> Run:
        if self.run is None:
            raise ValueError("out: got None, allowed is a run folder where files are written or read")
        return self.run

    def _take_folder(self, run: Run) -> None:
        """Makes sure, before the first write, that no other run is lost unasked. The folder is this process's own."""
        if self._owns:
            return
        if run.checkpoints():
            if not self.overwrite:
                raise ValueError(
                    f"out: {run.folder} holds a run already; Trainer(..., overwrite=True) replaces it, load() goes on with it"
                )
            run.clear()
        self._owns = True

    def save(self) -> None:
        """Writes a checkpoint: what `load_run` gives, and what `load` goes on from. config.keep of them stay. Of several processes all
        must call it, and process 0 has the run.

        Raises:
            ValueError: a number is not finite, a file cannot be written, or the folder holds a run that was not loaded; what was
                saved before stays whole.
        """
        curve = self.batches.curve
        training = {
            "model": own_state(self.model),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "curve": None if curve is None else curve.sums,
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        weights = gathered({**own_state(self.model), **self.average}, self.rank == 0)
        with ExitStack() as stack:
            run = self._folder() if self.rank == 0 else self.run
            if self.rank == 0 and run is not None:
                stack.enter_context(run.owned())
                self._take_folder(run)
            folder = None if run is None else run.folder
            parts = stack.enter_context(self.engine.parts(folder, pack(training)[1]))
            if self.rank or run is None:
                self._saved = self.step
                return
            config: dict[str, Any] = {
                "model": describe(self.model),
                "path": self.path.to_dict(),
                "train": asdict(self.config),
            }
            if self.heldout_step == self.step and self.heldout_loss is not None and math.isfinite(self.heldout_loss):
                config["heldout_loss"] = self.heldout_loss
            if self._log is not None:
                self._log.sync()  # before the checkpoint, whose steps it then has in any case
            run.save(config, weights, training, self.stream, self.step, self.config.keep, parts, self.tokenizer)
        self._saved = self.step

    def load(self, checkpoint: Checkpoint | None = None) -> None:
        """Takes up a checkpoint, of any number of processes and any engine. An average or a loss curve that it lacks starts anew from
        there.

        Args:
            checkpoint: None: the last one of the run folder that is whole; a later one that is not is warned of.

        Raises:
            ValueError: a file is missing, broken, or of another model; the message names it.
        """
        checkpoint = checkpoint or self._folder().last_good()
        with checkpoint.training(self.engine.likeness(self.optimizers)) as state:
            self.engine.load_model(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                _check_moments(optimizer, saved)
                self.engine.load_optimizer(optimizer, saved)
            if self.config.ema:
                average, weights = state["average"] or self._weights(), self._weights()
                if average.keys() != weights.keys():
                    raise ValueError("its average is of another model")
                self.average = {name: sharded_like(average[name], weights[name]) for name in weights}
            if self.batches.curve is not None and state["curve"] is not None:
                self.batches.curve.sums.copy_(state["curve"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.skipped, self.skipped_last = int(state["skipped"]), 0
        if self.run is not None and checkpoint.folder.resolve().parent == self.run.folder.resolve():
            self._owns = True
        if self.processes > 1:
            check_agreement({"checkpoint": checkpoint.folder.name, "step": self.step}, self.device)


def _check_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """torch takes moments of any shape for those of a parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in saved["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameters[number].shape:
                expected = tuple(parameters[number].shape)
                raise ValueError(f"its {name} {number} has shape {tuple(value.shape)}, allowed is {expected}")
