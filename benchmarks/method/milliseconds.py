"""Seconds of a sample by each method and number of passes."""

from __future__ import annotations

import json
import statistics

import torch
from compared import COST, LENGTH, METHODS, order_of

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, LogitPath, Sampler
from klflow_ext.files import write_file

SHOWN = ("autoregressive", "slices", "mask slices", "segments", "posterior", "simplex", "mask")
REPEATS = 3


def cost(arguments) -> None:
    """Milliseconds of a sample, of `count` drawn together: untrained networks, which cost as much, called in turn."""
    vocab, calls = arguments.vocab_size, {}
    for name in SHOWN:
        make_path, model_options, _ = METHODS[name]
        path = make_path(vocab)
        torch.manual_seed(0)
        network = Denoiser(DenoiserConfig(vocab, 4, 4, 256, **model_options), path)
        torch.nn.init.normal_(network.head.weight, std=0.1)  # it begins at zero, where all tokens are as likely
        sampler = Sampler(network.eval(), path)
        method = order_of(name) or ("sampling" if isinstance(path, LogitPath) else "basic")
        for steps in [LENGTH] if isinstance(path, Autoregressive) else arguments.nfe:
            options = {"steps": steps, "method": None if isinstance(path, Autoregressive) else method}
            calls[name, steps] = (sampler, options)
    seconds: dict = {key: [] for key in calls}
    for seed in range(1 + REPEATS):
        for key, (sampler, options) in calls.items():
            result = sampler.sample((arguments.count, LENGTH), top_k=20, seed=seed, **options)
            seconds[key].append(result.seconds)
        print(f"V = {vocab}: round {seed} of {REPEATS}", flush=True)
    rows = []
    for (name, steps), times in seconds.items():
        row = {"name": name, "steps": steps, "ms": 1e3 * statistics.median(times[1:]) / arguments.count}
        rows.append(row)
        print(f"{name:<16} {steps:>3} passes: {row['ms']:.2f} ms a sample")
    found = json.loads(COST.read_text()) if COST.exists() else {}
    found[str(vocab)] = {"count": arguments.count, "threads": torch.get_num_threads(), "repeats": REPEATS, "rows": rows}
    write_file(COST, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))
