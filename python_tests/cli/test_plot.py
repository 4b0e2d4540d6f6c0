"""klflow plot: which panels, what is left out with a word, and what is refused."""

import json
import math
import sys

import pytest

from klflow_ext.cli.plot import chosen_texts, curves, draw, smoothed

FULL = [
    {
        "step": i + 1,
        "loss": 5.0 / (i + 1),
        "gradient_norm": None if i == 3 else 1.0,
        "lr": 1e-3,
        "tokens_per_second": 100.0 + i,
        **({"heldout_loss": 3.0} if i % 10 == 9 else {}),
    }
    for i in range(40)
]


def test_a_panel_for_each_quantity_with_axes_and_units():
    pytest.importorskip("matplotlib")
    figure, missing = draw(FULL, "a run")
    assert not missing
    named = {p.get_title(): (p.get_xlabel(), p.get_ylabel()) for p in figure.axes}
    assert named == {
        "Loss": ("training step", "nats per token"),
        "Norm of the gradient": ("training step", "norm, before clipping"),
        "Learning rate": ("training step", "learning rate"),
        "Speed": ("training step", "tokens per second"),
    }
    loss = figure.axes[0]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["training, smoothed", "held-out"]
    thin, _, heldout = loss.get_lines()
    assert list(thin.get_ydata()) == [r["loss"] for r in FULL] and list(heldout.get_xdata()) == [10, 20, 30, 40]
    figure, missing = draw([{"step": 1, "loss": 2.0}], "a run")
    assert len(figure.axes) == 1 and missing == ["heldout_loss", "gradient_norm", "lr", "tokens_per_second"]
    with pytest.raises(ValueError, match="run: got a log without numbers"):
        draw([{"step": 1, "seconds": 2.0}], "a run")


def test_texts_stand_below_the_curves():
    pytest.importorskip("matplotlib")
    told = [
        {**r, **({"sample": f"text {r['step']}\x1b $a$ " + "word " * 99} if r["step"] % 2 == 0 else {})} for r in FULL
    ]
    assert [step for step, _ in chosen_texts(told)] == [2, 8, 16, 24, 32, 40]
    assert chosen_texts(FULL) == [] and chosen_texts([{"step": 3, "sample": "a"}]) == [(3, "a")]
    figure, _ = draw(told, "a run")
    assert len(figure.axes) == 5
    said = [t.get_text() for t in figure.axes[-1].texts]
    assert said[::2] == [f"step {s}" for s in (2, 8, 16, 24, 32, 40)]
    assert all(text.count("\n") == 1 and text.endswith(" ...") and "\x1b" not in text for text in said[1::2])
    figure.canvas.draw()  # $ is no formula
    boxes = [t.get_window_extent() for t in figure.axes[-1].texts]
    assert all(low.y1 <= high.y0 + 1 for high, low in zip(boxes, boxes[1:], strict=False)) and boxes[-1].y0 >= 0


def test_curves_hold_finite_numbers_alone():
    records = [{"step": 1, "lr": 1}, {"step": 2, "lr": None}, {"step": 3, "lr": True}, {"step": 4, "lr": math.inf}]
    assert curves(records, "lr") == ([1], [1])


def test_the_running_mean():
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]  # a fiftieth of few is less than one value
    steps = smoothed([0.0] * 200 + [1.0] * 200)
    assert steps[199] == 0 and 0.1 < steps[200] < 0.2 and steps[-1] > 0.99


def test_the_command(klflow, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = tmp_path / "some run"
    run.mkdir()
    lines = [json.dumps({"step": i + 1, "loss": 1.0 / (i + 1)}) for i in range(9)]
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 10, "lo')  # the last is being written
    done = klflow("plot", str(run))
    assert done.returncode == 0, done.stderr
    left_out = "left out, as the log does not hold it: heldout_loss, gradient_norm, lr, tokens_per_second\n"
    assert (done.stdout, done.stderr) == ("picture: some run.png\n", left_out)
    assert (tmp_path / "some run.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["some run", "some run.png"]
    for arguments, message in (
        (["nowhere"], "log.jsonl cannot be read: No such file"),
        ([str(run), "--out", "a.pdf"], "out: got a.pdf, allowed is a file that ends with .png"),
        ([str(run), "--out", "none/a.png"], "out: got none/a.png, allowed"),
    ):
        done = klflow("plot", *arguments)
        assert done.returncode == 1 and message in done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = klflow("plot", str(run))
    assert done.returncode == 1 and "pip install 'klflow_ext[plot]'" in done.stderr
