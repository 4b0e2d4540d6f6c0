"""What all commands share: how much they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated

import tyro

import klflow


@dataclass(frozen=True)
class Voice:
    """How much is said."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=("-q",))] = False
    """Print results, warnings and errors alone."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=("-v",))] = False
    """Also say what is used; of an error, where it came from."""

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise ValueError("quiet: got it beside verbose, allowed is one of the two")

    @property
    def level(self) -> int:
        """0, 1 or 2, as `klflow_ext.cli.terminal` counts."""
        return 1 + self.verbose - self.quiet


@dataclass(kw_only=True)
class Command:
    """A command of klflow; its fields are its options."""

    voice: tyro.conf.OmitArgPrefixes[Voice] = field(default_factory=Voice)

    def run(self) -> None:
        """Does it."""
        raise NotImplementedError


def command_of(name: str) -> type[Command]:
    """The class of a command of klflow.py."""
    module, kind = klflow.COMMANDS[name][0].split(":")
    return getattr(import_module(f"klflow_ext.cli.{module}"), kind)


def commands() -> Iterator[tuple[str, type[Command]]]:
    """All of them, with their names."""
    return ((name, command_of(name)) for name in klflow.COMMANDS)
