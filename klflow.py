"""The command `klflow`: what it can say without torch, whose import takes a second; klflow_ext/cli does the rest."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {  # name: (its class in klflow_ext.cli, what it does)
    "info": ("info:Info", "what was built, what runs here, and what falls back and why"),
    "demo": ("train:Demo", "train a small model on real text in a few minutes, and sample from it"),
    "prepare": ("prepare:Prepare", "encode texts into a token folder to train on"),
    "train": ("train:Train", "train on a text or token folders, or go on with a run"),
    "sample": ("generate:Sample", "generate texts from nothing"),
    "complete": ("generate:Complete", "continue prompts"),
    "infill": ("generate:Infill", "fill the holes of texts"),
    "watch": ("watch:Watch", "watch a text form in the terminal, pass by pass"),
    "serve": ("serve:Serve", "answer requests for completions over HTTP, asked as OpenAI's API is"),
    "plot": ("plot:Plot", "draw the log of a run as one picture"),
    "eval": ("evaluate:Eval", "held-out loss by time, likelihoods, and a judge of the samples"),
}
HELP = """usage: klflow COMMAND [OPTIONS]
       klflow COMMAND --help
       klflow --version

{commands}

sample, complete, infill, watch and serve need no run folder: without one they use the model of English stories that comes with the package.
  klflow complete --prompt "Once upon a time"

Exit codes: 0 done, 1 wrong input (a line on stderr says what), 2 wrong usage, 128 + n stopped by signal n.
"""


def version() -> str:
    """That of the package beside this file, read without an import."""
    text = Path(__file__).with_name("klflow_ext").joinpath("__init__.py").read_text("utf-8")
    return text.partition('\n__version__ = "')[2].partition('"')[0]


def answer(words: list[str]) -> int | None:
    """Answers what no command is needed for, and returns the exit code; None: words[0] is a command."""
    if words and words[0] in COMMANDS:
        return None
    if words and words[0] == "--version":
        print(f"klflow {version()}")
        return 0
    lines = "\n".join(f"  {name:<10}{line}" for name, (_, line) in COMMANDS.items())
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
    if code is None:
        from klflow_ext.cli import main as run

        run()
    sys.exit(code)


if __name__ == "__main__":
    main()
