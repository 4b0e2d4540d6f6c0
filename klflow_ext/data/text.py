"""Texts that memory holds: a whole file, its documents, the default corpus, and removed lines of code."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from klflow_ext.data.files import TextFile
from klflow_ext.data.pieces import END, FEW, PIECE


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. ValueError names the file and what is wrong: missing, a folder, not UTF-8, or empty."""
    text = "".join(TextFile(path).characters())
    if not text.strip():
        raise ValueError(f"data: {path} is empty")
    return text


def standard_library() -> list[str]:
    """The source files of this Python's standard library, sorted by name, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "config",
        "__pycache__",
    }
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not skipped.intersection(path.relative_to(root).parts):
            try:
                texts.append(path.read_text("utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
    if sum(map(len, texts)) < 100_000:
        raise ValueError(f"data: no standard library source under {root}; name a text file with --data")
    return texts


def documents(path: str | Path | None) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of a file of texts, or of the standard library (every 20th is held out)."""
    texts: list[str] = []
    if path is None:
        texts = standard_library()
    else:
        begun: list[str] = []
        for text, last in TextFile(path).parts():
            begun.append(text)
            if last:
                texts.append("".join(begun))
                begun.clear()
        if not texts:
            raise ValueError(f"data: {path} is empty")
    if len(texts) < FEW:
        raise ValueError(
            f"data: {path} has {len(texts)} pieces of text, at least {FEW} are needed: texts between lines of {END}, pieces of "
            f"{PIECE} characters between blank lines or lines, or lines"
        )
    return [text for i, text in enumerate(texts) if i % 20], texts[::20]


def removed_lines(
    texts: list[str], tokenizer, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[str, str, str]]]:
    """(tokens (1, L), given (1, L), (before, line, after)) of a line of 6 to 14 tokens between three others on each side, for
    which L <= length; the first such line of each text. Only the line's tokens are not given. Blank lines are left out."""
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        for at in range(3, len(lines) - 3):
            parts = "\n".join(lines[at - 3 : at]) + "\n", lines[at], "\n" + "\n".join(lines[at + 1 : at + 4])
            ids = [tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
            if 6 <= len(ids[1]) <= 14 and sum(map(len, ids)) <= length:
                tokens = torch.tensor([sum(ids, [])])
                given = torch.ones_like(tokens, dtype=torch.bool)
                given[0, len(ids[0]) : len(ids[0]) + len(ids[1])] = False
                yield tokens, given, parts
                break
