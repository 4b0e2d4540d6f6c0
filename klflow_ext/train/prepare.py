"""From a text or token folders to a Trainer: tokenizer, streams, network, and a run folder that is whole from the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from klflow_ext import data
from klflow_ext.evaluate import unigram_log_prior
from klflow_ext.model import Denoiser, DenoiserConfig, Reader
from klflow_ext.model.config import Input, Preset, Time
from klflow_ext.path import Path as NoisePath
from klflow_ext.run import Run, check_out
from klflow_ext.train.config import TrainConfig
from klflow_ext.train.trainer import Trainer

TOKENIZER_SAMPLE = 4e6  # characters that a tokenizer is trained on; more hardly change it
HELD_TEXTS = 100


@dataclass(frozen=True)
class NetworkChoice:
    """Which network, on which path; what is None follows from the rest."""

    preset: Preset = "demo"
    """Shape of the network, of which the next three set parts."""
    n_layer: int | None = None
    """Blocks."""
    n_head: int | None = None
    """Heads of the attention."""
    n_embd: int | None = None
    """Width."""
    path: Literal["logit", "mask", "uniform", "linear", "sphere", "autoregressive"] = "logit"
    """From noise to text; all but logit are baselines."""
    beta: float | None = None
    """Of the logit path, x_1 = (1 - beta) onehot + beta / V, in (0, 1)."""
    t_max: float | None = None
    """Of the logit path, the largest time, in (0, 1]."""
    input: Input | None = None
    """What the network reads: on the logit path posterior, or the paper's simplex."""
    time: Time | None = None
    """How the network is told the time."""
    slices: bool = True
    """On the paths logit and mask, train on two streams, for method="slices". A step has twice the rows."""

    def make(self, vocab_size: int, length: int) -> tuple[NoisePath, DenoiserConfig]:
        """(path, shape) for V tokens and sequences of `length`. Paths of tokens read tokens; the baselines on the simplex x_t.

        Raises:
            ValueError: the fields do not fit each other; the message names one.
        """
        of_path = {name: getattr(self, name) for name in ("beta", "t_max") if getattr(self, name) is not None}
        path = NoisePath.from_dict({"kind": self.path, "vocab_size": vocab_size, **of_path})
        reads: Input = "tokens" if path.reads == "tokens" else "posterior" if path.closed_form else "simplex"
        if self.input is not None:
            if (self.input == "tokens") != (path.reads == "tokens"):
                raise ValueError(f"input: got {self.input!r}, allowed on path {self.path} is {reads!r}")
            reads = self.input
        causal, slices = path.way == "left_to_right", self.slices and self.path in ("logit", "mask")
        shape = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        config = DenoiserConfig.preset(
            self.preset,
            vocab_size,
            input=reads,
            time=self.time or ("none" if causal or slices else "token"),
            causal=causal,
            slices=slices,
            max_length=max(DenoiserConfig.PRESETS[self.preset][3], length),
            **{name: value for name, value in shape.items() if value is not None},
        )
        return path, config


@dataclass
class Prepared:
    """trainer; tokenizer (tokenizers.Tokenizer); heldout, the tokens that are kept back, and held_texts, their documents (of
    token folders, HELD_TEXTS of them)."""

    trainer: Trainer
    tokenizer: Any
    heldout: data.Stream
    held_texts: list[str]


