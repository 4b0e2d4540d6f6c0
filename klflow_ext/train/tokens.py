"""From text files to a token folder, in flat memory: what `klflow prepare` does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from klflow_ext import data
from klflow_ext.checks import check_field
from klflow_ext.data.tokens import DTYPES, ENDS, FORMAT, SPLITS, dtype_name, fingerprint_of
from klflow_ext.lock import new_folder

SHARD = 1 << 27  # tokens, after which a shard ends with its document
FLUSH = 1 << 20  # tokens that are held before they are written


class _File:
    """A file that knows its fingerprint."""

    def __init__(self, path: Path):
        self.path, self.size, self.digest = path, 0, blake2b(digest_size=16)
        self.file = open(path, "wb")

    def write(self, raw: bytes) -> None:
        self.file.write(raw)
        self.digest.update(raw)
        self.size += len(raw)

    def close(self) -> tuple[str, list]:
        """(name, [bytes, fingerprint]) of the file, which is on the disk then."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.path.name, [self.size, self.digest.hexdigest()]


def _write(path: Path, raw: bytes) -> tuple[str, list]:
    file = _File(path)
    file.write(raw)
    return file.close()


class _Split:
    """Writes the shards of one split."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self.folder, self.split, self.vocab_size, self.shard_tokens = folder, split, vocab_size, shard_tokens
        self.dtype = DTYPES[dtype_name(vocab_size)]
        self.counts = np.zeros(vocab_size, np.int64)
        self.tokens = self.documents = 0
        self.shards: list[tuple[str, int, int]] = []  # name, tokens, documents
        self.files: dict[str, list] = {}
        self.open: tuple[_File, _File] | None = None  # tokens, ends
        self.held: list[np.ndarray] = []
        self.held_tokens = 0
        self.ends: list[int] = []

    def add(self, tokens: np.ndarray, last: bool) -> None:
        if self.open is None:
            name = f"{self.split}-{len(self.shards):05}"
            self.open = _File(self.folder / f"{name}.tokens"), _File(self.folder / f"{name}.ends")
            self.begun = self.tokens, self.documents
        self.held.append(tokens)
        self.held_tokens += len(tokens)
        self.tokens += len(tokens)
        if last:
            self.documents += 1
            self.ends.append(self.tokens - self.begun[0])
        full = last and self.tokens - self.begun[0] >= self.shard_tokens
        if full or self.held_tokens >= FLUSH:
            self._flush()
        if full:
            self._close()

    def _flush(self) -> None:
        assert self.open is not None
        tokens = np.concatenate(self.held)
        self.counts += np.bincount(tokens, minlength=self.vocab_size)
        self.open[0].write(tokens.astype(self.dtype).tobytes())
        self.open[1].write(np.array(self.ends, ENDS).tobytes())
        self.held, self.held_tokens, self.ends = [], 0, []

    def _close(self) -> None:
        assert self.open is not None
        self.shards.append((self.open[0].path.name, self.tokens - self.begun[0], self.documents - self.begun[1]))
        self.files.update(file.close() for file in self.open)
        self.open = None

    def finish(self) -> None:
        if self.open is not None:
            self._flush()
            self._close()
        self.files.update([_write(self.folder / f"{self.split}.counts", self.counts.astype(ENDS).tobytes())])


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file, allowed is a folder")
    if not data.is_token_folder(out):
        raise ValueError(f"out: {out} holds other files, allowed is a new folder, an empty one or a token folder")
    if not overwrite:
        raise ValueError(f"out: {out} holds a token folder already; --overwrite replaces it")


class _Progress:
    """A line on stderr now and then: bytes read, tokens made, time left."""

    def __init__(self, files: Sequence[data.TextFile], shown: bool):
        self.files, self.shown = files, shown
        self.total = max(1, sum(file.size for file in files))
        self.done = 0  # bytes of the files that are done
        self.begin = self.last = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def show(self, file: data.TextFile, tokens: int) -> None:
        now = time.perf_counter()
        if not self.shown or now - self.last < (0.5 if self.terminal else 15.0):
            return
        self.last = now
        read, spent = self.done + file.read, now - self.begin
        left = spent * (self.total - read) / read if read else float("nan")
        text = f"{read / self.total:4.0%} of {self.total / 1e6:,.0f} MB  {tokens:,} tokens  {tokens / spent:,.0f} tokens/s  "
        text += f"{left:.0f} s left"
        print(
            f"\r{text:<78}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        if self.shown and self.terminal and self.last > self.begin:
            print(file=sys.stderr)


class _Texts:
    """The documents of files, and which of them are held out: by a hash of the text, so that copies of one lie on one side."""

    def __init__(self, files: Sequence[data.TextFile], heldout: float, seed: int):
        self.files, self.below, self.key = files, int(heldout * 2**64), seed.to_bytes(8, "little")
        self.splits: deque[int] = deque()  # of the documents that `parts` has begun
        self.empty: list[Path] = []

    def split(self, begin: str) -> int:
        """0: train, 1: heldout; of a document by its first part."""
        digest = blake2b(begin.encode(), digest_size=8, key=self.key).digest()
        return int(int.from_bytes(digest, "little") < self.below)

    def parts(
        self, each: Callable[[data.TextFile], None], done: Callable[[data.TextFile], None]
    ) -> Iterator[data.Part]:
        for file in self.files:
            begins, found = True, False
            for part in file.parts():
                found = True
                if begins:
                    self.splits.append(self.split(part.text))
                begins = part.last
                each(file)
                yield part
            if not found:
                self.empty.append(file.path)
            done(file)

    def sample(self, characters: int) -> Iterator[str]:
        """Text to train a tokenizer on: of each file its share from its beginning, at least a little, files in random order."""
        total = max(1, sum(file.size for file in self.files))
        missing = characters
        for i in np.random.default_rng(int.from_bytes(self.key, "little")).permutation(len(self.files)):
            file = self.files[i]
            share = min(missing, max(10_000, characters * file.size // total))
            begins, split = True, 0
            for part in file.parts():
                if share <= 0:
                    break
                split = self.split(part.text) if begins else split
                begins = part.last
                if not split:
                    yield part.text
                    share -= len(part.text)
                    missing -= len(part.text)
            if missing <= 0:
                break


def prepare_tokens(
    texts: Sequence[str | Path],
    out: Path,
    *,
    column: str = "text",
    tokenizer: Path | None = None,
    vocab_size: int = 2048,
    tokenizer_characters: int = 4_000_000,
    heldout: float = 0.05,
    seed: int = 0,
    shard_tokens: int = SHARD,
    overwrite: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> data.TokenFolder:
    """Encodes text files into a token folder, which is there when it is whole, and not before.

    Args:
        texts: files, folders and globs (`data.find_files`).
        out: the folder.
        column: where JSONL and Parquet have their text.
        tokenizer: a tokenizers file; None: one of at most vocab_size tokens is trained on the texts.
        vocab_size: of that one, at least 257.
        tokenizer_characters: how much text it is trained on.
        heldout: share of the documents that are kept back, chosen by a hash of their text and the seed.
        seed: of that choice.
        shard_tokens: tokens after which a shard ends with its document.
        overwrite: whether a token folder in `out` is replaced.
        progress: whether there is a line on stderr now and then.
        report: called with a line on each thing that was made.

    Raises:
        ValueError: an argument is outside its range, or a file cannot be read or written; nothing has been written then.
        ImportError: a library is missing that reads one of the files.
    """
    import tokenizers  # noqa: F401  (what is missing is missed before any work)

    if not 0 < heldout < 1:
        raise ValueError(f"heldout: got {heldout}, allowed is a number in (0, 1)")
    check_field("seed", seed, 0, "an integer in [0, 2^63)")
    check_field("shard_tokens", shard_tokens, 1)
    check_field("tokenizer_characters", tokenizer_characters, 1)
    check_field("vocab_size", vocab_size, 257, f"at least 257 (every byte and {data.END})")
    _check_out(out, overwrite)
    made = None if tokenizer is None else data.load_tokenizer(tokenizer)
    files = [data.TextFile(path, column) for path in data.find_files(texts)]
    source = _Texts(files, heldout, seed)
    report(f"text: {sum(file.size for file in files) / 1e6:,.1f} MB in {len(files)} files")
    if made is None:
        report("training a tokenizer ...")
        made = data.train_tokenizer(source.sample(tokenizer_characters), vocab_size)
    vocab_size = data.vocab_size_of(made)

    with new_folder(out, lambda: _check_out(out, overwrite)) as (folder, _):
        try:
            splits = [_Split(folder, name, vocab_size, shard_tokens) for name in SPLITS]
            _encode(source, made, splits, _Progress(files, progress))
            for split in splits:
                split.finish()
            _check_splits(splits, files, heldout)
            index: dict[str, Any] = {
                "format": FORMAT,
                "vocab_size": vocab_size,
                "dtype": dtype_name(vocab_size),
                "made": {"files": len(files), "bytes": sum(f.size for f in files), "heldout": heldout, "seed": seed},
                "splits": {split.split: split.shards for split in splits},
                "files": dict([_write(folder / "tokenizer.json", made.to_str(pretty=True).encode())]),
            }
            for split in splits:
                index["files"] |= split.files
            index["fingerprint"] = fingerprint_of(index)
            _write(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
        except OSError as error:
            raise ValueError(f"out: {folder} cannot be written: {error.strerror}") from None
    if source.empty:
        report(f"left out as empty: {len(source.empty)} files, such as {source.empty[0]}")
    made_of = ", ".join(f"{s.tokens:,} tokens in {s.documents:,} documents ({s.split})" for s in splits)
    report(f"tokens: {made_of}, V = {vocab_size}, fingerprint {index['fingerprint']}")
    return data.TokenFolder(out)


def _check_splits(splits: list[_Split], files: Sequence[data.TextFile], heldout: float) -> None:
    count = sum(split.documents for split in splits)
    if not count:
        raise ValueError(f"data: {files[0].path}{f' and {len(files) - 1} more' * (len(files) > 1)} is empty")
    for split, name in zip(splits, ("to train on", "held out"), strict=True):
        if not split.documents:
            raise ValueError(
                f"heldout: got {heldout}, by which none of {count} documents in {len(files)} files is {name}; allowed is a share "
                "that leaves some on both sides"
            )


def _encode(source: _Texts, tokenizer, splits: list[_Split], progress: _Progress) -> None:
    def each(file: data.TextFile) -> None:
        progress.show(file, sum(split.tokens for split in splits))

    def done(file: data.TextFile) -> None:
        progress.done += file.size

    for tokens, last in data.encode_parts(tokenizer, source.parts(each, done)):
        splits[source.splits[0]].add(tokens, last)
        if last:
            source.splits.popleft()
    progress.end()
