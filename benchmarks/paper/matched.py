"""What the scripts of the paper's tables share: the scales, trained runs and measured rows that are made once, and samples.

A row has a key, what was asked, and what was found. It is written as soon as it is measured; a second call of a script
measures what is missing only. Runs are shared between the scripts, and a stopped one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "method")]

from compared import METHODS, stories, token_streams  # noqa: E402
from compared import RESULTS as RESULTS  # noqa: E402
from compared import order_of as order_of  # noqa: E402
from harness import figure as figure  # noqa: E402  (the scripts' own)
from harness import machine  # noqa: E402
from samples import load_judge  # noqa: E402

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, Sampler, TrainConfig, Trainer, data, evaluate  # noqa: E402
from klflow_ext.evaluate.conditional import Pair, read_pairs  # noqa: E402
from klflow_ext.evaluate.text import Interval, distinct, mean_interval, repetition  # noqa: E402
from klflow_ext.files import read_json, write_file  # noqa: E402
from klflow_ext.muon import multiplies_bfloat16  # noqa: E402


@dataclass(frozen=True)
class Scale:
    """One budget for all methods of a table."""

    vocab_size: int
    layers: int
    heads: int
    width: int
    length: int
    """Positions."""
    batch: int
    """Sequences of a step."""
    steps: int
    short_steps: int
    """Of tables in which a loss says enough, or which have runs of their own."""
    lr: float
    """Highest learning rate."""
    seeds: int
    """Runs of each method."""
    samples: int
    """Texts that are judged, of each run and setting."""
    nfe: tuple[int, ...]
    """Network passes in the table of passes."""
    passes: int
    """Network passes in all other tables."""
    judge: str = "stories260K"
    rounds: int = 2000
    """Of the bootstrap."""


SCALES = {
    "cpu": Scale(512, 2, 4, 128, 64, 16, 500, 250, 1e-2, 3, 64, (8, 16, 32, 64, 128, 512), 32),
    "cpu-long": Scale(512, 2, 4, 128, 64, 16, 4000, 2000, 1e-2, 3, 64, (8, 16, 32, 64, 128, 512), 32),
    "gpu": Scale(8192, 6, 6, 384, 256, 64, 3000, 3000, 3e-3, 3, 512, (8, 16, 32, 64, 128, 256, 512), 64),
    "test": Scale(300, 1, 1, 16, 16, 4, 2, 2, 1e-2, 1, 4, (2, 3), 2, "eight bits a byte", 20),
}


class NoJudge:
    """Stands for a judge where only the way of the figures is tried."""

    def bits(self, texts: Iterable[str]) -> list[tuple[float, float]]:
        return [(8.0 * len(text.encode()), float(len(text.encode()))) for text in texts]


class Enough(Exception):
    """As many rows are measured as were asked for."""


class Table:
    """The rows of a script, in a JSON file.

    file: where they are, or will be. about: what holds for all of them; rows of other settings are not taken up.
    most: how many rows are measured before it is Enough; None: all.
    expected: how many rows there will be, for the time left.
    """

    def __init__(self, file: Path, most: int | None = None, **about: Any):
        self.most = most
        about = json.loads(json.dumps(about))
        self.file, self.found = file, {**about, "rows": []}
        self.expected, self._first, self._measured = 0, time.monotonic(), 0
        if file.exists():
            self.found = read_json(file)
            for name in about:
                if name != "machine" and self.found.get(name) != about[name]:
                    raise ValueError(
                        f"{name}: got {about[name]}, allowed beside the rows of {file} is {self.found.get(name)}"
                    )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.found["rows"]

    def take(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """A row that was measured elsewhere, which stands for no measured one."""
        if not any(known["key"] == key for known in self.rows):
            self.rows.append({"key": key, **row})

    def row(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key: as it was measured before, or measured now."""
        key = json.loads(json.dumps(key))
        for row in self.rows:
            if row["key"] == key:
                return row
        if self._measured == self.most:
            raise Enough
        row = {"key": key, **json.loads(json.dumps(make()))}
        self.rows.append(row)
        self.write()
        self._measured += 1
        left = max(0, self.expected - len(self.rows)) * (time.monotonic() - self._first) / self._measured
        print(f"{self.file.stem}: {key}, about {left:.0f} s left", flush=True)
        return row

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, lambda path: path.write_text(json.dumps(self.found, indent=1) + "\n"))


