"""Tokenizers of the `tokenizers` library: trained here, or from a file; and the tokens of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from klflow_ext.data.pieces import END, Part, parts

BATCH = 1 << 20  # characters that are encoded at once
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # which end a text, in the tokenizers of one model or another


def train_tokenizer(texts: Iterable[str], vocab_size: int):
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
    """A `tokenizers` file, which gets <|endoftext|> as one more token where it has none that ends a text (`end_of`).

    path: the file (tokenizer.json), a folder that has one, or the name of a model on the Hub whose files its cache has.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizer: {path} cannot be read: {error}") from None
    tokenizer.no_truncation()  # either would change what is trained on
    tokenizer.no_padding()
    if end_of(tokenizer) is None:
        tokenizer.add_special_tokens([END])
    vocab_size_of(tokenizer)
    return tokenizer


def _tokenizer_file(path: str | Path) -> Path:
    """Nothing is downloaded."""
    file = Path(path)
    if file.is_dir():
        return file / "tokenizer.json"
    if not file.exists() and str(path).count("/") <= 1:  # may be a name of the Hub
        try:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(str(path), "tokenizer.json")
        except (ImportError, ValueError):  # not installed; no such name is possible
            cached = None
        if isinstance(cached, str):
            return Path(cached)
    return file


def end_of(tokenizer) -> int | None:
    """The id of the token that ends a text, the first of ENDS that the tokenizer has; None where it has none of them."""
    return next((i for i in map(tokenizer.token_to_id, ENDS) if i is not None), None)


def vocab_size_of(tokenizer) -> int:
    """V: one more than the largest id, which is more than the number of tokens where ids have gaps."""
    vocab_size, tokens = max(tokenizer.get_vocab().values()) + 1, tokenizer.get_vocab_size()
    if vocab_size > 2 * tokens + 1000:
        raise ValueError(f"tokenizer: got ids up to {vocab_size - 1} for {tokens} tokens, allowed are few gaps")
    return vocab_size


def encode_parts(tokenizer, texts: Iterable[Part]) -> Iterator[tuple[np.ndarray, bool]]:
    """(int32 tokens, whether the document ends) of each part; a document is followed by the token that ends it (`end_of`). Memory is
    flat.

    Raises:
        ValueError: the tokenizer has no such token, or cannot encode a text.
    """
    if end_of(tokenizer) is None:
        raise ValueError(f"tokenizer: got one without a token that ends a text, allowed is one with one of {ENDS}")
    batch: list[Part] = []
    size = 0
    for part in texts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield from _encode_batch(tokenizer, batch)
            batch, size = [], 0
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer, batch: list[Part]) -> Iterator[tuple[np.ndarray, bool]]:
    end = [end_of(tokenizer)]
    try:
        encodings = tokenizer.encode_batch_fast([part.text for part in batch], add_special_tokens=False)
    except Exception as error:  # the library raises Exception itself, for one without an unknown token
        raise ValueError(f"tokenizer: it cannot encode the text: {error}") from None
    for encoding, part in zip(encodings, batch, strict=True):
        yield np.asarray(encoding.ids + end * part.last, np.int32), part.last


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """One int32 stream: the documents, each followed by the token that ends it."""
    found = [tokens for tokens, _ in encode_parts(tokenizer, (part for text in texts for part in parts(text)))]
    return np.concatenate([np.zeros(0, np.int32), *found])
