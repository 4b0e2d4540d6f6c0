"""Makes docs/forming.svg, the picture of the README: a text of the model that comes with the package, as its passes leave it.

python docs/forming.py [SEED]
"""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from klflow_ext import Sampler, load_run
from klflow_ext.cli.live import coloured, heading, legend
from klflow_ext.cli.pieces import Pieces
from klflow_ext.files import write_file
from klflow_ext.sample import Pass

PROMPT, TOKENS, PASSES, SHOWN = "Once upon a time", 60, 16, (1, 4, 8, 12, 16)


def picture(seed: int) -> str:
    """The SVG, of passes SHOWN."""
    model, path, tokenizer = load_run()
    passes: list[Pass] = []
    Sampler(model, path, tokenizer=tokenizer).complete(
        [PROMPT], new_tokens=TOKENS, steps=PASSES, seed=seed, watch=passes.append
    )
    console = Console(record=True, width=88, file=io.StringIO(), highlight=False, emoji=False, markup=False)
    for found in passes:
        if found.number in SHOWN:
            text = coloured(found, 0, Pieces(tokenizer))
            text.plain = text.plain.replace("\n", " ")
            console.print(Text(heading(found), "dim"), text, "", sep="\n")
    console.print(legend())
    return console.export_svg(title=f'klflow watch: "{PROMPT} ..."', theme=DIMMED_MONOKAI, unique_id="forming")


if __name__ == "__main__":
    text = picture(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    write_file(Path(__file__).with_name("forming.svg"), lambda path: path.write_text(text))
