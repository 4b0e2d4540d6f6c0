"""Texts and tokenizers as people have them: any line ends, stored truncation, gaps between ids, spaces before words."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from chains import Counting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from klflow_ext import (
    LogitPath,
    Sampler,
    data,
)
from klflow_ext.data import parse_holes

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
    back = tokenizer.decode([t for t, g in zip(tokens, given, strict=True) if g], skip_special_tokens=False)
    assert back in (shown, shown.replace("walk ", "walk"))  # a space before a hole is left to it


def test_pieces_without_a_space_before_them():
    for tokenizer in (bytes_tokenizer(add_prefix_space=True), metaspace("always"), metaspace("first")):
        tokens, given = parse_holes("walk{?1}ing", tokenizer)
        assert tokenizer.decode([t for t, g in zip(tokens, given, strict=True) if g]) == "walking"


def test_text_that_a_tokenizer_changes():
    with pytest.raises(
        ValueError, match=r"text: got 'a  b' between the holes, which this tokenizer gives back as 'a b'"
    ):
        parse_holes("a  b{?1}", words({"a": 0, "b": 1, "?": 2}, unk_token="?"))


STORY = "Tom was sad because he was a boy and a dog ran. "


@pytest.mark.parametrize(
    "tokenizer, word, joins",
    [
        (data.train_tokenizer([STORY] * 3, 290), "Tom was alone.", True),
        (
            data.train_tokenizer(["\u043a\u043e\u0442 \u0438 \u0434\u043e\u043c"] * 9, 290),
            "\u0434\u043e\u043c",
            True,
        ),  # no " a" in it
        (metaspace("always"), "walk", True),
        (metaspace("never"), "walk", True),
        (
            data.train_tokenizer(["walk"], 257),
            "walk",
            False,
        ),  # a space is a token, as in the texts that a model of it has seen
        (words({"Tom": 0}), "Tom", False),  # it knows no space, and no other word
    ],
    ids=["bytes, merged", "bytes, other letters", "metaspace", "metaspace, never", "bytes", "words"],
)
def test_a_space_before_a_gap_is_left_to_it_where_it_belongs_to_the_next_word(tokenizer, word, joins):
    assert data.before_gap(tokenizer, word + " ") == ((word, True) if joins else (word + " ", False))
    assert data.before_gap(tokenizer, word) == (word, False)


def test_places_of_spaces_before_gaps():
    tokenizer = data.train_tokenizer([STORY] * 3, 290)
    found = data.read_holes("sad {?2} {?1} he{?1}. ", tokenizer)
    assert found[:2] == parse_holes("sad{?2}{?1} he{?1}. ", tokenizer)
    first = len(tokenizer.encode("sad").ids)
    assert found[2] == [first, first + 2] and tokenizer.decode(found[0][-2:]) == ". "  # no gap follows the last space
    he, sad = tokenizer.encode(" he").ids, tokenizer.encode("sad").ids
    assert data.with_spaces(tokenizer, sad + he, [first]) == "sad he"  # which brings it
    assert (
        data.with_spaces(tokenizer, sad + sad, [first]) == "sad sad"
        and data.with_spaces(tokenizer, sad, [first]) == "sad "
    )
    assert data.with_spaces(tokenizer, sad * 3, [first, 2 * first]) == "sad sad sad"
    code = data.train_tokenizer(["def add(a, b):\n    return a\n"] * 9, 300)  # the last space of an indentation
    assert data.before_gap(code, "def add(a, b):\n    ") == ("def add(a, b):\n   ", True)


@pytest.mark.parametrize("hole", ["0", "1000001", "99999999", "9" * 20, "9" * 5000])
def test_holes_of_impossible_sizes(hole):
    with pytest.raises(ValueError, match="text: got the hole"):
        parse_holes("a{?" + hole + "}", bytes_tokenizer())


class Letters:
    """A tokenizer of single characters, a = 1 and so on; it would put a 0 before a whole text."""

    def encode(self, text, add_special_tokens=True):
        return SimpleNamespace(ids=[0] * add_special_tokens + [ord(letter) % 32 for letter in text])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + i) for i in ids if i or not skip_special_tokens)


def test_holes():
    tokens, given = parse_holes("ab{?2}c{?1}{?1}", Letters())
    assert tokens == [1, 2, 0, 0, 3, 0, 0] and given == [True, True, False, False, True, False, False]
    for text in ("abc", "", "a{5}"):
        with pytest.raises(ValueError, match="text: got .* allowed is a text with a hole such as"):
            parse_holes(text, Letters())
    for text, place in (("{?}", 1), ("a{?x}", 2), ("{?-1}", 1), ("ab{?12}c{?", 9), ("{?3}{?{?2}", 5)):
        with pytest.raises(
            ValueError, match=rf"^text: got '\{{\?' at character {place}, allowed is a hole \{{\?n\}} with n in"
        ):
            parse_holes(text, Letters())
    with pytest.raises(ValueError, match=r"text: got the hole \{\?0\}, allowed are holes of 1 to 1,000,000 tokens"):
        parse_holes("a{?0}{?2}", Letters())
    tokens, given = parse_holes("{?3}", Letters())  # a hole with nothing around it
    assert (tokens, given) == ([0, 0, 0], [False] * 3)
    assert len(Sampler(Counting(50), LogitPath(50)).infill([tokens], [given], steps=2).tokens[0]) == 3


def test_tokenizer_round_trip_and_documents(tmp_path):
    text = "\n<|endoftext|>\n".join(f"Story {i}: the café naïve ☃ {i * i}\n" * 5 for i in range(40))
    (tmp_path / "t.txt").write_text(text)
    train, held = data.documents(tmp_path / "t.txt")
    assert len(train) == 38 and len(held) == 2
    tokenizer = data.train_tokenizer(train, 400)
    stream = data.encode(tokenizer, train)
    assert tokenizer.decode(stream.tolist(), skip_special_tokens=False).split(data.END)[:-1] == train
    assert torch.equal(data.batch(stream, 4, 8, 1, 2), data.batch(stream, 4, 8, 1, 2))


def test_removed_lines():
    tokenizer = data.train_tokenizer(["some text"], 257)  # a token a byte
    text = "\n".join(["a = 1", "", "b = 2", "", "c = 3", "d", "call(e)", "f", "g", "h", "i"])
    long = "\n".join(["x" * 40] * 3 + ["call(e)"] + ["y"] * 3)
    (found,) = data.removed_lines([long, "a\n" * 6, text], tokenizer, 60)
    tokens, given, (before, line, after) = found
    assert (before, line, after) == ("b = 2\nc = 3\nd\n", "call(e)", "\nf\ng\nh")
    assert tokenizer.decode(tokens[0].tolist()) == before + line + after
    assert tokenizer.decode(tokens[~given].tolist()) == line and given.shape == tokens.shape == (1, 27)


@pytest.mark.parametrize(
    "content,message", [(None, "cannot be read"), (b"", "is empty"), (b"ab\xff", "not UTF-8: byte 0xff in line 1"),
                        (b"short", "at least 20 are needed")]
)  # fmt: skip
def test_bad_data(tmp_path, content, message):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.documents(path)


def test_a_tokenizer_by_its_folder_or_its_name_in_the_cache(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    made = data.train_tokenizer(["one two three"] * 5, 260)
    made.save(str(tmp_path / "tokenizer.json"))
    assert data.load_tokenizer(tmp_path).get_vocab() == made.get_vocab()
    cached = {("owner/name", "tokenizer.json"): str(tmp_path / "tokenizer.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *key: cached.get(key))
    assert data.load_tokenizer("owner/name").get_vocab() == made.get_vocab()
    with pytest.raises(ValueError, match="tokenizer: owner/other cannot be read"):
        data.load_tokenizer("owner/other")
