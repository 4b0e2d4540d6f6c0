"""What a Sampler takes and gives: texts or token ids, seeds, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from klflow_ext.checks import check_int
from klflow_ext.data import before_gap, read_holes, with_spaces

NEW_TOKENS = 64  # after a prompt, where nothing else is asked for


@dataclass
class Samples:
    """What was generated.

    Attributes:
        tokens: (B, L) int64, or a list of (L_i,) where lengths differ.
        nfe: network passes of a sequence. seconds: that they took.
        history: tokens after each pass, if asked for.
        seeds: of each sequence; `seed=samples.seeds[3:4]` makes sequence 3 again, alone.
        tokenizer: of the Sampler, for `texts`.
        given: bool, as tokens; those that were given.
        spaces: of each sequence, the places of the tokens to which a given space before them was left; empty: of none.
    """

    tokens: Tensor | list[Tensor]
    nfe: int
    seconds: float
    history: list[Tensor] | list[list[Tensor]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    tokenizer: Any = field(default=None, repr=False)
    given: Tensor | list[Tensor] = field(default_factory=list, repr=False)
    spaces: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def texts(self) -> list[str]:
        """The tokens as text, what was given as it was written. ValueError where the Sampler has no tokenizer."""
        tokenizer = needed(self.tokenizer, "texts")
        spaces = self.spaces or [[]] * len(self.tokens)
        return [with_spaces(tokenizer, row.tolist(), of) for row, of in zip(self.tokens, spaces, strict=True)]


def needed(tokenizer: Any, name: str) -> Any:
    """The tokenizer. ValueError where there is none; name: of what needs it."""
    if tokenizer is None:
        raise ValueError(f"{name}: got a Sampler without a tokenizer, allowed is one with it: Sampler(..., tokenizer=)")
    return tokenizer


def is_texts(value: Any) -> TypeGuard[Sequence[str]]:
    """Whether it is a list of strings, and not an empty one."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(text, str) for text in value)


def is_rows(value: Any) -> bool:
    """Whether it is a list of sequences, none of them a string; an empty one too."""
    if isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        return False
    return all(hasattr(row, "__len__") and not isinstance(row, str) and getattr(row, "ndim", 1) > 0 for row in value)


def encoded(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """(ids of each prompt, with no special token before or behind it; `Samples.spaces` of what continues it)."""
    tokenizer = needed(tokenizer, "prompts")
    found = [before_gap(tokenizer, prompt) for prompt in prompts]
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in found]
    return rows, [[len(row)] * space for row, (_, space) in zip(rows, found, strict=True)]


def prompted(
    prompts: Sequence[Tensor], length: int | None, new_tokens: int | None, most: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """(tokens, given) of prompts and the room behind them: to `length` tokens, or of new_tokens; most: the model's max_length."""
    for i, ids in enumerate(prompts):
        if ids.dim() != 1:
            raise ValueError(f"prompts: number {i} has shape {tuple(ids.shape)}, allowed is a row of ids")
    longest = max(map(len, prompts), default=0)
    if new_tokens is not None:
        if length is not None:
            raise ValueError(f"new_tokens: got {new_tokens} beside length={length}, allowed is one of the two")
        new_tokens = check_int("new_tokens", new_tokens, 0, 2**31, "an integer in [0, 2^31]")
        if most is not None and longest + new_tokens > most:
            raise ValueError(
                f"new_tokens: got {new_tokens} after a prompt of {longest} tokens, allowed are max_length = {most} in all"
            )
    tokens, given = [], []
    for i, ids in enumerate(prompts):
        if length is not None:
            n = length
        elif new_tokens is not None:
            n = len(ids) + new_tokens
        else:
            n = len(ids) + NEW_TOKENS if most is None else max(len(ids), min(len(ids) + NEW_TOKENS, most))
        if len(ids) > n:
            raise ValueError(f"prompts: number {i} has {len(ids)} tokens, allowed are at most length = {n}")
        tokens.append(torch.cat([ids.cpu(), torch.zeros(n - len(ids), dtype=torch.int64)]))
        given.append(torch.arange(n) < len(ids))
    return tokens, given


def with_holes(tokenizer: Any, texts: Sequence[str]) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    """(tokens, given, `Samples.spaces`) of each text with {?n} holes."""
    tokenizer = needed(tokenizer, "tokens")
    found = [read_holes(text, tokenizer) for text in texts]
    tokens, given = [torch.tensor(ids) for ids, _, _ in found], [torch.tensor(flags) for _, flags, _ in found]
    return tokens, given, [spaces for _, _, spaces in found]


def _sequence_seed(seed: int, i: int) -> int:
    """A well mixed 63-bit seed of sequence i (SplitMix64)."""
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) >> 1


def seeds_of(seed: Any, count: int) -> list[int]:
    if isinstance(seed, (str, bool)) or not hasattr(seed, "__len__") or getattr(seed, "ndim", 1) == 0:
        seed = check_int("seed", seed, -(2**63), 2**64 - 1, "an integer that fits in 64 bits, or one for each sequence")
        return [_sequence_seed(seed, i) for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed: got {len(seed)} seeds, allowed is one or {count}, one for each sequence")
    return [check_int("seed", s, -(2**63), 2**63 - 1, "integers that fit in 64 bits with a sign") for s in seed]


def token_ids(name: str, value) -> Tensor:
    """The ids as int64; of integers of any kind only, as others would be cut."""
    try:
        ids = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {value!r}, allowed are token ids, a sequence of integers") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"{name}: got {ids.dtype}, allowed are token ids, which are integers")
    return ids.long()
