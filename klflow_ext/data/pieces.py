"""Documents of a text that is read block by block, each in parts that are held and encoded one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

END = "<|endoftext|>"  # stands between documents; token 0 of a tokenizer that is trained here
PIECE = 2000  # characters of a piece of a text that is not divided otherwise
PART = 1 << 18  # characters of a part
HEAD = 1 << 22  # characters by which it is decided how a text is divided
MARGIN = 1000  # characters, more than a separator has


class Part(NamedTuple):
    """text of a document, all of it where it has at most PART characters; last: the document ends here."""

    text: str
    last: bool


class Division(NamedTuple):
    """Documents end at a separator, which they keep or not, once they have more than `least` characters."""

    separator: re.Pattern
    least: int
    kept: bool


MARKS = Division(re.compile(rf"\r?\n{re.escape(END)}[ \t]*\r?\n"), 0, False)
DIVISIONS = (
    Division(re.compile(r"\n[ \t]*\r?\n"), PIECE, True),
    Division(re.compile(r"\n"), PIECE, True),
    Division(re.compile(r"\n"), 0, True),
)
FEW = 20  # documents


def parts(text: str) -> Iterator[Part]:
    """The parts of one document, which end before a space between two words, as byte-level tokens do."""
    while len(text) > PART:
        at = _cut(text)
        yield Part(text[:at], False)
        text = text[at:]
    yield Part(text, True)


def _cut(text: str) -> int:
    at = PART
    while (at := text.rfind(" ", PART // 2, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return PART


def pieces(blocks: Iterable[str]) -> Iterator[Part]:
    """The documents of a text in blocks of any size, on which nothing depends; those of nothing but blanks are left out.

    They stand between lines that hold only <|endoftext|>; without any in the first HEAD characters, at blank lines, and where
    there are few of those at any line, they are pieces of about 2,000 characters; where these are few, each line is one. Line
    ends are of any kind, and kept.
    """
    blocks = iter(blocks)
    first: list[str] = []
    size = 0
    while size < HEAD and (block := next(blocks, None)) is not None:
        first.append(block)
        size += len(block)
    head = "".join(first)
    division = _choose(head[:HEAD])
    rest, begun = "", 0  # what is not given yet; the characters of its document that are
    for block in chain([head], blocks):
        rest += block
        start = 0
        for match in division.separator.finditer(rest):
            if begun + match.end() - start > division.least:
                yield from _whole(rest[start : match.end() if division.kept else match.start()], begun)
                start, begun = match.end(), 0
        rest = rest[start:]
        while len(rest) > PART + MARGIN:
            at = _cut(rest)
            yield Part(rest[:at], False)
            rest, begun = rest[at:], begun + at
    yield from _whole(rest, begun)


def _whole(text: str, begun: int) -> Iterator[Part]:
    if begun or text.strip():
        yield from parts(text)


def _choose(head: str) -> Division:
    if sum(bool(piece.strip()) for piece in MARKS.separator.split(head)) > 1:
        return MARKS
    for division in DIVISIONS:
        count, start = 0, 0
        for match in division.separator.finditer(head):
            if match.end() - start > division.least:
                count += bool(head[start : match.end()].strip())
                start = match.end()
        if count + bool(head[start:].strip()) >= FEW:
            break
    return division
