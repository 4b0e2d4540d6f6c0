"""Which text each token of a sequence adds, for who looks at tokens one by one."""

from __future__ import annotations

from typing import Any

from klflow_ext.cli.terminal import printable
from klflow_ext.sample import UNKNOWN

BROKEN = "\ufffd"  # what a decoder puts for bytes that are no whole character


class Pieces:
    """pieces(ids): the text of each token, with control characters as escapes; None of an unknown one.

    A character of several tokens stands at the last of them; the others have "".
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def name(self, token: int) -> str:
        """The text of a token by itself."""
        if token not in self._names:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            piece = self.tokenizer.id_to_token(token) or ""
            if piece.startswith("\u2581") and not text.startswith(
                " "
            ):  # a decoder that drops the first space of a text
                text = " " + text
            self._names[token] = printable(text)
        return self._names[token]

    def __call__(self, ids: list[int]) -> list[str | None]:
        found: list[str | None] = [None if i == UNKNOWN else self.name(i) for i in ids]
        start = 0
        for i, text in enumerate(found):
            if text is None or BROKEN not in text:
                start = i + 1
                continue
            joined = self.tokenizer.decode(ids[start : i + 1], skip_special_tokens=False)
            if BROKEN not in joined:
                found[start : i + 1] = [""] * (i - start) + [printable(joined)]
                start = i + 1
        return found
