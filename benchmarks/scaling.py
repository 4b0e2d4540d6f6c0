"""A training step on several processes: measured on two of this machine's, and predicted on paper for H100s.

    python benchmarks/scaling.py                    # both; 1 minute
    python benchmarks/scaling.py --no-measure       # the prediction alone; seconds
    python benchmarks/scaling.py --json scaling.json

Measured: seconds of a step of a small network, by one process and by two (gloo) of one thread each, every process with the same number
of sequences; and what two processes' losses differ from those of one.

Predicted, NOT MEASURED on any GPU: step time and memory of the presets on H100s, from parameters and saved activations that
are counted here, and from the assumptions below, which are printed with the table. Communication hides behind the arithmetic
that torch's engines run beside it: of "ddp" behind the backward pass, of "fsdp" behind both, but for the first gather and
the last reduction.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Record, machine, parse, parser_of

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, TrainConfig, Trainer

# ---- measured

V, SHAPE = 2048, {"n_layer": 4, "n_head": 4, "n_embd": 128, "max_length": 64}
ENGINES = {"ddp": {}, "fsdp": {"engine": "fsdp"}, "fsdp, recompute": {"engine": "fsdp", "recompute": True}}


def run(sequences, steps, **options):
    """(median seconds of a step, losses) of a new run."""
    torch.manual_seed(0)
    path = LogitPath(V)
    stream = torch.randint(V, (20_000,), generator=torch.Generator().manual_seed(0)).numpy()
    config = TrainConfig(steps=steps, batch_size=sequences, length=64, **options)
    trainer = Trainer(Denoiser(DenoiserConfig(V, **SHAPE), path), path, stream, config)
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(trainer.train_step())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), losses


def process(rank, rendezvous, arguments, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {name: run(2 * arguments.sequences, arguments.steps, **options) for name, options in ENGINES.items()}
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def measured(arguments, record):
    torch.set_num_threads(1)
    alone, _ = run(arguments.sequences, arguments.steps)
    _, losses = run(2 * arguments.sequences, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        torch.multiprocessing.spawn(process, (Path(folder) / "meet", arguments, out), nprocs=2)
        found = torch.load(out)
    tokens = 64 * arguments.sequences
    print(f"\nmeasured: {arguments.sequences} x 64 positions a process, V = {V}, {SHAPE}")
    print(f"{'':18}{'s a step':>10}{'tokens/s':>10}{'x one':>8}{'largest difference of the losses':>36}")
    print(f"{'one process':18}{alone:10.3f}{tokens / alone:10,.0f}{1:8.2f}")
    for name, (seconds, others) in found.items():
        apart = max(abs(a - b) for a, b in zip(losses, others, strict=True))
        print(f"{'two, ' + name:18}{seconds:10.3f}{2 * tokens / seconds:10,.0f}{2 * alone / seconds:8.2f}{apart:36.1e}")
        record.add({"engine": name, "processes": 2, "seconds": seconds, "alone": alone, "loss_difference": apart})


# ---- on paper


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines and of the code on them; nothing of it was measured."""

    peak: float = 989e12  # products in bfloat16, dense, of an H100 SXM: operations a second
    utilisation: float = 0.5  # share of it that the products of blocks and head reach
    memory_rate: float = 3.35e12 * 0.8  # bytes a second, of which a copy reaches 80 %
    noise_rate: float = 0.5e12  # columns of noise and evidence a second: 132 x 1.75 GHz x 128 / about 60 instructions
    memory: float = 80e9
    other_memory: float = 3e9  # CUDA's context, NCCL's buffers, what the allocator cannot use
    gpus_a_node: int = 8
    nvlink: float = 450e9 * 0.8  # bytes a second and direction of a GPU within a node
    network: float = 50e9 * 0.8  # 400 Gb/s for each GPU
    hop: float = 5e-6  # seconds of latency from a node to the next


def gather_seconds(machine, ranks, nodes, size):
    """All-gather or reduce-scatter of `size` bytes over `ranks` GPUs, of `nodes` nodes: a ring over all, with every GPU's own
    network card beside NVLink."""
    if ranks == 1:
        return 0.0
    inside = (ranks - 1) / ranks * size / machine.nvlink
    between = 0.0 if nodes == 1 else (nodes - 1) / nodes * size / (machine.network * ranks / nodes)
    return max(inside, between) + machine.hop * nodes


