"""What training reads: an array of tokens, a split of a token folder, or a mixture of these with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from klflow_ext.checks import check_choice
from klflow_ext.data.order import Mixed, Packed, Windows
from klflow_ext.data.tokens import SPLITS, TokenFolder, Tokens

Shuffle = Literal["windows", "documents"]
KEY = 0x6F72646572  # tells the draws of orders from others of the same seed
CHUNK = 1 << 24  # tokens


class Mixture:
    """Splits of token folders of one tokenizer, each with its share of the sequences.

    Args:
        streams: the splits.
        weights: not negative, one each, of any sum but 0; None: by their tokens.

    Raises:
        ValueError: the tokenizers differ, or a weight is none.
    """

    def __init__(self, streams: Sequence[Tokens], weights: Sequence[float] | None = None):
        weights = [float(len(stream)) for stream in streams] if weights is None else list(weights)
        if len(weights) != len(streams) or not streams:
            raise ValueError(f"weights: got {len(weights)} for {len(streams)} sources, allowed is one for each")
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
            raise ValueError(f"weights: got {weights}, allowed are numbers >= 0 that are not all 0")
        for stream in streams:
            if not isinstance(stream, Tokens):
                raise ValueError(f"streams: got {type(stream).__name__}, allowed are splits of token folders")
            first, this = streams[0].source, stream.source
            if this.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(
                    f"data: got {this.folder} beside {first.folder}, which has another tokenizer; allowed are folders prepared "
                    f"with one (klflow prepare --tokenizer {first.folder / 'tokenizer.json'})"
                )
        used = [(stream, w / sum(weights)) for stream, w in zip(streams, weights, strict=True) if w > 0]
        self.streams, self.weights = [stream for stream, _ in used], [w for _, w in used]

    def __len__(self) -> int:
        return sum(map(len, self.streams))


Stream = np.ndarray | Tokens | Mixture


def order_of(stream: Stream, length: int, seed: int, shuffle: Shuffle = "windows") -> Windows | Packed | Mixed:
    """The order in which training with this seed sees a stream.

    Raises:
        ValueError: the stream is no row of integers, or it, or one of a mixture's, has no more tokens than a sequence.
    """
    check_choice("shuffle", shuffle, get_args(Shuffle))
    streams = stream.streams if isinstance(stream, Mixture) else [stream]
    for one in streams:
        if not isinstance(one, Tokens):
            array = np.asanyarray(one)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"stream: got {array.dtype} of shape {array.shape}, allowed is a row of integers")
        if len(one) <= length:
            where = f" in {one.source.folder} ({one.split})" if isinstance(one, Tokens) else ""
            raise ValueError(f"stream: got {len(one)} tokens{where}, allowed are more than length = {length}")
    kind = Windows if shuffle == "windows" else Packed
    orders = [kind(one, length, (KEY, seed, i)) for i, one in enumerate(streams)]
    return Mixed(orders, stream.weights) if isinstance(stream, Mixture) else orders[0]


def batch(stream: Stream, batch_size: int, length: int, seed: int, step: int) -> torch.Tensor:
    """(batch_size, length) int64 windows of the stream, those of this step: they depend on (seed, step) alone."""
    numbers = np.arange(step * batch_size, (step + 1) * batch_size)
    return torch.from_numpy(order_of(stream, length, seed).take(numbers))


def one_file(paths: Sequence[Path], weights: Sequence[float] | None) -> Path | None:
    """The file of texts that was named, None where none was; ValueError where there are several, or it has a weight."""
    if len(paths) > 1 or weights is not None:
        raise ValueError(
            f"data: got {', '.join(map(str, paths))}{' with a weight' * (weights is not None)}, allowed are one file of texts or "
            "token folders (klflow prepare makes one of many files)"
        )
    return paths[0] if paths else None


def same_tokenizer(folders: Sequence[Path], tokenizer: Any) -> None:
    """ValueError where a token folder was made with another tokenizer than the one that a model has."""
    for folder in folders:
        if TokenFolder(folder).tokenizer().to_str() != tokenizer.to_str():
            raise ValueError(f"data: {folder} has another tokenizer, allowed is that of the model")


def token_counts(stream: Stream, vocab_size: int) -> np.ndarray:
    """(V,) how often each token occurs; of a mixture by its weights, of the sum of all tokens."""
    if isinstance(stream, Mixture):
        shares = [w * token_counts(s, vocab_size) / len(s) for s, w in zip(stream.streams, stream.weights, strict=True)]
        return np.sum(shares, 0) * len(stream)
    if isinstance(stream, Tokens):
        return stream.counts
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(stream), CHUNK):
        counts += np.bincount(stream[start : start + CHUNK], minlength=vocab_size)
    return counts


# ---- names of token folders, in commands and in run folders


def parse_sources(names: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[float] | None]:
    """(paths, weights) of PATH or PATH=WEIGHT, one or several; None where no weights are given.

    Raises:
        ValueError: a weight is no number, or only some have one.
    """
    paths: list[Path] = []
    weights: list[float] = []
    given = [str(name) for name in ([names] if isinstance(names, (str, Path)) else names)]
    for name in given:
        before, sign, after = name.rpartition("=")
        if sign and not Path(name).exists():
            try:
                weights.append(float(after))
            except ValueError:
                raise ValueError(f"data: got {name!r}, allowed is PATH or PATH=WEIGHT, the weight a number") from None
        paths.append(Path(before if sign and not Path(name).exists() else name))
    if weights and len(weights) != len(paths):
        raise ValueError(f"data: got {given}, allowed is a weight for each source or for none")
    return paths, weights or None


def is_token_folder(path: Path) -> bool:
    return (path / "index.json").is_file()


def open_streams(
    paths: Sequence[Path], weights: Sequence[float] | None = None
) -> tuple[Tokens | Mixture, Tokens | Mixture]:
    """(training, held-out) tokens of one or more token folders."""
    folders = [TokenFolder(path) for path in paths]
    if len(folders) == 1:
        Mixture([folders[0].train], weights)  # for its checks
        return folders[0].train, folders[0].heldout
    if weights is None:
        weights = [float(len(folder.train)) for folder in folders]
    train, heldout = ([getattr(folder, split) for folder in folders] for split in ("train", "heldout"))
    return Mixture(train, weights), Mixture(heldout, weights)


def reference(stream: Stream) -> list[dict[str, Any]] | None:
    """What a run folder says of the token folders that it trains on; None for an array, which is copied."""
    if not isinstance(stream, (Tokens, Mixture)):
        return None
    mixture = stream if isinstance(stream, Mixture) else Mixture([stream])
    return [
        {"folder": str(s.source.folder.resolve()), "fingerprint": s.source.fingerprint, "split": s.split, "weight": w}
        for s, w in zip(mixture.streams, mixture.weights, strict=True)
    ]


def from_reference(sources: list[dict[str, Any]], moved: Sequence[str | Path] = ()) -> tuple[Stream, Stream]:
    """(training, held-out) tokens of a run that was trained on token folders, which may have moved since.

    Raises:
        ValueError: a folder is gone or holds something else than it did.
    """
    fields = {"folder": str, "fingerprint": str, "split": str, "weight": float}
    if not isinstance(sources, list) or not all(
        isinstance(source, dict)
        and all(isinstance(source.get(name), kind) for name, kind in fields.items())
        and source["split"] in SPLITS
        for source in sources
    ):
        raise ValueError(f"data: the run says {sources!r}, allowed is a list of folders with {', '.join(fields)}")
    if moved and len(moved) != len(sources):
        raise ValueError(f"data: got {len(moved)} folders, allowed are the {len(sources)} of the run, in their order")
    streams: tuple[list[Tokens], list[Tokens]] = [], []
    for i, source in enumerate(sources):
        path = Path(moved[i] if moved else source["folder"])
        if not is_token_folder(path):
            raise ValueError(
                f"data: the run was trained on {path}, where no token folder is; --data says where it is now"
            )
        folder = TokenFolder(path)
        if folder.fingerprint != source["fingerprint"]:
            raise ValueError(
                f"data: {folder.folder} has fingerprint {folder.fingerprint}, allowed is {source['fingerprint']}, what the run "
                "was trained on"
            )
        streams[0].append(getattr(folder, source["split"]))
        streams[1].append(folder.heldout)
    if len(sources) == 1:
        return streams[0][0], streams[1][0]
    weights = [source["weight"] for source in sources]
    return Mixture(streams[0], weights), Mixture(streams[1], weights)
