"""The registry of ways through a text: `way(passes, options) -> tokens (B, L)`, by the name that `method` gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klflow_ext.path import Path, ResolvedOptions
from klflow_ext.sample.passes import Passes

Way = Callable[[Passes, ResolvedOptions], Tensor]
_ways: dict[str, Way] = {}
_ways_of_paths: dict[str, Way] = {}


def register_way(name: str, *, of_path: bool = False) -> Callable[[Way], Way]:
    """Decorator: makes a way available as `method=name`; of_path: to the paths whose `way` it is instead.

    A way returns the tokens (B, L) of `passes.given.shape`; given ones are put back after it. See `Passes` for what it may ask.
    """

    def register(way: Way) -> Way:
        (_ways_of_paths if of_path else _ways)[name] = way
        return way

    return register


def way_of(path: Path, method: str) -> Way:
    """The way of a path that allows one only, else that of the method's name.

    Raises:
        ValueError: no way has this name.
    """
    if method not in _ways:
        raise ValueError(f"method: got {method!r}, allowed is one of {sorted(_ways)}")
    return _ways[method] if path.way is None else _ways_of_paths[path.way]
