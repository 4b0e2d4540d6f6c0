"""The texts that a command works on: from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from klflow_ext.cli.terminal import given_text


def given_texts(name: str, texts: tuple[str, ...], file: Path | None) -> list[str]:
    """Those of --name, then those of --names-file; `name` is also their key in JSONL."""
    return [given_text(name, text) for text in texts] + ([] if file is None else read_texts(name, file))


def read_texts(name: str, file: Path) -> list[str]:
    """One text a line, "-" stands for stdin: of JSONL, whose first line is an object with the key `name`, that key of each; else
    the line as it stands. Blank lines are left out.

    Raises:
        ValueError: the file cannot be read, holds no text, or a line of JSONL is none.
    """
    where = f"{name}s_file: {'stdin' if str(file) == '-' else file}"
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"{where} cannot be read: {said}") from None
    numbered = [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{where} holds no text")
    if file.suffix not in (".jsonl", ".ndjson") and _text_of(name, numbered[0][1]) is None:
        return [line for _, line in numbered]
    found = []
    for i, line in numbered:
        text = _text_of(name, line)
        if text is None:
            raise ValueError(f'{where}, line {i}: got {line[:80]!r}, allowed is an object with a text as "{name}"')
        found.append(text)
    return found


def _text_of(name: str, line: str) -> str | None:
    """What an object of JSON has by this name, None where the line is no such object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = value.get(name) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
