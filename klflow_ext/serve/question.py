"""The body of a request, checked before any work: who asks for what is not there is told so."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

import torch

from klflow_ext.checks import MOST, check_flag, check_int, check_scalar
from klflow_ext.path import SampleOptions
from klflow_ext.sample.samples import NEW_TOKENS, seeds_of
from klflow_ext.serve.batcher import Job
from klflow_ext.serve.refusal import Refusal
from klflow_ext.serve.served import Served, Sides

SEEDS = 2**53  # below it every reader of JSON keeps an integer as it is
MOST_STOPS, LONGEST_STOP = 4, 200
ABSENT: dict[str, tuple[Any, ...]] = {  # OpenAI's fields that are not here, and the values by which they ask for nothing
    "logprobs": (None,), "best_of": (None, 1), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}  # fmt: skip
FIELDS = (
    "model", "prompt", "suffix", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "echo", "user", "steps",
    "top_k", "method", "log_likelihood", "confidence", "stream", "stream_options", "passes",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What was asked for.

    Attributes:
        jobs: a sequence for each result, n for each prompt, side by side.
        sides: of each, the token ids of its prompt and of its suffix.
        stops: where a text ends. echo: whether the prompt is a part of the text. infills: whether there is a suffix.
        log_likelihood, confidence: whether each result has them.
        stream: whether the answer comes as events; with_usage: one of them says what was counted; passes: so does each pass.
    """

    jobs: list[Job]
    sides: list[Sides]
    stops: list[str]
    echo: bool
    infills: bool
    log_likelihood: bool
    confidence: bool
    stream: bool
    with_usage: bool
    passes: bool


def read_question(body: bytes, served: Served) -> Question:
    """Of the bytes of a request.

    Raises:
        Refusal: 400 for what cannot be understood or is not there, 404 for another model, 422 for more than the limits allow.
    """
    try:
        return _Reader(_values(body), served).question()
    except (ValueError, TypeError) as error:  # of the package's checks
        raise Refusal.of(error) from None


