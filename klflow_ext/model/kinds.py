"""The network of a run, as config.json says it, and made again."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from klflow_ext.model.denoiser import Denoiser
from klflow_ext.path import Network, Path


def describe(model: nn.Module) -> dict[str, Any]:
    """What `remake` takes: of a Denoiser its config, of another its class and what its `to_dict` says, if it says anything."""
    settings = model.to_dict() if isinstance(model, Network) else None
    if type(model) is Denoiser and settings is not None:
        return settings
    return {"class": f"{type(model).__module__}:{type(model).__qualname__}", "settings": settings}


def remake(values: dict[str, Any], path: Path) -> Network:
    """A network of the same class and shape, with any weights. No code comes from the file: the class must be installed.

    Raises:
        ValueError: the class cannot be imported, is no Network, or has not said how it is made; the message names it.
    """
    if "class" not in values:
        return Denoiser.from_dict(values, path)
    name, settings = values["class"], values.get("settings")
    by_hand = "load_run(folder, model=...) and Run.model(model=...) take one that was made by hand"
    if settings is None:
        raise ValueError(f"model: got a {name}, whose to_dict says nothing, so that it cannot be made again; {by_hand}")
    try:
        module, _, qualified = str(name).partition(":")
        kind: Any = import_module(module)
        for part in qualified.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: got the class {name}, which cannot be imported ({error}); {by_hand}") from None
    if not (isinstance(kind, type) and issubclass(kind, Network)):
        raise ValueError(f"model: got {name}, allowed is a subclass of klflow_ext.Network")
    return kind.from_dict(settings, path)
