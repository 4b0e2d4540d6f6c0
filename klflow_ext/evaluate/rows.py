"""Files of JSONL, packed by gzip or not, that hold what a model is asked."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_rows(name: str, path: str | Path, fields: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The object of each line.

    Args: name: of the argument, for errors. fields: what each must have, and of which type; a list is one of texts.

    Raises:
        ValueError: the file cannot be read, or a line is no such object.
    """
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                row = json.loads(line)
                if not isinstance(row, dict) or not all(_is(row.get(key), kind) for key, kind in fields.items()):
                    wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in fields.items())
                    raise ValueError(f"got {line[:60]!r}, allowed is an object with {wanted}")
                yield row
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path} cannot be read at line {max(number, 1)}: {error}") from None


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return isinstance(value, kind)
