"""The run folder: one run, written whole and read whole, by `Run` alone. Nobody else touches its files.

config.json         network, path and training settings       tokenizer.json       the tokenizer, if there is one
model.safetensors   weights (averaged, if the run averages)   train.npy heldout.npy  tokens
checkpoint.pt       what training goes on from                log.jsonl            a line for each step

A run that was trained on token folders (`klflow prepare`) has no train.npy and heldout.npy: its config.json names the folders.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from klflow_ext import data
from klflow_ext.model import Denoiser, DenoiserConfig
from klflow_ext.path import Path as NoisePath

FORMAT = 1  # config.json says which


def write_files(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Writes each file under a temporary name, then renames all: a reader finds them as they were before or as they are after.

    Raises:
        ValueError: one cannot be written. It is named, nothing temporary is left, and what was there before stays.
    """
    mask = os.umask(0)
    os.umask(mask)
    temporary = {name: folder / f"{name}.tmp" for name in writers}
    name = next(iter(writers))
    try:
        for name, write in writers.items():
            write(temporary[name])
            os.chmod(temporary[name], 0o666 & ~mask)  # safetensors' files would be private
        for name in writers:
            os.replace(temporary[name], folder / name)
    except Exception as error:  # each library has its own for a full disk
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise ValueError(f"{folder / name} cannot be written: {_reason(error)}") from error
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """One file, as `write_files` does it."""
    write_files(path.parent, {path.name: write})


def _reason(error: BaseException) -> str:
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


RUN = ("a run", ("config.json", "checkpoint.pt"))
TOKENS = ("a token folder", ("index.json",))


def check_out(out: Path, overwrite: bool, kind: tuple[str, tuple[str, ...]] = RUN) -> None:
    """Whether a new run may be written to a folder: ValueError where it holds anything but a run that may be overwritten.

    kind: what takes its place, RUN or TOKENS.
    """
    name, marks = kind
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file, allowed is a folder")
    if not any((out / mark).is_file() for mark in marks):
        raise ValueError(f"out: {out} holds other files than {name}'s, allowed is a new folder, an empty one or {name}")
    if not overwrite:
        go_on = f", --resume {out} goes on with it" * (kind == RUN)
        raise ValueError(f"out: {out} holds {name} already; --overwrite replaces it{go_on}")


@contextmanager
def new_folder(out: Path, overwrite: bool, kind: tuple[str, tuple[str, ...]] = RUN) -> Iterator[Path]:
    """A folder beside `out` to write a new run to, which takes its place (and that of an old run) when it is whole."""
    check_out(out, overwrite, kind)
    staging, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written: {error.strerror}") from None
    try:
        yield staging
        shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(staging, out)  # also over an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            os.rename(out, old)
            os.rename(staging, out)
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Any failure to read a file of a run folder becomes a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"run: {path.parent} is no whole run folder: it has no {path.name}")
    try:
        yield path
    except Exception as error:  # each library has its own exceptions for a broken file
        raise ValueError(f"run: {path} cannot be read: {str(error).splitlines()[0]}") from error


