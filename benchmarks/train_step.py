"""A whole training step, time and peak memory, beside what it replaces; against the size of the vocabulary.

    python benchmarks/train_step.py                                  # 4 x 128 positions, D = 384, 6 layers; 6 minutes on two cores
    python benchmarks/train_step.py --json step.json --plot step.png
    python benchmarks/train_step.py --memory --batch 64              # the memory of 8,192 positions

Steps: "posterior" and "simplex" are this package's (no tensor of positions x V); "eager" is the paper's step as a user
would write it in PyTorch (Dirichlet sample, log, lerp, softmax, matmul, cross-entropy); "integer" is the same network
with ordinary token embeddings and dense logits, what an autoregressive model costs: the floor to aim at. All steps are
called in turn in one run; each is forward, backward and both optimizers.

Peak memory (--memory) is what torch allocates for the vocabulary's side of a step (input embedding, output layer, loss) at its
peak, with the gradients of the two matrices. "gradients" is these gradients alone: the least there can be.
"""

import json
import math
import time

import torch
import torch.nn.functional as F
from harness import Record, choices, figure, machine, measure, parse, parser_of, peak_bytes

from klflow_ext import Denoiser, DenoiserConfig, LogitPath
from klflow_ext.files import write_file
from klflow_ext.muon import Muon

STEPS = ("posterior", "simplex", "integer", "eager")
BETA = 0.01


class Step:
    """One way to make a training step of a network of this size; call it to do one."""

    def __init__(self, kind, vocab, arguments):
        torch.manual_seed(0)
        self.kind, self.vocab, device = kind, vocab, torch.device(arguments.device)
        shape = (arguments.batch, arguments.length)
        self.path = LogitPath(vocab)
        prior = 1 / torch.arange(2.7, vocab + 2.7)  # Zipf's law, as in texts
        input = "posterior" if kind == "posterior" else "simplex"
        config = DenoiserConfig(
            vocab, arguments.layers, arguments.width // 64, arguments.width, max_length=arguments.length, input=input
        )
        self.model = Denoiser(config, self.path, (prior / prior.sum()).log()).to(device)
        for p in self.model.parameters():
            if not p.any():  # output projections at zero would leave the rest without a gradient
                torch.nn.init.normal_(p, std=0.02)
        self.target = torch.multinomial(prior, math.prod(shape), replacement=True).view(shape).to(device)
        self.t = (torch.rand(shape[0]) * self.path.t_max).to(device)
        hidden = self.model.hidden_matrices()
        rest = [p for p in self.model.parameters() if all(p is not q for q in hidden)]
        self.optimizers = [torch.optim.AdamW(rest, lr=1e-4), Muon(hidden, lr=1e-4)]
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
        self.count = 0

    def loss(self):
        model, target, t, vocab = self.model, self.target, self.t, self.vocab
        if self.kind in ("posterior", "simplex"):
            return self.path.loss(model, target, t, torch.tensor([0, self.count], device=target.device))
        if self.kind == "integer":
            h = F.embedding(target, model.embedding)
        else:
            x0 = torch.distributions.Dirichlet(torch.ones(vocab, device=target.device)).sample(target.shape)
            log_x1 = torch.full_like(x0, math.log(BETA / vocab))
            log_x1.scatter_(-1, target[..., None], math.log(1 - BETA + BETA / vocab))
            x = torch.lerp(x0.log(), log_x1, t[:, None, None]).softmax(-1)
            h = (x - 1 / vocab) @ model.embedding * math.sqrt(vocab)
        logits = model.head(model.hidden(h, t))
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())

    def backward(self):
        with self.autocast:
            loss = self.loss()
        loss.backward()
        self.count += 1

    def __call__(self):
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def times(arguments, record):
    device = torch.device(arguments.device)
    print(f"{'V':>8} {'step':<11}{'ms':>9}{'of integer':>12}{'of eager':>10}")
    for vocab in arguments.vocab:
        steps = {kind: Step(kind, vocab, arguments) for kind in arguments.steps}
        median, rounds = measure(steps, device, arguments.seconds, label=f"V = {vocab}: ")
        for kind in steps:
            ratios = {peer: median[kind] / median[peer] for peer in ("integer", "eager") if peer in median}
            record.add({"vocab": vocab, "step": kind, "ms": median[kind], "rounds": rounds, "ratios": ratios})
            print(f"{vocab:>8} {kind:<11}{median[kind]:>9.0f}" + "".join(f"{ratios.get(p, math.nan):>{w}.2f}" for p, w in
                  (("integer", 12), ("eager", 10))), flush=True)  # fmt: skip