def as_json(interval: Interval) -> list[float]:
    return [round(value, 5) for value in interval]


def toy_texts() -> tuple[list[str], list[str]]:
    """Small programs, where only the way of the figures is tried."""
    texts = [f"def {a}(x):\n    {b} = x\n    the = {b}\n    cat = {c}(the)\n    return cat\n\n" * 2
             for a in ("cat", "dog", "hen") for b in ("tom", "amy", "sam") for c in ("mat", "box", "bed")]  # fmt: skip
    return texts[3:], texts[:3]


class Bench:
    """What a script measures with.

    name: of the script and its file.
    """

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.arguments, self.scale = arguments, SCALES[arguments.scale]
        self.seeds = range(self.scale.seeds) if arguments.seeds is None else arguments.seeds
        self.device = torch.device(arguments.device)
        self.dtype = "bfloat16" if multiplies_bfloat16(self.device) else "float32"
        folder = arguments.results / arguments.scale
        self.table = Table(
            folder / f"{name}.json",
            arguments.most,
            scale=arguments.scale,
            settings={name: value for name, value in asdict(self.scale).items() if name not in ("seeds", "nfe")},
            judge=self.scale.judge,
            pooling="bits of all texts over their UTF-8 bytes; intervals: 95 %, bootstrap over texts",
            precision=self.dtype,
            machine=machine(arguments.device),
        )

    # ---- text

    def stream(self, text: str = "tinystories") -> tuple[Any, Any, Any]:
        """(tokenizer, training, held-out tokens)."""
        if self.arguments.scale == "test":
            text, read = "toy", toy_texts
        else:
            read = TEXTS[text]
        return token_streams(
            self.arguments.runs / f"tokens-{text}-{self.scale.vocab_size}", self.scale.vocab_size, read
        )

    @cached_property
    def judge(self) -> Any:
        return NoJudge() if self.arguments.scale == "test" else load_judge()

    # ---- runs

    def trained(
        self, method: str, seed: int, text: str = "tinystories", *, path: dict | None = None, model: dict | None = None,
        **train: Any,
    ) -> tuple[Sampler, dict[str, Any]]:  # fmt: skip
        """(Sampler, what is known of the run) of a method of benchmarks/method, trained once.

        Args:
            method, seed, text: which.
            path, model, train: what differs of the path, of DenoiserConfig and of TrainConfig.
        """
        scale, (tokenizer, stream, held) = self.scale, self.stream(text)
        make_path, model_options, train_options = METHODS[method]
        usual = {field.name: field.default for field in (*fields(DenoiserConfig), *fields(TrainConfig))}
        usual |= {"steps": scale.steps, "lr": scale.lr, "given_share": 0.0, **train_options, **model_options}
        changes = {**(path or {}), **{k: v for k, v in {**(model or {}), **train}.items() if v != usual[k]}}
        options = {"steps": scale.steps, "lr": scale.lr, "given_share": 0.0, **train_options, **train}
        label = "-".join([text, method, *(f"{name}={value}" for name, value in changes.items()), f"seed{seed}"])
        label = label.replace(" ", "-")
        made = make_path(scale.vocab_size, **(path or {}))
        torch.manual_seed(seed)
        shape = DenoiserConfig(
            scale.vocab_size, scale.layers, scale.heads, scale.width, scale.length, **{**model_options, **(model or {})}
        )
        network = Denoiser(shape, made, evaluate.unigram_log_prior(stream, scale.vocab_size)).to(self.device)
        config = TrainConfig(batch_size=scale.batch, length=scale.length, seed=seed, dtype=self.dtype, **options)
        out = self.arguments.runs / self.arguments.scale / label
        trainer = Trainer(network, made, stream, config, out, tokenizer=tokenizer)
        if trainer.run is not None and trainer.run.checkpoints():
            trainer.load()
        if trainer.progress() < 1:
            print(f"{label}: step {trainer.step} of {config.steps}", flush=True)
            trainer.fit(progress=sys.stderr.isatty())
        sampler = Sampler(network.eval(), made, self.device, tokenizer=tokenizer)
        note = out / "losses.json"  # beside the run, whose other files it leaves alone
        if not note.exists():
            found = self._losses(sampler, held)
            found |= {"parameters": sum(p.numel() for p in network.parameters()), "train_seconds": trainer.seconds}
            found |= {"steps": config.steps}
            write_file(note, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))
        return sampler, read_json(note)

    def _losses(self, sampler: Sampler, held: Any) -> dict[str, Any]:
        """Of held-out text: the loss by time, and -log p or its bound in nats per token, where the path has one."""
        count = min(64, self.scale.samples)
        texts = data.batch(held, count, self.scale.length, seed=12345, step=0).to(self.device)
        losses = evaluate.loss_by_time(sampler.model, sampler.path, texts)
        found: dict[str, Any] = {
            "loss": sum(losses.values()) / len(losses),
            "losses": {f"{t:.4f}": x for t, x in losses.items()},
        }
        if sampler.path.has_likelihood:
            likelihood = sampler.path.likelihood(sampler.model, texts, strata=min(16, count))
            found |= {
                "nats": likelihood.per_token,
                "nats_error": likelihood.standard_error,
                "nats_exact": likelihood.exact,
            }
        return found

    # ---- samples

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def judged(self, sampler: Sampler, seed: int, steps: int, **options: Any) -> dict[str, Any]:
        """Bits per byte under the judge beside the entropy of samples, with all that they depend on."""
        if isinstance(sampler.path, Autoregressive):
            options.pop("method", None)
        with self.autocast():
            found = sampler.sample((self.scale.samples, self.scale.length), seed=seed, steps=steps, **options)
        said = {"top_k": 20, "temperature": 1.0, **options}
        return {"nfe": found.nfe, "seconds": found.seconds, **said, **self.figures(found.tokens.cpu(), found.texts)}

    def figures(self, tokens: torch.Tensor, texts: list[str]) -> dict[str, Any]:
        pairs = [(bits, size) for bits, size in self.judge.bits(texts) if size]
        bits, sizes, rounds = [bits / size for bits, size in pairs], [size for _, size in pairs], self.scale.rounds
        return {
            "count": len(texts),
            "length": tokens.shape[1],
            "bits_per_byte": as_json(mean_interval(bits, sizes, rounds=rounds)),
            "entropy": as_json(mean_interval([evaluate.token_entropy([row]) for row in tokens], rounds=rounds)),
            "distinct_2": distinct(tokens.tolist(), 2),
            "repetition_4": sum(repetition(row, 4) for row in tokens.tolist()) / len(tokens),
            "texts": texts[:3],
        }

    def data_row(self) -> dict[str, Any]:
        """The figures of held-out text itself."""
        tokenizer, _, held = self.stream()
        tokens = data.batch(held, self.scale.samples, self.scale.length, seed=777, step=0)
        key = {"method": "data"}
        return self.table.row(key, lambda: self.figures(tokens, [tokenizer.decode(row.tolist()) for row in tokens]))


