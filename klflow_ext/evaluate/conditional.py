"""Texts written to prompts, against those that were wanted."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klflow_ext.checks import check_int
from klflow_ext.data import END, encode_pieces
from klflow_ext.evaluate.rows import read_rows
from klflow_ext.evaluate.text import mean_interval, need_sacrebleu, sentence_scores
from klflow_ext.sample import Sampler
from klflow_ext.sample.samples import needed, seeds_of

BETWEEN = "\n\n"  # a prompt and its text
HELD_OUT = 20  # of so many prompts one is held out
DEFINITIONS = {
    "bleu": "sentence BLEU of sacrebleu with as many orders as the text has, 0 to 100",
    "chrf": "sentence chrF2 of sacrebleu, 0 to 100",
    "rouge_l": "F1 of the longest common subsequence of words, lower-case, 0 to 100",
    "mean": "over tries and prompts; best: of each prompt that of the best try by this measure, over prompts",
    "samples": "what was written, against what was wanted",
    "other_prompt": "what was written, against what another prompt wanted: as good as samples where the prompt says nothing",
    "other_text": "what another prompt wanted, against what was wanted: a text as good as real ones that ignores its prompt",
}


@dataclass(frozen=True)
class Pair:
    prompt: str
    text: str

    @property
    def document(self) -> str:
        """What a model is trained on that is to write such texts."""
        return self.prompt + BETWEEN + self.text


def read_pairs(path: str | Path) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of JSONL with "prompt" and "text", one of HELD_OUT prompts held out, by a hash of the prompt.

    Raises:
        ValueError: the file cannot be read, or one of the two is empty.
    """
    split: tuple[list[Pair], list[Pair]] = ([], [])
    for row in read_rows("conditional", path, {"prompt": str, "text": str}):
        pair = Pair(row["prompt"], row["text"])
        split[zlib.crc32(pair.prompt.encode()) % HELD_OUT == 0].append(pair)
    if not all(split):
        raise ValueError(
            f"conditional: got {path} with {len(split[0])} prompts and {len(split[1])} held out, allowed is some of each"
        )
    return split


@dataclass(frozen=True)
class Chosen:
    """Pairs that fit: their prompts as tokens, and the texts that are wanted. left_out: how many before the last did not."""

    pairs: list[Pair]
    prompts: list[list[int]]
    wanted: list[str]
    left_out: int


def choose(pairs: Sequence[Pair], tokenizer: Any, count: int, new_tokens: int, window: int) -> Chosen:
    """The first `count` pairs whose prompt and new_tokens fit the window, and whose text has as many.

    Raises:
        ValueError: fewer than 2 do.
    """
    prompts, wanted, chosen, left_out = [], [], list[Pair](), 0
    for pair in pairs:
        if len(chosen) == count:
            break
        prompt, text = encode_pieces(tokenizer, [pair.prompt + BETWEEN, pair.text])
        if len(prompt) + new_tokens > window or len(text) < new_tokens:
            left_out += 1
            continue
        chosen.append(pair)
        prompts.append(prompt)
        wanted.append(_ended(tokenizer, text[:new_tokens]))
    if len(chosen) < 2:
        raise ValueError(
            f"new_tokens: got {new_tokens} in a window of {window}, in which {len(chosen)} of {len(pairs)} pairs fit; allowed are 2 or more"
        )
    return Chosen(chosen, prompts, wanted, left_out)


