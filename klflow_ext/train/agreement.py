"""What all processes must have alike: settings, data and code are compared before the first step."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import klflow_ext
from klflow_ext import data

BLOCKS, BLOCK = 64, 2**20  # of a long stream, pieces of so many bytes stand for it


def check_agreement(values: dict[str, Any], device: torch.device) -> None:
    """Compares values by name (numbers, texts, dicts) over all processes, which must all call it.

    Raises:
        ValueError: they differ; on every process, with the same message.
    """
    mine = {name: json.dumps(value, sort_keys=True, default=repr) for name, value in values.items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    ours = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device)
    theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, ours)
    if all(torch.equal(x, theirs[0]) for x in theirs):
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = sorted({name for one in everyone for name in one})
    raise ValueError(
        "; ".join(filter(None, (_difference(name, [one.get(name) for one in everyone]) for name in names)))
    )


def _difference(name: str, values: list[str | None]) -> str:
    """What is said of a value that differs; nothing of one that does not."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return ""
    said = []
    for value, who in sorted(ranks.items(), key=lambda item: item[1]):
        others = f" and {len(who) - 1} more" if len(who) > 1 else ""
        said.append(f"{'nothing' if value is None else value} on process {who[0]}{others}")
    return f"{name}: got {', '.join(said)}, allowed is the same on all"


def fingerprint(stream: data.Stream) -> str:
    """Of the tokens: their number, type and bytes; of a long array the bytes of pieces all over it. Token folders have their own."""
    sources = data.reference(stream)
    if sources is not None:  # wherever the folders lie
        return "; ".join(f"{s['fingerprint']} {s['split']} {s['weight']:g}" for s in sources)
    array = np.asanyarray(stream)
    digest = hashlib.blake2b(f"{array.dtype.str} {array.shape}".encode(), digest_size=16)
    size = BLOCK // array.dtype.itemsize
    count = -(-len(array) // size)
    for piece in np.unique(np.linspace(0, max(count - 1, 0), min(count, BLOCKS)).round().astype(np.int64)):
        digest.update(np.ascontiguousarray(array[piece * size : (piece + 1) * size]).tobytes())
    return digest.hexdigest()


@cache
def code_version() -> str:
    """Of this package, by its number and its source, and of torch."""
    folder = Path(klflow_ext.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return f"klflow_ext {klflow_ext.__version__} ({digest.hexdigest()}), torch {torch.__version__}"
