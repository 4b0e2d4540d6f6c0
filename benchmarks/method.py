"""The method beside its rivals: one backbone, one optimizer, the same text and steps; held-out loss, and samples under a judge.

python benchmarks/method.py train --name posterior --seed 0      # one run: runs/method/..., results/method/...json
python benchmarks/method.py judge --name posterior --seed 0      # bits per byte and entropy of its samples, a few minutes
python benchmarks/method.py fill --name segments --seed 0        # held-out stories from their beginnings, and with holes
python benchmarks/method.py sweep --name posterior --seed 0      # t_split, time grid, boosts; with --nfe 16 11 minutes
python benchmarks/method.py plot                                 # results/method_loss.png, results/method_frontier.png
python benchmarks/method.py gallery                              # benchmarks/GALLERY.md: uncurated samples

It needs KLFLOW_DATA, a folder with TinyStories text and the stories260K judge. Held-out loss of the paths of one kind
compares at equal times; text compares across all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tables import sampled_as

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    LinearPath,
    LogitPath,
    MaskPath,
    Sampler,
    SpherePath,
    TrainConfig,
    Trainer,
    UniformPath,
    data,
    evaluate,
    load_run,
)
from klflow_ext.muon import multiplies_bfloat16
from klflow_ext.run import Run, write_file

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "method"

# name: (path, what the network is, how it is trained). The paper's own is "simplex uniform". "stdlib" is "segments" on the
# source of Python's standard library, for a removed line of code.
METHODS = {
    "posterior": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle"}),
    "segments": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle", "given_share": 0.6}),
    "stdlib": (LogitPath, {"input": "posterior"}, {"time_sampling": "middle", "given_share": 0.6}),
    "posterior learned": (LogitPath, {"input": "posterior"}, {"time_sampling": "learned"}),
    "posterior uniform": (LogitPath, {"input": "posterior"}, {"time_sampling": "uniform"}),
    "simplex": (LogitPath, {"input": "simplex"}, {"time_sampling": "middle"}),
    "simplex uniform": (LogitPath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "linear": (LinearPath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "sphere": (SpherePath, {"input": "simplex"}, {"time_sampling": "uniform"}),
    "mask": (MaskPath, {"input": "tokens"}, {"time_sampling": "uniform"}),
    "uniform": (UniformPath, {"input": "tokens"}, {"time_sampling": "uniform"}),
    "autoregressive": (Autoregressive, {"input": "tokens", "causal": True, "time": "none"}, {"time_sampling": "uniform"}),
}  # fmt: skip
LENGTH, BATCH = 64, 32
EVERY = 8  # measurements of the held-out loss in a run


def text_streams(arguments):
    """(tokenizer, training, held-out tokens) of TinyStories, or of the standard library, made once."""
    from tokenizers import Tokenizer

    code = arguments.name == "stdlib"
    folder = arguments.runs / f"tokens-{'stdlib-' * code}{arguments.vocab_size}"
    if not (folder / "heldout.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(os.environ["KLFLOW_DATA"]) / "tinystories"
        train, held = data.documents(None) if code else (
            [part for part in data.read_text(source / f"tinystories_{name}.txt").split(f"\n{data.END}\n") if part.strip()]
            for name in ("train", "heldout")
        )  # fmt: skip
        tokenizer = data.train_tokenizer(train, arguments.vocab_size)
        write_file(folder / "tokenizer.json", lambda p: tokenizer.save(str(p)))
        for name, texts in (("train", train), ("heldout", held)):
            stream = data.encode(tokenizer, texts)
            write_file(folder / f"{name}.npy", lambda p, stream=stream: np.save(open(p, "wb"), stream))
    streams = (np.load(folder / f"{name}.npy") for name in ("train", "heldout"))
    return Tokenizer.from_file(str(folder / "tokenizer.json")), *streams


def label(arguments) -> str:
    return f"{arguments.name.replace(' ', '-')}-V{arguments.vocab_size}-{arguments.steps}-seed{arguments.seed}"


def update(arguments, **values) -> None:
    """Adds values to the result file of a run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{label(arguments)}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found.update(
        name=arguments.name, vocab_size=arguments.vocab_size, steps=arguments.steps, seed=arguments.seed, **values
    )
    write_file(file, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))


