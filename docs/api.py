"""Makes the pages of the API from the docstrings: python docs/api.py FOLDER. Fails where pdoc warns of anything."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import pdoc

import klflow_ext

MODULES = (
    "path",
    "model",
    "sample",
    "train",
    "data",
    "evaluate",
    "run",
    "hub",
    "transformer",
    "serve",
    "reference",
    "oracle",
)


def main(folder: Path) -> None:
    for name in klflow_ext.__all__:  # they come when they are first asked for, and pdoc looks only at what is there
        setattr(klflow_ext, name, getattr(klflow_ext, name))
    pdoc.render.configure(docformat="google")
    folder = folder.resolve()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as empty:
        warnings.simplefilter("error")
        os.chdir(empty)  # beside a folder with the name of a module pdoc warns that it may be meant
        pdoc.pdoc("klflow_ext", *(f"klflow_ext.{name}" for name in MODULES), output_directory=folder)
    page = (folder / "klflow_ext.html").read_text()
    missing = [
        name for name in klflow_ext.__all__ if f'id="{name}"' not in page and f"klflow_ext/{name}.html" not in page
    ]
    if missing:
        sys.exit(f"{folder / 'klflow_ext.html'} lacks {', '.join(missing)}")
    print(f"{len(list(folder.rglob('*.html')))} pages: {folder / 'index.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
