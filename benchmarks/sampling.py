#!/usr/bin/env python
"""Tokens per second of the sampling scheme on a trained run; on CUDA also with steps replayed as CUDA graphs.

    klflow train --out runs/train && python benchmarks/sampling.py runs/train --json results.json

Each line is the median of several calls after one that is not counted, which records the graphs. Both ways are called in turn
and must give the same tokens.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from kernels import machine, save

from klflow_ext import Sampler, load_run


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default="1,16,256", help="sequences at a time")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the matrix products (autocast)")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    arguments = parse()
    about = machine(arguments.device)
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    model, path, _ = load_run(arguments.run)
    model.to(arguments.device)
    flags = [False, True] if arguments.device == "cuda" else [False]
    samplers = {flag: Sampler(model, path, arguments.device, cuda_graph=flag) for flag in flags}
    rows = []
    for dtype in arguments.dtypes.split(","):
        for batch in map(int, arguments.batches.split(",")):
            seconds = {flag: [] for flag in flags}
            for seed in range(arguments.calls + 1):
                tokens = []
                for flag, sampler in samplers.items():
                    with torch.autocast(arguments.device, torch.bfloat16, enabled=dtype == "bfloat16"):
                        result = sampler.sample(
                            (batch, arguments.length), steps=arguments.steps, method="sampling", seed=seed
                        )
                    seconds[flag].append(result.seconds)
                    tokens.append(result.tokens)
                if not all(torch.equal(tokens[0], other) for other in tokens):
                    raise SystemExit(f"{dtype}, batch {batch}, seed {seed}: the replayed steps gave other tokens")
            for flag, times in seconds.items():
                rate = batch * arguments.length / statistics.median(times[1:])
                shape = {"batch": batch, "length": arguments.length, "steps": arguments.steps}
                rows.append({"dtype": dtype, **shape, "cuda_graph": flag, "tokens_per_second": rate})
                print(f"{dtype:<9} batch {batch:>4}  cuda_graph {flag!s:<5}  {rate:>12,.0f} tokens/s", flush=True)
    save(
        arguments,
        {"machine": about, "model": json.loads((arguments.run / "config.json").read_text())["model"], "rows": rows},
    )


if __name__ == "__main__":
    main()