def train(arguments) -> None:
    make_path, model_options, train_options = METHODS[arguments.name]
    tokenizer, stream, held = text_streams(arguments)
    vocab = tokenizer.get_vocab_size()
    torch.manual_seed(arguments.seed)
    path = make_path(vocab)
    prior = evaluate.unigram_log_prior(stream, vocab)
    model = Denoiser(DenoiserConfig(vocab, 4, 4, 256, **model_options), path, prior)
    config = TrainConfig(
        steps=arguments.steps, batch_size=BATCH, length=LENGTH, seed=arguments.seed,
        dtype="bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32",
        **{"given_share": 0.0, **train_options},
    )  # fmt: skip
    out = arguments.runs / label(arguments)
    trainer = Trainer(model, path, stream, config)
    with Run.create(out, overwrite=True, tokenizer=tokenizer, stream=stream, heldout=held) as trainer.run:
        trainer.save()
    trainer.run = Run(out)
    curve, begin, seconds = [], time.perf_counter(), 0.0
    while trainer.progress() < 1:
        begin = time.perf_counter()
        trainer.train_step()
        seconds += time.perf_counter() - begin
        if trainer.step % (arguments.steps // EVERY) == 0:
            losses = evaluate.loss_by_time(model.eval(), path, held, LENGTH)
            model.train()
            curve.append({"step": trainer.step, "loss": float(np.mean(list(losses.values())))})
            left = seconds / trainer.step * (arguments.steps - trainer.step)
            print(
                f"{label(arguments)}: step {trainer.step}, held-out {curve[-1]['loss']:.3f}, {left:.0f} s left",
                flush=True,
            )
    trainer.save()
    losses = evaluate.loss_by_time(trainer.averaged_model().eval(), path, held, LENGTH, sequences=256)
    update(
        arguments, losses={f"{t:.3f}": loss for t, loss in losses.items()}, curve=curve, train_seconds=seconds,
        threads=torch.get_num_threads(), dtype=config.dtype, unigram=evaluate.unigram_entropy(held, vocab, prior),
    )  # fmt: skip


def load_sampler(arguments):
    model, path, tokenizer = load_run(arguments.runs / label(arguments))
    return Sampler(model, path), tokenizer


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
    usual = "sampling" if isinstance(sampler.path, LogitPath) else "basic"
    usual = "segments" if arguments.name == "segments" else usual
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
    method = "segments" if isinstance(sampler.path, LogitPath) else "basic"
    seeds, rows = [arguments.seed + i for i in range(len(tokens))], []
    result = sampler.infill(tokens, given, steps=16, top_k=10, method=method, seed=seeds)
    for filled, was, shown in zip(result.tokens, tokens, given, strict=True):
        free = (~shown).nonzero().flatten()
        parts = {"before": slice(free[0]), "written": ~shown, "after": slice(free[-1] + 1, None)}
        row = {name: tokenizer.decode(filled[part].tolist()) for name, part in parts.items()}
        rows.append({**row, "was": tokenizer.decode(was[~shown].tolist())})
        print("{before}[{written}]{after}\n    (was: {was})\n".format(**rows[-1]), flush=True)
    update(arguments, filled=rows)


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


# ---- what a reader sees


def results() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def mean_by(found: list[dict], key) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in found:
        groups.setdefault(key(r), []).append(r)
    return groups


def plot(arguments) -> None:
    """Held-out loss by time and by step, and bits per byte against entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = results()
    shown = ("posterior", "simplex", "simplex uniform")
    runs = mean_by([r for r in found if "losses" in r and r["name"] in shown], lambda r: (r["vocab_size"], r["steps"]))
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(9, 3.4 * len(runs)), squeeze=False)
    for (by_time, by_step), (vocab, steps) in zip(axes, sorted(runs), strict=True):
        for color, name in zip(("C0", "C1", "C2"), shown, strict=True):
            for i, r in enumerate(r for r in runs[vocab, steps] if r["name"] == name):
                text = name if i == 0 else None
                by_time.plot(
                    [float(t) for t in r["losses"]], list(r["losses"].values()), color=color, marker=".", label=text
                )
                by_step.plot([c["step"] for c in r["curve"]], [c["loss"] for c in r["curve"]], color=color, label=text)
        by_time.set(xlabel="t", ylabel="held-out loss, nats", yscale="log", title=f"V = {vocab:,}, {steps:,} steps")
        by_step.set(xlabel="step", ylabel="mean over t", title="one line a seed")
        by_time.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "results" / "method_loss.png", dpi=110)

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4), sharey=True)
    found = [r for r in found if (r["vocab_size"], r["steps"]) == (2048, 1075)]
    names = [name for name in METHODS if any(r["name"] == name and r.get("samples") for r in found)]
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, nfe in zip(axes, (8, 16, 32, 64), strict=True):
        for name in [*names, "mask, segments"]:
            samples = [
                s for r in found for s in r.get("samples", []) if sampled_as(r["name"], s["method"]) == name
            ]  # fmt: skip
            groups = dict(sorted(mean_by([s for s in samples if s["steps"] == nfe], lambda s: s["top_k"]).items()))
            if groups:
                points = [
                    (n, *(np.mean([s[k] for s in g]) for k in ("entropy", "bits_per_byte"))) for n, g in groups.items()
                ]
                axis.plot([x for _, x, _ in points], [y for _, _, y in points], marker="o", color=colors[name.split(",")[0]],
                          linestyle="--" if "," in name else "-", label=name)  # fmt: skip
                for n, x, y in points:
                    axis.annotate(str(n), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel="entropy of a sample's tokens, nats", title=f"NFE {nfe}; numbers are top-k")
    axes[0].set_ylabel("bits per byte under the judge (lower is better)")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    axes[0].legend(lines.values(), lines.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "results" / "method_frontier.png", dpi=110)


def gallery(arguments) -> None:
    """GALLERY.md: the first ten samples of each method, as they came."""
    lines = ["# Samples", "", "The first ten of each run of `benchmarks/method.py` at NFE 64, top-k 20, V = 2,048, as they came: "
             "TinyStories, 4 layers, D = 256.", ""]  # fmt: skip
    for r in results():
        rows = [s for s in r.get("samples", []) if (s["steps"], s["top_k"]) == (LENGTH, 20)]
        rows = [s for s in rows if sampled_as(r["name"], s["method"]) == r["name"]]
        if rows and r["seed"] == 0 and r["vocab_size"] == 2048:
            lines += [f"## {r['name']}, {r['steps']:,} steps: {rows[0]['bits_per_byte']:.2f} bits per byte, entropy "
                      f"{rows[0]['entropy']:.2f}", ""]  # fmt: skip
            for number, text in enumerate(rows[0]["texts"], 1):
                lines.append(f"{number}. {' '.join(text.split()).replace('<|endoftext|>', '⏎')}")
            lines.append("")
            if "filled" in r:
                lines += [
                    f"### {r['name']}: prompts of 16 tokens continued, holes of 16 tokens filled; 16 passes, top-k 10",
                    "",
                ]
                for number, row in enumerate(r["filled"], 1):
                    row = {name: " ".join(text.split()) for name, text in row.items()}
                    lines.append("{}. {before} **{written}** {after} *(was: {was})*".format(number, **row))
                lines.append("")
        if r["name"] == "stdlib" and "filled" in r:
            lines += [
                f"## A removed line of the standard library's source, filled in; {r['steps']:,} steps, top-k 10",
                "",
            ]
            for row in r["filled"]:
                lines += [
                    "```text",
                    "{before}{written}    # <- written; was: {}{after}".format(row["was"].strip(), **row),
                    "```",
                    "",
                ]
    write_file(ROOT / "GALLERY.md", lambda p: p.write_text("\n".join(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "judge", "fill", "sweep", "plot", "gallery"))
    parser.add_argument("--name", choices=METHODS, default="posterior")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1075)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=ROOT.parent / "runs" / "method")
    parser.add_argument("--nfe", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[50, 20, 10, 5])
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--method", help="another scheme than the path's best")
    parser.add_argument("--bfloat16", action="store_true", help="sample with the network in bfloat16")
    arguments = parser.parse_args()
    {"train": train, "judge": judge, "fill": fill, "sweep": sweep, "plot": plot, "gallery": gallery}[arguments.action](
        arguments
    )


if __name__ == "__main__":
    main()
