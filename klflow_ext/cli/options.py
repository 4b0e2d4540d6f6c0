"""Options of the command line that stand in a file (--config FILE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from klflow_ext.files import read_json

CONFIG = "--config"
OF_MODEL = ("n_layer", "n_head", "n_embd", "input", "time", "slices")  # of a run's config.json, what may be asked for
OF_PATH = ("beta", "t_max")


def with_config(words: list[str]) -> list[str]:
    """The command line with the options of its --config FILE before its own, which are then stronger.

    Raises:
        ValueError: the file cannot be read, or holds something else than options.
    """
    if not words or words[0] not in ("train", "demo", "adapt"):
        return words
    for i, word in enumerate(words):
        if word == CONFIG and i + 1 < len(words):
            name = words[i + 1]
        elif word.startswith(CONFIG + "="):
            name = word.split("=", 1)[1]
        else:
            continue
        return [words[0], *_flags(Path(name)), *words[1:]]
    return words


def _flags(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"config: got {file}, allowed is a JSON file that is there")
    values = read_json(file, "config")
    if isinstance(values.get("train"), dict):
        values = _of_run(values)
    flags = []
    for name, value in values.items():
        flag = "--" + str(name).replace("_", "-")
        if flag in (CONFIG, "--resume") or isinstance(value, dict):
            raise ValueError(
                f"config: {file} has {name!r}: {value!r}, allowed are options of klflow train and their values"
            )
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def _of_run(config: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's config.json what can be asked for again; its text and tokenizer are named on the command line."""
    train = {"seconds" if name == "max_seconds" else name: value for name, value in config["train"].items()}
    model, path = config.get("model", {}), config.get("path", {})
    shape = {name: model[name] for name in OF_MODEL if name in model}
    return {
        **train,
        **shape,
        "path": path.get("kind", "logit"),
        **{name: path[name] for name in OF_PATH if name in path},
    }
