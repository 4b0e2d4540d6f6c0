"""The command `klflow`: what it can say without torch, whose import takes a second; klflow_ext/cli does the rest."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

COMMANDS = {  # name: (its class in klflow_ext.cli, what it does)
    "info": ("info:Info", "what was built, what runs here, and what falls back and why"),
    "demo": ("train:Demo", "train a small model on real text in a few minutes, and sample from it"),
    "prepare": ("prepare:Prepare", "encode texts into a token folder to train on"),
    "train": ("train:Train", "train on a text or token folders, or go on with a run"),
    "adapt": ("adapt:Adapt", "adapt a language model of transformers to flow matching"),
    "sample": ("generate:Sample", "generate texts from nothing"),
    "complete": ("generate:Complete", "continue prompts"),
    "infill": ("generate:Infill", "fill the holes of texts"),
    "watch": ("watch:Watch", "watch a text form in the terminal, pass by pass"),
    "serve": ("serve:Serve", "answer requests for completions over HTTP, asked as OpenAI's API is"),
    "plot": ("plot:Plot", "draw the log of a run as one picture"),
    "eval": ("evaluate:Eval", "held-out loss by time, likelihoods, and a judge of the samples"),
    "completion": ("completion:Completion", "print a script by which bash or zsh completes all this"),
}
HELP = """usage: klflow COMMAND [OPTIONS]
       klflow COMMAND --help
       klflow --version

{commands}

Every command takes --quiet (results, warnings and errors alone) and --verbose. Results go to stdout, all else to stderr.
sample, complete, infill, watch and serve need no run folder: without one they use the model of English stories that comes with the package.
  klflow complete --prompt "Once upon a time"

Exit codes: 0 done, 1 wrong input (a line on stderr says what), 2 wrong usage, 128 + n stopped by signal n.
"""


def version() -> str:
    """That of the package beside this file, read without an import."""
    text = Path(__file__).with_name("klflow_ext").joinpath("__init__.py").read_text("utf-8")
    return text.partition('\n__version__ = "')[2].partition('"')[0]


def help_of(name: str) -> str | None:
    """That of a command, written before; None where this terminal is too narrow for it."""
    file = Path(__file__).with_name("klflow_ext") / "cli" / "help" / f"{name}.txt"
    wide = shutil.get_terminal_size().columns >= 80
    return file.read_text("ascii") if wide and file.is_file() else None


def answer(words: list[str]) -> int | None:
    """Answers what no command has to run for, and returns the exit code; None: words[0] is a command that must."""
    if words and words[0] in COMMANDS:
        text = help_of(words[0]) if {"--help", "-h"} & set(words[1:]) else None
        if text is None:
            return None
        print(text, end="")
        return 0
    if words and words[0] == "--version":
        print(f"klflow {version()}")
        return 0
    lines = "\n".join(f"  {name:<12}{line}" for name, (_, line) in COMMANDS.items())
    if words and words[0] in ("--help", "-h"):
        print(HELP.format(commands=lines), end="")
        return 0
    if words:
        print(f"klflow: got {words[0]!r}, allowed is one of {', '.join(COMMANDS)}, --help, --version", file=sys.stderr)
    else:
        print(HELP.format(commands=lines), end="", file=sys.stderr)
    return 2


def main() -> None:
    code = answer(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    # A thread of OpenMP that waits for another does not hold its processor for long: where other programs want it too, that is
    # several times as fast, and alone hardly slower (benchmarks/NOTES.md). torch reads it when it is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from klflow_ext.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
