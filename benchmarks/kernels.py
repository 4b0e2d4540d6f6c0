"""Times every kernel beside its peers, interleaved in one run, as shares of a copy measured in the same run.

    python benchmarks/kernels.py                         # this machine's default shapes, under three minutes
    python benchmarks/kernels.py --device cuda --json results.json --plot results.png
    python benchmarks/kernels.py --shapes 1024x50259 --dtypes float32 --ops cross_entropy,topk_sample
    python benchmarks/kernels.py --scaling --plot scaling.png    # time against rows, V and threads; a minute

"copies" is the time over that of copying one (rows x V) tensor; "bound" is the share of the copy's bandwidth that the
kernel's own bytes reach; the last columns say how many times faster it is than each peer. On CUDA "replay" is the same
call as a CUDA graph.
"""

import time

import torch
import torch.nn.functional as F
from harness import (
    Record,
    choices,
    figure,
    machine,
    measure,
    parse,
    parser_of,
    recorded,
    shapes_of,
    show_left,
    that_run,
)

from klflow_ext import ops
from klflow_ext.files import write_file

DEFAULT_SHAPES = {
    "cpu": "1024x50259,8192x2048,1x50259",
    "cuda": "4096x50259,4096x50304,16384x50259,4096x32768,4096x128256,4096x262144,1x131072",
}
TOP_K, T, BETA = 50, 0.2, 0.01
KNOTS, LOWEST = 1024, -32.0


class Case:
    """One op on one shape: ours, the peers that do the same, and the elements it must read and write (in rows x V)."""

    def __init__(self, ours, traffic, peers):
        self.ours, self.traffic, self.peers = ours, traffic, peers


def compiled(function):
    return torch.compile(function, dynamic=False)


def installed_peers(name, logits, target):
    """The same op of other libraries, where they are installed; CUDA only. A peer that fails is named and left out."""
    peers = {}
    leaf = logits.clone().requires_grad_() if name.startswith("cross_entropy_") else None

    def both(loss):
        leaf.grad = None
        loss.sum().backward()

    if name.startswith("cross_entropy"):
        try:
            from liger_kernel.transformers import LigerCrossEntropyLoss

            liger = LigerCrossEntropyLoss()
            peers["Liger"] = (lambda: both(liger(leaf, target))) if leaf is not None else lambda: liger(logits, target)
        except ImportError:
            pass
        try:
            from quack.cross_entropy import cross_entropy_fwd

            gradient = leaf is not None
            peers["quack"] = lambda: cross_entropy_fwd(logits, target, return_lse=True, return_dx=gradient)
        except ImportError:
            pass
    if name == "topk_sample":
        try:
            from flashinfer.sampling import top_k_top_p_sampling_from_logits

            wide = logits.float()
            peers["FlashInfer"] = lambda: top_k_top_p_sampling_from_logits(wide, TOP_K, 1.0)
        except ImportError:
            pass
    return peers


