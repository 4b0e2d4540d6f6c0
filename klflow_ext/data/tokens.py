"""A folder of tokens: what `klflow prepare` writes, read by memory maps.

index.json      what the other files are, and a fingerprint of it all     tokenizer.json      the tokenizer
<split>-<shard>.tokens      uint16 ids, or uint32, one after another      <split>.counts      int64: how often each id occurs
<split>-<shard>.ends        int64: where each of its documents ends       a split is train or heldout
"""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from klflow_ext.data.tokenizer import load_tokenizer, vocab_size_of

FORMAT = 1  # index.json says which
SPLITS = ("train", "heldout")
ENDS = np.dtype("<i8")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_name(vocab_size: int) -> str:
    """The smallest integers that hold ids below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def fingerprint_of(index: dict) -> str:
    """Of all of index.json but the fingerprint itself; as it has those of the files, it stands for the whole folder."""
    rest = {name: value for name, value in index.items() if name != "fingerprint"}
    return blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_fingerprint(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class TokenFolder:
    """A folder of tokens.

    Args:
        folder: where it is.

    Attributes:
        vocab_size: V. fingerprint: of all it holds. train, heldout: its splits.

    Raises:
        ValueError: it is no such folder, or its files are not those that its index names (sizes, and what the small
            ones hold; `verify` reads all).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise ValueError(f"data: {folder} is no folder of tokens: it has no index.json (klflow prepare makes one)")
        try:
            index = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"data: {path} cannot be read: {error}") from None
        found = index.get("format") if isinstance(index, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"data: {folder} has format {found!r}, allowed is {FORMAT}: prepare it again with this version"
            )
        if index.get("fingerprint") != fingerprint_of(index):
            raise ValueError(f"data: {path} was changed: it does not fit its fingerprint; prepare it again")
        self.index: dict[str, Any] = index
        self.vocab_size, self.fingerprint = int(index["vocab_size"]), str(index["fingerprint"])
        for name, (size, _) in index["files"].items():
            file = self.folder / name
            have = file.stat().st_size if file.is_file() else None
            if have != size:
                what = "is missing" if have is None else f"has {have} bytes"
                raise ValueError(f"data: {file} {what}, index.json says {size} bytes; prepare it again")
        for name in ("tokenizer.json", *(f"{split}.counts" for split in SPLITS)):  # the small ones
            self._check(name)
        self.train, self.heldout = (Tokens(self, split) for split in SPLITS)

    def _check(self, name: str) -> None:
        if file_fingerprint(self.folder / name) != self.index["files"][name][1]:
            raise ValueError(
                f"data: {self.folder / name} was changed: it does not fit its fingerprint; prepare it again"
            )

    def verify(self) -> None:
        """Reads every file. ValueError: one is not what was written."""
        for name in self.index["files"]:
            self._check(name)

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.index["files"]["tokenizer.json"][1]

    def tokenizer(self) -> Any:
        """The tokenizers.Tokenizer."""
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        if (found := vocab_size_of(tokenizer)) != self.vocab_size:
            raise ValueError(f"data: {self.folder} has a tokenizer of {found} ids, index.json says {self.vocab_size}")
        return tokenizer


class Tokens:
    """One split of a folder of tokens: sliced as one long array, of which only what is asked for is read."""

    def __init__(self, source: TokenFolder, split: str):
        self.source, self.split = source, split
        self.dtype = DTYPES[source.index["dtype"]]
        shards = source.index["splits"][split]
        self._paths = [source.folder / name for name, _, _ in shards]
        self._first = np.cumsum([0] + [tokens for _, tokens, _ in shards])  # token of each shard
        self._first_document = np.cumsum([0] + [documents for _, _, documents in shards])
        self._maps: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self._first_document[-1])

    def _map(self, path: Path, dtype: np.dtype) -> np.ndarray:
        if path not in self._maps:
            try:
                self._maps[path] = np.memmap(path, dtype, "r")
            except (OSError, ValueError) as error:
                raise ValueError(f"data: {path} cannot be read: {error}") from None
        return self._maps[path]

    def __getitem__(self, places: slice) -> np.ndarray:
        """A copy of tokens [start : stop].

        Raises:
            ValueError: a shard holds an id that is none.
        """
        start, stop, _ = places.indices(len(self))
        found = []
        shard = int(np.searchsorted(self._first, start, "right")) - 1
        while start < stop:
            first, last = int(self._first[shard]), min(stop, int(self._first[shard + 1]))
            path = self._paths[shard]
            tokens = np.array(self._map(path, self.dtype)[start - first : last - first])
            if tokens.max(initial=0) >= self.source.vocab_size:
                raise ValueError(
                    f"data: {path} holds the id {tokens.max()}, allowed are those below {self.source.vocab_size}"
                )
            found.append(tokens)
            start, shard = last, shard + 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, self.dtype), *found])

    def places(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first token, tokens) of documents by their numbers."""
        start, size = np.empty(len(documents), np.int64), np.empty(len(documents), np.int64)
        shards = np.searchsorted(self._first_document, documents, "right") - 1
        for shard in np.unique(shards):
            path = self._paths[shard].with_suffix(".ends")
            ends = self._map(path, ENDS)
            here = shards == shard
            number = documents[here] - self._first_document[shard]
            begin = np.where(number > 0, ends[np.maximum(number - 1, 0)], 0)
            start[here], size[here] = begin + self._first[shard], ends[number] - begin
            if not (size[here] > 0).all() or not (0 <= begin).all() or ends[number].max() > np.diff(self._first)[shard]:
                raise ValueError(f"data: {path} was changed: it holds a document's end that is none; prepare it again")
        return start, size

    def document(self, number: int) -> np.ndarray:
        """The tokens of one, with <|endoftext|> at its end."""
        (start,), (size,) = self.places(np.array([number]))
        return self[int(start) : int(start + size)]

    @cached_property
    def counts(self) -> np.ndarray:
        """(V,) int64: how often each id occurs."""
        return np.array(self._map(self.source.folder / f"{self.split}.counts", ENDS))