def all_reduce_seconds(machine, ranks, nodes, size):
    return 2 * gather_seconds(machine, ranks, nodes, size)


@dataclass(frozen=True)
class Model:
    """What is counted of a preset: parameters of a block and of the root, and the bytes that a block saves for its backward pass."""

    name: str
    config: DenoiserConfig
    block: int
    root: int
    saved: float  # bytes a position
    saved_recompute: float

    @property
    def layers(self):
        return self.config.n_layer

    @property
    def parameters(self):
        return self.layers * self.block + self.root


def saved_bytes(config, recompute):
    """Bytes a position that a block keeps between forward and backward pass under autocast, counted on the CPU of one layer more or
    less, with few positions. A GPU's attention keeps the same: its inputs, its output and a number a row."""
    counts = []
    for layers in (1, 2):
        small = replace(config, n_layer=layers, vocab_size=64, top=None, max_length=64)
        model, kept = Denoiser(small, LogitPath(64)), {}
        model.recompute = recompute
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x, kept=kept, parameters=parameters):
            storage = x.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no address comes twice
            return x

        h = torch.randn(1, 64, config.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            out = model.hidden(h, 0.1)
        # autocast's casts of weights are counted with the weights
        shapes = {tuple(s) for p in model.parameters() if p.dim() == 2 for s in (p.shape, p.shape[::-1])}
        counts.append(sum(n for n, x in kept.values() if tuple(x.shape) not in shapes))
        del out
    return (counts[1] - counts[0]) / 65  # the positions and the time's


def model_of(name, vocab):
    config = DenoiserConfig.preset(name, vocab)
    with torch.device("meta"):
        model = Denoiser(config, LogitPath(vocab))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - config.n_layer * block
    return Model(name, config, block, root, saved_bytes(config, False), saved_bytes(config, True))


def predict(model, machine, gpus, engine, sequences, recompute):
    """{...} of one step of `sequences` a GPU."""
    c, d = model.config, model.config.n_embd
    length, rows = c.max_length, sequences * c.max_length
    nodes = -(-gpus // machine.gpus_a_node)
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, machine.gpus_a_node)}[engine]
    per_second = machine.peak * machine.utilisation

    # Arithmetic: 2 operations a parameter and position forwards, 4 backwards; attention over all positions; the head's three products.
    forward = rows * model.layers * (2 * model.block + 4 * length * d) / per_second
    backward = (2 + recompute) * forward
    head = rows * 6 * c.vocab_size * d / per_second + 5 * rows * c.vocab_size * 2 / machine.memory_rate
    noise = rows * c.vocab_size / machine.noise_rate
    top = min(c.top or c.vocab_size, c.vocab_size)
    embedding = 2 * rows * top * d * 4 / machine.memory_rate  # gathered, and scattered in the backward pass
    # Optimizers: AdamW reads and writes 28 bytes a parameter, Muon 20, with its 15 products of every matrix, spread over shards.
    blocks = model.layers * model.block
    muon = 15 * 2 * blocks * d / shards / per_second
    optimizer = (28 * model.root + 20 * blocks) / shards / machine.memory_rate + muon
    arithmetic = noise + embedding + forward + head + backward + optimizer

    if engine == "ddp":
        reduction = all_reduce_seconds(machine, gpus, nodes, 4 * model.parameters)
        hidden, last = backward, all_reduce_seconds(machine, gpus, nodes, 25 * 2**20)  # the last bucket
        exposed = max(reduction - hidden, last) if gpus > 1 else 0.0
        sent = reduction
    else:
        inner = 1 if engine == "hsdp" else nodes
        outer = gpus // shards
        root = gather_seconds(machine, shards, inner, 4 * model.root)
        block_in = gather_seconds(machine, shards, inner, 2 * model.block)
        block_out = gather_seconds(machine, shards, inner, 4 * model.block)
        copies = all_reduce_seconds(machine, outer, outer, 4 * model.parameters / shards) if outer > 1 else 0.0
        forwards = root + model.layers * block_in
        backwards = model.layers * (block_in + block_out) + root + copies
        exposed = max(forwards - forward, root + block_in) + max(backwards - backward - head, root) if gpus > 1 else 0.0
        sent = forwards + backwards

    saved = model.saved_recompute if recompute else model.saved
    activations = rows * (model.layers * saved + 24 * d) + (model.saved * rows if recompute else 0.0)
    logits = 2**29
    # float32 weights, gradients and moments: two of AdamW's, one of Muon's
    state = 16 * model.root + 12 * blocks
    if engine == "ddp":
        held = state + 2 * blocks  # and autocast's weights
    else:
        held = (
            state / shards + 8 * model.root + 2 * (2 + 4) * model.block
        )  # the root and its gradient whole, and two blocks
    memory = held + activations + logits + machine.other_memory
    step = arithmetic + exposed
    flops = rows * (6 * (blocks + c.vocab_size * d) + 12 * model.layers * length * d)
    return {
        "preset": model.name, "gpus": gpus, "engine": engine, "recompute": recompute, "sequences": sequences,
        "step": step, "vocabulary": noise + embedding + head, "optimizer": optimizer, "sent": sent, "exposed": exposed, "memory": memory,
        "tokens": gpus * rows / step, "mfu": flops / machine.peak / step, "fits": memory < machine.memory,
    }  # fmt: skip


