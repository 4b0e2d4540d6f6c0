"""Each program under examples/ runs, and learns."""

import importlib
from pathlib import Path

import pytest

from klflow_ext.sample import ways

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


def test_there_are_some():
    assert {"own_encoder", "own_loop", "own_sampler"} <= {file.stem for file in EXAMPLES}


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
