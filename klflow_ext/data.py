"""Text in, tokens out: the default corpus, a byte-level BPE tokenizer, and batches that depend on (seed, step) alone."""

from __future__ import annotations

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


def documents(path: str | Path | None) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of a text file, or of the standard library (every 20th file is held out).

    A file is split at lines that hold only <|endoftext|>; without any, at blank lines into pieces of about 2,000 characters.
    """
    if path is None:
        texts = standard_library()
    else:
        text = read_text(path)
        texts = [part for part in text.split(f"\n{END}\n") if part.strip()]
        if len(texts) == 1:
            texts, piece = [], ""
            for paragraph in text.split("\n\n"):
                piece += paragraph + "\n\n"
                if len(piece) > 2000:
                    texts.append(piece)
                    piece = ""
            texts += [piece] if piece.strip() else []
    if len(texts) < 20:
        raise ValueError(
            f"data: {path} has {len(texts)} pieces of text, at least 20 are needed (about 40,000 characters)"
        )
    return [text for i, text in enumerate(texts) if i % 20], texts[::20]


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
    if tokenizer.token_to_id(END) is None:
        tokenizer.add_special_tokens([END])
    return tokenizer


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """One int32 stream: the documents, each followed by <|endoftext|>."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += encoding.ids
        ids.append(end)
    return np.asarray(ids, np.int32)


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
