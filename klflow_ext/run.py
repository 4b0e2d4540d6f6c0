"""The run folder: one run, written whole and read whole, by `Run` alone. Nobody else touches its files.

checkpoint-<number>-step-<step>/  network, weights and state of one step (klflow_ext/checkpoint.py); the last of them count
tokenizer.json                    the tokenizer, if there is one       train.npy heldout.npy  tokens
log.jsonl                         a line for each step                 report.json  why training stopped by itself
lock                              who is training there, while it is

A run that was trained on token folders (`klflow prepare`) has no train.npy and heldout.npy: its configs name the folders.

What is not whole yet has a name that ends with .tmp, and goes when the folder is written to again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from klflow_ext import data
from klflow_ext.checkpoint import CONFIG, FORMAT, Checkpoint, NewerFormat, read_model, stamps
from klflow_ext.data import vocab_size_of
from klflow_ext.files import TEMPORARY, Writer, read_json, reading, remove, write_file, write_files
from klflow_ext.lock import Lock, new_folder
from klflow_ext.log import Log, read_log
from klflow_ext.path import Path as NoisePath

T = TypeVar("T")
TEXTS = ("tokenizer.json", "train.npy", "heldout.npy")
STORIES = Path(__file__).parent / "stories"  # the model that comes with the package


def check_out(out: Path, overwrite: bool) -> None:
    """Whether a new run may be written to a folder: ValueError where it holds anything but a run that may be overwritten, or
    where another process is training."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file, allowed is a folder")
    if not any(file.name != Lock.NAME for file in out.iterdir()):
        return
    if not Run(out).checkpoints() and not (out / "config.json").is_file():  # which runs of format 1 have
        raise ValueError(f"out: {out} holds other files than a run's, allowed is a new folder, an empty one or a run")
    if not overwrite:
        raise ValueError(f"out: {out} holds a run already; --overwrite replaces it, --resume {out} goes on with it")
    Lock(out).release()


