"""Every operator at three shapes: its results on a device beside the CPU's. Half a minute, before anything is measured.

    python benchmarks/smoke.py                  # exit code 1 where one differs or fails
    python benchmarks/smoke.py --device cpu     # the same calls, the CPU beside itself

"error" is |difference| / |result|, of a result at least .01 a row, the largest of all tensors that a call returns; of integers
the share that differs.
"""

import subprocess
import sys

import torch
from harness import choices, parse, parser_of, shapes_of

from klflow_ext import ops

SHAPES = "3x31,64x4096,16x50259"
WIDTH = 48
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the error
T = 0.1


def with_gradients(loss, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = loss(*leaves)
    return result, *torch.autograd.grad(result.float().square().sum(), leaves)


def results(rows, vocab, dtype, device):
    """{operator: function of nothing that returns its tensors}, of the same inputs on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    logits, log_x, hidden = normal(rows, vocab), normal(rows, vocab, dtype=torch.float32), normal(rows, WIDTH)
    weight, log_prior = normal(vocab, WIDTH), normal(vocab, dtype=torch.float32).log_softmax(0)
    target = torch.randint(vocab, (rows,), generator=generator).to(device)
    rng, top = torch.tensor([1, 2], device=device), min(20, vocab)
    boost = normal(rows, 3, dtype=torch.float32).abs()
    boosted = (target[:, None] + torch.arange(3, device=device)) % vocab

    def embedding(**options):
        return lambda: with_gradients(lambda w: ops.noise_embedding(target, T, w, rng, **options), weight)

    return {
        "noise_interpolate": lambda: [ops.noise_interpolate(target, T, rng, vocab_size=vocab, dtype=dtype)],
        "noise_interpolate log": lambda: [
            ops.noise_interpolate(target, T, rng, vocab_size=vocab, dtype=dtype, log=True)
        ],
        "logit_interpolate": lambda: [ops.logit_interpolate(log_x.to(dtype), logits, T)],
        "cross_entropy": lambda: with_gradients(
            lambda x: ops.cross_entropy(x, target, label_smoothing=0.1, reduction="none"), logits
        ),
        "cross_entropy_grad": lambda: ops.cross_entropy_grad(logits, target),
        "topk_sample": lambda: ops.topk_sample(logits.float(), top, rng, top_p=0.9),
        "topk_renoise": lambda: ops.topk_renoise(logits.float(), top, T, rng, dtype=dtype),
        "euler_step": lambda: ops.euler_step(log_x, logits, 0.1),
        "softmax_expectation": lambda: ops.softmax_expectation(logits, -torch.linspace(-32, 0, 257, device=device)),
        "noise_posterior": lambda: ops.noise_posterior(target, T, rng, log_prior, top=top),
        "noise_posterior boosts": lambda: ops.noise_posterior(boosted, T, rng, log_prior, top=top, boost=boost),
        "token_posterior": lambda: ops.token_posterior(log_x, T, log_prior, top=top),
        "noise_embedding": embedding(),
        "noise_embedding posterior": embedding(log_prior=log_prior, top=None),
        "noise_embedding top": embedding(log_prior=log_prior, top=top),
        "posterior_embedding": lambda: with_gradients(
            lambda w: ops.posterior_embedding(*ops.token_posterior(log_x, T, log_prior, top=top), w, log_prior), weight
        ),
        "linear_cross_entropy": lambda: with_gradients(
            lambda h, w: ops.linear_cross_entropy(h, w, target), hidden, weight
        ),
    }


def error(found, expected):
    found, expected = found.detach().cpu(), expected.detach()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if found.dim() == 0:
        found, expected = found[None], expected[None]
    if not found.is_floating_point():
        return (found != expected).double().mean().item()
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=0.01 * len(expected) ** 0.5)).item()


def main():
    parser = parser_of(__doc__, dtypes=("float32,bfloat16", None), shapes=f"ROWSxV,ROWSxV,...; default {SHAPES}")
    parser.add_argument("--ops", help="comma-separated names; default all")
    arguments = parse(parser)
    shapes = shapes_of(parser, arguments.shapes or SHAPES, ("rows", "V"), (1, 3))
    names = list(results(1, 3, torch.float32, "cpu"))
    if arguments.ops is not None:
        names = choices(parser, "ops", arguments.ops, names)
    cases = [(rows, vocab, getattr(torch, dtype)) for rows, vocab in shapes for dtype in arguments.dtypes]
    sys.exit(check(names, cases, arguments.device))


def check(names, cases, device):
    """What is not right, as a text; an operator that breaks CUDA for its process leaves the others to a process of their own."""
    bad = []
    for number, name in enumerate(names):
        for rows, vocab, dtype in cases:
            expected, found = (results(rows, vocab, dtype, where)[name] for where in ("cpu", device))
            what = f"{name:<28}{f'{rows} x {vocab}':>12}  {str(dtype).removeprefix('torch.'):<9}"
            try:
                worst = max(error(a, b) for a, b in zip(found(), expected(), strict=True))
                verdict = "ok    " if worst <= LIMIT[dtype] else "WRONG "  # NaN too
                print(f"{verdict} {what} error {worst:.1e}", flush=True)
            except Exception as failure:
                verdict = "FAILED"
                print(f"{verdict} {what} {type(failure).__name__}: {str(failure).splitlines()[:1]}", flush=True)
                if is_broken(device):
                    rest = others(names[number + 1 :]) if number + 1 < len(names) else 0
                    return f"not right: {', '.join(dict.fromkeys([*bad, name]))}; CUDA broke{'' if rest == 0 else ', and more'}"
            if verdict != "ok    ":
                bad.append(name)
    return f"not right: {', '.join(dict.fromkeys(bad))}" if bad else 0


def is_broken(device):
    try:
        torch.ones(1, device=device).item()
        return False
    except RuntimeError:
        return True


def others(names):
    """The exit code of a new process for these operators."""
    return subprocess.run([sys.executable, *sys.argv, "--ops", ",".join(names)]).returncode


if __name__ == "__main__":
    main()
