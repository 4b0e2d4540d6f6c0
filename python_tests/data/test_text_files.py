"""Text files of every kind: the same documents however they are packed, and errors that name the file, the line, the column."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from texts import whole_documents

from klflow_ext.data import END, TextFile, find_files
from klflow_ext.data import files as module

DOCUMENTS = [f"Döcument {i} ☃\nof {i * i} lines\n" + "a word, " * (i % 7) for i in range(300)]


def text_bytes():
    return f"\n{END}\n".join(DOCUMENTS).encode()


def jsonl_bytes():
    return b"".join(json.dumps({"id": i, "body": d}).encode() + b"\n" for i, d in enumerate(DOCUMENTS))


def write_parquet(path, columns=None):
    table = pyarrow.table(columns or {"id": range(len(DOCUMENTS)), "body": DOCUMENTS})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def frames(raw):
    """zstd in two frames, as `cat a.zst b.zst` has them."""
    half = len(raw) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))


PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": frames}


def documents(path, **options):
    return whole_documents(TextFile(path, **options).parts())


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_same_documents_however_they_are_packed(tmp_path, monkeypatch, kind, packed, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / f"t{kind}{packed}"
    path.write_bytes(PACKERS[packed](text_bytes() if kind == ".txt" else jsonl_bytes()))
    file = TextFile(path, "body")
    assert documents(path, column="body") == DOCUMENTS
    assert len(list(file.parts())) == len(DOCUMENTS) and file.read == file.size == path.stat().st_size


def test_parquet(tmp_path):
    write_parquet(tmp_path / "t.parquet")
    assert documents(tmp_path / "t.parquet", column="body") == DOCUMENTS


def test_blank_documents_are_left_out(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n{"text": " \\n"}\n{"text": "b"}')
    assert documents(tmp_path / "t.jsonl") == ["a", "b"]


def bad_line(line):
    return jsonl_bytes() + line + b"\n" + jsonl_bytes()


BAD = {
    "not UTF-8": ("t.txt", b"ab\n" * 400_000 + b"\xff\n", "is not UTF-8: byte 0xff in line 400001"),
    "half a character": ("t.txt", "é".encode()[:1], "is not UTF-8: byte 0xc3 in line 1"),
    "gzip, torn": ("t.txt.gz", gzip.compress(text_bytes())[:-100], "t.txt.gz cannot be read: Compressed file ended"),
    "gzip, no gzip": ("t.txt.gz", b"plain text", "t.txt.gz cannot be read: Not a gzipped file"),
    "gzip, flipped": ("t.jsonl.gz", gzip.compress(jsonl_bytes())[:-8] + b"12345678", "t.jsonl.gz cannot be read: CRC"),
    "zstd, torn": ("t.txt.zst", frames(text_bytes())[:-100], "t.txt.zst cannot be read: it ends within a zstd frame"),
    "zstd, no zstd": ("t.txt.zst", b"plain text", "t.txt.zst cannot be read: zstd decompress"),
    "JSONL, torn": ("t.jsonl", jsonl_bytes()[:-9], "line 300 of .*t.jsonl is no JSON"),
    "JSONL, no JSON": ("t.jsonl", bad_line(b"{'body': 1}"), "line 301 of .*t.jsonl is no JSON: Expecting property name"),
    "JSONL, deep": ("t.jsonl", bad_line(b"[" * 100_000), "line 301 of .*t.jsonl is no JSON: maximum recursion"),
    "JSONL, list": ("t.jsonl", bad_line(b"[1]"), "line 301 of .*t.jsonl holds list, allowed is a JSON object"),
    "JSONL, no column": ("t.jsonl", bad_line(b'{"b": 1}'), r"column: got 'body', allowed in line 301 of .* is one of \['b'\]"),
    "JSONL, no text": ("t.jsonl", bad_line(b'{"body": 3}'), "line 301 of .*t.jsonl has '3' in column 'body', allowed is text"),
    "JSONL, not UTF-8": ("t.jsonl", bad_line(b'{"body": "\xe9"}'), "t.jsonl is not UTF-8: byte 0xe9 in line 301"),
    "JSONL, half a character": ("t.jsonl", bad_line(b'{"body": "\\ud800"}'), "line 301 of .*lone surrogate"),
    "Parquet, none": ("t.parquet", b"plain text", "t.parquet cannot be read"),
    "Parquet, packed": ("t.parquet.gz", gzip.compress(b""), "allowed is Parquet that is not packed once more"),
}  # fmt: skip


@pytest.mark.parametrize("name,content,message", BAD.values(), ids=BAD)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name, column="body")


def test_bad_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path)
    with pytest.raises(ValueError, match=r"column: got 'text', allowed in .*t.parquet is one of \['id', 'body'\]"):
        documents(path)
    with pytest.raises(ValueError, match="row 1 of .*t.parquet has '0' in column 'id', allowed is text"):
        documents(path, column="id")
    write_parquet(path, {"body": ["a", None]})
    with pytest.raises(ValueError, match="row 2 of .*t.parquet has 'None' in column 'body'"):
        documents(path, column="body")
    write_parquet(path)
    raw = bytearray(path.read_bytes())
    raw[10:2000] = bytes(1990)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="t.parquet cannot be read"):
        documents(path, column="body")


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    monkeypatch.setattr(module, "BLOCK", 100)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 2000)
    with pytest.raises(ValueError, match="line 2 of .*t.jsonl has more than 1,000 bytes"):
        documents(tmp_path / "t.jsonl")


@pytest.mark.parametrize("name,library", [("t.txt.zst", "zstandard"), ("t.parquet", "pyarrow")])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, name, library):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    with pytest.raises(ImportError, match=f"{name} is .*, which needs {library}: pip install 'klflow_ext"):
        TextFile(tmp_path / name)


def test_files_folders_and_globs(tmp_path):
    for name in (
        "b/2.txt",
        "b/1.jsonl.zst",
        "b/c/3.parquet",
        "b/.hidden/4.txt",
        "b/.5.txt",
        "b/6.py",
        "a.md",
        "[x].txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def found(*names):
        return [str(path.relative_to(tmp_path)) for path in find_files([tmp_path / name for name in names])]

    assert found("b") == ["b/1.jsonl.zst", "b/2.txt", "b/c/3.parquet"]
    assert found("b/2.txt", "b/*.*", "b") == ["b/2.txt", "b/1.jsonl.zst", "b/6.py", "b/c/3.parquet"]
    assert found("**/*.py", "a.md", "[x].txt") == ["b/6.py", "a.md", "[x].txt"]
    for name, message in (
        ("b/*.csv", "which no file matches"),
        ("b/.hidden/../../none.txt", "cannot be read"),
        ("b/c/../.hidden/d", "the folder"),
    ):
        (tmp_path / "b/.hidden/d").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            [TextFile(path) for path in find_files([tmp_path / name])]
    for none in ([], [""]):
        with pytest.raises(ValueError, match="data: "):
            [TextFile(path) for path in find_files(none)]
