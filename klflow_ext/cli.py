"""The command line: klflow info | demo | train | sample | complete | infill | eval."""

import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch


def print_info() -> None:
    from klflow_ext import __version__, build_info

    info = build_info()
    runs_cuda = torch.cuda.is_available() and info["cuda"]
    print(f"klflow_ext       {__version__}, built against torch {info['torch_headers']} with g++ {info['compiler']}")
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
    if info["cuda"]:
        print(f"torch's stream   {info['cuda_stream'] or 'not found: this torch has no CUDA'}")
    why = f" ({info['cpu_capability_reason']})" if info["cpu_capability_reason"] else ""
    print(f"CPU kernels      {info['cpu_capability']}{why}, {torch.get_num_threads()} threads")


try:
    import tyro
except ImportError:
    if sys.argv[1:] == ["info"]:
        print_info()
        sys.exit()
    sys.exit("klflow: this command needs the train extra: pip install 'klflow_ext[train]' (klflow info does not)")


def printable(text: str) -> str:
    """Text for a terminal: control characters but line ends and tabs as escapes, so that they do nothing."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else repr(c)[1:-1] for c in text
    )


def given_text(name: str, text: str) -> str:
    """An argument of the command line as text: bytes of UTF-8, whatever encoding this terminal claims."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: got {raw!r}, allowed is UTF-8") from None


@dataclass
class Info:
    """Print torch, the compiled CUDA architectures, the CPU instruction set in use, and what falls back and why."""

    def run(self):
        print_info()


@dataclass
class Settings:
    """Text, model and training, shared by demo and train."""

    data: Path | None = None
    """UTF-8 text file; without it, the source of this Python's standard library."""
    out: Path = Path("runs/demo")
    """Run folder to write."""
    overwrite: bool = False
    """Replace a run that is there."""
    tokenizer: Path | None = None
    """A tokenizers file (tokenizer.json) instead of one trained here."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained here."""
    seconds: float = 180.0
    """Training time."""
    steps: int = 1_000_000
    """Training steps, if they end before the seconds do."""
    batch_size: int = 32
    length: int = 64
    preset: Literal["demo", "small", "150m", "1.5b"] = "demo"
    """Shape of the network, of which the next three set parts."""
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    path: Literal["logit", "mask", "uniform", "linear", "sphere", "autoregressive"] = "logit"
    """From noise to text; all but logit are baselines."""
    input: Literal["posterior", "simplex", "tokens"] | None = None
    """What the network reads: on the logit path posterior, or the paper's simplex."""
    time: Literal["token", "add", "adaln", "none"] | None = None
    """How the network is told the time."""
    time_sampling: Literal["middle", "uniform", "learned"] | None = None
    """Which times are trained on."""
    given_share: float = 0.6
    """Share of sequences that see a part of themselves: segments, prompts, all but a hole."""
    lr: float = 3e-3
    ema: float = 0.0
    """Decay of the average of the weights; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products."""
    accumulate: int = 1
    """Parts in which a batch is computed, to save memory."""
    compile: bool = False
    """torch.compile of the training step."""
    device: str | None = None
    """cuda where torch sees a GPU and the kernels were built for it, else cpu."""
    seed: int = 0