class Run:
    """A run by its folder, which need not exist before it is saved to.

    Args:
        folder: where its files are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock: Lock | None = None

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
        with new_folder(out, lambda: check_out(out, overwrite)) as (staging, lock):
            run = cls(staging)
            run._lock = lock
            writers: dict[str, Writer] = {"tokenizer.json": lambda p: tokenizer.save(str(p))}
            if data.reference(stream) is None:
                writers |= {"train.npy": _array_writer(stream), "heldout.npy": _array_writer(heldout)}
            write_files(run.folder, writers)
            yield run
        run.folder, run._lock = out, None

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Within the block no other process can write to the folder, which is made if needed. Blocks may be nested.

        Raises:
            ValueError: another process writes to it; the message says which.
        """
        if self._lock is not None:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written: {error.strerror}") from None
        self._lock = Lock(self.folder)
        try:
            self._clear()
            yield
        finally:
            self._lock.release()
            self._lock = None

    def _clear(self) -> None:
        """Removes what a killed process left unfinished."""
        for file in self.folder.glob(f"*{TEMPORARY}"):
            name = file.name.removesuffix(TEMPORARY)
            if Checkpoint.NAME.fullmatch(name) or name in (*TEXTS, "log.jsonl", "report.json", "parts"):
                remove(file)

    def clear(self) -> None:
        """Removes a run, to make room for another one. Files that are no run's stay. The texts go first: a checkpoint that a killed
        process leaves is then known to be damaged."""
        with self.owned():
            for name in (*TEXTS, "log.jsonl", "report.json"):
                remove(self.folder / name)
            for checkpoint in self.checkpoints():
                checkpoint.remove()

    def save(
        self, config: dict, weights: dict[str, Tensor], training: dict, stream: data.Stream, step: int, keep: int = 1,
        parts: Path | None = None, tokenizer: Any = None,
    ) -> Checkpoint:  # fmt: skip
        """Writes a checkpoint, and once it is whole removes all but the last ones and the best.

        Args:
            config: of the model, the path and the training, as dicts; "heldout_loss", where it is known (`best`).
            weights: what the run gives, by name.
            training: what its training goes on from.
            stream: the tokens to train on; an array is written once, token folders are named.
            step: where its training stands.
            keep: checkpoints that stay, this one with them.
            tokenizer: a tokenizers.Tokenizer, written with the first checkpoint; None: none is.
            parts: a folder with the sharded tensors of `training`, as `Checkpoint.write` takes it.

        Raises:
            ValueError: a tensor is not finite, or a file cannot be written; what was there before stays.
        """
        with self.owned():
            if self._lock is None or not self._lock.holds():
                raise ValueError(
                    f"run: {self.folder} has gone, or another took its place, so that nothing can be saved"
                )
            before, sources = self.checkpoints(), data.reference(stream)
            try:
                if sources is None and not (self.folder / "train.npy").exists():
                    write_file(self.folder / "train.npy", _array_writer(stream))
                if tokenizer is not None and not before and not (self.folder / "tokenizer.json").exists():
                    write_file(self.folder / "tokenizer.json", lambda p: tokenizer.save(str(p)))
                texts, number = self._texts(before), before[0].number + 1 if before else 1
                named = {} if sources is None else {"data": sources}
                config = {"tokenizer": "tokenizer.json" in texts, **named, **config}
                written = Checkpoint.write(
                    self.folder,
                    number,
                    step,
                    config=config,
                    weights=weights,
                    training=training,
                    texts=texts,
                    parts=parts,
                )
            except ValueError as error:
                last = f"the last checkpoint is {before[0].folder}" if before else "there is no checkpoint before it"
                raise ValueError(f"{error}; {last}") from error
            best = self.best()
            for checkpoint in before[max(keep, 1) - 1 :]:
                if best is None or checkpoint.number != best.number:
                    checkpoint.remove()
        return written

    def _texts(self, before: list[Checkpoint]) -> dict[str, Any]:
        """Size and checksum of what the run's checkpoints share, from the last of them that tells."""
        for checkpoint in before:
            try:
                return checkpoint.manifest["texts"]
            except ValueError:
                continue
        return stamps(self.folder, [name for name in TEXTS if (self.folder / name).exists()])

    def open_log(self, step: int) -> Log:
        """log.jsonl, to append lines to from this step on."""
        return Log(self.folder / "log.jsonl", step)

    def read_log(self) -> list[dict[str, Any]]:
        """The records of log.jsonl. ValueError where there is none."""
        return read_log(self.folder / "log.jsonl")

    def write_report(self, report: dict[str, Any]) -> Path:
        """report.json: why training stopped by itself."""
        write_file(self.folder / "report.json", lambda p: p.write_text(json.dumps(report, indent=2) + "\n", "utf-8"))
        return self.folder / "report.json"

    # ---- read

    def checkpoints(self) -> list[Checkpoint]:
        """All of them, the last first. Whether they are whole is seen when they are read."""
        found = [Checkpoint(f) for f in self.folder.glob("checkpoint-*") if Checkpoint.NAME.fullmatch(f.name)]
        return sorted(found, key=lambda checkpoint: -checkpoint.number)

    def last(self) -> Checkpoint:
        """The last checkpoint. ValueError where the folder is no run, or one of another version."""
        found = self.checkpoints()
        if found:
            return found[0]
        if (self.folder / "config.json").is_file():
            old = read_json(self.folder / "config.json").get("format")
            raise ValueError(
                f"run: {self.folder} has format {old!r}, allowed is {FORMAT}: train it again with this version"
            )
        raise ValueError(f"run: {self.folder} is no run folder: it has no checkpoint")

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest held-out loss, the last of several; None where no whole one tells."""
        found: list[tuple[float, Checkpoint]] = []
        for checkpoint in self.checkpoints():
            try:
                loss = checkpoint.config().get("heldout_loss")
            except ValueError:  # it is damaged
                continue
            if isinstance(loss, (int, float)):
                found.append((loss, checkpoint))
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def last_good(self, report: Callable[[str], object] = warnings.warn) -> Checkpoint:
        """The last checkpoint that is whole, for training to go on from.

        Args:
            report: called with a line on each later one that is not.

        Raises:
            ValueError: none is whole, or one was written by another version.
        """
        self.last()
        damage = []
        for checkpoint in self.checkpoints():
            try:
                checkpoint.check()
            except NewerFormat:
                raise
            except ValueError as error:
                damage.append(str(error))
                continue
            for said in damage:
                report(f"{said}; going back to {checkpoint.folder.name}")
            return checkpoint
        raise ValueError(f"{damage[0]}; no checkpoint of {self.folder} is whole")

    def _read(self, read: Callable[[Checkpoint], T]) -> T:
        """What the last checkpoint gives; asked again where training has put a later one in its place meanwhile."""
        while True:
            checkpoint = self.last()
            try:
                return read(checkpoint)
            except ValueError:
                if checkpoint.folder.exists() or checkpoint.number == self.last().number:
                    raise

    def config(self) -> dict:
        """Network, path and training settings. ValueError where the folder is no run, is broken, or is of another version."""
        return self._read(Checkpoint.config)

    def model(self, model: nn.Module | None = None) -> tuple[Any, NoisePath]:
        """(model, path), the model in evaluation mode, with the averaged weights of a run with ema.

        Args:
            model: takes up the weights, where the run cannot say how it is made (`Network.to_dict`); None: it is made anew.
        """
        return self._read(lambda checkpoint: checkpoint.model(model))

    def tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, or None of a run that was trained on tokens alone."""
        if not self.config().get("tokenizer", True):
            return None
        return read_tokenizer(self._read(lambda checkpoint: checkpoint.check_text("tokenizer.json")))

    def streams(
        self, moved: Sequence[str | Path] = (), checkpoint: Checkpoint | None = None
    ) -> tuple[data.Stream, data.Stream]:
        """(training, held-out) tokens, as memory maps. Its own are read and compared with what was written; of token folders the
        fingerprints are compared.

        Args:
            moved: where its token folders are now, if not where they were.
            checkpoint: whose tokens; None: the last one's.
        """
        sources = (self.config() if checkpoint is None else checkpoint.config()).get("data")
        if sources is not None:
            return data.from_reference(sources, moved)
        if moved:
            raise ValueError(f"data: got {moved[0]}, allowed is none: {self.folder} holds its own tokens")
        return self._stream("train.npy"), self._stream("heldout.npy")

    def _stream(self, name: str) -> np.ndarray:
        file = self._read(lambda checkpoint: checkpoint.check_text(name))
        with reading(file):
            stream = np.load(file, mmap_mode="r", allow_pickle=False)
            if stream.ndim != 1 or stream.dtype.kind not in "iu":
                raise ValueError(f"it holds {stream.dtype} of shape {stream.shape}, allowed is a row of integers")
        return stream


