"""Documents of a text in blocks: nothing depends on the blocks, and long documents come in parts that tokens do not notice."""

import random

import pytest
from texts import whole_documents

from klflow_ext.data import END, encode, pieces, train_tokenizer
from klflow_ext.data.pieces import Part, parts


def documents(blocks):
    found = list(pieces.pieces(blocks))
    assert all(len(text) <= pieces.PART for text, _ in found)
    return whole_documents(found)


WORDS = random.Random(0).choices("the cat sat, on a mat; and  then\tran away home again".split(" "), k=20_000)
TEXTS = {
    "marks": f"\n{END} \t\r\n".join(" ".join(WORDS[i : i + 150]) for i in range(0, 20_000, 150)),
    "blank lines": "".join(w + (" " if i % 100 else "\n \t\r\n") for i, w in enumerate(WORDS)),
    "lines": "\r\n".join(" ".join(WORDS[i : i + 20]) for i in range(0, 20_000, 20)),
    "few lines": "\n".join(" ".join(WORDS[i : i + 5]) for i in range(0, 150, 5)),
    "marks near the ends of parts": f"\n{END} \t\r\n".join(
        " ".join(WORDS)[:n] for n in (*range(960, 1010), *range(960, 1010))
    ),
    "one line": " ".join(WORDS),
    "no space": "x" * 70_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("part", [1000, 3000, 1 << 18])
def test_blocks_change_nothing(monkeypatch, text, part):
    monkeypatch.setattr(pieces, "HEAD", 60_000)
    monkeypatch.setattr(pieces, "PART", part)
    whole = list(pieces.pieces([text]))
    random_cuts = random.Random(1)
    for size in (1, 13, 5000):
        blocks, at = [], 0
        while at < len(text):
            count = random_cuts.randint(1, size)
            blocks.append(text[at : at + count])
            at += count
        assert list(pieces.pieces(blocks)) == whole, size
    joined = "".join(documents([text]))
    assert joined == (text if END not in text else text.replace(f"\n{END} \t\r\n", ""))


def test_where_documents_end(monkeypatch):
    counts = {name: len(documents([text])) for name, text in TEXTS.items()}
    assert counts["marks"] == 134 and counts["few lines"] == 30 and counts["one line"] == counts["no space"] == 1
    assert all(len(d) > 2000 and d.endswith("\n") for d in documents([TEXTS["blank lines"]])[:-1])
    assert all(d.endswith("\n \t\r\n") for d in documents([TEXTS["blank lines"]])[:-1])
    monkeypatch.setattr(pieces, "HEAD", 1000)  # what comes later decides nothing
    assert len(documents(["\n".join(["a line"] * 1000), f"\n{END}\nanother"])) == 1002
    assert documents([f"  \n{END}\n", f"a\n{END}\n\n{END}\nb"]) == ["a", "b"]


def test_parts_have_the_tokens_of_the_whole(monkeypatch):
    tokenizer = train_tokenizer(WORDS, 400)
    want = tokenizer.encode(TEXTS["one line"]).ids
    monkeypatch.setattr(pieces, "PART", 1000)
    cut = list(parts(TEXTS["one line"]))
    assert len(cut) > 60 and all(500 <= len(part.text) <= 1000 and not part.last for part in cut[:-1]) and cut[-1].last
    assert encode(tokenizer, [TEXTS["one line"]]).tolist() == [*want, 0]
    assert list(parts("")) == [Part("", True)]
    assert [len(part.text) for part in parts(" " * 2500)] == [1000, 1000, 500]
