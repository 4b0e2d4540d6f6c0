"""klflow prepare."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from klflow_ext.cli.command import Command
from klflow_ext.cli.terminal import USUAL, note, spoken
from klflow_ext.data import TokenFolder
from klflow_ext.train import prepare_tokens


@dataclass
class Prepare(Command):
    """Encode texts into a token folder to train on, in flat memory. Killed, it leaves nothing in the folder's place."""

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders and globs: UTF-8 text, .jsonl, .ndjson and .parquet, also with .gz or .zst at the end. Documents of a text
    stand between lines of <|endoftext|>."""
    out: Path = Path("runs/tokens")
    """Token folder to write."""
    column: str = "text"
    """Where JSONL and Parquet have their text."""
    tokenizer: Path | None = None
    """A tokenizers file (tokenizer.json) instead of one trained here."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained here."""
    tokenizer_characters: int = 4_000_000
    """How much text it is trained on: of each file its share, from its beginning."""
    heldout: float = 0.05
    """Share of the documents that are kept back, by a hash of their text: copies of one lie on one side."""
    seed: int = 0
    """Of that choice."""
    overwrite: bool = False
    """Replace a token folder that is there."""
    verify: Path | None = None
    """Read every byte of this token folder and say whether it is what was written; nothing else is done."""

    def run(self):
        if self.verify is not None:
            folder = TokenFolder(self.verify)
            folder.verify()
            print(f"{self.verify} is whole: fingerprint {folder.fingerprint}")
            return
        # As an exception, by which what was written is taken away.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            self.prepare()
        finally:
            signal.signal(signal.SIGTERM, before)
        print(f"token folder: {self.out}  (next: klflow train --data {self.out})")

    def prepare(self) -> None:
        prepare_tokens(
            self.data,
            self.out,
            column=self.column,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            tokenizer_characters=self.tokenizer_characters,
            heldout=self.heldout,
            seed=self.seed,
            overwrite=self.overwrite,
            progress=spoken() >= USUAL,
            report=note,
        )
