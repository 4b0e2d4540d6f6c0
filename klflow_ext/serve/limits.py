"""What a request, a batch and the queue may hold."""

from __future__ import annotations

from dataclasses import dataclass

from klflow_ext.checks import check_int, check_scalar

LEAST = {"max_queue": 0}  # of the others 1
MOST = 2**31


@dataclass(frozen=True)
class Limits:
    """What may be asked for, and how long it may wait.

    Raises:
        ValueError, TypeError: a field is outside its range, or no number; the message names it.
    """

    max_batch: int = 16
    """Sequences that run together: of one length, with the same settings."""
    max_wait_ms: float = 5.0
    """Milliseconds that a sequence waits for others to run with."""
    max_queue: int = 256
    """Sequences that wait; what is more is refused (429)."""
    timeout: float = 60.0
    """Seconds that a request may wait until it runs (504), and that its body may take to arrive (408)."""
    max_tokens: int = 512
    """Of each result (422)."""
    max_length: int = 2048
    """Tokens of a prompt, its suffix and the result together (422); the model's max_length where that is less."""
    max_n: int = 16
    """Results of a request, which are its prompts times its n (422)."""
    max_steps: int = 256
    """Network passes that may be asked for (422)."""
    max_body: int = 2**20
    """Bytes of a request (413)."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_tokens", "max_length", "max_n", "max_steps", "max_body"):
            least = LEAST.get(name, 1)
            value = check_int(name, getattr(self, name), least, MOST, f"an integer in [{least}, 2^31]")
            object.__setattr__(self, name, value)
        check_scalar("max_wait_ms", self.max_wait_ms, 0, 60_000, "milliseconds in [0, 60000]")
        check_scalar("timeout", self.timeout, 0, 86_400, "seconds in (0, 86400]", open_low=True)