def build_case(name, rows, vocab, dtype, device):
    """Inputs are made once; `out=` and in-place forms are used by all that have them."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = (torch.randn(rows, vocab, device=device, generator=generator) * 3).to(dtype)
    target = torch.randint(vocab, (rows,), device=device, generator=generator)
    out, t = torch.empty_like(logits), torch.full((rows,), T, device=device)
    rng = torch.tensor([1, 2], device=device)
    c = torch.log(torch.tensor(vocab / BETA - vocab + 1)).item()
    rate = 0.05

    def noise_eager():
        noise = torch.empty(rows, vocab, device=device).exponential_()
        l = noise.log_().mul_(1 - T)
        l[torch.arange(rows, device=device), target] += T * c
        return l.softmax(-1).to(dtype)

    def noise_compiled():
        l = (1 - T) * torch.log(-torch.log(torch.rand(rows, vocab, device=device).clamp_min(1e-9)))
        column = torch.arange(vocab, device=device)
        return (l + T * c * (column == target[:, None])).softmax(-1).to(dtype)

    def sample_eager():
        values, index = logits.topk(TOP_K)
        choice = torch.multinomial(values.float().softmax(-1), 1)
        return index.gather(1, choice)[:, 0]

    def renoise_eager():
        token = sample_eager()
        l = torch.empty(rows, vocab, device=device).exponential_().log_().mul_(1 - T)
        l[torch.arange(rows, device=device), token] += T * c
        return l.softmax(-1).to(dtype)

    if name == "noise_interpolate":
        ours = lambda: ops.noise_interpolate(target, t, rng, vocab_size=vocab, out=out)  # noqa: E731
        return Case(ours, 1, {"eager": noise_eager, "compile": compiled(noise_compiled)})
    if name == "logit_interpolate":
        log_x0 = torch.randn_like(logits)

        def eager():
            return torch.lerp(log_x0, logits, T).softmax(-1)

        return Case(
            lambda: ops.logit_interpolate(log_x0, logits, T, out=out), 3, {"eager": eager, "compile": compiled(eager)}
        )
    if name == "cross_entropy":
        eager = lambda: F.cross_entropy(logits.float(), target)  # noqa: E731
        return Case(lambda: ops.cross_entropy(logits, target), 1, {"eager": eager, "compile": compiled(eager)})
    if name in ("cross_entropy_grad", "cross_entropy_autograd"):

        def loss(x):
            return F.cross_entropy(x.float(), target)

        leaf = logits.clone().requires_grad_()
        mine, fast = logits.clone(), compiled(loss)

        def both(f):
            leaf.grad = None
            f(leaf).backward()

        peers = {"eager": lambda: both(loss), "compile": lambda: both(fast)}
        if name == "cross_entropy_autograd":  # the same by loss.backward()
            return Case(lambda: both(lambda x: ops.cross_entropy(x, target)), 2, peers)
        return Case(lambda: ops.cross_entropy_grad(mine, target, out=mine), 2, peers)
    if name == "topk_sample":
        peers = {"eager": sample_eager, "torch.topk": lambda: logits.topk(TOP_K)}
        return Case(lambda: ops.topk_sample(logits, TOP_K, rng), 1, peers)
    if name == "topk_renoise":
        return Case(lambda: ops.topk_renoise(logits, TOP_K, t, rng, out=out), 2, {"eager": renoise_eager})
    if name == "softmax_expectation":
        table = torch.linspace(-LOWEST, 0.0, KNOTS, device=device)  # the entropy

        def expectation_eager():
            log_p = logits.float().log_softmax(-1)
            place = (1 - log_p.clamp(LOWEST, 0) / LOWEST) * (KNOTS - 1)
            i = place.floor().clamp(max=KNOTS - 2).long()
            return (log_p.exp() * torch.lerp(table[i], table[i + 1], place - i)).sum(-1)

        peers = {"eager": expectation_eager, "compile": compiled(expectation_eager)}
        return Case(lambda: ops.softmax_expectation(logits, table, lowest=LOWEST), 1, peers)
    log_x = torch.randn(rows, vocab, device=device).log_softmax(-1)

    def euler_eager():
        l = (1 - rate) * log_x + rate * c * logits.float().softmax(-1)
        log_next = l.log_softmax(-1)
        return log_next, log_next.exp().to(dtype)

    size = logits.element_size()
    traffic = (2 * size + 8) / size  # logits in, x out, the float32 state in and out
    ours = lambda: ops.euler_step(log_x, logits, rate, inplace=True, out=out)  # noqa: E731
    return Case(ours, traffic, {"eager": euler_eager, "compile": compiled(euler_eager)})


OPS = [
    "noise_interpolate",
    "logit_interpolate",
    "cross_entropy",
    "cross_entropy_grad",
    "cross_entropy_autograd",
    "topk_sample",
    "topk_renoise",
    "euler_step",
    "softmax_expectation",
]


def run(arguments, record):
    device = torch.device(arguments.device)
    todo = [(s, d, o) for s in arguments.shapes for d in arguments.dtypes for o in arguments.ops]
    begin = time.perf_counter()
    print(f"{'op':<20}{'rows x V':>16} {'dtype':>9}{'ms':>9}{'copies':>8}{'bound':>7}  times faster than")
    for number, ((rows, vocab), dtype, name) in enumerate(todo):
        torch._dynamo.reset()
        if number:
            show_left((time.perf_counter() - begin) / number * (len(todo) - number), f"{number}/{len(todo)}, ")
        case = build_case(name, rows, vocab, getattr(torch, dtype), device)
        source = torch.ones(rows, vocab, dtype=getattr(torch, dtype), device=device)
        sink = torch.empty_like(source)
        peers = {} if arguments.no_peers else dict(case.peers)
        if peers and device.type == "cuda":
            generator = torch.Generator(device=device).manual_seed(0)
            logits = (torch.randn(rows, vocab, device=device, generator=generator) * 3).to(getattr(torch, dtype))
            target = torch.randint(vocab, (rows,), device=device, generator=generator)
            peers |= that_run(installed_peers(name, logits, target), f"{name} {rows} x {vocab} {dtype}")
        functions = {"ours": case.ours, "copy": lambda sink=sink, source=source: sink.copy_(source), **peers}
        if device.type == "cuda":
            try:
                functions["replay"] = recorded(case.ours)
            except RuntimeError as error:
                print(f"{name} is not recorded as a graph: {str(error).splitlines()[0]}", flush=True)
        ms, _ = measure(functions, device, arguments.seconds)
        copies = ms["ours"] / ms["copy"]
        ratios = {peer: ms[peer] / ms["ours"] for peer in peers}
        record.add({"op": name, "rows": rows, "vocab": vocab, "dtype": dtype, "ms": ms, "copies": copies,
                    "bound": case.traffic / 2 / copies, "speedup": ratios})  # fmt: skip
        text = "  ".join(f"{peer} {ratio:.1f}" for peer, ratio in ratios.items())
        text += f"  replay {ms['replay']:.3f} ms" if "replay" in ms else ""
        print(
            f"{name:<20}{f'{rows} x {vocab}':>16} {dtype:>9}{ms['ours']:>9.3f}{copies:>8.2f}{case.traffic / 2 / copies:>7.0%}  {text}",
            flush=True,
        )


SCALING_OPS = ["noise_interpolate", "cross_entropy", "cross_entropy_grad", "topk_sample", "euler_step"]


def scaling(arguments, record):
    """Times of ours alone: rows at V = 50,259, V at 256 rows; on a CPU with one thread and with all."""
    device = torch.device(arguments.device)
    most = torch.get_num_threads()
    sweeps = {
        "rows": [(rows, 50259) for rows in (1, 4, 16, 64, 256, 1024)],
        "V": [(256, vocab) for vocab in (512, 2048, 8192, 32768, 131072, 262144)],
    }
    print(f"{'op':<20}{'rows x V':>16}{'threads':>9}{'ms':>10}{'ns an element':>15}")
    for name in [name for name in arguments.ops if name in SCALING_OPS]:
        for sweep, shapes in sweeps.items():
            for rows, vocab in shapes:
                case = build_case(name, rows, vocab, getattr(torch, arguments.dtypes[0]), device)
                for threads in [1] if device.type == "cuda" or most == 1 else [1, most]:
                    torch.set_num_threads(threads)
                    ms = measure({"ours": case.ours}, device, arguments.seconds / 2)[0]["ours"]
                    record.add({"op": name, "sweep": sweep, "rows": rows, "vocab": vocab, "threads": threads, "ms": ms})
                    each = ms * 1e6 / rows / vocab
                    print(f"{name:<20}{f'{rows} x {vocab}':>16}{threads:>9}{ms:>10.3f}{each:>15.3f}", flush=True)
    torch.set_num_threads(most)


def plot_scaling(results, path):
    names = list(dict.fromkeys(r["op"] for r in results))
    drawing, axes = figure(2, 3, figsize=(10, 6), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        own = [r for r in results if r["op"] == name]
        for sweep in ("rows", "V"):
            for threads in sorted({r["threads"] for r in own}):
                line = [r for r in own if r["sweep"] == sweep and r["threads"] == threads]
                label = f"{'rows of V = 50,259' if sweep == 'rows' else '256 rows of V'}, {threads} thread{'s' * (threads > 1)}"
                each = [1e6 * r["ms"] / (r["rows"] * r["vocab"]) for r in line]
                axis.plot([r["rows"] * r["vocab"] for r in line], each, label=label, marker="o" if sweep == "rows" else "s",
                          linestyle="-" if threads == 1 else "--", color="C0" if sweep == "rows" else "C1")  # fmt: skip
        axis.set(xscale="log", yscale="log", title=name)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    drawing.supxlabel("rows x V")
    drawing.supylabel("nanoseconds an element")
    drawing.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right")
    drawing.savefig(path, dpi=120, format="png")


def plot(results, path):
    """How many times faster than PyTorch each op is, at the first shape: a panel for each dtype."""
    rows, vocab = results[0]["rows"], results[0]["vocab"]
    results = [r for r in results if (r["rows"], r["vocab"]) == (rows, vocab)]
    dtypes, names = (list(dict.fromkeys(r[key] for r in results)) for key in ("dtype", "op"))
    drawing, axes = figure(
        1,
        len(dtypes),
        figsize=(5 * len(dtypes), 0.55 * len(names) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    looks = {"eager": ("#0072B2", ""), "compile": ("#E69F00", "///"), "torch.topk": ("#999999", "...")}
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        ratios = {r["op"]: r["speedup"] for r in results if r["dtype"] == dtype}
        for peer in dict.fromkeys(p for found in ratios.values() for p in found):
            colour, hatch = looks.get(peer, (None, "xx"))
            for i, name in enumerate(names):
                peers = list(ratios.get(name, {}))
                if peer in peers:
                    height = 0.8 / len(peers)
                    at = i + (peers.index(peer) - (len(peers) - 1) / 2) * height
                    ratio = ratios[name][peer]
                    bar = axis.barh(at, ratio - 1, left=1, height=height, color=colour, hatch=hatch, edgecolor="white", label=peer)  # fmt: skip
                    axis.bar_label(bar, [f"{ratio:.1f}"], padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=1.2)
        axis.set(
            xscale="log",
            title=dtype,
            xlabel="times faster than PyTorch (1: as fast)",
            yticks=range(len(names)),
            yticklabels=names,
        )
        axis.xaxis.set_major_formatter("{x:g}")
        all_ratios = [ratio for found in ratios.values() for ratio in found.values()]
        axis.set_xlim(0.8 * min(1, *all_ratios), 1.6 * max(1, *all_ratios))
    axes[0, 0].invert_yaxis()
    found = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(
                {"eager": "PyTorch, eager", "compile": "torch.compile", "torch.topk": "torch.topk alone"}.get(
                    label, label
                ),
                handle,
            )
    drawing.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found))
    drawing.suptitle(f"{rows:,} rows of V = {vocab:,}")
    drawing.savefig(path, dpi=120, format="png")


def parse_arguments():
    parser = parser_of(
        __doc__,
        seconds=(0.6, "time for each line, all peers together"),
        dtypes=("float32,bfloat16", None),
        shapes="ROWSxV,ROWSxV,...",
        plots=True,
    )
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--scaling", action="store_true", help="time against rows, V and threads, of the first dtype")
    arguments = parse(parser)
    arguments.shapes = shapes_of(parser, arguments.shapes or DEFAULT_SHAPES[arguments.device], ("rows", "V"), (1, 2))
    arguments.ops = choices(parser, "ops", arguments.ops, OPS)
    if arguments.plot and arguments.no_peers and not arguments.scaling:
        parser.error("--plot: it shows the times faster than the peers, which --no-peers leaves out")
    return arguments


def main():
    arguments = parse_arguments()
    record = Record(arguments.json, machine=machine(arguments.device))
    start = time.perf_counter()
    (scaling if arguments.scaling else run)(arguments, record)
    print(f"done in {time.perf_counter() - start:.0f} s")
    if arguments.plot:
        draw = plot_scaling if arguments.scaling else plot
        write_file(arguments.plot, lambda path: draw(record.rows, path))


if __name__ == "__main__":
    main()
