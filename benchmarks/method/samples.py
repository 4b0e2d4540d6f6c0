"""What the runs write: samples under a judge, texts with holes, and the sampler's settings."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from compared import LENGTH, RESULTS, TEXT, held_texts, label, load_sampler, order_of, text_streams, update

from klflow_ext import LogitPath, data, evaluate
from klflow_ext.files import write_file


def samples(arguments, sampler, tokenizer, scorer, **options):
    """(row, tokens): the options, and bits per byte and token entropy of what they give."""
    result = sampler.sample((arguments.count, LENGTH), seed=arguments.seed, **options)
    texts = [tokenizer.decode(tokens.tolist()) for tokens in result.tokens]
    row = {
        **options, "count": arguments.count, "bits_per_byte": scorer.bits_per_byte(texts),
        "entropy": evaluate.token_entropy(result.tokens), "seconds": result.seconds, "texts": texts[:10],
    }  # fmt: skip
    return row, result.tokens


def load_judge() -> evaluate.Judge:
    return evaluate.Judge(Path(os.environ["KLFLOW_DATA"]) / "stories260K")


def judge(arguments) -> None:
    """Bits per byte and token entropy of samples at each NFE and top-k, by the path's best scheme."""
    scorer, rows = load_judge(), []
    sampler, tokenizer = load_sampler(arguments)
    usual = order_of(arguments.name) or ("sampling" if isinstance(sampler.path, LogitPath) else "basic")
    for top_k in arguments.top_k:
        for nfe in [LENGTH] if arguments.name == "autoregressive" else arguments.nfe:
            options = {"steps": nfe, "top_k": top_k, "method": arguments.method or usual}
            with torch.autocast("cpu", torch.bfloat16) if arguments.bfloat16 else nullcontext():
                row, _ = samples(arguments, sampler, tokenizer, scorer, **options)
            rows.append(row)
            print(
                f"{label(arguments)}: NFE {nfe}, top-k {top_k}: {row['bits_per_byte']:.2f} ({row['entropy']:.2f})",
                flush=True,
            )
    key = lambda row: (row["method"], row["top_k"], row["steps"])  # noqa: E731
    file, measured = RESULTS / f"{label(arguments)}.json", {key(row) for row in rows}
    kept = json.loads(file.read_text()).get("samples", []) if file.exists() else []
    update(arguments, samples=[row for row in kept if key(row) not in measured] + rows)


def text(arguments) -> None:
    """Bits per byte and token entropy of held-out text, in pieces as long as the samples; results/method_text.json."""
    tokenizer, _, held = text_streams(arguments)
    tokens = held_texts(held, 4 * arguments.count)
    row = {"count": len(tokens), "bits_per_byte": load_judge().bits_per_byte([tokenizer.decode(t.tolist()) for t in tokens]), "entropy": evaluate.token_entropy(tokens)}  # fmt: skip
    print(f"V = {arguments.vocab_size}: {row}")
    found = json.loads(TEXT.read_text()) if TEXT.exists() else {}
    found[str(arguments.vocab_size)] = row
    write_file(TEXT, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))


def likelihood(arguments) -> None:
    """Nats per token of held-out text: exactly by each number of passes, where the method has an order, and the path's bound."""
    sampler, _ = load_sampler(arguments)
    _, _, held = text_streams(arguments)
    tokens = held_texts(held, 4 * arguments.count)
    rows = []
    if order_of(arguments.name) or arguments.name == "mask":
        for steps in arguments.nfe:
            rows.append(
                {"steps": steps, "found": sampler.likelihood(tokens, steps=steps, progress=sys.stdout.isatty())}
            )
    if sampler.path.has_likelihood:
        rows.append({"steps": None, "found": sampler.path.likelihood(sampler.model, tokens)})
    for row in rows:
        found = row.pop("found")
        row |= {"nats": found.per_token, "error": found.standard_error, "exact": found.exact, "texts": len(tokens)}
        print(f"{label(arguments)}: {row}", flush=True)
    update(arguments, likelihood=rows)


def holes(arguments, tokenizer):
    """((tokens, given), ...), each (1, L), held-out: beginnings of stories and stories without their middle, or code without a line."""
    if arguments.name == "stdlib":
        _, texts = data.documents(None)
        return [(tokens, given) for tokens, given, _ in islice(data.removed_lines(texts, tokenizer, LENGTH), 10)]
    _, _, held = text_streams(arguments)
    end, found = tokenizer.token_to_id(data.END), []
    starts = [i + 1 for i in np.flatnonzero(held == end) if end not in held[i + 1 : i + 1 + LENGTH]]
    for free in [slice(16, LENGTH)] * 5 + [slice(24, 40)] * 5:
        start = starts[len(found)]
        tokens = torch.from_numpy(held[start : start + LENGTH][None]).long()
        given = torch.ones_like(tokens, dtype=torch.bool)
        given[:, free] = False
        found.append((tokens, given))
    return found


