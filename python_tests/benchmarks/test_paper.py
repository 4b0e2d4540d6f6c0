"""benchmarks/paper at its smallest scale: every script measures, draws and tabulates, and a second call measures nothing again."""

import json
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks" / "paper"))
import matched  # noqa: E402
import report  # noqa: E402

from klflow_ext.evaluate import code, conditional  # noqa: E402
from klflow_ext.evaluate.text import mean_interval  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def call(name, folder, *more):
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    matched.run(import_module(name), ["--scale", "test", "--device", "cpu", *places, *more])
    return json.loads((folder / "results" / "test" / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", report.SCRIPTS)
def test_script(name, folder, capsys, monkeypatch):
    monkeypatch.setattr(import_module("cost"), "REPEATS", 1)
    for module in (code, conditional):
        monkeypatch.setattr(module, "mean_interval", partial(mean_interval, rounds=20))
    found = call(name, folder)
    assert found["settings"]["steps"] == 2 and found["judge"] == "eight bits a byte" and found["machine"]["torch"]
    keys = [json.dumps(row["key"]) for row in found["rows"]]
    assert len(set(keys)) == len(keys) > 0
    assert (folder / "results" / "test" / f"{name}.png").stat().st_size > 1000
    for row in found["rows"]:
        if "bits_per_byte" in row:
            assert row["bits_per_byte"] == [8.0, 8.0, 8.0] and row["count"] == 4 and row["length"] == 16
            low, middle, high = (row["entropy"][i] for i in (1, 0, 2))
            assert low <= middle <= high
    table = capsys.readouterr().out.rpartition("s left\n")[2]
    assert "\n| --- |" in table and "nan" not in table

    if name != "cost":  # more seeds are added, to every setting; of the networks that are there, as that is faster
        make = matched.Bench.trained
        monkeypatch.setattr(matched.Bench, "trained", lambda self, what, seed, *a, **b: make(self, what, 0, *a, **b))
        again = call(name, folder, "--seeds", "1")
        settings = [
            sorted(json.dumps(row["key"] | {"seed": None}) for row in again["rows"] if row["key"].get("seed") == seed)
            for seed in (0, 1)
        ]
        assert again["rows"][: len(keys)] == found["rows"] and settings[0] == settings[1] != []
        found = again
    capsys.readouterr()

    monkeypatch.setattr(matched.Bench, "trained", lambda *a, **b: pytest.fail("made again"))
    monkeypatch.setattr(import_module("cost"), "costs", lambda *a: pytest.fail("made again"))
    seeds = [] if name == "cost" else ["--seeds", "0", "1"]
    assert call(name, folder, *seeds)["rows"] == found["rows"]


def test_the_report_has_what_the_results_say(tmp_path):
    """A script whose rows are there is a table, the others say that they are not; the text around the marks stays."""
    marks = "".join(f"a\n<!-- {name} -->\nold\n<!-- end of {name} -->\nb\n" for name in report.SCRIPTS)
    settings = {"layers": 1, "width": 2, "vocab_size": 3000, "length": 4, "steps": 5, "batch": 6, "samples": 7}
    table = matched.Table(
        tmp_path / "t_split.json",
        settings=settings,
        judge="J",
        precision="P",
        machine={"device": "D", "threads": 1, "torch": "T"},
    )
    for share in (0.0, 1.0):
        row = {"bits_per_byte": [1 + share, 1.0, 3.0], "entropy": [2.0, 1.0, 3.0]}
        table.row({"method": "KL", "share": share, "seed": 0}, lambda row=row: row)
    again = "<!-- t_split at more -->\n<!-- end of t_split at more -->\n"  # of another scale, beside this one
    (tmp_path.parent / "more").mkdir()
    (tmp_path.parent / "more" / "t_split.json").write_text(table.file.read_text().replace("3000", "4000"))
    assert "V = 4,000" in report.filled(marks + again, tmp_path, tmp_path).partition("<!-- t_split at more -->")[2]
    text = report.filled(marks, tmp_path, tmp_path)
    assert text.count("Not measured yet.") == len(report.SCRIPTS) - 1 and text.count("a\n<!--") == len(report.SCRIPTS)
    assert "| 1.00 | 2.00 [1.00, 3.00] | 2.00 [1.00, 3.00] |" in text and "V = 3,000" in text and "old" not in text
    assert "](t_split.png)" in text and (tmp_path / "t_split.png").exists()
    assert report.filled(text, tmp_path, tmp_path) == text
    with pytest.raises(ValueError, match="no marks of geometry"):
        report.filled("", tmp_path, tmp_path)


README = (Path(report.__file__).parent / "README.md").read_text()


@pytest.mark.parametrize("mark", [*report.SCRIPTS, *re.findall(r"<!-- (\w+ at [\w-]+) -->", README)])
def test_tables_of_the_readme_are_those_of_the_results(mark):
    name, _, scale = mark.partition(" at ")
    file = matched.BENCHMARKS / "results" / "paper" / (scale or "cpu") / f"{name}.json"
    shown = README.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- end of {mark} -->")[0]
    expected = (
        import_module(name).table(json.loads(file.read_text())["rows"]) if file.exists() else ["Not measured yet."]
    )
    assert shown.startswith("\n".join(expected) + "\n")


def test_rows_of_other_settings_are_refused(tmp_path):
    table = matched.Table(tmp_path / "a.json", judge="one", machine="here")
    assert table.row({"x": (1, None)}, lambda: {"y": 2}) == {"key": {"x": [1, None]}, "y": 2}
    again = matched.Table(tmp_path / "a.json", judge="one", machine="there")
    assert again.row({"x": (1, None)}, lambda: pytest.fail("made again"))["y"] == 2
    assert again.row({"x": (2, None)}, lambda: {"y": 3})["y"] == 3
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == again.rows and len(again.rows) == 2
    with pytest.raises(ValueError, match="judge: got two, allowed beside the rows of .*a.json is one"):
        matched.Table(tmp_path / "a.json", judge="two")
    short = matched.Table(tmp_path / "a.json", most=1, judge="one")
    assert short.row({"x": (1, None)}, dict)["y"] == 2 and short.row({"x": 3}, dict) == {"key": {"x": 3}}
    with pytest.raises(matched.Enough):
        short.row({"x": 4}, dict)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    arguments = matched.parser_of_scripts().parse_args(
        ["--scale", "test", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    )
    bench = matched.Bench("none", arguments)
    step, fit = matched.Trainer.train_step, matched.Trainer.fit
    done = []

    def stopping(self):
        if len(done) == 1:
            self.save()
            raise InterruptedError
        done.append(self.step)
        return step(self)

    monkeypatch.setattr(matched.Trainer, "train_step", stopping)
    with pytest.raises(InterruptedError):
        bench.trained("mask", 0)
    monkeypatch.setattr(matched.Trainer, "train_step", lambda self: (done.append(self.step), step(self))[1])
    _, found = bench.trained("mask", 0)
    assert done == [0, 1]
    monkeypatch.setattr(matched.Trainer, "fit", lambda *a, **b: pytest.fail("made again"))
    sampler, again = bench.trained("mask", 0)
    assert again == found and sampler.model.training is False
    monkeypatch.setattr(matched.Trainer, "fit", fit)
    assert bench.trained("mask", 1)[1]["nats"] != found["nats"]


def test_cells():
    rows = [{"key": {"seed": i}, "x": [float(i), 0.0, 9.0], "y": 1.5} for i in (1, 2, 3)]
    assert matched.cell(rows, "x") == "2.00 ± 1.00" and matched.cell(rows[:1], "x") == "1.00 [0.00, 9.00]"
    assert matched.cell(rows[:1], "y", 1) == "1.5" and matched.cell(rows, "z") == "" == matched.cell([], "x")
    assert matched.of(rows, seed=2) == rows[1:2] and matched.values(rows, "seed") == [1, 2, 3]
