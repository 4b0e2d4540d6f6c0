"""Puts the tables of the results into README.md beside this file, each between its two marks; the text around them stays.

python benchmarks/paper/report.py            # after any of the scripts
"""

from __future__ import annotations

import argparse
import os
import re
from importlib import import_module
from pathlib import Path

from matched import BENCHMARKS, SCALES, draw

from klflow_ext.files import read_json, write_file

SCRIPTS = (
    "geometry", "nfe", "top_k", "optimizer", "time_insertion", "t_split", "code_infilling", "conditional", "cost",
)  # fmt: skip


def section(name: str, results: Path, beside: Path) -> str:
    """The table of a script, its plot and what it was measured with; beside: the folder of the file that it is put into."""
    file, script = results / f"{name}.json", import_module(name)
    if not file.exists():
        return "Not measured yet.\n"
    found = read_json(file)
    draw(script, found["rows"], file.with_suffix(".png"))
    settings, machine = found["settings"], found["machine"]
    lines = [*script.table(found["rows"]), ""]
    lines += [f"![{script.TITLE}]({os.path.relpath(file.with_suffix('.png'), beside)})", ""]
    steps = (
        " and ".join(
            f"{n:,}" for n in sorted({row["steps"] for row in found["rows"] if "steps" in row and "source" not in row})
        )
        or f"{settings['steps']:,}"
    )
    shape = "{layers} layers of width {width}, V = {vocab_size:,}, {length} positions, {steps} steps of {batch} sequences".format(**{**settings, "steps": steps})  # fmt: skip
    said = (
        f"Settings: {shape}; {settings['samples']} samples each, judge {found['judge']}, {found['precision']}; {machine['device']}, "
        f"threads: {machine['threads']}, torch {machine['torch']}. "
    )
    here = [row for row in found["rows"] if "source" not in row]  # the others have settings of their own
    lines.append((said if here else "") + f"All figures: [{file.name}]({os.path.relpath(file, beside)}).")
    return "\n".join(lines) + "\n"


def filled(text: str, results: Path, beside: Path) -> str:
    """The text with every script's section between its marks, and of another scale where the marks say "geometry at cpu-long".
    ValueError: a mark is missing."""
    for mark, name, scale in re.findall(r"<!-- ((\w+) at ([\w-]+)) -->", text):
        found = section(name, results.parent / scale, beside)
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)",
            lambda m, found=found: m[1] + found + m[2],
            text,
            flags=re.S,
        )
    for name in SCRIPTS:
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
        if not marks.search(text):
            raise ValueError(
                f"README.md: got no marks of {name}, allowed is a text with <!-- {name} --> and <!-- end of {name} -->"
            )
        text = marks.sub(lambda found, name=name: found[1] + section(name, results, beside) + found[2], text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--results", type=Path, default=BENCHMARKS / "results" / "paper", help="folder of what was found"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("README.md"), help="the text with the marks"
    )
    arguments = parser.parse_args()
    text = filled(
        arguments.out.read_text(), arguments.results.resolve() / arguments.scale, arguments.out.resolve().parent
    )
    write_file(arguments.out, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
