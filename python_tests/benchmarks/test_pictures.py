"""The pictures of benchmarks/method and of the kernels: what has to be in them for a reader to compare."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT / "benchmarks", ROOT / "benchmarks" / "method"):
    sys.path.insert(0, str(folder))
import compared  # noqa: E402
import kernels  # noqa: E402
import pictures  # noqa: E402


@pytest.fixture(scope="module")
def found():
    return compared.results()


def labels(axis):
    return [line.get_label() for line in axis.get_lines() if not line.get_label().startswith("_")]


def test_styles_differ_without_colour():
    looks = [(marker, line) for _, marker, line in pictures.STYLES.values()]
    assert len(set(looks)) == len(looks) == len({marker for marker, _ in looks})
    assert set(pictures.STYLES) <= set(compared.TITLES)


def test_frontier_compares_in_every_panel(found):
    figure = pictures.frontier(found)
    assert len(figure.axes) == 4 and len({(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes}) == 1
    for axis in figure.axes:
        assert any(name.startswith("autoregressive (") for name in labels(axis))
        assert "real text, held out" in labels(axis) and any("slices" in name for name in labels(axis))
    assert "V = 2,048" in figure._suptitle.get_text()


def test_loss_and_likelihood_say_how_many_seeds(found):
    for figure in (pictures.loss(found), pictures.likelihood(found)):
        names = [name for axis in figure.axes for name in labels(axis)]
        assert all("seed" in name for name in names) and any("slices" in name for name in names)
    assert any("segments" in name for name in labels(pictures.loss(found).axes[0]))


def test_runs_with_half_the_steps_stand_beside_whole_ones():
    run = {"name": "mask slices", "vocab_size": 2048, "steps": 537}
    assert compared.beside(run) == (2048, 1075, ", half the steps")
    assert compared.beside({**run, "name": "mask"}) == (2048, 537, "")
    assert compared.titled("mask slices, half the steps") == "mask flow, slices, half the steps"
    assert pictures.style("slices, half the steps")["markerfacecolor"] == "white"


def test_bars_are_ratios_that_start_at_one(tmp_path, monkeypatch):
    drawn = []
    real = kernels.figure
    monkeypatch.setattr(kernels, "figure", lambda *a, **o: drawn.append(real(*a, **o)) or drawn[-1])
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["results"]
    kernels.plot(results, tmp_path / "a.png")
    axis = drawn[0][1][0, 0]
    first = next(r for r in results if r["dtype"] == "float32")
    bar = axis.containers[0].patches[0]
    assert bar.get_x() == 1 and bar.get_x() + bar.get_width() == pytest.approx(first["speedup"]["eager"])
    assert any(list(line.get_xdata()) == [1, 1] for line in axis.get_lines()) and (tmp_path / "a.png").stat().st_size


def test_a_plot_of_ratios_needs_peers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--no-peers", "--plot", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        kernels.parse_arguments()
    assert "--plot: it shows the times faster than the peers" in capsys.readouterr().err
