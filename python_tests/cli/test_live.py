"""--live and klflow watch: what stands in a terminal and in a pipe, and that texts are those without them."""

import io
import json
import re
import sys

import pytest
import torch
from rich.console import Console

from klflow_ext import data
from klflow_ext.cli import live
from klflow_ext.cli.live import Live, coloured, plain_line
from klflow_ext.cli.pieces import Pieces
from klflow_ext.cli.show import Show
from klflow_ext.sample import UNKNOWN, Pass


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["a b"], 258)


def a_pass(tokenizer, text, known, number=1, members=(0,)):
    """Of a text whose first token is given, `known` tokens long; of which the second stands."""
    ids = torch.tensor([tokenizer.encode(text).ids] * len(members))
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return Pass(
        number=number,
        total=10,
        members=list(members),
        given=place == 0,
        stands=place < 2,
        tokens=torch.where(place < known, ids, UNKNOWN),
        confidence=torch.where(place == 0, 1.0, torch.where(place < known, 0.6, 0.0)),
        entropy=torch.full((len(members),), 1.5),
        top_tokens=None,
        top_p=None,
    )


def test_pieces_are_whole_characters(tokenizer):
    pieces = Pieces(tokenizer)
    text = "a\U0001f642\x1bé\n"
    ids = tokenizer.encode(text).ids
    found = pieces(ids)
    assert len(found) == len(ids) and "".join(found) == "a\U0001f642\\x1bé\n" and "\U0001f642" in found
    assert pieces([ids[0], UNKNOWN, ids[1]]) == ["a", None, "\ufffd"]
    end = tokenizer.token_to_id("<|endoftext|>")
    assert pieces([end]) == ["<|endoftext|>"]


def test_a_line_for_each_pass_without_a_terminal(tokenizer, capsys):
    with Live(Pieces(tokenizer), 0.0, None) as show:
        show(a_pass(tokenizer, "a b\n\x1b[2J", 4))
        show(a_pass(tokenizer, "ab", 2, 10, (1, 2)))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        " 1/10  p 0.60  a b\\n\\x1b\u00b7\u00b7\u00b7",
        "10/10 2  p 0.60  ab",
        "10/10 3  p 0.60  ab",
    ]
    alone = a_pass(tokenizer, "a", 1)
    assert plain_line(alone, 0, Pieces(tokenizer)) == " 1/10  a"


def test_colours_by_confidence_and_given_text_plain(tokenizer):
    text = coloured(a_pass(tokenizer, "abcd", 3), 0, Pieces(tokenizer))
    assert text.plain == "abc\u00b7"
    assert [str(span.style) for span in text.spans] == ["bold cyan", "cyan", "dim"]  # not of the given one


def test_the_screen_holds_all_texts_and_no_control_character(tokenizer):
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="standard", _environ={})
    with Live(Pieces(tokenizer), 0.0, console) as show:
        show(a_pass(tokenizer, "first \x1b]0;x\x07", 20))
        show(a_pass(tokenizer, "second", 6, 3, (1,)))
        assert show.sequences == 2
    shown = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    last = plain[plain.rindex("pass 3 of 10, entropy 1.50 nats") :]
    assert "first \\x1b]0;x\\x07" in last and "second" in last and "\x07" not in shown and "\x1b]" not in shown


def test_where_colours_are_not_wanted(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert live.console_of_stdout() is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert live.console_of_stdout() is None
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert live.console_of_stdout() is None


def test_nothing_is_asked_for_where_nobody_watches(tokenizer, tmp_path):
    assert Show().start(tokenizer, 258).options == {}
    asked = Show(html=tmp_path / "a.html").start(tokenizer, 258).options
    assert asked["top"] == 5 and "progress" not in asked
    assert Show(live=True).start(tokenizer, 3).options["top"] == 0
    for wrong, message in (
        ({"pause": -1.0}, "pause: got -1.0"),
        ({"html": tmp_path}, "html: got .*, allowed is a file"),
        ({"html": tmp_path / "none" / "a.html"}, "html: got"),
    ):
        with pytest.raises(ValueError, match=message):
            Show(**wrong)


def test_commands_that_show(klflow, tmp_path):
    """The texts are the same with and without; watch is sample --live of one text."""
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60)))
    run = str(tmp_path / "run")
    done = klflow(
        "train", "--data", str(tmp_path / "t.txt"), "--out", run, "--steps", "2", "--length", "16", "--vocab-size", "300",
        "--n-layer", "1", "--n-head", "1", "--n-embd", "16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    some = ["--steps", "3", "--length", "8"]
    seconds = re.compile(r"\d+\.\d s")
    for command in (
        ["sample", run, "--count", "2", *some],
        ["complete", run, "--prompt", "one", *some],
        ["infill", run, "--text", "one {?5} three", "--steps", "3"],
    ):
        plain = seconds.sub("", klflow(*command).stdout)
        html = tmp_path / f"{command[0]}.html"
        done = klflow(*command, "--live", "--pause", "0", "--html", str(html))
        assert done.returncode == 0, done.stderr
        shown = seconds.sub("", done.stdout)
        assert shown.endswith(plain) and shown.startswith("1/3") and len(shown) > len(plain)
        text = html.read_text("utf-8")
        held = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
        assert len(held["sequences"]) == (2 if command[0] == "sample" else 1)
        assert all(len(s["passes"]) == 3 and len(s["passes"][0]["top"][-1]) == 5 for s in held["sequences"])
        ended = "".join(held["sequences"][0]["passes"][-1]["pieces"]).replace("<|endoftext|>", "")
        assert plain.startswith(ended)
    done = klflow("watch", run, "--pause", "0", *some)
    assert done.returncode == 0 and [line[:3] for line in done.stdout.splitlines()[:3]] == ["1/3", "2/3", "3/3"]
    done = klflow("sample", run, "--html", "none/a.html")
    assert done.returncode != 0 and "html: got none/a.html" in done.stderr
    assert "Traceback" not in done.stderr