class Run:
    """A run by its folder, which need not exist before it is saved to.

    Args:
        folder: where its files are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    # ---- written

    @classmethod
    @contextmanager
    def create(
        cls, out: Path, *, overwrite: bool, tokenizer: Any, stream: data.Stream, heldout: data.Stream
    ) -> Iterator[Run]:
        """A new run with its text, to save to; it takes its place at `out` (and that of an old run) when it is whole.

        Args:
            out: its folder.
            overwrite: whether it may take the place of a run.
            tokenizer: a tokenizers.Tokenizer.
            stream, heldout: tokens to train on, and those that are kept back; arrays are copied.

        Raises:
            ValueError: `out` holds something else, or cannot be written.
        """
        with new_folder(out, overwrite) as folder:
            writers: dict[str, Callable[[Path], None]] = {"tokenizer.json": lambda p: tokenizer.save(str(p))}
            if data.reference(stream) is None:
                writers |= {"train.npy": _array_writer(stream), "heldout.npy": _array_writer(heldout)}
            write_files(folder, writers)
            yield cls(folder)

    def save(self, config: dict, weights: dict[str, Tensor], checkpoint: dict, stream: data.Stream) -> None:
        """Writes the folder, or what has changed of it, all at once.

        Args:
            config: of the model, the path and the training, as dicts.
            weights: what the run gives, by name.
            checkpoint: what its training goes on from.
            stream: the tokens to train on; an array is written once, token folders are named.

        Raises:
            ValueError: a weight is not finite, or a file cannot be written; what was there before stays.
        """
        from safetensors.torch import save_file

        bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
        if bad:
            raise ValueError(f"{bad[0]}: got numbers that are not finite, which are never saved")
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = data.reference(stream)
        named = {} if sources is None else {"data": sources}
        config = {"format": FORMAT, "tokenizer": (self.folder / "tokenizer.json").exists(), **named, **config}
        writers = {
            "checkpoint.pt": lambda p: torch.save(checkpoint, p),
            "model.safetensors": lambda p: save_file(weights, p),
            "config.json": lambda p: p.write_text(json.dumps(config, indent=2) + "\n"),
        }
        if sources is None and not (self.folder / "train.npy").exists():
            writers["train.npy"] = _array_writer(stream)
        write_files(self.folder, writers)

    def open_log(self) -> IO[str]:
        """log.jsonl, to append lines to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return open(self.folder / "log.jsonl", "a")

    # ---- read

    def config(self) -> dict:
        """config.json. ValueError where the folder is no run, is broken, or is of another version."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise ValueError(f"run: {self.folder} is no run folder: it has no config.json")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"run: {path} cannot be read: {error}") from None
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else None
            raise ValueError(
                f"run: {self.folder} has format {found!r}, allowed is {FORMAT}: train it again with this version"
            )
        return config

    def model(self) -> tuple[Denoiser, NoisePath]:
        """(model, path), the model in evaluation mode, with the averaged weights of a run with ema."""
        from safetensors import safe_open

        config = self.config()
        with reading(self.folder / "config.json"):
            path = NoisePath.from_dict(config["path"])
            shape = DenoiserConfig(**config["model"])
        with reading(self.folder / "model.safetensors") as file, safe_open(file, "pt") as stored:
            rows = shape.vocab_size + (shape.input == "tokens")
            found, expected = stored.get_slice("embedding").get_shape(), [rows, shape.n_embd]
            blocks = {name.split(".")[1] for name in stored.keys() if name.startswith("blocks.")}  # noqa: SIM118
            if found != expected or len(blocks) != shape.n_layer:  # before memory is taken for what config.json says
                raise ValueError(
                    f"it holds an embedding of {found} and {len(blocks)} layers, config.json says {expected} and "
                    f"{shape.n_layer}"
                )
            model = Denoiser(shape, path)
            model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        return model.eval(), path

    def tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, or None of a run that was trained on tokens alone."""
        if not self.config().get("tokenizer", True):
            return None
        from tokenizers import Tokenizer

        with reading(self.folder / "tokenizer.json") as file:
            return Tokenizer.from_file(str(file))

    def streams(self, moved: Sequence[Path] = ()) -> tuple[data.Stream, data.Stream]:
        """(training, held-out) tokens, as memory maps. moved: where its token folders are now, if not where they were."""
        sources = self.config().get("data")
        if sources is not None:
            return data.from_reference(sources, moved)
        if moved:
            raise ValueError(f"data: got {moved[0]}, allowed is none: {self.folder} holds its own tokens")
        streams = []
        for name in ("train.npy", "heldout.npy"):
            with reading(self.folder / name) as file:
                streams.append(np.load(file, mmap_mode="r"))
        return streams[0], streams[1]

    @contextmanager
    def checkpoint(self, device: torch.device) -> Iterator[dict]:
        """What training goes on from; an error while it is taken up is one of the file."""
        with reading(self.folder / "checkpoint.pt") as path:
            yield torch.load(path, map_location=device, weights_only=True)


def _array_writer(array: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:  # np.save adds .npy to a name
            np.save(file, array)

    return write


def load_run(run: str | Path) -> tuple[Denoiser, NoisePath, Any]:
    """(model, path, tokenizer) of a run folder: `Run.model` and `Run.tokenizer`."""
    opened = Run(run)
    return (*opened.model(), opened.tokenizer())