def fill(arguments) -> None:
    """What is missing of held-out texts, written anew in 16 passes."""
    sampler, tokenizer = load_sampler(arguments)
    tokens, given = zip(*[(t[0], g[0]) for t, g in holes(arguments, tokenizer)], strict=True)
    method = None if isinstance(sampler.path, LogitPath) or sampler.network.slices else "basic"
    seeds, rows = [arguments.seed + i for i in range(len(tokens))], []
    result = sampler.infill(tokens, given, steps=16, top_k=10, method=method, seed=seeds)
    for filled, was, shown in zip(result.tokens, tokens, given, strict=True):
        free = (~shown).nonzero().flatten()
        parts = {"before": slice(free[0]), "written": ~shown, "after": slice(free[-1] + 1, None)}
        row = {name: tokenizer.decode(filled[part].tolist()) for name, part in parts.items()}
        rows.append({**row, "was": tokenizer.decode(was[~shown].tolist())})
        print("{before}[{written}]{after}\n    (was: {was})\n".format(**rows[-1]), flush=True)
    update(arguments, filled=rows)


def grid(arguments) -> None:
    """The sampling scheme at each NFE, its times as the path has them, and where the race bound falls by as much."""
    scorer, rows = load_judge(), []
    sampler, tokenizer = load_sampler(arguments)
    _, _, held = text_streams(arguments)
    texts = held_texts(held, 128, step=1)
    for steps in arguments.nfe:
        for name in ("path", "race"):
            times = sampler.path.race_times(sampler.model, texts, steps) if name == "race" else None
            row, _ = samples(
                arguments, sampler, tokenizer, scorer, steps=steps, method="sampling", top_k=20, times=times
            )
            row = {
                "times": name,
                **{key: row[key] for key in ("steps", "bits_per_byte", "entropy", "seconds", "count")},
            }
            rows.append(row)
            print(f"{label(arguments)}: {row}", flush=True)
    update(arguments, grid=rows)


def race(arguments) -> None:
    """The exact reverse process at each NFE, without and with a corrector, beside the sampling scheme."""
    scorer, rows = load_judge(), []
    sampler, tokenizer = load_sampler(arguments)
    for steps in arguments.nfe:
        for method, corrector in (("sampling", 0.0), ("race", 0.0), ("race", 0.5), ("race", 2.0)):
            row, _ = samples(
                arguments, sampler, tokenizer, scorer, steps=steps, method=method, top_k=20, corrector=corrector
            )
            kept = ("method", "corrector", "steps", "bits_per_byte", "entropy", "seconds", "count")
            rows.append({key: row[key] for key in kept})
            print(f"{label(arguments)}: {rows[-1]}", flush=True)
    update(arguments, race=rows)


def sweep(arguments) -> None:
    """Where hybrid turns to sampling and how the times are spaced; and what of the basic scheme's sum has to be kept."""
    scorer, rows, kept = load_judge(), [], []
    sampler, tokenizer = load_sampler(arguments)

    def measure(**options):
        row, tokens = samples(arguments, sampler, tokenizer, scorer, **options)
        return {name: row[name] for name in ("steps", "bits_per_byte", "entropy", "seconds")}, tokens

    for steps in arguments.nfe:
        for share in (0.0, 0.25, 0.5, 0.75, 14 / 15):
            for power in (1.0, 0.5):
                t_split = share * sampler.path.t_max
                row, _ = measure(steps=steps, method="hybrid", top_k=20, t_split=t_split, grid_power=power)
                rows.append({"t_split": share, "grid_power": power, **row})
                print(f"{label(arguments)}: {rows[-1]}", flush=True)
        row, exact = measure(steps=steps, method="basic", boosts=None)
        kept.append({"boosts": None, "same": 1.0, **row})
        for boosts in (1024, 256, 64, 16):
            row, tokens = measure(steps=steps, method="basic", boosts=boosts)
            kept.append({"boosts": boosts, "same": float((tokens == exact).float().mean()), **row})
            print(f"{label(arguments)}: {kept[-1]}", flush=True)
    update(arguments, sweep=rows, boosts=kept)
