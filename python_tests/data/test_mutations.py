"""Files that a user gives, under mutations: what they then say, or a ValueError that names the file; never a crash or a hang."""

import gzip
import io
import json
import struct
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from mutations import COUNT, mutation
from texts import token_folder
from tokenizers import Tokenizer

from klflow_ext import data, evaluate
from klflow_ext.data import TextFile, TokenFolder

DOCUMENTS = [f"Döcument {i} ☃\nof {i * i} lines\n" + "a word, " * (i % 7) for i in range(100)]
TEXT = f"\n{data.END}\n".join(DOCUMENTS).encode()
JSONL = b"".join(json.dumps({"id": i, "text": d}).encode() + b"\n" for i, d in enumerate(DOCUMENTS))


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(100), "text": DOCUMENTS}), file, row_group_size=30)
    return file.getvalue()


TEXTS = {
    "t.txt": TEXT, "t.txt.gz": gzip.compress(TEXT), "t.txt.zst": zstandard.ZstdCompressor(write_checksum=True).compress(TEXT),
    "t.jsonl": JSONL, "t.jsonl.gz": gzip.compress(JSONL), "t.parquet": parquet(),
}  # fmt: skip
SURE = {"t.txt.gz", "t.txt.zst", "t.jsonl.gz"}  # they have checksums


def mutate(path, read, others, seconds=1.0, named=None):
    """Counts of what COUNT mutations of a file came to."""
    content, right, generator = path.read_bytes(), read(), np.random.default_rng(len(path.name))
    seen = {"refused": 0, "right": 0, "other": 0}
    for _ in range(COUNT):
        path.write_bytes(mutation(path.name, content, others, generator))
        begin = time.process_time()
        try:
            found = read()
        except ValueError as error:
            assert (named or path.name) in str(error) and len(str(error)) < 2000, error
            seen["refused"] += 1
        else:
            seen["right" if found == right else "other"] += 1
        assert time.process_time() - begin < seconds
    path.write_bytes(content)
    print(path.name, seen)
    return seen


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TEXTS[name])
    seen = mutate(path, lambda: list(TextFile(path).parts()), [*TEXTS.values(), b""])
    assert seen["refused"] > 0.2 * COUNT and (name not in SURE or seen["other"] < 0.15 * COUNT)


def test_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    data.train_tokenizer(["some text of few words"], 270).save(str(path))

    def read():
        return data.encode(data.load_tokenizer(path), ["some words", "é ☃"]).tolist()

    assert mutate(path, read, [*TEXTS.values()], named="tokenizer")["refused"] > 0.2 * COUNT
    assert isinstance(data.load_tokenizer(path), Tokenizer)


def test_a_token_folder(tmp_path):
    folder = tmp_path / "tokens"
    token_folder(folder)
    names = sorted(file.name for file in folder.iterdir())

    def read():
        tokens = TokenFolder(folder)
        tokens.verify()
        return [tokens.train[:].tolist(), tokens.heldout[:].tolist(), tokens.tokenizer().to_str()]

    for name in ("index.json", "train-00000.tokens", "train-00000.ends", "train.counts", "tokenizer.json"):
        seen = mutate(folder / name, read, [(folder / n).read_bytes() for n in names if n != name], named=str(folder))
        assert seen["other"] == 0


# ---- the judge


def write_judge(folder):
    generator, (dim, hidden, layers, heads, vocab, context) = np.random.default_rng(0), (8, 16, 2, 2, 260, 16)
    per_layer = 2 * dim + 4 * dim * dim + 3 * dim * hidden
    size = vocab * dim + layers * per_layer + dim + context * dim // heads
    weights = generator.normal(size=size).astype("<f4").tobytes()
    header = struct.pack("<7i", dim, hidden, layers, heads, heads, vocab, context)
    (folder / "stories260K.bin").write_bytes(header + weights)
    pieces = [bytes([i % 256]) * (1 + i // 256) for i in range(vocab)]
    rows = [struct.pack("<fi", -float(i), len(piece)) + piece for i, piece in enumerate(pieces)]
    (folder / "tok512.bin").write_bytes(struct.pack("<i", 2) + b"".join(rows))


@pytest.mark.parametrize("name", ["stories260K.bin", "tok512.bin"])
def test_the_judge(tmp_path, name):
    write_judge(tmp_path)
    path = tmp_path / name
    others = [*TEXTS.values(), *(f.read_bytes() for f in tmp_path.iterdir() if f.name != name)]

    def read():
        return evaluate.Judge(tmp_path).bits_per_byte(["some text"])

    assert mutate(path, read, others)["refused"] > 0.2 * COUNT
