"""The line that tells how far training is, and the numbers for TensorBoard."""

import io
import re
import sys
from types import ModuleType

import pytest
from runs import trainer

from klflow_ext import Run, Trainer
from klflow_ext.train import TensorBoard
from klflow_ext.train.progress import ProgressLine, span

RECORD = {"step": 3, "loss": 2.0, "seconds": 60.0, "tokens_per_second": 1234.5, "skipped": 0, "heldout_loss": None}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [30, 60, 120])
def test_it_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
    with ProgressLine() as line:
        line.last = -1e9
        line.show(RECORD, 0.25)
        line.show({**RECORD, "loss": 4.0, "heldout_loss": 1.25}, 0.5)  # at once, and it stays
        print("a text")
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [part for part in re.split(r"[\r\n]+", shown) if part.strip()]
    assert max(map(len, lines)) <= columns and lines[0].startswith("step 3  loss 2.000")
    assert "step 3  held-out loss 1.250" in [part.rstrip() for part in lines]
    assert ("\u2501" in shown) == (columns >= 70)  # a bar where there is room for it
    assert piped.getvalue() == "a text\n"


def test_elsewhere_a_line_now_and_then(monkeypatch, capsys):
    with ProgressLine() as line:
        line.show(RECORD, 0.25)
        assert capsys.readouterr().err == ""
        line.last -= 16
        line.show({**RECORD, "skipped": 2}, 0.25)
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "step 3  loss 2.000  1,234 tokens/s  3 min left  2 skipped\n")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with ProgressLine() as line:
        line.show({**RECORD, "heldout_loss": 1.5}, 1.0)
    assert terminal.getvalue() == "step 3  loss 2.000  1,234 tokens/s  0 s left  held-out loss 1.500\n"


def test_what_a_callback_adds_is_logged_and_costs_no_training_time(tmp_path, monkeypatch):
    now, seconds = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    step = Trainer.train_step

    def train_step(self):
        now[0] += 1
        return step(self)

    def callback(record):
        now[0] += 1000
        record["sample"] = f"text {record['step']}"
        seconds.append(record["seconds"])

    monkeypatch.setattr(Trainer, "train_step", train_step)
    trainer(2, tmp_path / "run").fit(progress=False, callback=callback)
    assert [r["sample"] for r in Run(tmp_path / "run").read_log()] == ["text 1", "text 2"]
    assert seconds == [1, 2]


def test_tensorboard(tmp_path, monkeypatch):
    """Every finite number and text, by its name; the file format is TensorBoard's own."""
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *given):
            written.append(given)

        add_text = add_scalar

        def close(self):
            written.append("closed")

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with TensorBoard(tmp_path, 2) as board:
        board({"step": 3, "loss": 2.5, "heldout_loss": None, "gradient_norm": float("nan"), "sample": "text"})
    assert written == [(str(tmp_path), 3), ("loss", 2.5, 3), ("sample", "text", 3), "closed"]
    assert TensorBoard(tmp_path) and written[-1] == (str(tmp_path), None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="^tensorboard is missing: pip install tensorboard$"):
        TensorBoard(tmp_path)


def test_spans():
    assert [span(s) for s in (5.2, 119, 600, 7199, 9000, float("nan"))] == [
        "5 s",
        "119 s",
        "10 min",
        "120 min",
        "2.5 h",
        "?",
    ]
