"""Text files as people have them: plain, JSONL or Parquet, gzip or zstd, many at once, read in flat memory."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klflow_ext.data.pieces import Part, parts, pieces
from klflow_ext.files import first_line

PACKED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")  # each has its text in a column
KINDS = (".txt", *RECORDS)  # what is taken of a folder
BLOCK = 1 << 20  # bytes
LONGEST_LINE = 1 << 28  # bytes of JSONL


def find_files(names: Iterable[str | Path]) -> list[Path]:
    """The files that files, folders (all they hold of KINDS, packed or not) and globs name, each once, sorted within a name.

    Raises:
        ValueError: a name has no file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if str(name) and path.is_dir():
            files = sorted(_inside(path))
            if not files:
                raise ValueError(f"data: got the folder {path}, allowed are folders with files of {', '.join(KINDS)}")
        elif path.exists() or not glob.has_magic(str(name)):
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(str(name), recursive=True)) if p.is_file())
            if not files:
                raise ValueError(
                    f"data: got {str(name)!r}, which no file matches, allowed are files, folders and globs"
                )
        found.update(dict.fromkeys(files))
    if not found:
        raise ValueError("data: got no file, allowed are files, folders and globs")
    return list(found)


def _inside(folder: Path) -> Iterator[Path]:
    """Its files of KINDS, in folders below too, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"data: {error.filename} cannot be read: {error.strerror}")

    for base, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            if _kind(path)[0] in KINDS and path.is_file():
                yield path


def _kind(path: Path) -> tuple[str, str]:
    """(what it holds, how it is packed), as suffixes."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


class TextFile:
    """A file of documents.

    Args:
        path: .jsonl, .ndjson, .parquet, or any other name for UTF-8 text; with .gz or .zst at its end (but Parquet, which is
            packed within).
        column: where JSONL and Parquet have their text.

    Attributes:
        size: its bytes. read: how many of them were read.

    Raises:
        ValueError: it cannot be read, or is no such file; the message names it, and the line.
        ImportError: a library that reads it is missing.
    """

    def __init__(self, path: str | Path, column: str = "text"):
        self.path, self.column = Path(path), column
        self.kind, self.packed = _kind(self.path)
        if self.path.is_dir():
            raise ValueError(
                f"data: got the folder {path}, allowed is a file; klflow prepare makes a token folder of many"
            )
        try:
            with open(self.path, "rb"):
                self.size = self.path.stat().st_size
        except OSError as error:
            raise ValueError(f"data: {path} cannot be read: {error.strerror}") from None
        self.read = 0
        if self.kind == ".parquet":
            if self.packed:
                raise ValueError(f"data: got {path}, allowed is Parquet that is not packed once more")
            self._library("pyarrow.parquet", "Parquet", "pyarrow")
        elif self.packed == ".zst":
            self._library("zstandard", "zstd", "zstandard")

    def _library(self, module: str, kind: str, package: str) -> Any:
        from importlib import import_module

        try:
            return import_module(module)
        except ImportError:
            needs = f"which needs {package}: pip install 'klflow_ext[data]'"
            raise ImportError(f"data: {self.path} is {kind}, {needs}") from None

    def parts(self) -> Iterator[Part]:
        """Its documents in parts; those of nothing but blanks are left out."""
        self.read = 0
        if self.kind == ".parquet":
            texts = self._rows()
        elif self.kind in RECORDS:
            texts = self._lines()
        else:
            yield from pieces(self.characters())
            return
        for text in texts:
            if text.strip():
                yield from parts(text)

    def characters(self) -> Iterator[str]:
        """The text of the file in blocks."""
        decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
        for block in self._blocks():
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                raise self._not_utf8(error.object[error.start], line + before.count(b"\n")) from None
            line += block.count(b"\n")

    def _not_utf8(self, byte: int, line: int) -> ValueError:
        return ValueError(f"data: {self.path} is not UTF-8: byte {byte:#04x} in line {line}")

    # ---- bytes

    def _blocks(self) -> Iterator[bytes]:
        """Its bytes, unpacked; an empty block is the last."""
        with self._reading(), open(self.path, "rb") as raw:
            if self.packed == ".zst":
                yield from self._unpacked(raw)
            else:
                file = gzip.GzipFile(fileobj=raw) if self.packed else raw
                while block := file.read(BLOCK):
                    self.read = raw.tell()
                    yield block
        self.read = self.size
        yield b""

    def _unpacked(self, raw: Any) -> Iterator[bytes]:
        """zstd, frame after frame. (zstandard's own reader takes the middle of a frame for the end of the file.)"""
        library = self._library("zstandard", "zstd", "zstandard")
        frame, fresh = library.ZstdDecompressor().decompressobj(), True
        while block := raw.read(1 << 16):
            self.read = raw.tell()
            while block:
                out = frame.decompress(block)
                fresh = False
                if out:
                    yield out
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, fresh = library.ZstdDecompressor().decompressobj(), True
        if not fresh:
            raise EOFError("it ends within a zstd frame")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # gzip, zlib, zstandard and pyarrow have their own
            why = getattr(error, "strerror", None) or first_line(error)
            raise ValueError(f"data: {self.path} cannot be read: {why}") from None

    # ---- records

    def _lines(self) -> Iterator[str]:
        """The column of each line of JSONL."""
        begun: list[bytes] = []
        number = 1
        for block in self._blocks():
            *whole, rest = block.split(b"\n")
            for line in whole:
                yield from self._record(b"".join((*begun, line)), number)
                begun.clear()
                number += 1
            begun.append(rest)
            if sum(map(len, begun)) > LONGEST_LINE:
                raise ValueError(f"data: line {number} of {self.path} has more than {LONGEST_LINE:,} bytes")
        yield from self._record(b"".join(begun), number)

    def _record(self, line: bytes, number: int) -> Iterator[str]:
        where = f"line {number} of {self.path}"
        if not line.strip():
            return
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise self._not_utf8(line[error.start], number) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data: {where} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"data: {where} holds {type(record).__name__}, allowed is a JSON object")
        if self.column not in record:
            raise self._no_column(where, record)
        text = record[self.column]
        if not isinstance(text, str):
            raise self._no_text(where, text)
        if b"\\u" in line:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"data: {where} has half a character (a lone surrogate) in column {self.column!r}"
                ) from None
        yield text

    def _no_column(self, where: str, columns: Iterable[str]) -> ValueError:
        return ValueError(f"column: got {self.column!r}, allowed in {where} is one of {list(columns)}")

    def _no_text(self, where: str, value: object) -> ValueError:
        return ValueError(f"data: {where} has {str(value)[:40]!r} in column {self.column!r}, allowed is text")

    def _rows(self) -> Iterator[str]:
        """The column of each row of Parquet."""
        library = self._library("pyarrow.parquet", "Parquet", "pyarrow")
        with self._reading():
            file = library.ParquetFile(self.path, memory_map=True)
            names, count = file.schema_arrow.names, max(1, file.metadata.num_rows)
        if self.column not in names:
            raise self._no_column(str(self.path), names)
        batches = file.iter_batches(batch_size=256, columns=[self.column])
        number = 0
        while True:
            with self._reading():
                batch = next(batches, None)
                texts = [] if batch is None else batch.column(0).to_pylist()
            if batch is None:
                break
            for text in texts:
                number += 1
                if not isinstance(text, str):
                    raise self._no_text(f"row {number} of {self.path}", text)
                yield text
            self.read = self.size * number // count
        self.read = self.size