def prepare(
    text: str | Path | Sequence[str | Path] | None,
    out: Path,
    *,
    train: TrainConfig,
    network: NetworkChoice | Reader,
    tokenizer: Any = None,
    vocab_size: int = 2048,
    overwrite: bool = False,
    device: torch.device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Checks everything, then makes the tokenizer, encodes, and writes the run folder, which can be resumed from then on.

    Args:
        text: a file of texts, which memory must hold; token folders (`klflow prepare`), each with "=WEIGHT" behind it or none,
            which are read as they stand; None: the source of this Python's standard library (`data.documents`).
        out: the run folder.
        train: how.
        network: what; or a network that is there already, such as a TransformerDenoiser, on its own path and with its tokenizer.
        tokenizer: a tokenizers file, a folder that has one, or the name of a model whose files the Hub's cache has; or a
            tokenizers.Tokenizer; None: one of at most vocab_size tokens is trained on the text.
        vocab_size: of that one, at least 257.
        overwrite: whether a run in `out` is replaced.
        device: where to train; None: the CPU.
        report: called with a line on each thing that was made.

    Raises:
        ValueError: an argument is outside its range, or a file cannot be read or written; nothing has been written then.
        ImportError: safetensors or tokenizers is missing.
    """
    import safetensors  # noqa: F401  (what is missing is missed before any work)
    import tokenizers  # noqa: F401

    paths, weights = data.parse_sources([] if text is None else text)
    if isinstance(network, NetworkChoice):
        network.make(vocab_size, train.length)
    else:
        _check_given(network, tokenizer, train)
    start = time.perf_counter()
    stream: data.Stream
    heldout: data.Stream
    if any(map(data.is_token_folder, paths)):
        if not isinstance(network, NetworkChoice):
            data.same_tokenizer(paths, tokenizer)
        elif tokenizer is not None:
            raise ValueError(f"tokenizer: got {tokenizer}, allowed is none beside token folders, which have their own")
        check_out(out, overwrite)
        stream, heldout = folders = data.open_streams(paths, weights)
        made, held_texts = _of_folder(data.TokenFolder(paths[0]))
        report("tokens: " + "; ".join(_described(folders[0])))
    else:
        file = data.one_file(paths, weights)
        made = _tokenizer(tokenizer, vocab_size)
        train_texts, held_texts = data.documents(file)
        check_out(out, overwrite)
        size = sum(map(len, train_texts))
        making = "training a tokenizer" if made is None else "encoding"
        report(f"text: {size / 1e6:.1f} M characters in {len(train_texts)} documents; {making} ...")
        if made is None:
            sample = train_texts if size < TOKENIZER_SAMPLE else train_texts[:: int(size // TOKENIZER_SAMPLE) + 1]
            made = data.train_tokenizer(sample, vocab_size)
        stream, heldout = data.encode(made, train_texts), data.encode(made, held_texts)
        if len(heldout) <= train.length:
            raise ValueError(
                f"length: got {train.length}, allowed is less than the {len(heldout)} tokens of held-out text (a twentieth of "
                "all)"
            )
    data.order_of(heldout, train.length, train.seed)  # of folders, whether it is long enough
    vocab_size = data.vocab_size_of(made)
    report(f"tokenizer: V = {vocab_size}, {len(stream):,} tokens, {time.perf_counter() - start:.0f} s")

    torch.manual_seed(train.seed)
    model = _network(network, vocab_size, train.length, stream).to(device)
    path = model.path
    trainer = Trainer(model, path, stream, train, heldout=heldout)
    # Only now that nothing is left to be refused, and whole: it can be resumed from here on.
    with ExitStack() as created:
        if trainer.rank == 0:
            create = Run.create(out, overwrite=overwrite, tokenizer=made, stream=stream, heldout=heldout)
            trainer.run = created.enter_context(create)
        trainer.save()
    trainer.run = Run(out)
    count = sum(p.numel() for p in model.parameters())
    report(f"model: {count / 1e6:.1f} M parameters, input {model.input}, on {trainer.device}; {path!r}")
    return Prepared(trainer, made, heldout, held_texts)


def _check_given(network: Reader, tokenizer: Any, train: TrainConfig) -> None:
    """Whether a network that is there can be trained so."""
    most, vocab_size = network.max_length, network.path.vocab_size
    if most is not None and train.length > most:
        raise ValueError(f"length: got {train.length}, allowed is at most max_length = {most} of the model")
    if tokenizer is None or data.vocab_size_of(tokenizer) > vocab_size:
        got = "none" if tokenizer is None else f"one of {data.vocab_size_of(tokenizer)} tokens"
        raise ValueError(f"tokenizer: got {got}, allowed is that of the model, of at most V = {vocab_size} tokens")


def _network(network: NetworkChoice | Reader, vocab_size: int, length: int, stream: data.Stream) -> Reader:
    """The one that was chosen, or is there, with the frequencies of this text as its prior."""
    if isinstance(network, NetworkChoice):
        path, config = network.make(vocab_size, length)
        return Denoiser(config, path, unigram_log_prior(stream, vocab_size))
    network.log_prior.copy_(unigram_log_prior(stream, network.path.vocab_size))
    return network


def _tokenizer(given: Any, vocab_size: int) -> Any:
    """The one that is given, or of the file; None where one is to be trained."""
    if isinstance(given, (str, Path)):
        return data.load_tokenizer(given)
    if given is not None:
        return given
    if vocab_size < 257:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is at least 257 (every byte and {data.END})")
    return None


def _of_folder(folder: data.TokenFolder) -> tuple[Any, list[str]]:
    """(tokenizer, the first held-out documents)."""
    tokenizer, held = folder.tokenizer(), folder.heldout
    return tokenizer, [tokenizer.decode(held.document(i).tolist()) for i in range(min(HELD_TEXTS, held.documents))]


def _described(stream: data.Tokens | data.Mixture) -> list[str]:
    mixture = stream if isinstance(stream, data.Mixture) else data.Mixture([stream])
    return [
        f"{part.source.folder}: {weight:.1%} of the sequences, {len(part):,} tokens in {part.documents:,} documents"
        for part, weight in zip(mixture.streams, mixture.weights, strict=True)
    ]
