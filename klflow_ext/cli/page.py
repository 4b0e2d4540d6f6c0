"""`--html FILE`: the passes as one page that needs nothing but itself (page.html has its form)."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from klflow_ext.cli.pieces import Pieces
from klflow_ext.files import write_file
from klflow_ext.sample import Pass

TOP = 5
DIGITS = 4  # of probabilities and entropies


def history_of(passes: list[Pass], pieces: Pieces) -> dict[str, Any]:
    """What the page holds: of each sequence its passes, and the text of every token that occurs."""
    sequences: dict[int, dict[str, Any]] = {}
    names: dict[int, str] = {}
    for found in passes:
        for row, member in enumerate(found.members):
            tokens = found.tokens[row].tolist()
            top = [] if found.top_tokens is None else found.top_tokens[row].tolist()
            top_p = [] if found.top_p is None else found.top_p[row].tolist()
            entropy = float(found.entropy[row])
            sequence = sequences.setdefault(member, {"given": found.given[row].int().tolist(), "passes": []})
            sequence["passes"].append(
                {
                    "tokens": tokens,
                    "pieces": pieces(tokens),
                    "stands": found.stands[row].int().tolist(),
                    "p": _rounded(found.confidence[row].tolist()),
                    "entropy": round(entropy, DIGITS) if math.isfinite(entropy) else None,
                    "top": top,
                    "topP": [_rounded(some) for some in top_p],
                }
            )
            names.update((i, pieces.name(i)) for i in {*tokens, *(i for some in top for i in some)} if i >= 0)
    return {"sequences": [sequences[i] for i in sorted(sequences)], "names": names}


def page_of(passes: list[Pass], pieces: Pieces, title: str, about: str) -> str:
    """The page as text."""
    history = history_of(passes, pieces)
    ended = "\n\n".join("".join(p or "" for p in s["passes"][-1]["pieces"]) for s in history["sequences"])
    data = json.dumps(history, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # no end of a script, and no comment, may stand in it
        data = data.replace(character, f"\\u{ord(character):04x}")
    values = {
        "title": html.escape(title),
        "about": html.escape(about),
        "ended": html.escape(ended),
        "data": data,
    }
    page = Path(__file__).with_name("page.html").read_text("utf-8")
    parts = page.split("{{")
    for i, part in enumerate(parts[1:], 1):
        name, _, rest = part.partition("}}")
        parts[i] = values[name] + rest
    return "".join(parts)


def write_page(path: Path, passes: list[Pass], pieces: Pieces, title: str, about: str) -> None:
    """Writes the page under a temporary name and renames it.

    Raises:
        ValueError: there is no pass to show, or the file cannot be written; what was there before stays.
    """
    if not passes:
        raise ValueError(f"html: got no pass to show in {path}, allowed are texts with a free position")
    page = page_of(passes, pieces, title, about)
    write_file(path, lambda new: new.write_text(page, "utf-8", "strict"))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]
