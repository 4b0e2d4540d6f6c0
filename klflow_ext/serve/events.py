"""An answer as server-sent events. All positions of a text form together, so a text is not sent piece by piece: it comes whole at the
end, and before it, for who asks, what stands after each pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from klflow_ext.sample import UNKNOWN, Pass
from klflow_ext.serve.answer import after_space
from klflow_ext.serve.question import Question
from klflow_ext.serve.refusal import Refusal
from klflow_ext.serve.served import Served

BLANK = "\u00b7"  # a position that no pass has asked for
END = "data: [DONE]\n\n"


def answer_events(question: Question, whole: dict[str, Any]) -> Iterator[str]:
    """One for each choice of an answer, and one for what was counted where that is asked for."""
    for choice in whole["choices"]:
        yield _event({**_without(whole, "usage"), "choices": [choice]})
    if question.with_usage:
        yield _event({**whole, "choices": []})
    yield END


def pass_event(question: Question, served: Served, i: int, found: Pass, row: int) -> str:
    """What a pass leaves behind of result i: tokens (null where none was asked for), which stand, and their probability."""
    sides = question.sides[i]
    hole = slice(len(sides.before), found.tokens.shape[1] - len(sides.after))
    tokens = found.tokens[row, hole].tolist()
    text = ""
    for unknown, some in groupby(tokens, lambda token: token == UNKNOWN):
        ids = list(some)
        text += BLANK * len(ids) if unknown else served.tokenizer.decode(ids)
    data = {
        "object": "text_completion.pass", "index": i, "pass": found.number, "of": found.total, "text": after_space(text, sides),
        "tokens": [None if token == UNKNOWN else token for token in tokens], "stands": found.stands[row, hole].tolist(),
        "confidence": [round(p, 4) for p in found.confidence[row, hole].tolist()],
    }  # fmt: skip
    return _event(data, "pass")


def error_event(error: Refusal) -> str:
    """Of what went wrong after the first event."""
    return _event(error.body())


def _event(data: dict[str, Any], name: str | None = None) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
