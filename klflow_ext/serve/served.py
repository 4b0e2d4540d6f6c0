"""The model that is served: its name, its tokenizer, its limits, and the methods that it has."""

from __future__ import annotations

import time
from typing import NamedTuple

from klflow_ext.data import before_gap, encode_pieces, end_of
from klflow_ext.sample import Sampler
from klflow_ext.sample.samples import encoded
from klflow_ext.serve.limits import Limits

METHODS = ("slices", "segments", "confidence", "basic", "sampling", "hybrid")  # "race" holds rows of V


class Sides(NamedTuple):
    """The token ids of a prompt and of a suffix; space: whether that at the end of the prompt was left to the hole."""

    before: list[int]
    after: list[int]
    space: bool


class Served:
    """A Sampler with a tokenizer, under a name.

    Attributes:
        sampler, name, limits: as given. tokenizer: that of the sampler.
        max_length: tokens of a sequence; that of the limits or the model, whichever is less.
        methods: the names of METHODS that this model can be asked for; each was tried once.
        end: the id of the token that ends a text, None where the tokenizer has none.
        created: seconds since 1970.
    """

    def __init__(self, sampler: Sampler, name: str, limits: Limits):
        if sampler.tokenizer is None:
            raise ValueError("run: it has no tokenizer, without which there is no text")
        self.sampler, self.name, self.limits, self.tokenizer = sampler, name, limits, sampler.tokenizer
        most = sampler.network.max_length
        self.max_length = limits.max_length if most is None else min(limits.max_length, most)
        self.methods = [name for name in METHODS if self._has(name)]
        self.end: int | None = end_of(self.tokenizer)
        self.created = int(time.time())

    def _has(self, method: str) -> bool:
        """A model that is broken says so here, before anybody asks."""
        if method == "slices" and not self.sampler.network.slices and self.sampler.path.way is None:
            return False
        self.sampler.sample((1, min(2, self.max_length)), steps=2, method=method)
        return True

    def method(self, name: str | None) -> str:
        """The method that a name, or none, stands for."""
        return self.sampler.path.way or name or self.sampler.default_method

    def encode(self, prompt: str | list[int], suffix: str | None) -> Sides:
        """What stands on both sides of a hole, each encoded by itself, as `parse_holes` does it; without a suffix as `complete` does.

        Raises:
            ValueError: the tokenizer cannot encode it, or would change it.
        """
        try:
            if isinstance(prompt, str) and suffix is None:
                (before,), (spaces,) = encoded(self.tokenizer, [prompt])
                return Sides(before, [], bool(spaces))
            space = False
            if isinstance(prompt, str):
                prompt, space = before_gap(self.tokenizer, prompt)
            pieces = [piece for piece in (prompt, suffix) if isinstance(piece, str) and piece]
            found = iter(encode_pieces(self.tokenizer, pieces) if pieces else [])
            before = prompt if isinstance(prompt, list) else next(found) if prompt else []
            return Sides(before, next(found) if suffix else [], space)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"prompt: {str(error).removeprefix('text: ')}") from None
