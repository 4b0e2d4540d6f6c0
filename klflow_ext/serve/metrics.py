"""What is counted, as text that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """How many values were at most each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Counts; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: Counter[str] = Counter()
        self._seconds, self._batches = Histogram(SECONDS), Histogram(BATCHES)

    def request(self, path: str, code: int) -> None:
        """One that was answered; 499: the client went away."""
        with self._lock:
            self._requests[path, code] += 1

    def answered(self, seconds: float, prompt_tokens: int, completion_tokens: int) -> None:
        """A completion that was made, in seconds from the request to the answer."""
        with self._lock:
            self._seconds.add(seconds)
            self._totals["prompt_tokens"] += prompt_tokens
            self._totals["completion_tokens"] += completion_tokens

    def batch(self, size: int, seconds: float, passes: int) -> None:
        """Sequences that ran together."""
        with self._lock:
            self._batches.add(size)
            self._totals["model_seconds"] += seconds  # type: ignore[assignment]
            self._totals["passes"] += passes

    def text(self, waiting: int, running: int) -> str:
        """Everything. waiting, running: sequences now."""
        with self._lock:
            found: list[str] = []

            def put(name: str, kind: str, about: str, lines: list[str]) -> None:
                found.extend([f"# HELP klflow_{name} {about}", f"# TYPE klflow_{name} {kind}", *lines])

            rows = sorted(self._requests.items())
            lines = [f'klflow_requests_total{{path="{path}",code="{code}"}} {count}' for (path, code), count in rows]
            put("requests_total", "counter", "Requests by path and status; 499: the client went away.", lines)
            put("queue_length", "gauge", "Sequences that wait.", [f"klflow_queue_length {waiting}"])
            put("running", "gauge", "Sequences that run.", [f"klflow_running {running}"])
            for name, about in (
                ("prompt_tokens", "Tokens of prompts and suffixes that were answered."),
                ("completion_tokens", "Tokens that were generated for answers."),
                ("model_seconds", "Seconds that the model ran."),
                ("passes", "Network passes over a batch."),
            ):
                total = f"klflow_{name}_total"
                put(f"{name}_total", "counter", about, [f"{total} {self._totals[name]:.10g}"])
            about = "Sequences that ran together."
            put("batch_size", "histogram", about, self._batches.lines("klflow_batch_size"))
            about = "Seconds from a request for a completion to its answer."
            put("completion_seconds", "histogram", about, self._seconds.lines("klflow_completion_seconds"))
        return "\n".join(found) + "\n"
