"""`--live`: the text in the terminal as it forms, pass by pass. Where there is no terminal for it: a plain line for each pass."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from klflow_ext.cli.pieces import Pieces
from klflow_ext.sample import UNKNOWN, Pass

if TYPE_CHECKING:
    from rich.console import Console

BLANK = "\u00b7"  # a position that no pass has asked for
LEVELS = ((0.25, "red"), (0.5, "yellow"), (0.75, "cyan"), (math.inf, "green"))  # of p, below which


class Live:
    """Shows passes as they are made; used as a context.

    Args:
        pause: seconds after each pass. console: of rich, with colours; None: plain lines.

    Attributes:
        paused: seconds spent on it.
    """

    def __init__(self, pieces: Pieces, pause: float, console: Console | None):
        self.pieces, self.pause, self.console = pieces, pause, console
        self.paused = 0.0
        self._sequences: dict[int, Any] = {}  # what is shown of each
        self._screen: Any = None

    @property
    def sequences(self) -> int:
        """How many stand on the screen."""
        return len(self._sequences)

    def __enter__(self) -> Live:
        if self.console is not None:
            from rich.live import Live as Screen

            self._screen = Screen(console=self.console, auto_refresh=False)
            self._screen.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._screen is not None:
            self._screen.stop()

    def __call__(self, found: Pass) -> None:
        start = time.perf_counter()
        for row, member in enumerate(found.members):
            if self._screen is None:
                print(plain_line(found, row, self.pieces), flush=True)
            else:
                self._sequences[member] = coloured(found, row, self.pieces)
        if self._screen is not None:
            from rich.console import Group
            from rich.text import Text

            texts = [self._sequences[i] for i in sorted(self._sequences)]
            between = [part for text in texts for part in (text, Text(""))]
            self._screen.update(Group(Text(heading(found), "dim"), legend(), Text(""), *between), refresh=True)
        time.sleep(self.pause)
        self.paused += time.perf_counter() - start


def console_of_stdout() -> Console | None:
    """None where colours and movement are not wanted, or cannot be."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        raise ImportError("--live needs rich, of the train extra: pip install 'klflow_ext[train]'") from None
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    return None if console.is_dumb_terminal else console


def heading(found: Pass) -> str:
    """Which pass it is, and the mean entropy over the sequences."""
    known = [value for value in found.entropy.tolist() if math.isfinite(value)]
    entropy = f", entropy {sum(known) / len(known):.2f} nats" if known else ""
    return f"pass {found.number} of {found.total}{entropy}"


def legend():
    """The colours, in words."""
    from rich.text import Text

    text = Text().append("p: ", "dim")
    below = 0
    for most, colour in LEVELS:
        text.append(f"{below}-{100 * min(most, 1):.0f} %", colour).append("  ")
        below = int(100 * min(most, 1))
    return text.append("bold: stands, plain: given", "dim")


def coloured(found: Pass, row: int, pieces: Pieces):
    """A sequence as a rich Text."""
    from rich.text import Text

    text = Text()
    given, stands, confidence = (x[row].tolist() for x in (found.given, found.stands, found.confidence))
    for i, piece in enumerate(pieces(found.tokens[row].tolist())):
        if piece is None:
            text.append(BLANK, "dim")
        elif given[i]:
            text.append(piece)
        else:
            colour = next(colour for most, colour in LEVELS if confidence[i] < most)
            text.append(piece, f"bold {colour}" if stands[i] else colour)
    return text


def plain_line(found: Pass, row: int, pieces: Pieces) -> str:
    """A pass of a sequence in a line: its number, the mean p of the tokens that are not given, the text."""
    text = "".join(BLANK if piece is None else piece for piece in pieces(found.tokens[row].tolist()))
    number = f"{found.number:>{len(str(found.total))}}/{found.total}"
    which = f" {found.members[row] + 1}" if len(found.members) > 1 or found.members[row] else ""
    text = text.replace("\t", "\\t").replace("\n", "\\n")
    known = ~found.given[row] & (found.tokens[row] != UNKNOWN)
    p = f"  p {found.confidence[row][known].mean():.2f}" if bool(known.any()) else ""
    return f"{number}{which}{p}  {text}"
