"""A checkpoint: a folder of a run with all of one step, written whole, never changed, and checked when it is read.

config.json         network, path and training settings     manifest.json  size and checksum of each file, the run's texts too
model.safetensors   weights (averaged, if the run averages)  training.safetensors  what training goes on from
                    of sharded parameters that is in training-<number>-of-<processes>.safetensors too, a part of each process
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from klflow_ext.files import TEMPORARY, checksum, read_json, reading, remove, write_folder
from klflow_ext.model import Denoiser, DenoiserConfig, remake
from klflow_ext.parts import read_parts
from klflow_ext.path import Path as NoisePath
from klflow_ext.path import as_network
from klflow_ext.path.network import load_own_state, own_state
from klflow_ext.sharding import is_sharded

FORMAT = 2  # manifest.json says which
MANIFEST, CONFIG, MODEL, TRAINING = "manifest.json", "config.json", "model.safetensors", "training.safetensors"


class NewerFormat(ValueError):
    """A whole checkpoint of another version of this package."""


class Checkpoint:
    """A checkpoint by its folder, checkpoint-<number>-step-<step>. Numbers count a run's checkpoints: the highest is the last.

    Args:
        folder: where its files are.
    """

    NAME = re.compile(r"checkpoint-(\d{1,18})-step-(\d{1,18})")

    def __init__(self, folder: Path):
        name = self.NAME.fullmatch(folder.name)
        if name is None:
            raise ValueError(f"checkpoint: got {folder.name!r}, allowed is checkpoint-<number>-step-<step>")
        self.folder = folder
        self.number, self.step = int(name[1]), int(name[2])

    @classmethod
    def write(
        cls, run: Path, number: int, step: int, *, config: dict, weights: dict[str, Tensor], training: dict, texts: dict,
        parts: Path | None = None,
    ) -> Checkpoint:  # fmt: skip
        """A new one in a run's folder, there whole or not at all.

        Args:
            config, weights: what the run gives.
            training: what its training goes on from: dicts, lists, numbers, texts and tensors.
            texts: size and checksum of the run's other files, by name (`stamp`).
            parts: a folder whose files (`write_parts`) hold the sharded tensors of `training`; it is emptied.

        Raises:
            ValueError: a tensor is not finite, or a file cannot be written.
        """
        from safetensors.torch import save_file

        tree, tensors = pack(training)
        tensors = {name: value for name, value in tensors.items() if not is_sharded(value)}
        found = [] if parts is None else sorted(parts.glob("*.safetensors"))
        moved = {f"training-{i:05}-of-{len(found):05}.safetensors": file for i, file in enumerate(found, 1)}
        for name, value in {**weights, **tensors}.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{name}: got numbers that are not finite, which are never saved")

        def manifest(path: Path) -> None:
            files = stamps(path.parent, (CONFIG, MODEL, TRAINING, *moved))
            path.write_text(_signed({"format": FORMAT, "step": step, "files": files, "texts": texts}), "utf-8")

        checkpoint = cls(run / f"checkpoint-{number:04d}-step-{step}")
        writers = {
            CONFIG: lambda p: p.write_text(json.dumps(config, indent=2) + "\n", "utf-8"),
            MODEL: lambda p: save_file({name: value.contiguous() for name, value in weights.items()}, p),
            TRAINING: lambda p: save_file(tensors, p, {"tree": json.dumps(tree)}),
            **{name: file.rename for name, file in moved.items()},
            MANIFEST: manifest,  # the last, of what is on the disk
        }
        write_folder(checkpoint.folder, writers)
        return checkpoint

    def remove(self) -> None:
        """Under a temporary name first: half of it is never taken for a whole one."""
        gone = self.folder.with_name(self.folder.name + TEMPORARY)
        remove(gone)
        try:
            self.folder.rename(gone)
        except OSError:  # a reader of it loses nothing, and the next checkpoint tries again
            return
        remove(gone)

    # ---- read

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, checked by its own checksum."""
        path = self.folder / MANIFEST
        manifest = read_json(path)
        with reading(path):
            if json.loads(_signed({k: v for k, v in manifest.items() if k != "checksum"})) != manifest:
                raise ValueError("its checksum is another")
        if manifest.get("format") != FORMAT:
            raise NewerFormat(f"run: {path} has format {manifest.get('format')!r}, allowed is {FORMAT}")
        with reading(path):
            for name, stamp in (*manifest["files"].items(), *manifest["texts"].items()):
                if not isinstance(stamp["bytes"], int) or not isinstance(stamp["sha256"], str) or "/" in name:
                    raise ValueError(f"its entry {name!r} is none of a file")
            if manifest["step"] != self.step:
                raise ValueError(f"it is of step {manifest['step']}, the folder's name says {self.step}")
        return manifest

    def check(self, *names: str) -> Checkpoint:
        """Itself, once its files are known to be those that were written; without names all of them."""
        for name in names or {CONFIG, MODEL, TRAINING, *self.manifest["files"]}:
            _check(self.folder / name, self.manifest["files"].get(name))
        return self

    def check_text(self, name: str) -> Path:
        """The path of one of the run's texts, once it is known to be what was written."""
        _check(self.folder.parent / name, self.manifest["texts"].get(name))
        return self.folder.parent / name

    def config(self) -> dict[str, Any]:
        """config.json: dicts of the "model", the "path" and its training ("train")."""
        self.check(CONFIG)
        config = read_json(self.folder / CONFIG)
        with reading(self.folder / CONFIG):
            for name in ("model", "path", "train"):
                if not isinstance(config.get(name), dict):
                    raise ValueError(f"{name}: got {config.get(name)!r}, allowed is an object")
        return config

    def model(self, model: nn.Module | None = None) -> tuple[nn.Module, NoisePath]:
        """(model, path), as `read_model` gives them."""
        config = self.config()
        self.check(MODEL)
        return read_model(self.folder, config, model)

    @contextmanager
    def training(self, like: Callable[[str], Any] | None = None) -> Iterator[dict[str, Any]]:
        """What training goes on from; an error while it is taken up is one of the file.

        like: for the name of a tensor (`pack`) one that is split as it should be, or None. Without it all are whole, on the CPU.
        """
        from safetensors import safe_open

        parts = [name for name in self.manifest["files"] if name.startswith("training-")]
        self.check(TRAINING, *parts)
        with reading(self.folder / TRAINING) as file, safe_open(file, "pt") as stored:
            tree = json.loads((stored.metadata() or {})["tree"])
            if like is None and not parts:
                yield _unpack(tree, stored.get_tensor)
                return
            tensors = read_parts(self.folder, _names(tree), like or (lambda name: None))
            yield _unpack(tree, tensors.__getitem__)