def memory_of(kind, vocab, arguments):
    """(bytes that the vocabulary's side holds at its peak, those of its gradients).

    The transformer is left out (it would hide what is held while it is idle): the embedding is normalised and goes to the head.
    """
    step = Step(kind, vocab, arguments)
    step.model.hidden = lambda h, t: F.rms_norm(h, h.shape[-1:])
    step.backward()  # what is made in a first call only is no part of it
    step.model.zero_grad(set_to_none=True)
    gradients = sum(p.numel() * p.element_size() for p in (step.model.embedding, step.model.head.weight))
    return peak_bytes(step.backward, torch.device(arguments.device)), gradients


def memories(arguments, record):
    print(f"{'V':>8} {'step':<11}{'peak MB':>9}{'gradients':>11}")
    for vocab in arguments.vocab:
        for kind in arguments.steps:
            if kind in ("integer", "eager") and 16 * arguments.batch * arguments.length * vocab > arguments.most_bytes:
                continue
            try:
                size, gradients = memory_of(kind, vocab, arguments)
            except RuntimeError as error:  # there is too little memory
                print(f"{vocab:>8} {kind:<11} failed: {str(error).splitlines()[:1]}")
                continue
            record.add({"vocab": vocab, "step": kind, "peak_bytes": size, "gradient_bytes": gradients})
            print(f"{vocab:>8} {kind:<11}{size / 1e6:>9.0f}{gradients / 1e6:>11.0f}", flush=True)


def plot(results, path):
    panels = [(name, key, label) for name, key, label in (
        ("times", "ms", "ms a step"), ("memory", "peak_bytes", "peak MB of the vocabulary's side of a step")) if results.get(name)]  # fmt: skip
    drawing, axes = figure(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    looks = {"posterior": ("#0072B2", "o", "-"), "simplex": ("#CC79A7", "X", "-."), "integer": ("black", "P", ":"), "eager": ("#7f7f7f", "d", "--")}  # fmt: skip
    names = {"posterior": "this package, posterior input", "simplex": "this package, the paper's input",
             "integer": "PyTorch, integer tokens (autoregressive)", "eager": "PyTorch, the paper's step"}  # fmt: skip
    for axis, (name, key, label) in zip(axes[0], panels, strict=True):
        for kind in STEPS:
            points = [
                (r["vocab"], r[key] / 1e6 if key == "peak_bytes" else r[key])
                for r in results[name]
                if r["step"] == kind
            ]
            if points:
                colour, marker, line = looks[kind]
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=names[kind])
        axis.set(xscale="log", yscale="log", xlabel="V", ylabel=label)
        if name == "memory":
            sizes = sorted({r["vocab"]: r["gradient_bytes"] / 1e6 for r in results[name]}.items())
            axis.plot(*zip(*sizes, strict=True), color="black", linewidth=0.8, label="the two gradients alone")
        vocabs = sorted({r["vocab"] for r in results[name]})
        axis.set_xticks(vocabs, [f"{vocab:,}" for vocab in vocabs])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120, format="png")


def parse_arguments():
    parser = parser_of(
        __doc__,
        seconds=(30, "time for each V, all steps together"),
        plots=True,
        json="results join those that the file holds",
    )
    parser.add_argument("--vocab", default="4096,50259,128256,262144", help="V,V,...")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: under autocast")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument(
        "--most-bytes", type=float, default=16e9, help="with --memory: dense steps above this are left out"
    )
    arguments = parse(parser)
    try:
        arguments.vocab = [int(v) for v in arguments.vocab.split(",")]
        assert min(arguments.vocab) >= 2
    except (ValueError, AssertionError):
        parser.error(f"--vocab: got {arguments.vocab!r}, allowed are integers >= 2, separated by commas")
    arguments.steps = choices(parser, "steps", arguments.steps, STEPS)
    if arguments.width < 64 or arguments.width % 64:
        parser.error(f"--width: got {arguments.width}, allowed is a multiple of 64")
    return arguments


def main():
    arguments = parse_arguments()
    size = {name: getattr(arguments, name) for name in ("batch", "length", "width", "layers", "dtype")}
    name = "memory" if arguments.memory else "times"
    held = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}

    def join(rows):
        new = {(r["vocab"], r["step"]) for r in rows}
        rows = rows + [r for r in held.get(name, []) if (r["vocab"], r["step"]) not in new]
        return sorted(rows, key=lambda r: (r["vocab"], STEPS.index(r["step"])))

    about = {f"{name}_machine": machine(arguments.device, size=size)}
    record = Record(arguments.json, name, join, **{**held, **about})
    start = time.perf_counter()
    (memories if arguments.memory else times)(arguments, record)
    print(f"done in {time.perf_counter() - start:.0f} s")
    if arguments.plot:
        write_file(arguments.plot, lambda path: plot(record.whole(), path))


if __name__ == "__main__":
    main()
