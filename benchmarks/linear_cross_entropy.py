"""Times linear_cross_entropy, forward and backward, beside its peers, interleaved in one run, with each one's peak memory.

    python benchmarks/linear_cross_entropy.py                      # this machine's default shapes
    python benchmarks/linear_cross_entropy.py --shapes 512x50259x384 --dtypes float32 --json results.json

"extra" is the memory at the peak beyond the inputs and their gradients: resident size on the CPU, allocated on CUDA. "dense"
is cross_entropy(hidden @ weight.T), "torch ..." torch.nn.functional.linear_cross_entropy with these chunks. A peer whose first
call takes longer than --seconds is not called again.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from embedding import peak_bytes
from kernels import machine, once, save

from klflow_ext import ops

DEFAULT_SHAPES = {"cpu": "512x50259x384,2048x50259x768", "cuda": "8192x50259x768,8192x128256x2048,16384x262144x2048"}


def losses(hidden, weight, target):
    """Every function that gives the mean loss, by name."""
    found = {
        "ours": lambda: ops.linear_cross_entropy(hidden, weight, target),
        "dense": lambda: ops.cross_entropy(hidden @ weight.t(), target),
        "eager": lambda: F.cross_entropy((hidden @ weight.t()).float(), target),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        for name, chunks in {
            "aspect_ratio": {"chunking_method": "aspect_ratio"},
            "aspect_ratio:2": {"chunking_method": "aspect_ratio:2"},
            "256 rows": {"batch_chunk_size": 256},
            "one chunk": {"chunking_method": None},
        }.items():
            options = torch.nn.LinearCrossEntropyOptions(**chunks)
            found[f"torch {name}"] = lambda o=options: F.linear_cross_entropy(hidden, weight, target, options=o)
    if hidden.is_cuda:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            found["Liger"] = lambda: liger(weight, hidden, target)
        except ImportError:
            pass
        try:
            import cut_cross_entropy

            found["cut_cross_entropy"] = lambda: cut_cross_entropy.linear_cross_entropy(hidden, weight, target)
        except ImportError:
            pass
    return found


def measure(functions, device, seconds):
    """Median milliseconds of each function, called in turn, at least three times; the slow ones once."""
    times = {name: [once(function, device)] for name, function in functions.items()}
    again = {name: functions[name] for name in functions if times[name][0] < 1e3 * seconds}
    for name in again:
        times[name] = []
    start = time.perf_counter()
    while again and (time.perf_counter() - start < seconds or len(times[next(iter(again))]) < 3):
        for name, function in again.items():
            times[name].append(once(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def run(arguments):
    device = torch.device(arguments.device)
    results = []
    for rows, vocab, width in arguments.shapes:
        for dtype in arguments.dtypes:
            generator = torch.Generator(device=device).manual_seed(0)
            hidden = torch.randn(rows, width, device=device, generator=generator).to(getattr(torch, dtype))
            weight = (torch.randn(vocab, width, device=device, generator=generator) * width**-0.5).to(hidden.dtype)
            target = torch.randint(vocab, (rows,), device=device, generator=generator)
            leaves = [hidden.requires_grad_(), weight.requires_grad_()]
            gradients = sum(x.numel() * x.element_size() for x in leaves)

            def step(loss, leaves=leaves):
                for leaf in leaves:
                    leaf.grad = None
                loss().backward()

            functions = {}
            for name, loss in losses(hidden, weight, target).items():
                if arguments.peers is None or name == "ours" or name in arguments.peers:
                    functions[name] = lambda loss=loss: step(loss)
            ms = measure(functions, device, arguments.seconds)
            extra = {}
            for name, function in functions.items():
                for leaf in leaves:
                    leaf.grad = None
                extra[name] = (peak_bytes(function, device) - gradients) / 1e6
            print(f"{rows} x {vocab} x {width} {dtype}")
            for name in functions:
                print(
                    f"  {name:<22}{ms[name]:>10.1f} ms  {ms[name] / ms['ours']:>6.2f} x ours  extra {extra[name]:>8.1f} MB"
                )
            results.append({"rows": rows, "vocab": vocab, "width": width, "dtype": dtype, "ms": ms, "extra_mb": extra})
    return results


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="ROWSxVxD,ROWSxVxD,...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each shape and dtype, all peers together")
    parser.add_argument("--peers", help="comma-separated names; default all, '' none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but this torch sees no CUDA device")
    try:
        shapes = (arguments.shapes or DEFAULT_SHAPES[arguments.device]).split(",")
        arguments.shapes = [tuple(int(n) for n in shape.split("x")) for shape in shapes]
        assert all(len(s) == 3 and s[0] >= 1 and s[1] >= 2 and s[2] >= 1 for s in arguments.shapes)
    except (ValueError, AssertionError):
        parser.error(f"--shapes: got {arguments.shapes!r}, allowed is ROWSxVxD,... with rows >= 1, V >= 2, D >= 1")
    arguments.dtypes = arguments.dtypes.split(",")
    for dtype in arguments.dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            parser.error(f"--dtypes: got {dtype!r}, allowed are float32, bfloat16, float16")
    if arguments.peers is not None:
        arguments.peers = arguments.peers.split(",")
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        parser.error(f"{arguments.json}: its folder does not exist")
    return arguments


def main():
    arguments = parse()
    about = machine(arguments.device)
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    results = run(arguments)
    save(arguments, {"machine": about, "results": results})


if __name__ == "__main__":
    main()
