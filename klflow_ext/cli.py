"""The command line: klflow info | demo | train | sample | complete | infill | eval."""

import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

try:
    import tyro
except ImportError:
    sys.exit("the command line needs the train extra: pip install 'klflow_ext[train]'")


@dataclass
class Info:
    """Print torch, the compiled CUDA architectures, the CPU instruction set in use, and what falls back and why."""

    def run(self):
        from klflow_ext import __version__, build_info

        info = build_info()
        runs_cuda = torch.cuda.is_available() and info["cuda"]
        print(
            f"klflow_ext       {__version__}, built against torch {info['torch_headers']} with g++ {info['compiler']}"
        )
        print(f"torch            {torch.__version__} (any torch >= {info['torch_minimum']} will do)")
        built = f"{info['cuda_arch']} (nvcc {info['nvcc']})" if info["cuda"] else f"none: {info['cuda_reason']}"
        print(f"CUDA kernels     {built}")
        if runs_cuda:
            device = f"{torch.cuda.get_device_name()}"
        elif not torch.cuda.is_available():
            device = "none seen by torch: every op runs on the CPU"
        else:
            device = f"{torch.cuda.get_device_name()}, but no CUDA kernels were built: use CPU tensors"
        print(f"CUDA device      {device}")
        why = f" ({info['cpu_capability_reason']})" if info["cpu_capability_reason"] else ""
        print(f"CPU kernels      {info['cpu_capability']}{why}, {torch.get_num_threads()} threads")


@dataclass
class Settings:
    """Size of model and training, shared by demo and train."""

    data: Path | None = None
    """UTF-8 text file; without it, the source of this Python's standard library."""
    out: Path = Path("runs/demo")
    """Run folder to write."""
    vocab_size: int = 2048
    seconds: float = 180.0
    """Training time."""
    steps: int = 1_000_000
    """Training steps, if they end before the seconds do."""
    batch_size: int = 32
    length: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    input: str = "posterior"
    """What the network reads: posterior, or the paper's simplex."""
    seed: int = 0


