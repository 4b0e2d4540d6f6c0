#!/usr/bin/env python
"""Tokens per second of the sampling scheme, or of slices, on a trained run; on CUDA also with passes replayed as CUDA graphs.

    klflow train --out runs/train && python benchmarks/sampling.py runs/train --json results.json

Each line is the median of several calls after one that is not counted, which records the graphs. Both ways are called in turn
and must give the same tokens.
"""

import statistics
from pathlib import Path

import torch
from harness import Record, machine, parse, parser_of

from klflow_ext import Run, Sampler


def parse_arguments():
    parser = parser_of(__doc__, dtypes=("float32,bfloat16", "of the matrix products (autocast)"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", default="1,16,256", help="sequences at a time")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--method", choices=["sampling", "slices"], default="sampling")
    return parse(parser)


def main():
    arguments = parse_arguments()
    about = machine(arguments.device)
    run = Run(arguments.run)
    model, path = run.model()
    model.to(arguments.device)
    flags = [False, True] if arguments.device == "cuda" else [False]
    samplers = {flag: Sampler(model, path, arguments.device, cuda_graph=flag) for flag in flags}
    record = Record(arguments.json, "rows", machine=about, model=run.config()["model"])
    for dtype in arguments.dtypes:
        for batch in map(int, arguments.batches.split(",")):
            seconds = {flag: [] for flag in flags}
            for seed in range(arguments.calls + 1):
                tokens = []
                for flag, sampler in samplers.items():
                    with torch.autocast(arguments.device, getattr(torch, dtype), enabled=dtype != "float32"):
                        result = sampler.sample(
                            (batch, arguments.length), steps=arguments.steps, method=arguments.method, seed=seed
                        )
                    seconds[flag].append(result.seconds)
                    tokens.append(result.tokens)
                if not all(torch.equal(tokens[0], other) for other in tokens):
                    raise SystemExit(f"{dtype}, batch {batch}, seed {seed}: the replays gave other tokens")
            for flag, times in seconds.items():
                rate = batch * arguments.length / statistics.median(times[1:])
                shape = {
                    "method": arguments.method,
                    "batch": batch,
                    "length": arguments.length,
                    "steps": arguments.steps,
                }
                record.add({"dtype": dtype, **shape, "cuda_graph": flag, "tokens_per_second": rate})
                print(f"{dtype:<9} batch {batch:>4}  cuda_graph {flag!s:<5}  {rate:>12,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