def read_model(folder: Path, config: dict[str, Any], model: nn.Module | None = None) -> tuple[nn.Module, NoisePath]:
    """(model, path) of a folder with model.safetensors, the model in evaluation mode. Of a Denoiser no memory is taken for what
    config says and the weights do not.

    Args:
        folder: where model.safetensors is.
        config: config.json, with the "model" and the "path".
        model: takes up the weights, where nothing else can make it; None: it is made as config says.

    Raises:
        ValueError: a file is missing or broken, or the two do not fit. TypeError: the model is no module.
    """
    from safetensors import safe_open

    with reading(folder / CONFIG):
        path = NoisePath.from_dict(config["path"])
        if model is None and "class" not in config["model"]:
            _check_denoiser(folder, config["model"], path)
        made = remake(config["model"], path) if model is None else model
        if model is None:
            as_network(made, path)
    if not isinstance(made, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, allowed where it takes up weights is a torch.nn.Module")
    as_network(made, path)
    said = f"{CONFIG} says" if model is None else "the model has"
    with reading(folder / MODEL) as file, safe_open(file, "pt") as stored:
        _check_shapes(stored, own_state(made), said)
        load_own_state(made, {name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return made.eval(), path


def _check_denoiser(folder: Path, values: dict, path: NoisePath) -> None:
    from safetensors import safe_open

    shape = DenoiserConfig(**values)
    with reading(folder / MODEL) as file, safe_open(file, "pt") as stored:
        blocks = {name.split(".")[1] for name in stored.keys() if name.startswith("blocks.")}  # noqa: SIM118
        if len(blocks) != shape.n_layer:  # before that many are made, be it without memory
            raise ValueError(f"it holds {len(blocks)} layers, {CONFIG} says {shape.n_layer}")
    with torch.device("meta"):
        expected = Denoiser(shape, path).state_dict()
    with reading(folder / MODEL) as file, safe_open(file, "pt") as stored:
        _check_shapes(stored, expected, f"{CONFIG} says")


def _check_shapes(stored: Any, expected: dict[str, Tensor], said: str) -> None:
    found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    shapes = {name: list(value.shape) for name, value in expected.items()}
    for name in sorted({*found, *shapes}):
        if found.get(name) != shapes.get(name):
            raise ValueError(f"it holds {name} of {found.get(name)}, {said} {shapes.get(name)}")


def stamps(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files, by name."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)} for name in names}


def _check(path: Path, stamp: dict[str, Any] | None) -> None:
    with reading(path):
        if stamp is None:
            raise ValueError("the manifest does not name it")
        size = path.stat().st_size
        if size != stamp["bytes"]:
            raise ValueError(f"it has {size} bytes, {stamp['bytes']} were written")
        if checksum(path) != stamp["sha256"]:
            raise ValueError("its checksum is not that of what was written")


def _signed(manifest: dict[str, Any]) -> str:
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "checksum": hashlib.sha256(body.encode()).hexdigest()}, indent=2) + "\n"


def pack(training: Any) -> tuple[Any, dict[str, Tensor]]:
    """(tree, tensors): what training goes on from as JSON, and the tensors that it names."""
    tensors: dict[str, Tensor] = {}
    return _pack(training, "", tensors), tensors


def _names(tree: Any) -> Iterator[str]:
    """Of the tensors of a tree."""
    if isinstance(tree, list):
        for value in tree:
            yield from _names(value)
    elif isinstance(tree, dict) and "tensor" in tree:
        yield tree["tensor"]
    elif isinstance(tree, dict):
        yield from _names([value for _, value in tree["items"]])


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of JSON, in which tensors, put into `tensors`, stand as {"tensor": name} and dicts, with keys of any kind, as
    {"items": [[key, value], ...]}."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach() if is_sharded(value) else value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[k, _pack(v, f"{name}/{k}".lstrip("/"), tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(tree: Any, tensor: Any) -> Any:
    if isinstance(tree, list):
        return [_unpack(value, tensor) for value in tree]
    if isinstance(tree, dict):
        return tensor(tree["tensor"]) if "tensor" in tree else {k: _unpack(v, tensor) for k, v in tree["items"]}
    return tree
