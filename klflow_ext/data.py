"""Text in, tokens out: the default corpus, a byte-level BPE tokenizer, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

END = "<|endoftext|>"  # stands between documents; token 0 of a tokenizer that is trained here


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. ValueError names the file and what is wrong: missing, a folder, not UTF-8, or empty."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}") from None
    if not text.strip():
        raise ValueError(f"data: {path} is empty")
    return text


def standard_library() -> list[str]:
    """The source files of this Python's standard library, sorted by name, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "config",
        "__pycache__",
    }
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not skipped.intersection(path.relative_to(root).parts):
            try:
                texts.append(path.read_text("utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
    if sum(map(len, texts)) < 100_000:
        raise ValueError(f"data: no standard library source under {root}; name a text file with --data")
    return texts


PIECE = 2000  # characters of a piece of a text that is not divided otherwise


def documents(path: str | Path | None) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of a text file, or of the standard library (every 20th is held out).

    A file is split at lines that hold only <|endoftext|>; without any, at blank lines, and where there are few of those at any
    line, into pieces of about 2,000 characters; where these are few, each line is one. Line ends are of any kind, and kept.
    """
    if path is None:
        texts = standard_library()
    else:
        text = read_text(path)
        texts = [part for part in re.split(rf"\r?\n{re.escape(END)}[ \t]*\r?\n", text) if part.strip()]
        if len(texts) == 1:
            for separator, size in ((r"\n[ \t]*\r?\n", PIECE), (r"\n", PIECE), (r"\n", 0)):
                texts = _pieces(text, separator, size)
                if len(texts) >= 20:
                    break
    if len(texts) < 20:
        raise ValueError(
            f"data: {path} has {len(texts)} pieces of text, at least 20 are needed: texts between lines of {END}, pieces of "
            f"{PIECE} characters between blank lines or lines, or lines"
        )
    return [text for i, text in enumerate(texts) if i % 20], texts[::20]


def _pieces(text: str, separator: str, size: int) -> list[str]:
    """Pieces that end with a separator, each of more than `size` characters but the last."""
    pieces, start = [], 0
    for match in re.finditer(separator, text):
        if match.end() - start > size:
            pieces.append(text[start : match.end()])
            start = match.end()
    return [piece for piece in (*pieces, text[start:]) if piece.strip()]


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer of at most vocab_size tokens (>= 257: every byte and <|endoftext|>, which is token 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is at least 257 (every byte and {END})")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path):
    """A `tokenizers` file (tokenizer.json), which gets <|endoftext|> as one more token where it lacks it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizer: {path} cannot be read: {error}") from None
    tokenizer.no_truncation()  # either would change what is trained on
    tokenizer.no_padding()
    if tokenizer.token_to_id(END) is None:
        tokenizer.add_special_tokens([END])
    vocab_size_of(tokenizer)
    return tokenizer


def vocab_size_of(tokenizer) -> int:
    """V: one more than the largest id, which is more than the number of tokens where ids have gaps."""
    vocab_size, tokens = max(tokenizer.get_vocab().values()) + 1, tokenizer.get_vocab_size()
    if vocab_size > 2 * tokens + 1000:
        raise ValueError(f"tokenizer: got ids up to {vocab_size - 1} for {tokens} tokens, allowed are few gaps")
    return vocab_size


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """One int32 stream: the documents, each followed by <|endoftext|>."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    try:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises Exception itself, for one without an unknown token
        raise ValueError(f"tokenizer: it cannot encode the text: {error}") from None
    for encoding in encodings:
        ids += encoding.ids
        ids.append(end)
    return np.asarray(ids, np.int32)


def _without_prefix_space(tokenizer):
    """A copy of the tokenizer that puts no space before a text; one of another library is taken as it is."""
    from tokenizers import Tokenizer

    if not isinstance(tokenizer, Tokenizer):
        return tokenizer
    bare = Tokenizer.from_str(tokenizer.to_str())
    before = bare.pre_tokenizer
    if hasattr(before, "add_prefix_space"):
        before.add_prefix_space = False
    if hasattr(before, "prepend_scheme"):
        before.prepend_scheme = "never"
    if before is not None:
        bare.pre_tokenizer = before
    return bare


def encode_pieces(tokenizer, pieces: list[str]) -> list[list[int]]:
    """The ids of pieces of one text, each encoded by itself, that give the whole text back.

    A tokenizer that puts a space before every text is asked not to, but before the first where that is what gives it back.

    Raises:
        ValueError: the tokenizer changes the text.
    """
    text = "".join(pieces)
    bare = _without_prefix_space(tokenizer)
    for first, other in ((tokenizer, tokenizer), (tokenizer, bare), (bare, bare)):
        makers = [first if i == 0 else other for i in range(len(pieces))]
        try:
            ids = [maker.encode(p, add_special_tokens=False).ids for maker, p in zip(makers, pieces, strict=True)]
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"text: the tokenizer cannot encode it: {error}") from None
        found = tokenizer.decode(sum(ids, []), skip_special_tokens=False)
        if found == text:
            return ids
    raise ValueError(f"text: got {text[:80]!r} between the holes, which this tokenizer gives back as {found[:80]!r}")


LONGEST_HOLE = 1_000_000


def parse_holes(text: str, tokenizer) -> tuple[list[int], list[bool]]:
    """(tokens, given) of a text with holes {?n}, each of n >= 1 tokens: "x = {?3} + 1".

    The pieces between holes are encoded by themselves (`encode_pieces`).

    Raises:
        ValueError: there is no hole, or one of no tokens or of more than LONGEST_HOLE, or the tokenizer would change the text.
    """
    parts = re.split(r"\{\?(\d+)\}", text)
    for hole in parts[1::2]:
        if len(hole) > 18 or not 1 <= int(hole) <= LONGEST_HOLE:
            raise ValueError(
                f"text: got the hole {{?{hole}}}, allowed are holes of 1 to {LONGEST_HOLE:,} tokens, such as {{?8}}"
            )
    if len(parts) == 1:
        raise ValueError(f"text: got {text!r}, allowed is a text with a hole such as {{?8}}")
    pieces = [part for part in parts[::2] if part]
    encoded = iter(encode_pieces(tokenizer, pieces))
    tokens: list[int] = []
    given: list[bool] = []
    for i, part in enumerate(parts):
        ids = [0] * int(part) if i % 2 else next(encoded) if part else []
        tokens += ids
        given += [i % 2 == 0] * len(ids)
    return tokens, given


def batch(stream: np.ndarray, batch_size: int, length: int, seed: int, step: int) -> torch.Tensor:
    """(batch_size, length) int64 windows of the stream, at places that depend on (seed, step) alone."""
    if len(stream) <= length:
        raise ValueError(f"data: {len(stream)} tokens are too few for sequences of {length}")
    starts = np.random.default_rng((seed, step)).integers(0, len(stream) - length, batch_size)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


def removed_lines(
    texts: list[str], tokenizer, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[str, str, str]]]:
    """(tokens (1, L), given (1, L), (before, line, after)) of a line of 6 to 14 tokens between three others on each side, for
    which L <= length; the first such line of each text. Only the line's tokens are not given. Blank lines are left out."""
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        for at in range(3, len(lines) - 3):
            parts = "\n".join(lines[at - 3 : at]) + "\n", lines[at], "\n" + "\n".join(lines[at + 1 : at + 4])
            ids = [tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
            if 6 <= len(ids[1]) <= 14 and sum(map(len, ids)) <= length:
                tokens = torch.tensor([sum(ids, [])])
                given = torch.ones_like(tokens, dtype=torch.bool)
                given[0, len(ids[0]) : len(ids[0]) + len(ids[1])] = False
                yield tokens, given, parts
                break
