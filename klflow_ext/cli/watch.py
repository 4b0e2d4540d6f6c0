"""klflow watch."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from klflow_ext.cli.generate import Sample
from klflow_ext.cli.show import Show


@dataclass
class Watch(Sample):
    """Watch a text form in the terminal, pass by pass: sample --live of one text."""

    count: int = 1
    """Texts, one below the other."""
    show: tyro.conf.OmitArgPrefixes[Show] = field(default_factory=lambda: Show(live=True))
