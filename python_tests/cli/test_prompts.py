"""Prompts from the command line, from files and from stdin."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from klflow_ext.cli.prompts import given_texts, read_texts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"one\ntwo three \r\n\n  four", ["one", "two three ", "  four"]),
        (b'{"prompt": "a\\nb"}\n\n{"prompt": "c", "id": 3}\n', ["a\nb", "c"]),
        (b'{"text": "of another key"}\n', ['{"text": "of another key"}']),
        ("\ufeffcaf\u00e9\u2028x\n".encode(), ["caf\u00e9\u2028x"]),  # only \\n ends a line
        (b"{?3} and\n3\n", ["{?3} and", "3"]),
    ],
)
def test_lines_or_objects(tmp_path, monkeypatch, raw, expected):
    (tmp_path / "texts").write_bytes(raw)
    assert read_texts("prompt", tmp_path / "texts") == expected
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    assert given_texts("prompt", ("first",), Path("-")) == ["first", *expected]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a", b"caf\xe9", "prompts_file: .*a cannot be read: it is not UTF-8"),
        ("a", b" \n\n", "prompts_file: .*a holds no text"),
        (
            "a",
            b'{"prompt": "a"}\n\nb\n',
            "prompts_file: .*a, line 3: got 'b', allowed is an object with a text as \"prompt\"",
        ),
        ("a.jsonl", b'{"text": "a"}\n', "prompts_file: .*a.jsonl, line 1: got"),
        ("a.jsonl", b'{"prompt": 3}\n', "prompts_file: .*a.jsonl, line 1: got"),
    ],
)
def test_what_is_refused(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{message}"):
        read_texts("prompt", tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_texts("prompt", tmp_path)
