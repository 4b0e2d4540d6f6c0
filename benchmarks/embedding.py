#!/usr/bin/env python
"""The network's input, forward and backward: how long it takes and what it holds, beside what it replaces.

    python benchmarks/embedding.py                       # 512 rows, V = 50,257, D = 384; about a minute on two cores
    python benchmarks/embedding.py --device cuda --rows 8192 --dtypes bfloat16 --json results.json

Forms: x_t @ weight ("simplex"), the whole posterior q @ weight ("posterior"), its M largest entries and the rest's mean
("top M"), nn.Embedding's lookup of the clean tokens ("lookup": the floor), and x_t @ weight in plain PyTorch ("eager"). All
are called in turn in one run. Peak memory is what a call adds, the gradient of the weight included: of CUDA's allocator, or
of the process (Linux).
"""

import math

import torch
import torch.nn.functional as F
from harness import Record, machine, measure, parse, parser_of, peak_bytes

from klflow_ext import ops

BETA = 0.01


def forms(rows, vocab, width, dtype, device):
    """The forms as functions of nothing that do one forward and backward pass."""
    generator = torch.Generator(device=device).manual_seed(0)
    prior = 1 / torch.arange(2.7, vocab + 2.7, device=device)  # Zipf's law, as in texts
    log_prior = (prior / prior.sum()).log()
    target = torch.multinomial(log_prior.exp(), rows, replacement=True, generator=generator)
    t = torch.rand(rows, device=device, generator=generator) * 0.3
    rng = torch.tensor([1, 2], device=device)
    weight = torch.randn(vocab, width, device=device, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    c = math.log(vocab / BETA - vocab + 1)

    def eager():
        l = torch.empty(rows, vocab, device=device).exponential_().log_().mul_(1 - t[:, None])
        l[torch.arange(rows, device=device), target] += t * c
        return l.softmax(-1).to(dtype) @ weight

    def embedding(**options):
        return lambda: ops.noise_embedding(target, t, weight, rng, **options)

    forward = {
        "lookup": lambda: F.embedding(target, weight),
        "top 128": embedding(log_prior=log_prior, top=128),
        "top 512": embedding(log_prior=log_prior, top=512),
        "posterior": embedding(log_prior=log_prior, top=None),
        "simplex": embedding(),
        "eager": eager,
    }

    def both(function):
        weight.grad = None
        function().backward(upstream)

    return {name: lambda function=function: both(function) for name, function in forward.items()}, weight


def run(arguments, record):
    device = torch.device(arguments.device)
    print(f"{'form':<12}{'dtype':>10}{'ms':>10}{'of eager':>10}{'of simplex':>12}{'of lookup':>11}{'peak MB':>9}")
    for dtype in arguments.dtypes:
        functions, weight = forms(arguments.rows, arguments.vocab, arguments.width, getattr(torch, dtype), device)
        memory = {}
        for name, function in functions.items():
            function()
            weight.grad = None
            memory[name] = peak_bytes(function, device)

        def free(weight=weight):
            weight.grad = None

        ms, _ = measure(functions, device, arguments.seconds, before=free)
        for name in functions:
            ratios = {peer: ms[name] / ms[peer] for peer in ("eager", "simplex", "lookup")}
            record.add({"form": name, "rows": arguments.rows, "vocab": arguments.vocab, "width": arguments.width,
                        "dtype": dtype, "ms": ms[name], "ratios": ratios, "peak_bytes": memory[name]})  # fmt: skip
            print(
                f"{name:<12}{dtype:>10}{ms[name]:>10.2f}{ratios['eager']:>10.3f}{ratios['simplex']:>12.3f}"
                f"{ratios['lookup']:>11.1f}{memory[name] / 1e6:>9.0f}",
                flush=True,
            )


def parse_arguments():
    parser = parser_of(__doc__, seconds=(20, "time for each dtype, all forms together"), dtypes=("float32", None))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--width", type=int, default=384)
    arguments = parse(parser)
    if arguments.rows < 1 or arguments.vocab < 512 or arguments.width < 1:
        parser.error("--rows, --vocab, --width: allowed are at least 1, 512 and 1")
    return arguments


def main():
    arguments = parse_arguments()
    run(arguments, Record(arguments.json, machine=machine(arguments.device)))


if __name__ == "__main__":
    main()
