"""What README.md, docs and benchmarks/README.md say: links lead somewhere, examples run, options exist, tables are filled."""

import json
import re
import sys
from pathlib import Path

import pytest

from klflow_ext import TrainConfig
from klflow_ext.train import NetworkChoice, prepare

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/GUIDE.md", "docs/METHOD.md", "benchmarks/README.md")


def anchors(text):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    file = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()) if not link.startswith("https:")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        found = (file.parent / name).resolve() if name else file
        assert found.exists(), link
        assert not anchor or anchor in anchors(found.read_text()), link


def test_the_readme_is_short_and_has_its_marks():
    text = (ROOT / "README.md").read_text()
    assert 150 <= len(text.splitlines()) <= 200
    for mark in ("fresh: main", "fresh: tests", "own loop", "use", "quality"):
        assert text.count(f"<!-- {mark} -->") == 1


@pytest.mark.parametrize("page", ["README.md", "docs/GUIDE.md", "docs/METHOD.md"])
def test_python_examples_run(page, tmp_path, monkeypatch, capsys):
    """As they stand there; the loop of the README is in test_examples.py, the example of transformers names no model."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    blocks = [block for block in blocks if "transformers" not in block and "class Mine" not in block]
    assert blocks
    if any("{RUN}" in block for block in blocks):
        train, network = TrainConfig(length=8), NetworkChoice(n_layer=1, n_head=1, n_embd=16)
        prepare(ROOT / page, tmp_path / "run", train=train, network=network, vocab_size=257)
    for block in blocks:
        names = {"RUN": tmp_path / "run"}
        exec(block, names)
        assert "heldout" not in names or 0 < len(names["heldout"]) < len(names["tokens"])
        if "again" in names:
            assert (names["again"].tokens[0] == names["result"].tokens[1]).all()


def test_commands_have_these_options(klflow):
    """Every `klflow COMMAND --option` that the pages show is known to that command."""
    shown = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        for command, rest in re.findall(r"klflow(?:_ext)? ([a-z]+)((?: [^\n`|]*)?)", text):
            options = re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", rest.partition("#")[0])
            shown.setdefault(command, set()).update(options)
    assert {"demo", "sample", "complete", "infill", "train", "prepare", "watch", "plot", "eval", "serve"} <= set(shown)
    for command, options in shown.items():
        known = klflow(command, "--help").stdout
        unknown = {option for option in options if not re.search(rf"{option}(?![\w-])", known)}
        assert not unknown, f"klflow {command}"


def test_tables_are_filled_from_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    marks = "|".join(name for name, _ in tables.TABLES)
    pages = tuple(tmp_path / page.name.replace("README", str(i)) for i, page in enumerate(tables.PAGES))
    for new, page in zip(pages, tables.PAGES, strict=True):
        new.write_text(re.sub(f"(<!-- (?:{marks}) -->\n).*?(<!-- end -->)", r"\1\2", page.read_text(), flags=re.S))
    monkeypatch.setattr(tables, "PAGES", pages)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "read", lambda name: json.loads((ROOT / "benchmarks" / "results" / name).read_text()))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="0.md, 1.md"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    for page, count in zip(pages, (1, len(tables.TABLES) - 1), strict=True):
        filled = re.findall(rf"<!-- (?:{marks}) -->\n(\|.*?)<!-- end -->", page.read_text(), re.S)
        assert len(filled) == count and all(len(table.splitlines()) >= 3 for table in filled)


def test_the_picture_of_a_text_that_forms(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import forming

    text = forming.picture(seed=0)
    kept = (ROOT / "docs" / "forming.svg").read_text()
    for words in ("of&#160;16", "Once&#160;upon&#160;a&#160;time"):
        assert words in text and words in kept