def read_tokenizer(file: Path) -> Any:
    """The tokenizers.Tokenizer of a file."""
    from tokenizers import Tokenizer

    with reading(file):
        tokenizer = Tokenizer.from_file(str(file))
        vocab_size_of(tokenizer)  # ids with gaps of 10^9 would take seconds and gigabytes later
    return tokenizer


def _array_writer(array: Any) -> Writer:
    def write(path: Path) -> None:
        with open(path, "wb") as file:  # np.save adds .npy to a name
            np.save(file, array)

    return write


def is_saved_model(folder: Path) -> bool:
    """Whether a folder is one of `klflow_ext.hub.save_pretrained`: a model and nothing of its training."""
    if Run(folder).checkpoints() or not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    return config.get("library") == "klflow_ext" and config.get("format") == FORMAT


def load_run(
    run: str | Path | None = None, model: nn.Module | None = None, best: bool = False
) -> tuple[Any, NoisePath, Any]:
    """(model, path, tokenizer), the model in evaluation mode, the tokenizer None where there is none.

    Args:
        run: a run folder, or one of `klflow_ext.hub.save_pretrained`; None: the small model of English stories that comes with
            the package.
        model: takes up the weights; None: it is made anew.
        best: of a run the checkpoint with the lowest held-out loss (`Run.best`), not the last one.

    Raises:
        ValueError: the folder is neither, or is broken; or None where the package came without its model; or with `best` no
            checkpoint knows its held-out loss.
    """
    folder = STORIES if run is None else Path(run)
    if run is None and not folder.is_dir():
        raise ValueError(f"run: got none, and this klflow_ext came without a model ({folder}): name a run folder")
    if not is_saved_model(folder):
        opened = Run(folder)
        if not best:
            return (*opened.model(model), opened.tokenizer())
        checkpoint = opened.best()
        if checkpoint is not None:
            return (*checkpoint.model(model), opened.tokenizer())
    if best:
        raise ValueError(f"best: got True, allowed is False: no checkpoint of {folder} knows its held-out loss")
    config = read_json(folder / CONFIG)
    made, path = read_model(folder, config, model)
    return made, path, read_tokenizer(folder / "tokenizer.json") if config.get("tokenizer") else None
