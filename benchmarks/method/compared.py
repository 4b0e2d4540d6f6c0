"""The runs that are compared, the text they read, and the file of results that each has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from klflow_ext import Autoregressive, LinearPath, LogitPath, MaskPath, Sampler, SpherePath, UniformPath, data, load_run
from klflow_ext.files import write_file

ROOT = Path(__file__).resolve().parent.parent  # of the benchmarks
RESULTS = ROOT / "results" / "method"
TEXT = ROOT / "results" / "method_text.json"  # of real text
COST = ROOT / "results" / "method_cost.json"  # seconds of a sample

# name: (path, what the network is, how it is trained). The paper's own is "simplex uniform". "stdlib" is "segments" on the
# source of Python's standard library, for a removed line of code.
METHODS = {
    "posterior": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle"}),
    "segments": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle", "given_share": 0.6}),
    "stdlib": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle", "given_share": 0.6}),
    "slices": (LogitPath, {"input": "posterior", "time": "none", "slices": True}, {"time_sampling": "middle"}),
    "slices evidence": (LogitPath, {"input": "posterior", "time": "none", "slices": True}, {"time_sampling": "middle", "evidence_share": 0.15}),
    "mask slices": (MaskPath, {"input": "tokens", "time": "none", "slices": True}, {"time_sampling": "uniform"}),
    "posterior learned": (LogitPath, {"input": "posterior"}, {"time_sampling": "learned"}),
    "posterior uniform": (LogitPath, {"input": "posterior"}, {"time_sampling": "uniform"}),
    "simplex": (LogitPath, {"input": "simplex"}, {"time_sampling": "middle"}),
    "simplex uniform": (LogitPath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "linear": (LinearPath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "sphere": (SpherePath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "mask": (MaskPath, {"input": "tokens"}, {"time_sampling": "uniform"}),
    "uniform": (UniformPath, {"input": "tokens"}, {"time_sampling": "uniform"}),
    "autoregressive": (Autoregressive, {"input": "tokens", "causal": True, "time": "none"}, {"time_sampling": "uniform"}),
}  # fmt: skip
LENGTH, BATCH = 64, 32

TITLES = {  # what a reader sees, in this order; a run may be sampled by another scheme than its own
    "autoregressive": "autoregressive",
    "slices": "KL flow, slices",
    "mask slices": "mask flow, slices",
    "segments": "KL flow, segments",
    "mask, segments": "mask flow, segments",
    "posterior": "KL flow, posterior input",
    "posterior, hybrid at half": "KL flow, posterior input, hybrid at half",
    "simplex": "KL flow, the paper's input",
    "mask": "mask flow (DFM)",
}
# Two streams have twice the rows: a step of theirs is two of one stream's. Steps of theirs: of one stream's, with equal arithmetic.
HALVES = {537: 1075}


def text_streams(arguments):
    """(tokenizer, training, held-out tokens) of TinyStories, or of the standard library, made once."""
    code = arguments.name == "stdlib"
    folder = arguments.runs / f"tokens-{'stdlib-' * code}{arguments.vocab_size}"
    return token_streams(folder, arguments.vocab_size, (lambda: data.documents(None)) if code else stories)


def stories() -> tuple[list[str], list[str]]:
    """TinyStories, (training, held-out)."""
    source = Path(os.environ["KLFLOW_DATA"]) / "tinystories"
    train, held = (
        [part for part in data.read_text(source / f"tinystories_{name}.txt").split(f"\n{data.END}\n") if part.strip()]
        for name in ("train", "heldout")
    )
    return train, held


def token_streams(folder: Path, vocab_size: int, read: Callable[[], tuple[list[str], list[str]]]):
    """(tokenizer, training, held-out tokens) of the texts (training, held-out) that `read` gives, made once in a folder."""
    from tokenizers import Tokenizer

    if not (folder / "heldout.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        train, held = read()
        tokenizer = data.train_tokenizer(train, vocab_size)
        write_file(folder / "tokenizer.json", lambda p: tokenizer.save(str(p)))
        for name, texts in (("train", train), ("heldout", held)):
            stream = data.encode(tokenizer, texts)
            write_file(folder / f"{name}.npy", lambda p, stream=stream: np.save(open(p, "wb"), stream))
    streams = (np.load(folder / f"{name}.npy") for name in ("train", "heldout"))
    return Tokenizer.from_file(str(folder / "tokenizer.json")), *streams


def held_texts(held: np.ndarray, count: int, seed: int = 12345, step: int = 0) -> torch.Tensor:
    """(count, LENGTH) held-out texts, always the same: at the places that the first results were measured at."""
    starts = np.random.default_rng((seed, step)).integers(0, len(held) - LENGTH, count)
    return torch.from_numpy(np.stack([held[i : i + LENGTH] for i in starts]).astype(np.int64))


def label(arguments) -> str:
    return f"{arguments.name.replace(' ', '-')}-V{arguments.vocab_size}-{arguments.steps}-seed{arguments.seed}"


def update(arguments, **values) -> None:
    """Adds values to the result file of a run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{label(arguments)}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found.update(
        name=arguments.name, vocab_size=arguments.vocab_size, steps=arguments.steps, seed=arguments.seed, **values
    )
    write_file(file, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))


def results() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def grouped(found: list[dict], key) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in found:
        groups.setdefault(key(r), []).append(r)
    return groups


def beside(r: dict) -> tuple[int, int, str]:
    """(V, steps, "" or what to add to its name) of the runs that a run stands beside."""
    if order_of(r["name"]) == "slices" and r["steps"] in HALVES:
        return r["vocab_size"], HALVES[r["steps"]], ", half the steps"
    return r["vocab_size"], r["steps"], ""


def titled(name: str) -> str:
    """As a reader sees it."""
    name, half, _ = name.partition(", half the steps")
    return TITLES.get(name, name) + half


def placed(name: str) -> tuple[int, str]:
    """Where a name comes in the order of the titles."""
    names = list(TITLES)
    bare = name.partition(", half the steps")[0]
    return (names.index(bare) if bare in names else len(names)), name


def order_of(name: str) -> str | None:
    """The order of its draws that a run was trained for, its method; None: it moves all positions together."""
    found = [word for word in name.split() if word in ("segments", "slices")]
    return found[0] if found else None


def sampled_as(name: str, method: str) -> str:
    """A run with the scheme it was sampled by, where that is not its usual one."""
    order = order_of(name)
    usual = ("basic", "sampling") if order is None else (order,)
    return name if method in usual else f"{name}, {method}"


def load_sampler(arguments):
    model, path, tokenizer = load_run(arguments.runs / label(arguments))
    return Sampler(model, path), tokenizer
