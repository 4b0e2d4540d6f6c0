"""A folder with a model and nothing of its training, as the Hub keeps it: config.json, model.safetensors, tokenizer.json, README.md."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from klflow_ext.checkpoint import CONFIG, FORMAT, MODEL
from klflow_ext.files import Writer, first_line, read_json, write_files
from klflow_ext.hub.card import model_card
from klflow_ext.model import describe
from klflow_ext.path import Path as NoisePath
from klflow_ext.path import as_network
from klflow_ext.path.network import own_state
from klflow_ext.run import Run, is_saved_model, load_run

FILES = (CONFIG, MODEL, "tokenizer.json")


def save_pretrained(
    folder: str | Path, model: nn.Module, path: NoisePath, tokenizer: Any = None, *,
    data: str | None = None, base: str | None = None, name: str | None = None, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Writes a model to a folder, all files or none, with a model card where there is none yet.

    Args:
        folder: made if needed. Other files in it stay.
        model: any module that a Trainer takes.
        path: on which it was trained.
        tokenizer: a tokenizers.Tokenizer; None: none is kept.
        data, base: what the card says, as in `klflow_ext.hub.card.model_card`.
        name: of the repository, for the card; None: that of the folder.
        dtype: of the weights in the file, such as torch.bfloat16, which takes half the bytes; None: as they are. Loaded, they
            are what the model is made with, float32.

    Raises:
        ValueError: the model does not fit the path, a weight is not finite, or a file cannot be written.
    """
    from safetensors.torch import save_file

    as_network(model, path)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, allowed is None or a floating one such as torch.bfloat16")
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in own_state(model).items()}
    for key, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key}: got numbers that are not finite, which are never saved")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: {folder} cannot be written: {error.strerror}") from None
    config = {
        "format": FORMAT, "library": "klflow_ext", "tokenizer": tokenizer is not None,
        "model": describe(model), "path": path.to_dict(),
    }  # fmt: skip
    card = model_card(model, path, name=name or folder.name, tokenizer=tokenizer is not None, data=data, base=base)
    writers: dict[str, Writer] = {
        MODEL: lambda p: save_file({key: value.detach().contiguous() for key, value in weights.items()}, p),
        CONFIG: lambda p: p.write_text(json.dumps(config, indent=2) + "\n", "utf-8"),
    }
    if tokenizer is not None:
        writers["tokenizer.json"] = lambda p: tokenizer.save(str(p))
    if not (folder / "README.md").exists():
        writers["README.md"] = lambda p: p.write_text(card, "utf-8")
    write_files(folder, writers)


def from_pretrained(
    name: str | Path, *, model: nn.Module | None = None, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None, local_files_only: bool = False,
) -> tuple[Any, NoisePath, Any]:  # fmt: skip
    """(model, path, tokenizer) of a folder, of a run folder too, or of a repository of the Hub; the model in evaluation mode.

    Args:
        name: a folder, or "owner/name".
        model: takes up the weights, where the folder cannot say how it is made (`Network.to_dict`); None: it is made anew.
        revision, token, cache_dir, local_files_only: of a repository, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: there is no such folder or repository, or it is no model of this library; the message names it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), revision, token, cache_dir, local_files_only)
    if not Run(folder).checkpoints():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"name: got {str(name)!r}, which has no {CONFIG}, allowed is a model of klflow_ext")
        config = read_json(folder / CONFIG)
        if not is_saved_model(folder):
            raise ValueError(
                f"name: got {str(name)!r} of library {config.get('library')!r}, format {config.get('format')!r}, allowed is "
                f"'klflow_ext', format {FORMAT}; klflow_ext.TransformerDenoiser adapts a transformer"
            )
    return load_run(folder, model)


def _download(name: str, revision: Any, token: Any, cache_dir: Any, local_files_only: bool) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"name: got {name!r}, allowed is a folder that is there, or a repository, owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(FILES),
            )  # fmt: skip
        )
    except Exception as error:  # of the network, the Hub, the disk: each has its own
        raise ValueError(f"name: {name!r} cannot be fetched: {first_line(error)}") from error


def push_to_hub(
    repo_id: str, model: nn.Module, path: NoisePath, tokenizer: Any = None, *,
    private: bool | None = None, token: str | bool | None = None, message: str = "Upload model", **card: Any,
) -> Any:  # fmt: skip
    """Sends what `save_pretrained` writes to a repository, which is made if needed. A card that is there already stays.

    Args:
        repo_id: owner/name. model, path, tokenizer: as in `save_pretrained`; card: its data and base.
        private, token: as in `huggingface_hub.HfApi`. message: of the commit.

    Returns: what `HfApi.upload_folder` does.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model, path, tokenizer, name=repo_id, **card)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if api.file_exists(repo_id, "README.md"):
            (Path(folder) / "README.md").unlink()
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
