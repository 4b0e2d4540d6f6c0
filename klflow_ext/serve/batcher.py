"""Sequences that wait, and the one thread that runs the model on those that can be together."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from torch import Tensor

from klflow_ext.path import SampleOptions
from klflow_ext.sample import Pass, Samples
from klflow_ext.serve.metrics import Metrics
from klflow_ext.serve.refusal import Refusal
from klflow_ext.serve.served import Served


@dataclass(frozen=True)
class Done:
    """What came of a sequence.

    Attributes:
        tokens: its ids. log_likelihood: in nats per generated token, where it was asked for and the method has one.
        confidence: the probability of each token, where it was asked for.
    """

    tokens: list[int]
    log_likelihood: float | None = None
    confidence: list[float] | None = None


@dataclass(eq=False)
class Job:
    """A sequence to fill.

    Attributes:
        tokens, given: (L,), as `Sampler.infill` takes them. seed, options: its own.
        score, look: whether its log-likelihood, and its confidence, are asked for.
        key: of `Sampler.batch_key`.
        watch: called, in the thread that runs the model, with each Pass and the row of this sequence in it; None: nobody.
        future: its Done, or a Refusal.
    """

    tokens: Tensor
    given: Tensor
    seed: int
    options: SampleOptions
    score: bool
    look: bool
    key: tuple[int, int]
    watch: Callable[[Pass, int], object] | None = None
    future: Future[Done] = field(default_factory=Future)
    since: float = 0.0

    @property
    def kind(self) -> tuple[tuple[int, int], SampleOptions]:
        """Those of one kind run together."""
        return self.key, self.options


class Batcher:
    """Runs jobs in a thread of its own, the oldest first, together with others of its kind, at most max_batch of them.

    A job waits at most max_wait_ms for others, and for the batches before it. Start it once; after `close` it is done with.
    """

    def __init__(self, served: Served, metrics: Metrics):
        self.served, self.metrics, self.limits = served, metrics, served.limits
        self.running = 0
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="klflow-model", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        return self._closed

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Puts all of them into the queue, or none.

        Raises:
            Refusal: 429, there is no room; 503, the server is stopping.
        """
        with self._changed:
            if self._closed:
                raise stopping()
            waiting, room = len(self._waiting), self.limits.max_queue
            if waiting + len(jobs) > room + self._free():
                raise Refusal(
                    429, f"queue: {waiting} sequences wait and {len(jobs)} would join them, allowed are {room}"
                )
            now = time.monotonic()
            for job in jobs:
                job.since = now
            self._waiting += jobs
            self._changed.notify()

    def _free(self) -> int:
        """Sequences that would run at once: with a queue of 0 an idle model still takes what it can."""
        return 0 if self.running or self._waiting else self.limits.max_batch

    def drop(self, jobs: list[Job]) -> int:
        """Takes those that still wait out of the queue: how many."""
        with self._changed:
            gone, before = set(jobs), len(self._waiting)
            self._waiting = [job for job in self._waiting if job not in gone]
            dropped = before - len(self._waiting)
        for job in jobs:
            job.future.cancel()  # which does nothing to one that runs
        return dropped

    def close(self) -> None:
        """Refuses what waits and what is yet to come. What runs is finished."""
        with self._changed:
            self._closed = True
            refused, self._waiting = self._waiting, []
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(stopping())

    def join(self) -> None:
        """Waits for the end of what runs, after `close`."""
        if self._thread.ident is not None:
            self._thread.join()

    # ---- the thread

    def _work(self) -> None:
        while batch := self._next():
            start = time.perf_counter()
            try:
                found, passes = self._fill(batch)
            except Exception as error:  # one batch is lost, not the server
                traceback.print_exc(file=sys.stderr)
                self.running = 0
                for job in batch:
                    job.future.set_exception(failure(error))
                continue
            self.running = 0
            self.metrics.batch(len(batch), time.perf_counter() - start, passes)
            for job, done in zip(batch, found, strict=True):
                job.future.set_result(done)

    def _next(self) -> list[Job]:
        """The jobs to run now; none after `close`."""
        with self._changed:
            while not self._closed:
                if not self._waiting:
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                batch = [job for job in self._waiting if job.kind == oldest.kind][: self.limits.max_batch]
                left = oldest.since + self.limits.max_wait_ms / 1000 - time.monotonic()
                if len(batch) < self.limits.max_batch and left > 0:
                    self._changed.wait(left)
                    continue
                taken = set(batch)
                self._waiting = [job for job in self._waiting if job not in taken]
                batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
                if batch:
                    self.running = len(batch)
                    return batch
        return []

    def _fill(self, batch: list[Job]) -> tuple[list[Done], int]:
        """(what comes of each, passes made)."""
        sampler, options = self.served.sampler, batch[0].options
        rows, flags = [job.tokens for job in batch], [job.given for job in batch]
        confidences: list[list[float] | None] = [None] * len(batch)

        def see(found: Pass) -> None:
            for row, member in enumerate(found.members):
                if batch[member].look:
                    confidences[member] = found.confidence[row].tolist()
                if (watch := batch[member].watch) is not None:
                    watch(found, row)

        watch = see if any(job.look or job.watch for job in batch) else None
        result = sampler.infill(rows, flags, options, seed=[job.seed for job in batch], watch=watch)
        scores = self._scores(batch, result)
        tokens = (row.tolist() for row in result.tokens)
        return [Done(*of) for of in zip(tokens, scores, confidences, strict=True)], result.nfe

    def _scores(self, batch: list[Job], result: Samples) -> list[float | None]:
        """The log-likelihoods of those that ask."""
        scores: list[float | None] = [None] * len(batch)
        asked = [i for i, job in enumerate(batch) if job.score]
        if asked and self.served.sampler.has_likelihood(batch[0].options):
            some = replace(result, tokens=[result.tokens[i] for i in asked], given=[result.given[i] for i in asked])
            for i, score in zip(asked, self.served.sampler.log_likelihoods(some, batch[0].options), strict=True):
                scores[i] = score
        return scores


def stopping() -> Refusal:
    return Refusal(503, "server: it is stopping")


def failure(error: Exception) -> Refusal:
    """What the client hears of an error of the model; the server's stderr has all of it."""
    memory = isinstance(error, MemoryError) or "memory" in str(error)
    what = "there is not enough memory for it" if memory else "the model failed"
    return Refusal(500, f"server: {what}")
