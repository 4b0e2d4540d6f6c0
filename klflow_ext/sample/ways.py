"""The registry of ways through a text: `way(passes, options) -> tokens (B, L)`, by the name that `method` gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klflow_ext.path import Path, ResolvedOptions
from klflow_ext.sample.passes import Passes

Way = Callable[[Passes, ResolvedOptions], Tensor]
_ways: dict[str, Way] = {}
_ways_of_paths: dict[str, Way] = {}
_ordered: set[Way] = set()
_of_same_free: set[Way] = set()
_hearing: set[Way] = set()


def register_way(
    name: str, *, of_path: bool = False, ordered: bool = False, same_free: bool = False, hears: bool = False
) -> Callable[[Way], Way]:
    """Decorator: makes a way available as `method=name`.

    A way returns the tokens (B, L) of `passes.given.shape`; given ones are put back after it. See `Passes` for what it may ask.

    Args:
        of_path: to the paths whose `way` it is instead.
        ordered: it draws every free token once, by `Passes.draw`, in an order that does not depend on what is drawn: then it
            has an exact likelihood (`Sampler.likelihood`).
        same_free: the sequences that it gets together have as many free positions each.
        hears: it takes up `Passes.evidence`.
    """

    def register(way: Way) -> Way:
        (_ways_of_paths if of_path else _ways)[name] = way
        if ordered:
            _ordered.add(way)
        if same_free:
            _of_same_free.add(way)
        if hears:
            _hearing.add(way)
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


def is_ordered(way: Way) -> bool:
    """Whether a way has an exact likelihood."""
    return way in _ordered


def ordered_names() -> list[str]:
    """The methods that have one."""
    return sorted(name for name, way in _ways.items() if way in _ordered)


def wants_same_free(way: Way) -> bool:
    """Whether a way asks for sequences with as many free positions each."""
    return way in _of_same_free


def hears(way: Way) -> bool:
    """Whether a way takes up evidence."""
    return way in _hearing


def hearing_names() -> list[str]:
    """The methods that do."""
    return sorted(name for name, way in _ways.items() if way in _hearing)
