"""What a reader sees of the results: plots, and a gallery of samples."""

from __future__ import annotations

import numpy as np
from compared import LENGTH, METHODS, ROOT, grouped, results, sampled_as

from klflow_ext.files import write_file


def plot(arguments) -> None:
    """Held-out loss by time and by step, and bits per byte against entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = results()
    shown = ("posterior", "simplex", "simplex uniform")
    runs = grouped([r for r in found if "losses" in r and r["name"] in shown], lambda r: (r["vocab_size"], r["steps"]))
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
            groups = dict(sorted(grouped([s for s in samples if s["steps"] == nfe], lambda s: s["top_k"]).items()))
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
    lines = ["# Samples", "", "The first ten of each run of `benchmarks/method` at NFE 64, top-k 20, V = 2,048, as they came: "
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
