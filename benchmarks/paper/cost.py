"""What each method costs: seconds of a training token and of a sample, of networks of one shape.

Untrained networks do: neither depends on the weights. Processor seconds stand beside those of the clock, as other work may run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from matched import METHODS, Bench, cell, figure, markdown, of, order_of, run, values

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, Sampler, TrainConfig, Trainer, evaluate

TITLE = "Cost"
SHOWN = {
    "KL": "simplex uniform",
    "KL, posterior input": "posterior",
    "Fisher-Rao": "sphere",
    "linear": "linear",
    "mask DFM": "mask",
    "uniform DFM": "uniform",
    "autoregressive": "autoregressive",
    "KL, segments": "segments",
    "KL, slices": "slices",
    "mask, slices": "mask slices",
}
COLUMNS = {
    "basic": "basic",
    "sampling": "sampling",
    "order": "segments or slices",
    "order_longest": "the same, a pass a token",
}
REPEATS = 5


def measure(bench: Bench) -> None:
    bench.table.expected = len(SHOWN)
    for name, method in SHOWN.items():
        bench.table.row({"method": name}, lambda method=method: costs(bench, method))


def costs(bench: Bench, method: str) -> dict:
    scale, (_, stream, _) = bench.scale, bench.stream()
    make_path, model_options, train_options = METHODS[method]
    path = make_path(scale.vocab_size)
    shape = DenoiserConfig(scale.vocab_size, scale.layers, scale.heads, scale.width, scale.length, **model_options)
    network = Denoiser(shape, path, evaluate.unigram_log_prior(stream, scale.vocab_size)).to(bench.device)
    options = {"given_share": 0.0, **train_options}
    config = TrainConfig(batch_size=scale.batch, length=scale.length, dtype=bench.dtype, **options)
    trainer = Trainer(network, path, stream, config)
    tokens = scale.batch * scale.length
    found = seconds_of("train_token", trainer.train_step, tokens, bench)
    sampler = Sampler(network.eval(), path, bench.device)
    count = min(scale.samples, 64)
    left_to_right, order = isinstance(path, Autoregressive), order_of(method)
    # the schemes by which all positions move cost the same in every pass
    schemes = {"basic": 4, "sampling": 4} if order is None else {"order": scale.passes, "order_longest": scale.length}
    for name, steps in {"basic": scale.length}.items() if left_to_right else schemes.items():

        def sample(name=name, steps=steps):
            passes = {} if left_to_right else {"steps": steps, "method": order or name}
            with bench.autocast():
                sampler.sample((count, scale.length), top_k=20, **passes)

        share = 1 if left_to_right or order else steps / scale.passes
        found |= seconds_of(f"sample_{name}", sample, count * share, bench)
    return found | {
        "repeats": REPEATS,
        "batch": scale.batch,
        "samples_at_once": count,
        "length": scale.length,
        "passes": scale.passes,
    }


def seconds_of(name: str, function: Callable[[], object], per: float, bench: Bench) -> dict[str, float]:
    """Median seconds of a call over `per`, by the clock and (where the CPU does the work) of the processor."""
    clock, processor = [], []
    for _ in range(1 + REPEATS):
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter(), time.process_time()
        function()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        clock.append((time.perf_counter() - begin[0]) / per)
        processor.append((time.process_time() - begin[1]) / per)
    found = {name: statistics.median(clock[1:])}
    return found if bench.device.type == "cuda" else {**found, f"{name}_processor": statistics.median(processor[1:])}


def table(rows) -> list[str]:
    suffix = "_processor" if any("train_token_processor" in row for row in rows) else ""
    lines = []
    for name in values(rows, "method"):
        scaled = [{**row, "train": 1e6 * row[f"train_token{suffix}"],
                   **{f"ms_{s}": 1e3 * row[f"sample_{s}{suffix}"] for s in COLUMNS if f"sample_{s}" in row}}
                  for row in of(rows, method=name)]  # fmt: skip
        lines.append([name, *(cell(scaled, field, 0) for field in ("train", *(f"ms_{s}" for s in COLUMNS)))])
    what = "processor " if suffix else ""
    passes = rows[0]["passes"] if rows else 0
    titles = ["method", f"training, {what}µs a token", *(f"{title}, {what}ms a sample" for title in COLUMNS.values())]
    length = rows[0]["length"] if rows else 0
    note = f"A sample has {length} tokens, and {passes} passes where nothing else is said. Left to right it has {length} passes of one position, with cached keys and values."
    return [*markdown(titles, lines), "", note]


def plot(rows):
    names = values(rows, "method")
    suffix = "_processor" if any("train_token_processor" in row for row in rows) else ""
    chart, axes = figure(1, 2, figsize=(11, 3.5))
    axes[0].barh(names, [1e6 * of(rows, method=name)[0][f"train_token{suffix}"] for name in names])
    axes[0].set(xlabel="µs a training token")
    for shift, scheme in zip((-0.3, -0.1, 0.1, 0.3), COLUMNS, strict=True):
        shown = [
            (i + shift, of(rows, method=name)[0].get(f"sample_{scheme}{suffix}", 0.0)) for i, name in enumerate(names)
        ]
        axes[1].barh([y for y, _ in shown], [1e3 * x for _, x in shown], 0.19, label=COLUMNS[scheme])
    axes[1].set_yticks(range(len(names)), names)
    axes[1].set(xlabel="ms a sample")
    axes[1].legend()
    for axis in axes:
        axis.invert_yaxis()
    chart.tight_layout()
    return chart


if __name__ == "__main__":
    run(sys.modules[__name__])