def prepare(settings: Settings):
    """Checks everything, then trains the tokenizer and encodes: (trainer, tokenizer, held-out stream, held-out documents)."""
    from klflow_ext import Denoiser, DenoiserConfig, LogitPath, TrainConfig, Trainer, data, evaluate
    from klflow_ext.train import write_atomically

    train_config = TrainConfig(
        steps=settings.steps, max_seconds=settings.seconds, batch_size=settings.batch_size, length=settings.length,
        seed=settings.seed,
    )  # fmt: skip
    config = DenoiserConfig(
        settings.vocab_size,
        settings.n_layer,
        settings.n_head,
        settings.n_embd,
        max(256, settings.length),
        settings.input,
    )
    if settings.vocab_size < 257:
        raise ValueError(f"vocab_size: got {settings.vocab_size}, allowed is at least 257 (every byte and {data.END})")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "log.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"out: {settings.out} cannot be written: {error.strerror}") from None
    if (settings.out / "config.json").exists():
        print(f"{settings.out} holds a run already; it is replaced")
    train_texts, held_texts = data.documents(settings.data)
    start = time.perf_counter()
    size = sum(map(len, train_texts))
    print(f"text: {size / 1e6:.1f} M characters in {len(train_texts)} documents; training a tokenizer ...", flush=True)
    sample = train_texts if size < 4e6 else train_texts[:: int(size // 4e6) + 1]
    tokenizer = data.train_tokenizer(sample, settings.vocab_size)
    stream, held = data.encode(tokenizer, train_texts), data.encode(tokenizer, held_texts)
    config = replace(config, vocab_size=tokenizer.get_vocab_size())
    print(f"tokenizer: V = {config.vocab_size}, {len(stream):,} tokens, {time.perf_counter() - start:.0f} s")
    write_atomically(settings.out / "tokenizer.json", lambda p: tokenizer.save(str(p)))
    write_atomically(settings.out / "train.npy", lambda p: np.save(open(p, "wb"), stream))
    write_atomically(settings.out / "heldout.npy", lambda p: np.save(open(p, "wb"), held))
    torch.manual_seed(settings.seed)
    path = LogitPath(config.vocab_size)
    model = Denoiser(config, path, evaluate.unigram_log_prior(stream, config.vocab_size))
    trainer = Trainer(model, path, stream, train_config, settings.out)
    count = sum(p.numel() for p in model.parameters())
    print(f"model: {count / 1e6:.1f} M parameters, input {config.input}; {path!r}")
    return trainer, tokenizer, held, held_texts


def load_streams(run: Path):
    """(training, held-out) tokens of a run folder, as memory maps."""
    from klflow_ext.train import reading

    streams = []
    for name in ("train.npy", "heldout.npy"):
        with reading(run / name) as file:
            streams.append(np.load(file, mmap_mode="r"))
    return streams


def print_losses(model, path, stream, held, length):
    from klflow_ext import evaluate

    prior = evaluate.unigram_log_prior(np.asarray(stream), path.vocab_size)
    print(
        f"held-out loss, nats per token (unigram entropy {evaluate.unigram_entropy(held, path.vocab_size, prior):.3f}):"
    )
    losses = evaluate.loss_by_time(model, path, held, length)
    print("  t    " + "  ".join(f"{t:6.3f}" for t in losses))
    print("  loss " + "  ".join(f"{v:6.3f}" for v in losses.values()))


@dataclass
class Demo(Settings):
    """Train a small denoiser on real text for about three minutes, show its loss by time, sample, and fill a removed line."""

    def run(self):
        from klflow_ext import Sampler

        trainer, tokenizer, held, held_texts = prepare(self)
        trainer.fit()
        model, path = trainer.model.eval(), trainer.path
        print_losses(model, path, trainer.stream, held, self.length)
        sampler = Sampler(model, path)
        for method in ("basic", "sampling", "hybrid"):
            result = sampler.sample((2, self.length), steps=32, method=method, seed=self.seed, t_split=path.t_max / 2)
            print(f"\n--- {method}, 32 passes, {result.seconds:.1f} s")
            for tokens in result.tokens:
                print(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))
                print("   .")
        self.fill(sampler, tokenizer, held_texts)
        print(
            f"\nrun folder: {self.out}  (next: klflow sample {self.out}; klflow train --resume {self.out} --seconds 60)"
        )

    def fill(self, sampler, tokenizer, held_texts):
        """Removes the middle line of a piece of held-out text and lets the model write it again."""
        for text in held_texts:
            lines = [line for line in text.split("\n") if line.strip()]
            for at in range(3, len(lines) - 3):
                parts = ["\n".join(lines[at - 3 : at]) + "\n", lines[at], "\n" + "\n".join(lines[at + 1 : at + 4])]
                ids = [tokenizer.encode(part).ids for part in parts]
                if 6 <= len(ids[1]) <= 14 and sum(map(len, ids)) <= self.length:
                    tokens = torch.tensor([sum(ids, [])])
                    given = torch.ones_like(tokens, dtype=torch.bool)
                    given[0, len(ids[0]) : len(ids[0]) + len(ids[1])] = False
                    result = sampler.infill(tokens, given, steps=32, method="sampling", seed=self.seed)
                    filled = tokenizer.decode(result.tokens[0][~given[0]].tolist())
                    print(f"\n--- a removed line, filled in ({len(ids[1])} tokens)\n{parts[0]}>>> {filled}{parts[2]}")
                    print(f"    (the line was: {parts[1].strip()})")
                    return


@dataclass
class Train(Settings):
    """Train on a text file, or go on with a run (--resume RUN)."""

    out: Path = Path("runs/train")
    resume: Path | None = None
    """A run folder to take up; --seconds (and --steps) are then what is added to it."""

    def run(self):
        if self.resume is None:
            trainer, tokenizer, held, _ = prepare(self)
        else:
            from klflow_ext import TrainConfig, Trainer, load_run
            from klflow_ext.train import read_config

            config = read_config(self.resume)["train"]
            model, path, tokenizer = load_run(self.resume)
            stream, held = load_streams(self.resume)
            trainer = Trainer(model.train(), path, stream, TrainConfig(**config), self.resume)
            trainer.load()
            longer = {"steps": trainer.step + self.steps}
            if config["max_seconds"] is not None:
                longer["max_seconds"] = trainer.seconds + self.seconds
            trainer.config = replace(trainer.config, **longer)
            print(f"going on with {self.resume} from step {trainer.step}")
        trainer.fit()
        print_losses(trainer.model.eval(), trainer.path, trainer.stream, held, trainer.config.length)
        print(f"run folder: {trainer.out}")


@dataclass
class Generation:
    """How to generate."""

    run_folder: tyro.conf.Positional[Path]
    steps: int = 64
    """Network passes (NFE)."""
    method: str = "sampling"
    """basic, sampling or hybrid."""
    top_k: int = 20
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def generate(self, make):
        from klflow_ext import Sampler, load_run

        model, path, tokenizer = load_run(self.run_folder)
        length = getattr(self, "length", 1)
        if not 1 <= length <= model.config.max_length:
            raise ValueError(f"length: got {length}, allowed is 1 to the run's max_length, {model.config.max_length}")
        options = {name: getattr(self, name) for name in ("steps", "method", "top_k", "top_p", "temperature", "seed")}
        result = make(Sampler(model, path), model, tokenizer, {**options, "progress": sys.stderr.isatty()})
        for tokens in result.tokens:
            print(tokenizer.decode(tokens.tolist()) + "\n   .")
        print(f"{result.nfe} passes, {result.seconds:.1f} s")


@dataclass
class Sample(Generation):
    """Generate texts with a trained run."""

    count: int = 4
    length: int = 64

    def run(self):
        self.generate(lambda sampler, model, tok, options: sampler.sample((self.count, self.length), **options))


@dataclass
class Complete(Generation):
    """Continue a prompt."""

    prompt: str = ""
    length: int = 64

    def run(self):
        self.generate(
            lambda sampler, model, tok, options: sampler.complete([tok.encode(self.prompt).ids], self.length, **options)
        )


@dataclass
class Infill(Generation):
    """Fill the {?n} holes of a text, each of n tokens."""

    text: str = ""

    def run(self):
        def make(sampler, model, tokenizer, options):
            tokens, given = [], []
            for i, part in enumerate(re.split(r"\{\?(\d+)\}", self.text)):
                ids = [0] * int(part) if i % 2 else tokenizer.encode(part).ids
                tokens += ids
                given += [i % 2 == 0] * len(ids)
            if all(given):
                raise ValueError(f"text: got {self.text!r}, allowed is a text with a hole such as {{?8}}")
            return sampler.infill(torch.tensor([tokens]), torch.tensor([given]), **options)

        self.generate(make)


@dataclass
class Eval:
    """Held-out loss by time of a run; with --judge, bits per byte of its samples under a llama2.c model."""

    run_folder: tyro.conf.Positional[Path]
    judge: Path | None = None
    """Folder with stories260K.bin and tok512.bin."""
    count: int = 32
    length: int = 64
    steps: int = 64

    def run(self):
        from klflow_ext import Sampler, evaluate, load_run

        model, path, tokenizer = load_run(self.run_folder)
        stream, held = load_streams(self.run_folder)
        # First, so that a wrong folder fails at once.
        judge = None if self.judge is None else evaluate.Judge(self.judge)
        print_losses(model, path, stream, held, self.length)
        if judge is None:
            return
        generator = np.random.default_rng(0)
        real = [held[i : i + self.length] for i in generator.integers(0, len(held) - self.length, self.count)]
        unigram = generator.choice(stream, (self.count, self.length))
        rows = {"real text": real, "unigram-sampled": unigram}
        sampler = Sampler(model, path)
        for name, options in {
            "basic": {"method": "basic"},
            "sampling, top-k 20": {"method": "sampling", "top_k": 20},
            "sampling, top-k 1": {"method": "sampling", "top_k": 1},
            "hybrid at half, top-k 20": {"method": "hybrid", "top_k": 20, "t_split": path.t_max / 2},
        }.items():
            rows[f"{name}, NFE {self.steps}"] = sampler.sample(
                (self.count, self.length), steps=self.steps, **options
            ).tokens
        print(f"{self.count} texts of {self.length} tokens: bits per byte under the judge (token entropy, nats)")
        for name, sequences in rows.items():
            texts = [tokenizer.decode([int(i) for i in tokens]) for tokens in sequences]
            print(
                f"  {name:<34} {judge.bits_per_byte(texts):.2f} ({evaluate.token_entropy(sequences):.2f})", flush=True
            )


def main() -> None:
    commands = {"info": Info, "demo": Demo, "train": Train, "sample": Sample, "complete": Complete, "infill": Infill,
                "eval": Eval}  # fmt: skip
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="klflow").run()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"klflow: {error}")
    except KeyboardInterrupt:
        sys.exit("klflow: stopped; the last checkpoint is kept")
