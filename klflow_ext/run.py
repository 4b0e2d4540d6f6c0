"""The run folder: one run, written whole and read whole. Nobody else touches its files.

config.json         network, path and training settings       tokenizer.json       the tokenizer
model.safetensors   weights (averaged, if the run averages)   train.npy heldout.npy  tokens
checkpoint.pt       what training goes on from                log.jsonl            a line for each step
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def check_out(out: Path, overwrite: bool) -> None:
    """Whether a new run may be written to a folder: ValueError where it holds anything but a run that may be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file, allowed is a folder")
    if not (out / "config.json").is_file() and not (out / "checkpoint.pt").is_file():
        raise ValueError(f"out: {out} holds other files than a run's, allowed is a new folder, an empty one or a run")
    if not overwrite:
        raise ValueError(f"out: {out} holds a run already; --overwrite replaces it, --resume {out} goes on with it")


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` to write a new run to, which takes its place (and that of an old run) when it is whole."""
    check_out(out, overwrite)
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


def read_config(run: str | Path) -> dict:
    """config.json of a run folder; ValueError where the folder is none, is broken, or is of another version."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"run: {run} is no run folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"run: {path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"run: {run} has format {found!r}, allowed is {FORMAT}: train it again with this version")
    return config


def load_run(run: str | Path):
    """(model, path, tokenizer) of a run folder, the model in evaluation mode, with the averaged weights of a run with ema."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    from klflow_ext.model import Denoiser, DenoiserConfig
    from klflow_ext.path import Path as NoisePath

    run = Path(run)
    config = read_config(run)
    with reading(run / "config.json"):
        path = NoisePath.from_dict(config["path"])
        shape = DenoiserConfig(**config["model"])
    with reading(run / "model.safetensors") as file, safe_open(file, "pt") as stored:
        rows = shape.vocab_size + (shape.input == "tokens")
        found, expected = stored.get_slice("embedding").get_shape(), [rows, shape.n_embd]
        blocks = {name.split(".")[1] for name in stored.keys() if name.startswith("blocks.")}  # noqa: SIM118
        if found != expected or len(blocks) != shape.n_layer:  # before memory is taken for what config.json says
            raise ValueError(
                f"it holds an embedding of {found} and {len(blocks)} layers, config.json says {expected} and {shape.n_layer}"
            )
        model = Denoiser(shape, path)
        model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    with reading(run / "tokenizer.json") as file:
        tokenizer = Tokenizer.from_file(str(file))
    return model.eval(), path, tokenizer
