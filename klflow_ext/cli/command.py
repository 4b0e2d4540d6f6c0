"""What all commands share: how much they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, TypeVar
from unittest import mock

import docstring_parser
import tyro

import klflow

Kind = TypeVar("Kind")


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

    voice: Annotated[tyro.conf.OmitArgPrefixes[Voice], tyro.conf.arg(name="output")] = field(default_factory=Voice)

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


def asked(kind: type[Kind], prog: str, words: Sequence[str]) -> Kind:
    """What the words of a command line make of a class, by tyro; it prints the help or what is wrong, and exits, where they make none."""
    with mock.patch.object(docstring_parser, "parse_from_object", _parsed):
        return tyro.cli(kind, prog=prog, args=words)


def _parsed(kind: type, parse=docstring_parser.parse_from_object) -> Any:
    """With one line for each paragraph: tyro would keep a break before a line that is indented, or begins with a quote."""
    found = parse(kind)
    for each in found.params:
        paragraphs = (each.description or "").split("\n\n")
        each.description = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) or None
    return found
