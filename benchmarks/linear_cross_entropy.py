"""Times linear_cross_entropy, forward and backward, beside its peers, interleaved in one run, with each one's peak memory.

    python benchmarks/linear_cross_entropy.py                      # this machine's default shapes
    python benchmarks/linear_cross_entropy.py --shapes 512x50259x384 --dtypes float32 --json results.json

"extra" is the memory at the peak beyond the inputs and their gradients: what torch allocates. "dense"
is cross_entropy(hidden @ weight.T), "torch ..." torch.nn.functional.linear_cross_entropy with these chunks, "products" the three
matrix products alone, with all logits: the floor. A peer whose first call takes longer than --seconds is not called again.
"""

import torch
import torch.nn.functional as F
from harness import Record, machine, measure, parse, parser_of, peak_bytes, shapes_of, that_run

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


def products(hidden, weight):
    """The three matrix products of a step alone, with all logits: the floor."""
    hidden, weight = hidden.detach(), weight.detach()
    logits, dhidden, dweight = (x.new_empty(shape) for x, shape in (
        (hidden, (len(hidden), len(weight))), (hidden, hidden.shape), (weight, weight.shape)))  # fmt: skip

    def three():
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    return three


def run(arguments, record):
    device = torch.device(arguments.device)
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
            functions["products"] = products(hidden, weight)
            if device.type == "cuda":  # on a CPU none fails, and a first call takes long
                functions = that_run(functions, f"{rows} x {vocab} x {width} {dtype}")
            ms, _ = measure(functions, device, arguments.seconds, slowest=arguments.seconds)
            extra = {}
            for name, function in functions.items():
                for leaf in leaves:
                    leaf.grad = None
                extra[name] = (peak_bytes(function, device) - gradients) / 1e6
            print(f"{rows} x {vocab} x {width} {dtype}")
            for name in functions:
                print(
                    f"  {name:<22}{ms[name]:>10.1f} ms  {ms[name] / ms['ours']:>6.2f} x ours  extra {extra[name]:>8.1f} MB",
                    flush=True,
                )
            record.add({"rows": rows, "vocab": vocab, "width": width, "dtype": dtype, "ms": ms, "extra_mb": extra})


def parse_arguments():
    parser = parser_of(
        __doc__,
        seconds=(5.0, "time for each shape and dtype, all peers together"),
        dtypes=("float32,bfloat16", None),
        shapes="ROWSxVxD,ROWSxVxD,...",
    )
    parser.add_argument("--peers", help="comma-separated names; default all, '' none")
    arguments = parse(parser)
    shapes = arguments.shapes or DEFAULT_SHAPES[arguments.device]
    arguments.shapes = shapes_of(parser, shapes, ("rows", "V", "D"), (1, 2, 1))
    if arguments.peers is not None:
        arguments.peers = arguments.peers.split(",")
    return arguments


def main():
    arguments = parse_arguments()
    run(arguments, Record(arguments.json, machine=machine(arguments.device)))


if __name__ == "__main__":
    main()