PLANS = {"150m": (32, ("ddp",)), "1.5b": (16, ("ddp", "fsdp", "hsdp"))}  # sequences of 1,024 a GPU, engines


def predicted(arguments, record):
    machine = Machine()
    print("\nPREDICTED, on paper; nothing of it was measured on a GPU. Assumed:")
    for name, value in asdict(machine).items():
        print(f"  {name:14} {value:g}")
    for name, (sequences, engines) in PLANS.items():
        model = model_of(name, arguments.vocab)
        print(
            f"\n{name}: {model.parameters / 1e6:,.0f} M parameters, {model.root / 1e6:,.0f} M of them outside the blocks; V = "
            f"{arguments.vocab:,}; {sequences} x {model.config.max_length:,} positions a GPU; a block saves {model.saved / 1e3:.1f} kB a "
            f"position, recomputed {model.saved_recompute / 1e3:.1f} (counted)"
        )
        print(
            f"{'GPUs':>5} {'engine':16}{'ms a step':>10}{'vocabulary':>11}{'optimizer':>10}{'sends':>8}{'exposed':>9}{'M tokens/s':>12}{'of peak':>9}{'GB a GPU':>10}"
        )
        for gpus in (1, 8, 64, 512):
            for engine in engines if gpus > 1 else engines[:1]:
                if engine == "hsdp" and gpus <= machine.gpus_a_node:
                    continue
                found = predict(model, machine, gpus, engine, sequences, False)
                if not found["fits"]:
                    found = predict(model, machine, gpus, engine, sequences, True)
                record.add(found)
                what = ("-" if gpus == 1 else engine) + ", recompute" * found["recompute"]
                print(
                    f"{gpus:5} {what:16}{1e3 * found['step']:10.0f}{1e3 * found['vocabulary']:11.0f}{1e3 * found['optimizer']:10.0f}"
                    f"{1e3 * found['sent']:8.1f}{1e3 * found['exposed']:9.1f}"
                    f"{found['tokens'] / 1e6:12.2f}{found['mfu']:9.0%}{found['memory'] / 1e9:10.1f}{'' if found['fits'] else '  too much'}"
                )


def main():
    parser = parser_of(__doc__, json="where figures and predictions go")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each run")
    parser.add_argument("--sequences", type=int, default=8, help="sequences a process, measured")
    parser.add_argument("--vocab", type=int, default=50_258, help="V of the predictions")
    parser.add_argument("--no-measure", action="store_true", help="the prediction alone")
    arguments = parse(parser)
    about = machine("cpu", backend="gloo, 2 processes")
    if not arguments.no_measure:
        measured(arguments, Record(None))
    record = Record(arguments.json, name="predicted", machine=about, assumed=asdict(Machine()))
    predicted(arguments, record)


if __name__ == "__main__":
    main()
