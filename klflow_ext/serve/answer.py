"""The answer to a question: texts, and what was counted, in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from typing import Any

from klflow_ext.serve.batcher import Done
from klflow_ext.serve.question import Question
from klflow_ext.serve.served import Served, Sides


def answer(question: Question, found: list[Done], served: Served) -> dict[str, Any]:
    """The object for what came of each job. Tokens are all that were generated, also those behind the end of the text."""
    choices = []
    prompt_tokens = completion_tokens = 0
    for i, (job, sides, done) in enumerate(zip(question.jobs, question.sides, found, strict=True)):
        around = len(sides.before) + len(sides.after)
        hole = slice(len(sides.before), len(done.tokens) - len(sides.after))
        drawn = done.tokens[hole]
        text, ended = _text(question, served, sides, drawn)
        choice = {
            "index": i, "text": text, "finish_reason": "stop" if ended else "length", "logprobs": None, "seed": job.seed,
            "tokens": drawn,
        }  # fmt: skip
        if question.log_likelihood:
            choice["log_likelihood"] = done.log_likelihood
        if question.confidence:
            choice["confidence"] = None if done.confidence is None else done.confidence[hole]
        choices.append(choice)
        prompt_tokens += around
        completion_tokens += len(drawn)
    usage = {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip
    return {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": served.name,
        "choices": choices, "usage": usage,
    }  # fmt: skip


def _text(question: Question, served: Served, sides: Sides, drawn: list[int]) -> tuple[str, bool]:
    """The text of drawn tokens, and whether it ended before they did: at the token that ends a text, or at a stop."""
    ended = False
    if not question.infills and served.end in drawn:
        drawn, ended = drawn[: drawn.index(served.end)], True
    text = after_space(_between(served.tokenizer, sides.before, drawn, sides.after), sides)
    places = [place for place in map(text.find, question.stops) if place >= 0]
    if places:
        text, ended = text[: min(places)], True
    prompt = served.tokenizer.decode(sides.before) + " " * sides.space
    return (prompt if question.echo else "") + text, ended


def after_space(text: str, sides: Sides) -> str:
    """The text of a hole as it follows its prompt, which has the space already that may have been left to the hole."""
    return text.removeprefix(" ") if sides.space else text


def _between(tokenizer: Any, before: list[int], drawn: list[int], after: list[int]) -> str:
    """The text that the drawn tokens add: some decoders drop the first space of a text, so they are not decoded alone."""
    whole, head, tail = (tokenizer.decode(ids) for ids in (before + drawn + after, before, after))
    if len(head) + len(tail) <= len(whole) and whole.startswith(head) and whole.endswith(tail):
        return whole[len(head) : len(whole) - len(tail)]
    return tokenizer.decode(drawn)  # a character of several tokens stands across the edge
