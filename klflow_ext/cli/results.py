"""What was generated: texts or JSONL on stdout, all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from klflow_ext.cli.terminal import QUIET, note, printable
from klflow_ext.path import SampleOptions
from klflow_ext.sample import Sampler, Samples


def print_results(
    sampler: Sampler,
    result: Samples,
    options: SampleOptions,
    prompts: Sequence[str | None],
    jsonl: bool,
    shown: bool = False,
    log_likelihood: bool = False,
) -> None:
    """The texts with a blank line between them, unless they were shown as they formed, or an object of JSON a line."""
    method = sampler.path.way or options.method or sampler.default_method
    scores: list[dict[str, float | None]] = [{} for _ in result.seeds]
    if log_likelihood:
        scores = [{"log_likelihood": value} for value in log_likelihoods(sampler, result, options, method)]
    for i, (text, tokens, seed, prompt, score) in enumerate(
        zip(result.texts, result.tokens, result.seeds, prompts, scores, strict=True)
    ):
        if jsonl:
            line = {
                "text": text, "tokens": tokens.tolist(), "seed": seed, "prompt": prompt, "method": method,
                "steps": options.steps, "passes": result.nfe, **score,
            }  # fmt: skip
            print(json.dumps(line))
        elif not shown:
            print("\n" * (i > 0) + printable(text))
    sys.stdout.flush()
    note(f"{result.nfe} passes, {result.seconds:.1f} s")


def log_likelihoods(sampler: Sampler, result: Samples, options: SampleOptions, method: str) -> list[float | None]:
    """Of each result, in nats per token; None, and a word on stderr, where the method has no exact one."""
    if sampler.has_likelihood(options):
        return sampler.log_likelihoods(result, options)
    more = f" with slice_steps={options.slice_steps}" if options.slice_steps > 1 else ""
    note(f"log_likelihood: {method}{more} has no exact one, so it is null", QUIET)
    return [None] * len(result.tokens)
