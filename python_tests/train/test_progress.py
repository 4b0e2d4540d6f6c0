"""The line that tells how far training is."""

import os
import shutil

import pytest

from klflow_ext.train.progress import ProgressLine, span

RECORD = {"step": 3, "loss": 2.0, "seconds": 60.0, "tokens_per_second": 1234.5, "skipped": 0, "heldout_loss": None}


@pytest.mark.parametrize("columns", [30, 70, 120])
def test_it_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    line = ProgressLine()
    line.last = -1e9
    line.show(RECORD, 0.25)
    shown = capsys.readouterr().out
    assert shown.startswith("\rstep 3  loss 2.000") and len(shown) == columns and "\n" not in shown
    line.show({**RECORD, "loss": 4.0, "heldout_loss": 1.25}, 0.5)  # at once, and it stays
    shown = capsys.readouterr().out
    assert "loss 2.100" in shown and shown.endswith("\n") and ("held-out loss 1.250" in shown) == (columns >= 70)


def test_elsewhere_a_line_now_and_then(capsys):
    line = ProgressLine()
    line.show(RECORD, 0.25)
    assert capsys.readouterr().out == ""
    line.last -= 16
    line.show({**RECORD, "skipped": 2}, 0.25)
    line.close()
    assert capsys.readouterr().out == "step 3  loss 2.000  1,234 tokens/s  3 min left  2 skipped\n"


def test_spans():
    assert [span(s) for s in (5.2, 119, 600, 7199, 9000, float("nan"))] == [
        "5 s",
        "119 s",
        "10 min",
        "120 min",
        "2.5 h",
        "?",
    ]