def prompted_stories() -> tuple[list[str], list[str]]:
    """Prompts and the beginnings of their stories, so short that a sequence mostly shows a prompt with its text."""
    pairs = read_pairs(Path(os.environ["KLFLOW_DATA"]) / "snakes" / "llm_stories.jsonl.gz")
    train, held = ([Pair(pair.prompt, pair.text[:160]).document for pair in part] for part in pairs)
    return train, held


TEXTS: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
    "tinystories": stories,
    "stdlib": lambda: data.documents(None),
    "snakes": prompted_stories,
}


def earlier_results(pattern: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What benchmarks/method has measured: (results of a run, what is to be said of all that is taken from it)."""
    for file in sorted(RESULTS.glob(pattern)):
        found = json.loads(file.read_text())
        yield found, {"source": file.name, "width": 256, "steps": found["steps"]}


# ---- tables


def mean_over_seeds(rows: list[dict[str, Any]], field: str) -> tuple[float, float] | None:
    """(mean, half the range) of a field of rows that differ in their seed; of an interval its middle value."""
    values = [row[field][0] if isinstance(row[field], list) else row[field] for row in rows if field in row]
    if not values:
        return None
    return sum(values) / len(values), (max(values) - min(values)) / 2


def draw_curve(axis: Any, rows: list[dict[str, Any]], along: str, field: str, style: str = "-", **more: Any) -> None:
    """A field over a part of the key, the mean over seeds; nothing where there is no row."""
    means = {x: mean_over_seeds(of(rows, **{along: x}), field) for x in sorted(values(rows, along))}
    points = [(x, mean[0]) for x, mean in means.items() if mean is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, marker="o", **more)


def cell(rows: list[dict[str, Any]], field: str, digits: int = 2) -> str:
    """ "mean ± half the range" of several seeds, of one seed the figure with its interval if it has one; "" of no row."""
    found = mean_over_seeds(rows, field)
    if found is None:
        return ""
    if len(rows) == 1 and isinstance(rows[0][field], list):
        mean, low, high = rows[0][field]
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{found[0]:.{digits}f}" + f" ± {found[1]:.{digits}f}" * (len(rows) > 1)


JUDGED = "Each cell: bits per byte under the judge (entropy of a sample's tokens, nats); ± half the range over the seeds, nothing of one seed."


def judged_cell(rows: list[dict[str, Any]]) -> str:
    """What JUDGED says; "" of no row."""
    bits, entropy = (mean_over_seeds(rows, field) for field in ("bits_per_byte", "entropy"))
    if bits is None or entropy is None:
        return ""
    return f"{bits[0]:.2f}{f' ± {bits[1]:.2f}' * (len(rows) > 1)} ({entropy[0]:.2f})"


def of(rows: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    """The rows whose key has these values."""
    return [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]


def values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """What stands in the keys under a name, each once, in the order of the rows."""
    return list(dict.fromkeys(row["key"][name] for row in rows if name in row["key"]))


def markdown(titles: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines)]


# ---- scripts


def parser_of_scripts(doc: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="which runs of each method; all of the scale where not given"
    )
    parser.add_argument("--most", type=int, help="how many rows to measure now; all that are missing where not given")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--runs", type=Path, default=BENCHMARKS.parent / "runs" / "paper", help="folder of trained runs"
    )
    parser.add_argument(
        "--results", type=Path, default=BENCHMARKS / "results" / "paper", help="folder of what is found"
    )
    return parser


def run(script: ModuleType, argv: list[str] | None = None) -> None:
    """Measures what a script's table still lacks, then draws its plot.

    A script has `measure(bench)`, `table(rows)` -> lines of markdown, `plot(rows)` -> a figure, and TITLE.
    """
    arguments = parser_of_scripts(script.__doc__).parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bench = Bench(Path(str(script.__file__)).stem, arguments)
    with suppress(Enough):
        script.measure(bench)
    bench.table.write()
    draw(script, bench.table.rows, bench.table.file.with_suffix(".png"))
    print("\n".join(script.table(bench.table.rows)))


def draw(script: ModuleType, rows: list[dict[str, Any]], file: Path) -> None:
    chart = script.plot(rows)
    write_file(file, lambda path: chart.savefig(path, dpi=110, format="png"))
