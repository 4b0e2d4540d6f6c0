"""The options by which the commands that generate let a text be watched: --live and --html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from klflow_ext.checks import check_scalar
from klflow_ext.cli.live import Live, console_of_stdout
from klflow_ext.cli.page import TOP, write_page
from klflow_ext.cli.pieces import Pieces
from klflow_ext.sample import Pass, Samples


@dataclass(frozen=True)
class Show:
    """How the text is shown as it forms."""

    live: bool = False
    """Show the text in the terminal as it forms, coloured by the probability of each token; without a terminal a line for each pass."""
    pause: float = 0.1
    """Of --live, seconds to wait after each pass."""
    html: Path | None = None
    """Write a page with all passes here: a slider, the likeliest tokens of each position, the entropy."""

    def __post_init__(self) -> None:
        check_scalar("pause", self.pause, 0, 3600, "a number of seconds in [0, 3600]")
        if self.html is not None and (self.html.is_dir() or not self.html.parent.is_dir()):
            raise ValueError(f"html: got {self.html}, allowed is a file in a folder that is there")

    def start(self, tokenizer: Any, vocab_size: int) -> Showing:
        """What watches one call of a Sampler; used as a context."""
        return Showing(self, Pieces(tokenizer), min(TOP, vocab_size))


class Showing:
    """Watches a call, given `options` of `Sampler.infill`, and at `end` writes what was asked for.

    Attributes:
        on_screen: after the end, whether all texts stand in the terminal already.
    """

    def __init__(self, show: Show, pieces: Pieces, top: int):
        self.show, self.pieces = show, pieces
        self.passes: list[Pass] = []
        self.live = Live(pieces, show.pause, console_of_stdout()) if show.live else None
        self.on_screen = False
        self.options: dict[str, Any] = {}
        if show.live or show.html is not None:
            self.options = {"watch": self._see, "top": 0 if show.html is None else top}
        if show.live:
            self.options["progress"] = False

    def __enter__(self) -> Showing:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, at)

    def _see(self, found: Pass) -> None:
        if self.show.html is not None:
            self.passes.append(found)
        if self.live is not None:
            self.live(found)

    def end(self, result: Samples, about: str) -> None:
        """Takes the pauses out of the seconds, and writes the page."""
        if self.live is not None:
            result.seconds -= self.live.paused
            self.on_screen = self.live.console is not None and self.live.sequences == len(result.tokens)
        if self.show.html is not None:
            write_page(self.show.html, self.passes, self.pieces, "Text as it forms", about)