def _values(body: bytes) -> dict[str, Any]:
    """The object, without the fields that are null."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Refusal(400, f"body: it is no JSON: {said}") from None
    if not isinstance(values, dict):
        raise Refusal(400, f"body: got {type(values).__name__}, allowed is an object")
    for name, value in values.items():
        if name in ABSENT:
            if not any(value == nothing and type(value) in (type(nothing), float) for nothing in ABSENT[name]):
                raise Refusal(400, f"{name}: got {_short(value)}, but this server has none", name, "unsupported")
        elif name not in FIELDS:
            raise Refusal(400, f"{name[:80]}: no such field, allowed are {', '.join(FIELDS)}", name[:80])
    return {name: value for name, value in values.items() if value is not None and name not in ABSENT}


def _short(value: Any) -> str:
    return repr(value)[:80]


class _Reader:
    def __init__(self, values: dict[str, Any], served: Served):
        self.values, self.served, self.limits = values, served, served.limits

    def question(self) -> Question:
        model = self.values.get("model", self.served.name)
        if model != self.served.name:
            message = f"model: got {_short(model)}, allowed is {self.served.name!r}"
            raise Refusal(404, message, "model", "model_not_found")
        options, stops, echo = self._options(), self._stops(), self._flag("echo")
        n, score, look = self._int("n", 1), self._flag("log_likelihood"), self._flag("confidence")
        stream, with_usage, passes = self._stream()
        prompts, suffix = self._prompts(), self._text("suffix", self.values.get("suffix"))
        count = n * len(prompts)
        if count > self.limits.max_n:
            what = f"{n} for each of {len(prompts)} prompts" if len(prompts) > 1 else f"{n}"
            raise Refusal(422, f"n: got {what}, allowed are {self.limits.max_n} results of a request", "n")
        seeds = self._seeds(count)
        sides = [around for prompt in prompts for around in [self.served.encode(prompt, suffix)] * n]
        jobs = []
        for around, seed in zip(sides, seeds, strict=True):
            tokens, given = self._row(around)
            key = self.served.sampler.batch_key(given, options)
            jobs.append(Job(tokens, given, seed, options, score=score, look=look, key=key))
        return Question(
            jobs,
            sides,
            stops,
            echo=echo,
            infills=suffix is not None,
            log_likelihood=score,
            confidence=look,
            stream=stream,
            with_usage=with_usage,
            passes=passes,
        )

    # ---- fields

    def _int(self, name: str, default: int, low: int = 1, high: int = 2**63 - 1) -> int:
        return check_int(name, self.values.get(name, default), low, high, f"an integer >= {low}")

    def _flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        check_flag(name, value)
        return value

    @staticmethod
    def _text(name: str, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"{name}: got {_short(value)}, allowed is a string")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{name}: got half of a surrogate pair, allowed is text")
        return value

    def _options(self) -> SampleOptions:
        temperature = check_scalar("temperature", self.values.get("temperature", 1.0), 0, MOST, "a number >= 0")
        names = ("steps", "top_k", "top_p", "method")
        asked = {name: self.values[name] for name in names if name in self.values}
        options = SampleOptions(
            **{"steps": min(SampleOptions.steps, self.limits.max_steps), **asked}, temperature=temperature
        )
        if options.steps > self.limits.max_steps:
            raise Refusal(422, f"steps: got {options.steps}, allowed are at most {self.limits.max_steps}", "steps")
        if options.method is not None and options.method not in self.served.methods:
            allowed = ", ".join(self.served.methods)
            raise ValueError(f"method: got {_short(options.method)}, allowed is one of {allowed}")
        return options

    def _stops(self) -> list[str]:
        stops = self.values.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or len(stops) > MOST_STOPS:
            raise ValueError(f"stop: got {_short(stops)}, allowed is a string or at most {MOST_STOPS} of them")
        if stops and "suffix" in self.values:
            raise Refusal(400, "stop: got it with suffix, but a hole is filled to its end", "stop", "unsupported")
        for stop in stops:
            if not 0 < len(self._text("stop", stop) or "") <= LONGEST_STOP:
                raise ValueError(f"stop: got {_short(stop)}, allowed is one of 1 to {LONGEST_STOP} characters")
        return stops

    def _stream(self) -> tuple[bool, bool, bool]:
        """(stream, with_usage, passes)"""
        stream, passes, options = self._flag("stream"), self._flag("passes"), self.values.get("stream_options", {})
        if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
            raise ValueError(f"stream_options: got {_short(options)}, allowed is {{'include_usage': true or false}}")
        usage = options.get("include_usage", False)
        check_flag("stream_options", usage)
        for name, value in (("passes", passes), ("stream_options", usage)):
            if value and not stream:
                raise ValueError(f"{name}: got it without stream, allowed is both")
        return stream, usage, passes

    def _seeds(self, count: int) -> list[int]:
        """The seed asked for is that of the first result, and those of the others are made of it. Or each has its own."""
        seed = self.values.get("seed")
        allowed = f"an integer in [0, 2^53), or {count} of them, one for each result"
        if isinstance(seed, list):
            if len(seed) != count:
                raise ValueError(f"seed: got {len(seed)} of them, allowed is {allowed}")
            return [check_int("seed", value, 0, SEEDS - 1, allowed) for value in seed]
        seed = secrets.randbelow(SEEDS) if seed is None else check_int("seed", seed, 0, SEEDS - 1, allowed)
        return [seed, *(value % SEEDS for value in seeds_of(seed, count)[1:])]

    def _prompts(self) -> list[str | list[int]]:
        prompt = self.values.get("prompt", "")
        if isinstance(prompt, list) and not (prompt and all(type(value) is int for value in prompt)):
            prompts = prompt
        else:
            prompts = [prompt]
        if not prompts:
            raise ValueError("prompt: got an empty list, allowed are a string, token ids, or a list of these")
        return [self._prompt(value) for value in prompts]

    def _prompt(self, prompt: Any) -> str | list[int]:
        if isinstance(prompt, str):
            self._text("prompt", prompt)
            return prompt
        V = self.served.sampler.path.vocab_size
        if not isinstance(prompt, list) or not all(type(value) is int for value in prompt):
            raise TypeError(f"prompt: got {_short(prompt)}, allowed are strings or token ids")
        for value in prompt:
            if not 0 <= value < V:
                raise ValueError(f"prompt: got the token {value}, allowed is 0 to V - 1 = {V - 1}")
        return prompt

    # ---- sequences

    def _row(self, sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, given) of a sequence with room for the result between its sides."""
        before, after = sides.before, sides.after
        around = len(before) + len(after)
        room = self.served.max_length - around
        hole = self._int("max_tokens", max(1, min(NEW_TOKENS, self.limits.max_tokens, room)))
        if hole > self.limits.max_tokens:
            message = f"max_tokens: got {hole}, allowed are at most {self.limits.max_tokens}"
            raise Refusal(422, message, "max_tokens")
        if hole > room:
            message = (
                f"prompt: got {around} tokens and room for {hole} more, allowed are {self.served.max_length} in all"
            )
            raise Refusal(422, message, "prompt", "context_length_exceeded")
        tokens = torch.tensor([*before, *[0] * hole, *after])
        given = torch.ones(len(tokens), dtype=torch.bool)
        given[len(before) : len(before) + hole] = False
        return tokens, given