def choose_device(name: str | None) -> torch.device:
    from klflow_ext import build_info

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and build_info()["cuda"] else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("the kernels run on cpu and cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def network(settings: Settings, vocab_size: int):
    """(path, config) of the settings, for V tokens. Paths of tokens read tokens; the baselines on the simplex read x_t."""
    from klflow_ext import DenoiserConfig
    from klflow_ext.path import Path as NoisePath

    path = NoisePath.from_dict({"kind": settings.path, "vocab_size": vocab_size})
    reads = "tokens" if path.reads == "tokens" else "posterior" if settings.path == "logit" else "simplex"
    if settings.input is not None:
        if (settings.input == "tokens") != (path.reads == "tokens"):
            raise ValueError(f"input: got {settings.input!r}, allowed on path {settings.path} is {reads!r}")
        reads = settings.input
    causal = settings.path == "autoregressive"
    time_mode = settings.time or ("none" if causal else "token")
    shape = {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd")}
    shape = {name: value for name, value in shape.items() if value is not None}
    longest = max(DenoiserConfig.PRESETS[settings.preset][3], settings.length)
    config = DenoiserConfig.preset(
        settings.preset, vocab_size, input=reads, time=time_mode, causal=causal, max_length=longest, **shape
    )
    return path, config


def prepare(settings: Settings):
    """Checks everything, then makes the tokenizer and encodes: (trainer, tokenizer, held-out stream, held-out documents)."""
    import safetensors  # noqa: F401  (what is missing is missed before any work)
    import tokenizers  # noqa: F401

    from klflow_ext import Denoiser, TrainConfig, Trainer, data, evaluate
    from klflow_ext.run import check_out, new_folder, write_files

    names = ("steps", "batch_size", "length", "seed", "time_sampling", "given_share", "lr", "ema", "dtype", "accumulate",
             "compile")  # fmt: skip
    train_config = TrainConfig(max_seconds=settings.seconds, **{name: getattr(settings, name) for name in names})
    network(settings, settings.vocab_size)
    device = choose_device(settings.device)
    tokenizer = None
    if settings.tokenizer is not None:
        tokenizer = data.load_tokenizer(settings.tokenizer)
    elif settings.vocab_size < 257:
        raise ValueError(f"vocab_size: got {settings.vocab_size}, allowed is at least 257 (every byte and {data.END})")
    train_texts, held_texts = data.documents(settings.data)
    check_out(settings.out, settings.overwrite)
    start = time.perf_counter()
    size = sum(map(len, train_texts))
    making = "training a tokenizer" if tokenizer is None else "encoding"
    print(f"text: {size / 1e6:.1f} M characters in {len(train_texts)} documents; {making} ...", flush=True)
    if tokenizer is None:
        sample = train_texts if size < 4e6 else train_texts[:: int(size // 4e6) + 1]
        tokenizer = data.train_tokenizer(sample, settings.vocab_size)
    stream, held = data.encode(tokenizer, train_texts), data.encode(tokenizer, held_texts)
    vocab_size = data.vocab_size_of(tokenizer)
    if len(held) <= settings.length:
        raise ValueError(
            f"length: got {settings.length}, allowed is less than the {len(held)} tokens of held-out text (a twentieth of all)"
        )
    print(f"tokenizer: V = {vocab_size}, {len(stream):,} tokens, {time.perf_counter() - start:.0f} s")
    torch.manual_seed(settings.seed)
    path, config = network(settings, vocab_size)
    model = Denoiser(config, path, evaluate.unigram_log_prior(stream, vocab_size)).to(device)
    trainer = Trainer(model, path, stream, train_config)
    # Only now that nothing is left to be refused, and whole: it can be resumed from here on.
    if trainer.rank == 0:
        with new_folder(settings.out, settings.overwrite) as trainer.out:
            files = {
                "tokenizer.json": lambda p: tokenizer.save(str(p)),
                "train.npy": lambda p: np.save(open(p, "wb"), stream),
                "heldout.npy": lambda p: np.save(open(p, "wb"), held),
            }
            write_files(trainer.out, files)
            trainer.save()
    trainer.out = settings.out
    count = sum(p.numel() for p in model.parameters())
    print(f"model: {count / 1e6:.1f} M parameters, input {config.input}, on {device}; {path!r}")
    return trainer, tokenizer, held, held_texts


def load_streams(run: Path):
    """(training, held-out) tokens of a run folder, as memory maps."""
    from klflow_ext.run import reading

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
        model, path = trainer.averaged_model().eval(), trainer.path
        print_losses(model, path, trainer.stream, held, self.length)
        sampler = Sampler(model, path, trainer.device)
        for method in ("basic", "sampling", "hybrid", "segments") if path.kind != "autoregressive" else ("basic",):
            result = sampler.sample((2, self.length), steps=32, method=method, seed=self.seed)
            print(f"\n--- {method}, {result.nfe} passes, {result.seconds:.1f} s")
            for tokens in result.tokens:
                print(printable(tokenizer.decode(tokens.tolist(), skip_special_tokens=False)))
                print("   .")
        self.fill(sampler, tokenizer, held_texts)
        print(
            f"\nrun folder: {self.out}  (next: klflow sample {self.out}; klflow train --resume {self.out} "
            "--more-seconds 60)"
        )

    def fill(self, sampler, tokenizer, held_texts):
        """Removes the middle line of a piece of held-out text and lets the model write it again."""
        from klflow_ext import data

        for tokens, given, (before, line, after) in data.removed_lines(held_texts, tokenizer, self.length):
            result = sampler.infill(tokens, given, steps=32, method="segments", seed=self.seed)
            filled = tokenizer.decode(result.tokens[~given.to(result.tokens.device)].tolist())
            print(f"\n--- a removed line, filled in ({result.nfe} tokens)\n{printable(f'{before}>>> {filled}{after}')}")
            print(f"    (the line was: {printable(line.strip())})")
            break


@dataclass
class Train(Settings):
    """Train on a text file, or go on with a run (--resume RUN)."""

    out: Path = Path("runs/train")
    resume: Path | None = None
    """A run folder: its run is finished as it was meant, with its own settings."""
    more_steps: int = 0
    """With --resume: steps that are added to the run."""
    more_seconds: float = 0.0
    """With --resume: seconds that are added to it."""

    RESUMED = ("resume", "more_steps", "more_seconds", "device")  # what may stand beside --resume

    def run(self):
        from klflow_ext.train import leave_processes

        trainer, held = self.go_on() if self.resume is not None else self.start()
        trainer.fit()
        print_losses(trainer.averaged_model().eval(), trainer.path, trainer.stream, held, trainer.config.length)
        print(f"run folder: {trainer.out}")
        leave_processes()

    def start(self):
        for name in ("more_steps", "more_seconds"):
            if getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is only with --resume")
        trainer, _, held, _ = prepare(self)
        return trainer, held

    def go_on(self):
        from klflow_ext import TrainConfig, Trainer
        from klflow_ext.run import load_run, read_config

        given = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in sys.argv[2:]
                 if word.startswith("--")}  # fmt: skip
        foreign = sorted(given - set(self.RESUMED))
        if foreign:
            names = ", ".join("--" + name.replace("_", "-") for name in foreign)
            raise ValueError(
                f"resume: got {names} beside it, allowed are --more-steps, --more-seconds and --device: a run goes on with its "
                "own settings"
            )
        if self.more_steps < 0 or not 0 <= self.more_seconds < float("inf"):
            raise ValueError(
                f"more_steps, more_seconds: got {self.more_steps}, {self.more_seconds}, allowed are numbers >= 0"
            )
        config = TrainConfig(**read_config(self.resume)["train"])
        model, path, _ = load_run(self.resume)
        stream, held = load_streams(self.resume)
        trainer = Trainer(model.train().to(choose_device(self.device)), path, stream, config, self.resume)
        trainer.load()
        if self.more_steps:
            trainer.config = replace(trainer.config, steps=trainer.step + self.more_steps, max_seconds=None)
        if self.more_seconds:
            steps = max(trainer.config.steps, trainer.step + self.more_steps if self.more_steps else 2**31)
            trainer.config = replace(trainer.config, steps=steps, max_seconds=trainer.seconds + self.more_seconds)
        if trainer.progress() >= 1:
            raise ValueError(
                f"resume: the run of {self.resume} is finished, at step {trainer.step} after {trainer.seconds:.0f} s; "
                "--more-steps or --more-seconds add to it"
            )
        print(f"going on with {self.resume} from step {trainer.step}")
        return trainer, held


@dataclass
class Generation:
    """How to generate."""

    run_folder: tyro.conf.Positional[Path]
    steps: int = 64
    """Network passes (NFE)."""
    method: str | None = None
    """basic, sampling, hybrid or segments, which is the best."""
    top_k: int = 20
    top_p: float = 1.0
    temperature: float | tuple[float, float] = 1.0
    """Of all passes, or of the first and the last."""
    t_split: float | None = None
    """Where hybrid turns from basic to sampling."""
    grid_power: float = 1.0
    """Below 1: more of the passes late."""
    final: Literal["argmax", "draw"] | None = None
    """How the last pass chooses its tokens."""
    device: str | None = None
    seed: int = 0

    OPTIONS = ("steps", "method", "top_k", "top_p", "temperature", "t_split", "grid_power", "final", "seed")

    def generate(self, make):
        from klflow_ext import Sampler, load_run

        model, path, tokenizer = load_run(self.run_folder)
        length, count = getattr(self, "length", 1), getattr(self, "count", 1)
        if count < 1:
            raise ValueError(f"count: got {count}, allowed is an integer >= 1")
        if not 1 <= length <= model.config.max_length:
            raise ValueError(f"length: got {length}, allowed is 1 to the run's max_length, {model.config.max_length}")
        options = {name: getattr(self, name) for name in self.OPTIONS}
        options["method"] = self.method or "segments"
        device = choose_device(self.device)
        sampler = Sampler(model.to(device), path, device)
        result = make(sampler, tokenizer, {**options, "progress": sys.stderr.isatty()})
        for tokens in result.tokens:
            print(printable(tokenizer.decode(tokens.tolist())) + "\n   .")
        print(f"{result.nfe} passes, {result.seconds:.1f} s")


@dataclass
class Sample(Generation):
    """Generate texts with a trained run."""

    count: int = 4
    length: int = 64

    def run(self):
        self.generate(lambda sampler, tokenizer, options: sampler.sample((self.count, self.length), **options))


@dataclass
class Complete(Generation):
    """Continue a prompt."""

    prompt: str = ""
    length: int = 64

    def run(self):
        prompt = given_text("prompt", self.prompt)
        self.generate(
            lambda sampler, tokenizer, options: sampler.complete(
                [tokenizer.encode(prompt, add_special_tokens=False).ids], self.length, **options
            )
        )


@dataclass
class Infill(Generation):
    """Fill the {?n} holes of a text, each of n tokens."""

    text: str = ""

    def run(self):
        def make(sampler, tokenizer, options):
            from klflow_ext.sample import parse_holes

            tokens, given = parse_holes(given_text("text", self.text), tokenizer)
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
    device: str | None = None

    def run(self):
        from klflow_ext import Sampler, evaluate, load_run

        for name, least in (("count", 1), ("length", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is an integer >= {least}")
        model, path, tokenizer = load_run(self.run_folder)
        if self.length > model.config.max_length:
            raise ValueError(
                f"length: got {self.length}, allowed is at most the run's max_length, {model.config.max_length}"
            )
        device = choose_device(self.device)
        model = model.to(device)
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
        sampler = Sampler(model, path, device)
        schemes = {
            "basic": {"method": "basic"},
            "sampling, top-k 20": {"method": "sampling", "top_k": 20},
            "sampling, top-k 1": {"method": "sampling", "top_k": 1},
            "hybrid, top-k 20": {"method": "hybrid", "top_k": 20},
            "segments, top-k 20": {"method": "segments", "top_k": 20},
        }
        if path.kind == "autoregressive":
            schemes = {"left to right, top-k 20": {"top_k": 20}}
        for name, options in schemes.items():
            result = sampler.sample((self.count, self.length), steps=self.steps, **options)
            rows[f"{name}, NFE {result.nfe}"] = result.tokens.cpu()
        print(f"{self.count} texts of {self.length} tokens: bits per byte under the judge (token entropy, nats)")
        for name, sequences in rows.items():
            texts = [tokenizer.decode([int(i) for i in tokens]) for tokens in sequences]
            print(
                f"  {name:<34} {judge.bits_per_byte(texts):.2f} ({evaluate.token_entropy(sequences):.2f})", flush=True
            )


def main() -> None:
    commands = {"info": Info, "demo": Demo, "train": Train, "sample": Sample, "complete": Complete, "infill": Infill,
                "eval": Eval}  # fmt: skip
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="klflow").run()
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.exit(f"klflow: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"klflow: stopped{'; ' * bool(interrupt.args)}{interrupt}", file=sys.stderr)
        sys.exit(130)
