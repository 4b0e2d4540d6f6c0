"""Texts with holes: {?n} stands for n tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable


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
    for first, other in _makers(tokenizer):
        makers = [first if i == 0 else other for i in range(len(pieces))]
        try:
            ids = [maker.encode(p, add_special_tokens=False).ids for maker, p in zip(makers, pieces, strict=True)]
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"text: the tokenizer cannot encode it: {error}") from None
        found = tokenizer.decode(sum(ids, []), skip_special_tokens=False)
        if found == text:
            return ids
    raise ValueError(f"text: got {text[:80]!r} between the holes, which this tokenizer gives back as {found[:80]!r}")


def _makers(tokenizer):
    """Who encodes the first piece, and who the others. A copy is made only where it is needed: it takes long."""
    yield tokenizer, tokenizer
    bare = _without_prefix_space(tokenizer)
    yield tokenizer, bare
    yield bare, bare


def before_gap(tokenizer, text: str) -> tuple[str, bool]:
    """(what is given to the model of a text that a gap follows, whether the space at its end was left to the gap).

    Most tokenizers join a space to the word that follows it. Such a space is no token by itself in the texts that a model has
    seen, so the first token of the gap brings it. Whether the tokenizer does so is asked of it: by the last word of the text.
    """
    if not text.endswith(" "):
        return text, False

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for word in (*text.split()[-1:], "a"):
        try:
            without, alone, joined = ids(text[:-1]), ids(text), ids(text + word)
        except Exception:  # the library raises Exception itself, for a word that it does not know
            continue
        if joined[: len(without)] == without and joined[: len(alone)] != alone:
            return text[:-1], True
    return text, False


def with_spaces(tokenizer, ids: list[int], spaces: Iterable[int]) -> str:
    """The text of tokens, in which a space that was left to the token at each of these places stands, whether or not it brought it."""
    text = tokenizer.decode(ids)
    for place in sorted(spaces, reverse=True):
        before = tokenizer.decode(ids[:place])
        if text.startswith(before) and not text.startswith(" ", len(before)):
            text = f"{before} {text[len(before) :]}"
    return text


LONGEST_HOLE = 1_000_000


def parse_holes(text: str, tokenizer) -> tuple[list[int], list[bool]]:
    """(tokens, given) of a text with holes {?n}, each of n >= 1 tokens: "x = {?3} + 1".

    The pieces between holes are encoded by themselves (`encode_pieces`), a space before a hole is left to it (`before_gap`).

    Raises:
        ValueError: there is no hole, or one of no tokens or of more than LONGEST_HOLE, or a "{?" that opens none, or the tokenizer
            would change the text.
    """
    tokens, given, _ = read_holes(text, tokenizer)
    return tokens, given


def read_holes(text: str, tokenizer) -> tuple[list[int], list[bool], list[int]]:
    """As `parse_holes`, and the places of the tokens to which a space before them was left."""
    parts = re.split(r"\{\?(\d+)\}", text)
    for hole in parts[1::2]:
        if len(hole) > 18 or not 1 <= int(hole) <= LONGEST_HOLE:
            raise ValueError(
                f"text: got the hole {{?{hole}}}, allowed are holes of 1 to {LONGEST_HOLE:,} tokens, such as {{?8}}"
            )
    place = 0
    for i, part in enumerate(parts):
        if not i % 2 and "{?" in part:
            raise ValueError(
                f"text: got '{{?' at character {place + part.index('{?') + 1}, allowed is a hole {{?n}} with n in [1, {LONGEST_HOLE:,}]"
            )
        place += len(part) + 3 * (i % 2)  # of a hole its {?}
    if len(parts) == 1:
        raise ValueError(f"text: got {text!r}, allowed is a text with a hole such as {{?8}}")
    left: set[int] = set()  # holes, by their place among the parts, to which a space was left
    for i in range(0, len(parts) - 1, 2):
        parts[i], space = before_gap(tokenizer, parts[i])
        if space:
            left.add(i + 1)
    pieces = [part for part in parts[::2] if part]
    encoded = iter(encode_pieces(tokenizer, pieces))
    tokens: list[int] = []
    given: list[bool] = []
    spaces: list[int] = []
    for i, part in enumerate(parts):
        ids = [0] * int(part) if i % 2 else next(encoded) if part else []
        if i in left:
            spaces.append(len(tokens))
        tokens += ids
        given += [i % 2 == 0] * len(ids)
    return tokens, given, spaces