def measure_conditional(
    pairs: Sequence[Pair],
    sampler: Sampler,
    *,
    count: int | None = None,
    new_tokens: int = 64,
    window: int | None = None,
    tries: int = 5,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Has a sampler write to prompts, and gives BLEU, chrF and ROUGE-L with their settings, in the types of JSON.

        training, held_out = read_pairs("llm_stories.jsonl.gz")         # train on pair.document of the first
        row = measure_conditional(held_out, sampler, count=64, steps=32, method="segments")
        row["figures"]["samples"]["bleu"]["best"]                       # {"mean", "low", "high"}: best of 5

    What is written has `new_tokens` tokens, and what was wanted is cut to as many, so that no length is rewarded. Both end at an
    END token if there is one.

    Args:
        pairs: prompts, and what is wanted. Those that are too long for the window, or whose text has fewer than new_tokens
            tokens, are left out.
        sampler: with a tokenizer, on any path.
        count: how many pairs, the first that fit; None: all.
        new_tokens: of each text, at least 1.
        window: tokens of prompt and text together; None: the network's max_length. Say here on how many it was trained.
        tries: texts for each prompt, at least 1.
        seed: of the first try; the next has the next.
        options: of `Sampler.complete`: steps, method, temperature, top_k.

    Returns: {"prompts", "left_out", "tries", "new_tokens", "window", "nfe", "seed", "seconds", "options", "definitions", "figures":
        {"samples" | "other_prompt": {"bleu" | "chrf" | "rouge_l": {"mean" | "best": {"mean", "low", "high"}}}, "other_text":
        {...: {"mean": ...}}}, "texts": [{"prompt", "wanted", "written": [...]}]}. Intervals are bootstrapped over prompts.

    Raises:
        ValueError: an argument is outside its range, fewer than 2 pairs fit, or sacrebleu is missing; the message names it.
    """
    tokenizer = needed(sampler.tokenizer, "sampler")
    new_tokens = check_int("new_tokens", new_tokens, 1, 2**31, "an integer >= 1", ValueError)
    tries = check_int("tries", tries, 1, 2**31, "an integer >= 1", ValueError)
    most = sampler.network.max_length
    longest = 2**31 if most is None else most
    allowed = f"an integer in [2, max_length = {most}]"
    window = check_int("window", longest if window is None else window, 2, longest, allowed, ValueError)
    count = check_int("count", len(pairs) if count is None else count, 2, 2**31, "an integer >= 2", ValueError)
    chosen = choose(pairs, tokenizer, count, new_tokens, window)
    prompts, wanted = chosen.prompts, chosen.wanted
    need_sacrebleu()  # before any work, so that a missing library is told at once
    start = time.perf_counter()
    found = sampler.complete(
        prompts * tries,
        new_tokens=new_tokens,
        seed=[one for i in range(tries) for one in seeds_of(seed + i, len(prompts))],
        progress=progress,
        **options,
    )
    seconds = time.perf_counter() - start
    texts = [
        _ended(tokenizer, row.tolist()[len(prompt) :])
        for row, prompt in zip(found.tokens, prompts * tries, strict=True)
    ]
    written = [texts[i :: len(prompts)] for i in range(len(prompts))]
    others = wanted[1:] + wanted[:1]
    return {
        "prompts": len(prompts), "left_out": chosen.left_out, "tries": tries, "new_tokens": new_tokens,
        "window": None if window == 2**31 else window, "nfe": found.nfe, "seed": seed, "seconds": seconds, "options": options,
        "definitions": DEFINITIONS,
        "figures": {
            "samples": _figures(written, wanted), "other_prompt": _figures(written, others),
            "other_text": _figures([[text] for text in others], wanted),
        },
        "texts": [
            {"prompt": pair.prompt, "wanted": text, "written": texts}
            for pair, text, texts in zip(chosen.pairs, wanted, written, strict=True)
        ],
    }  # fmt: skip


def _ended(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens up to the first END."""
    return tokenizer.decode(ids, skip_special_tokens=False).partition(END)[0]


def _figures(written: Sequence[Sequence[str]], wanted: Sequence[str]) -> dict[str, Any]:
    """Of each measure the mean of the tries and the best one; of a single try the mean alone."""
    scores = [[sentence_scores(text, aim) for text in texts] for texts, aim in zip(written, wanted, strict=True)]
    found: dict[str, Any] = {}
    for name in scores[0][0]:
        each = [[score[name] for score in tries] for tries in scores]
        found[name] = {"mean": mean_interval([sum(tries) / len(tries) for tries in each])._asdict()}
        if len(each[0]) > 1:
            found[name]["best"] = mean_interval([max(tries) for tries in each])._asdict()
    return found
