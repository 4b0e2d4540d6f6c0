"""The page of --html: its structure, what it holds, and its script in a JavaScript engine where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from klflow_ext import data
from klflow_ext.cli.page import history_of, page_of, write_page
from klflow_ext.cli.pieces import Pieces
from klflow_ext.sample import UNKNOWN, Pass

TEXT = "a </script><!-- \x1b[31m b\n& \U0001f642"
VOID = {"meta", "input", "br", "link", "img"}


class Structure(HTMLParser):
    """Elements with their attributes and text; fails where tags do not close."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open:
            self.open[-1][2].append(text)

    def find(self, **wanted):
        return [e for e in self.elements if all(e[1].get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["a b"], 258)  # bytes: a character of four tokens is in TEXT


def history(tokenizer):
    """Three passes: nothing but the given, a part, and all."""
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    length = ids.shape[1]
    passes = []
    for number, count in ((1, 3), (2, length // 2), (3, length)):
        shown = torch.arange(length)[None] < count
        p = torch.where(shown, torch.linspace(0.05, 1, length)[None], 0.0)
        top = torch.where(shown[..., None], torch.stack([ids, (ids + 1) % 258], 2), UNKNOWN)
        passes.append(
            Pass(
                number=number,
                total=3,
                members=[0],
                given=torch.arange(length)[None] < 2,
                stands=shown,
                tokens=torch.where(shown, ids, UNKNOWN),
                confidence=p,
                entropy=torch.tensor([torch.nan if number == 2 else 1.23456]),
                top_tokens=top,
                top_p=torch.stack([p, p / 7], 2),
            )
        )
    return passes


def page(tokenizer):
    return page_of(history(tokenizer), Pieces(tokenizer), "A <title>", "run & seed")


def test_structure(tokenizer):
    found = Structure(page(tokenizer))
    assert [e[2] for e in found.elements if e[0] in ("title", "h1")] == [["A <title>"]] * 2
    assert not [e for e in found.elements if {"src", "href"} & e[1].keys()], "it needs nothing but itself"
    assert found.find(name="viewport") and found.find(**{"http-equiv": "Content-Security-Policy"})
    for name in ("slider", "play", "back", "next", "sequence", "text", "tops", "entropy", "numbers"):
        (element,) = found.find(id=name)
        assert (
            element[0] in ("select", "div")
            or any(k.startswith("aria") for k in element[1])
            or name == "numbers"
            or (element[0] == "section")
        )
    style = "".join(found.elements[[e[0] for e in found.elements].index("style")][2])
    assert "prefers-color-scheme: dark" in style and "underline" in style and "font-weight: 700" in style


def test_its_data_are_the_history(tokenizer):
    passes, pieces = history(tokenizer), Pieces(tokenizer)
    text = page(tokenizer)
    assert "\x1b" not in text and text.count("</script>") == 2
    held = json.loads("".join(Structure(text).find(id="data")[0][2]))
    expected = history_of(passes, pieces)
    assert held == {**expected, "names": {str(i): name for i, name in expected["names"].items()}}
    (sequence,) = held["sequences"]
    assert sequence["given"] == passes[0].given[0].int().tolist()
    for said, kept in zip(sequence["passes"], passes, strict=True):
        assert said["tokens"] == kept.tokens[0].tolist() and said["stands"] == kept.stands[0].int().tolist()
        torch.testing.assert_close(torch.tensor(said["p"]), kept.confidence[0], atol=5e-5, rtol=0)
        assert said["top"] == kept.top_tokens[0].tolist()
        torch.testing.assert_close(torch.tensor(said["topP"]), kept.top_p[0], atol=5e-5, rtol=0)
    assert [said["entropy"] for said in sequence["passes"]] == [1.2346, None, 1.2346]
    assert "".join(sequence["passes"][-1]["pieces"]) == TEXT.replace("\x1b", "\\x1b")
    assert sequence["passes"][0]["pieces"][3:] == [None] * (len(sequence["given"]) - 3)


def test_its_form_is_installed_with_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert re.search(r"^package-data = .*\"cli/page.html\"", project, re.M)


def test_it_is_written_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_page(file, history(tokenizer), Pieces(tokenizer), "A <title>", "run & seed")
    assert file.read_text("utf-8") == page(tokenizer)
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="page.html cannot be written"):
        write_page(file, history(tokenizer), Pieces(tokenizer), "other", "")
    assert file.read_bytes().decode() == page(tokenizer) and [f.name for f in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="html: got no pass"):
        write_page(file, [], Pieces(tokenizer), "", "")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_its_script_shows_the_passes(tokenizer, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(tokenizer), "utf-8")
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("dom.js")), str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    length = len(tokenizer.encode(TEXT).ids)
    ended = TEXT.replace("\x1b", "\\x1b").replace("\n", "\u21b5\n")
    assert seen["first"]["text"] == "a \u003c" + "\u00b7" * (length - 3) and seen["first"]["count"] == "pass 1 of 3"
    assert seen["second"]["count"] == "pass 2 of 3" and seen["last"]["text"] == ended
    assert seen["last"]["classes"][:3] == ["", "", "c0 stands here"] and seen["last"]["classes"][-1] == "c3 stands"
    assert seen["played"] == seen["last"] == seen["clicked"] | {k: seen["last"][k] for k in ("classes", "tops")}
    assert seen["slid"] == seen["second"] and "Position 3 of" in seen["last"]["tops"]
    assert f"Position {length} of {length}, not asked for yet" in seen["pointed"]["tops"]
    assert "\u25b8<" in seen["last"]["tops"] and "= " not in seen["first"]["svg"]
    (curve,) = [line for line in seen["last"]["svg"] if line.startswith("POLYLINE")]
    assert len(curve.split()) == 2 and "CIRCLE" in seen["last"]["svg"] and "CIRCLE" not in seen["second"]["svg"]
