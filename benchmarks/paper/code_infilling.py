"""Code with a share of its lines removed (the paper's figure 2): the KL path against mask discrete flow matching.

Trained on Python's standard library and asked of files of it that were held out. First what small models can be told apart by: the
bound of -log p of the removed tokens given the rest, and how many are put back as they were. Then functions whose lines are removed,
filled and compiled; and MBPP with 10 % of its lines removed, whose tests run in the sandbox.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from matched import Bench, as_json, cell, draw_curve, figure, markdown, of, run, toy_texts, values

from klflow_ext import data
from klflow_ext.evaluate import code
from klflow_ext.evaluate.infilling import infill_tasks
from klflow_ext.evaluate.text import Interval

TITLE = "Code infilling"
METHODS = {
    "KL, sampling": ("simplex uniform", "sampling"),
    "KL, hybrid": ("simplex uniform", "hybrid"),
    "KL, posterior input, sampling": ("posterior", "sampling"),
    "mask DFM": ("mask", "basic"),
}
SHARES = {"cpu": (0.1, 0.4, 0.7, 1.0), "gpu": code.SHARES, "test": (0.5,)}
FIELDS = ("exact@1", "compiles@1", "pass@1")


def measure(bench: Bench) -> None:
    shares, scale = SHARES[bench.arguments.scale], bench.arguments.scale
    bench.table.expected = len(bench.seeds) * len(METHODS) * (2 * len(shares) + (scale != "test"))
    for seed in bench.seeds:
        for share in shares:
            for name in METHODS:
                key = {"method": name, "share": share, "seed": seed}
                bench.table.row(
                    {**key, "what": "tokens"},
                    lambda name=name, share=share, seed=seed: tokens(bench, name, share, seed),
                )
        for name in METHODS:
            for share in shares:
                key = {"method": name, "share": share, "seed": seed, "what": "functions"}
                bench.table.row(
                    key, lambda name=name, share=share, seed=seed: programs(bench, name, functions(bench, share), seed)
                )
            if scale != "test":
                key = {"method": name, "share": 0.1, "seed": seed, "what": "MBPP"}
                bench.table.row(key, lambda name=name, seed=seed: programs(bench, name, mbpp(), seed))


def trained(bench: Bench, name: str, seed: int):
    """(Sampler, steps of its training)."""
    sampler, losses = bench.trained(METHODS[name][0], seed, "stdlib", given_share=0.6, steps=bench.scale.short_steps)
    return sampler, losses["steps"]


def tokens(bench: Bench, name: str, share: float, seed: int) -> dict:
    """Of held-out code: the bound of -log p of what was removed, and how much of it is put back as it was."""
    (sampler, steps), (tokenizer, _, held) = trained(bench, name, seed), bench.stream("stdlib")
    text = data.batch(held, bench.scale.samples, bench.scale.length, seed=777, step=0)
    given = ~removed(text, tokenizer, share)
    text, given = text.to(bench.device), given.to(bench.device)
    found = sampler.path.likelihood(sampler.model, text, given=given, strata=min(16, len(text)))
    with bench.autocast():
        filled = sampler.infill(text, given, steps=bench.scale.passes, method=METHODS[name][1], top_k=1, seed=seed)
    same = (filled.tokens == text)[~given].float().mean()
    return {
        "steps": steps,
        "nats": found.per_token,
        "nats_error": found.standard_error,
        "same": float(same),
        "nfe": filled.nfe,
        "top_k": 1,
        "texts": len(text),
    }


def removed(text: torch.Tensor, tokenizer, share: float) -> torch.Tensor:
    """(B, L): the tokens of a share of the lines of each text, at least one line, always the same ones."""
    ends = torch.tensor(
        ["\n" in tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
    )
    after = ends[text].cumsum(1)
    lines = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)  # the end of a line is a part of it
    gone = torch.zeros_like(text, dtype=torch.bool)
    for row, numbers in enumerate(lines):
        count = int(numbers[-1]) + 1
        chosen = np.random.default_rng((777, row)).permutation(count)[: max(1, round(share * count))]
        gone[row] = torch.isin(numbers, torch.from_numpy(chosen))
    return gone


def functions(bench: Bench, share: float) -> list[code.Task]:
    held = toy_texts()[1] if bench.arguments.scale == "test" else data.documents(None)[1]
    found = code.function_tasks(held, share)
    count = min(bench.scale.samples // 2, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def mbpp() -> list[code.Task]:
    return code.mbpp_tasks(Path(os.environ["KLFLOW_DATA"]) / "mbpp" / "mbpp.jsonl", 0.1)[::20]


def programs(bench: Bench, name: str, tasks: list[code.Task], seed: int) -> dict:
    sampler, steps = trained(bench, name, seed)
    with bench.autocast():
        found = infill_tasks(tasks, sampler, seed=seed, steps=bench.scale.passes, method=METHODS[name][1], top_k=5)
    figures = {name: as_json(Interval(**figure)) for name, figure in found.pop("figures").items()}
    return {**found, "steps": steps, **figures}


def table(rows) -> list[str]:
    names = [name for name in METHODS if of(rows, method=name)]
    parts = []
    for what, field, title in (("tokens", "nats", "held-out code, bound, nats per removed token"), ("tokens", "same", "removed tokens put back as they were"),
                               ("functions", "exact@1", "functions: all removed lines exact"), ("functions", "compiles@1", "functions: it compiles")):  # fmt: skip
        found = of(rows, what=what)
        lines = [
            [f"{share:.0%}", *(cell(of(found, method=name, share=share), field, 3) for name in names)]
            for share in values(found, "share")
        ]
        if lines and not any(np.any(row[field]) for row in found):
            parts += [f"**{title}**: 0 by all methods, whatever the share of lines.", ""]
        elif lines:
            parts += [f"**{title}**", "", *markdown(["lines removed", *names], lines), ""]
    if of(rows, what="MBPP"):
        lines = [[name, *(cell(of(rows, what="MBPP", method=name), field) for field in FIELDS)] for name in names]
        parts += ["**MBPP, 10 % of the lines removed**", "", *markdown(["method", *FIELDS], lines), ""]
    return [*parts, f"Seeds: {len(values(rows, 'seed'))}."]


def plot(rows):
    chart, axes = figure(1, 2, figsize=(10, 4))
    found = of(rows, what="tokens")
    for axis, field, title in zip(
        axes, ("nats", "same"), ("bound, nats per removed token", "removed tokens put back"), strict=True
    ):
        for name in METHODS:
            draw_curve(axis, of(found, method=name), "share", field, label=name)
        axis.set(xlabel="share of lines removed", ylabel=title)
    axes[0].legend(fontsize=7)
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
