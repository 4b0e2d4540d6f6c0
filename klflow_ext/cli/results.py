"""What was generated: texts or JSONL on stdout, all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from klflow_ext.cli.terminal import printable
from klflow_ext.path import SampleOptions
from klflow_ext.sample import Sampler, Samples


def print_results(
    sampler: Sampler,
    result: Samples,
    options: SampleOptions,
    prompts: Sequence[str | None],
    jsonl: bool,
    shown: bool = False,
) -> None:
    """A text and a line with a point for each, unless they were shown as they formed, or an object of JSON a line."""
    method = sampler.path.way or options.method or sampler.default_method
    for text, tokens, seed, prompt in zip(result.texts, result.tokens, result.seeds, prompts, strict=True):
        if jsonl:
            line = {
                "text": text, "tokens": tokens.tolist(), "seed": seed, "prompt": prompt, "method": method,
                "steps": options.steps, "passes": result.nfe,
            }  # fmt: skip
            print(json.dumps(line))
        elif not shown:
            print(printable(text) + "\n   .")
    sys.stdout.flush()
    print(f"{result.nfe} passes, {result.seconds:.1f} s", file=sys.stderr)
