"""Texts and tokenizers as people have them: any line ends, stored truncation, gaps between ids, spaces before words."""

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from klflow_ext import data
from klflow_ext.sample import parse_holes

DOCUMENTS = [f"Document {i}.\n" + "It was the best of times, it was the worst of times.\n" * 60 for i in range(100)]
BLANK = "\n\n".join(DOCUMENTS)
MARKED = f"\n{data.END}\n".join(d.rstrip() for d in DOCUMENTS)
TEXTS = {
    "blank lines": (BLANK, 100),
    "blank lines, CRLF": (BLANK.replace("\n", "\r\n"), 100),
    "blank lines with blanks": (BLANK.replace("\n\n", "\n \t\n"), 100),
    "marks": (MARKED, 100),
    "marks, CRLF": (MARKED.replace("\n", "\r\n"), 100),
    "marks with a blank": (MARKED.replace(data.END, data.END + " "), 100),
    "a text a line": ("\n".join(" ".join(d.split()) for d in DOCUMENTS), 100),
    "a text a line, CRLF": ("\r\n".join(" ".join(d.split()) for d in DOCUMENTS), 100),
    "short lines": ("\n".join(f"line {i}" for i in range(30)), 30),
}


@pytest.mark.parametrize("text,count", TEXTS.values(), ids=TEXTS)
def test_documents_of_any_line_ends(tmp_path, text, count):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    train, held = data.documents(path)
    assert len(train) + len(held) == count and len(held) == (count + 19) // 20
    order = iter(train)
    whole = "".join(held[i // 20] if i % 20 == 0 else next(order) for i in range(count))
    if data.END not in text:
        assert whole == text  # nothing is lost
    else:
        assert whole.replace("\r", "").replace("\n", "") == "".join(DOCUMENTS).replace("\n", "")


def test_too_little_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="has 2 pieces of text, at least 20 are needed"):
        data.documents(path)


def bytes_tokenizer(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["walk walking the dog"] * 9, trainer)
    return tokenizer


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_stored_truncation_and_padding_are_switched_off(tmp_path, setting):
    tokenizer, path = bytes_tokenizer(), tmp_path / "tokenizer.json"
    texts = ["the dog " * n for n in (1, 30, 7)]
    want = data.encode(_saved(tokenizer, path), texts)
    if setting == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    loaded = _saved(tokenizer, path)
    assert data.encode(loaded, texts).tolist() == want.tolist()
    assert data.encode(_saved(loaded, path), texts).tolist() == want.tolist()


def _saved(tokenizer, path):
    tokenizer.save(str(path))
    return data.load_tokenizer(path)


def words(vocab, **options):
    tokenizer = Tokenizer(models.WordLevel(vocab, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_ids_with_gaps_and_unknown_words(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = _saved(words({"a": 0, "b": 7, "?": 3}, unk_token="?"), path)
    assert data.vocab_size_of(tokenizer) == max(tokenizer.get_vocab().values()) + 1 >= 8
    assert max(data.encode(tokenizer, ["a b c"])) < data.vocab_size_of(tokenizer)
    with pytest.raises(ValueError, match="tokenizer: got ids up to 1000000 for"):
        _saved(words({"a": 0, "b": 10**6, "?": 3}, unk_token="?"), path)
    with pytest.raises(ValueError, match="tokenizer: it cannot encode the text"):
        data.encode(_saved(words({"a": 0, "b": 1}), path), ["a c"])
    path.write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match="tokenizer: .* cannot be read"):
        data.load_tokenizer(path)


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["walk walking the dog ing x"] * 9, trainer)
    return tokenizer


@pytest.mark.parametrize("text", ["walk{?1}ing", "{?2}walk the{?1} dog", " walk{?3}", "walk {?1}", "the{?1}{?1}dog"])
@pytest.mark.parametrize(
    "tokenizer",
    [
        bytes_tokenizer(),
        bytes_tokenizer(add_prefix_space=True),
        metaspace("always"),
        metaspace("first"),
        metaspace("never"),
    ],
    ids=["bytes", "bytes, space before", "metaspace", "metaspace, first", "metaspace, never"],
)
def test_given_text_comes_back_or_is_refused(tokenizer, text):
    shown = "".join(re.split(r"\{\?(\d+)\}", text)[::2])
    try:
        tokens, given = parse_holes(text, tokenizer)
    except ValueError as error:
        assert "which this tokenizer gives back as" in str(error)
        return
    assert tokenizer.decode([t for t, g in zip(tokens, given, strict=True) if g], skip_special_tokens=False) == shown


def test_pieces_without_a_space_before_them():
    for tokenizer in (bytes_tokenizer(add_prefix_space=True), metaspace("always"), metaspace("first")):
        tokens, given = parse_holes("walk{?1}ing", tokenizer)
        assert tokenizer.decode([t for t, g in zip(tokens, given, strict=True) if g]) == "walking"


def test_text_that_a_tokenizer_changes():
    with pytest.raises(
        ValueError, match=r"text: got 'a  b' between the holes, which this tokenizer gives back as 'a b'"
    ):
        parse_holes("a  b{?1}", words({"a": 0, "b": 1, "?": 2}, unk_token="?"))


@pytest.mark.parametrize("hole", ["0", "1000001", "99999999", "9" * 20, "9" * 5000])
def test_holes_of_impossible_sizes(hole):
    with pytest.raises(ValueError, match="text: got the hole"):
        parse_holes("a{?" + hole + "}", bytes_tokenizer())
