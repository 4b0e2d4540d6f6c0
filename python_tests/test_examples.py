"""Each program under examples/ runs, and learns."""

import importlib
import re
from pathlib import Path

import pytest

from klflow_ext.sample import ways

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_some():
    assert {"adapt_transformer", "own_encoder", "own_loop", "own_sampler", "own_text"} <= {
        file.stem for file in EXAMPLES
    }


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.stem for file in EXAMPLES])
def test_loss_falls(file, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))  # a run folder names the class of its network by its module
    registered = dict(ways._ways)
    try:
        module = importlib.import_module(file.stem)
        losses = module.main(steps=40)
    finally:
        ways._ways.clear()
        ways._ways.update(registered)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert "loss" in capsys.readouterr().out


def test_the_loop_of_the_readme(tmp_path, monkeypatch, capsys):
    """As it stands there."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- own loop -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    names = {}
    exec(code, names)
    first = names["batches"].batch(0).loss(names["path"], names["Mine"](names["path"])).item()
    assert names["loss"].item() < 0.7 * first
    assert (tmp_path / "runs" / "mine").is_dir() and "tensor" in capsys.readouterr().out
