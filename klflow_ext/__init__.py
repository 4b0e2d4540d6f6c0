"""KL-geodesic flow matching of text on the simplex: kernels (`ops`), their PyTorch twins (`reference`), a trainer and a sampler.

    x_t = softmax((1 - t) log x_0 + t log x_1),   x_0 ~ Dirichlet(1, ..., 1),   x_1 = (1 - beta) onehot + beta / V

(Sevriugov & Oseledets, "KL-geodesics flow matching with a novel sampling scheme", arXiv 2411.16821).
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING

import torch  # noqa: F401  (libtorch must be loaded before the library that uses it)

# In the repository's root this source folder comes before the installed package; extending the path finds its library.
__path__ = extend_path(__path__, __name__)

try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"the compiled library klflow_ext._C cannot be loaded ({error}); install it with `pip install .` (torch >= 2.11)"
    ) from error

from . import ops  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:  # what the names below are; they are imported when they are first asked for
    from klflow_ext.model import Denoiser, DenoiserConfig, Reader
    from klflow_ext.oracle import ExactDenoiser
    from klflow_ext.path import (
        Autoregressive,
        Evidence,
        Layout,
        LinearPath,
        LogitPath,
        MaskPath,
        Move,
        Network,
        Path,
        Prediction,
        SampleOptions,
        SpherePath,
        State,
        UniformPath,
    )
    from klflow_ext.run import Run, load_run
    from klflow_ext.sample import Sampler, register_sampler, register_way
    from klflow_ext.train import Batches, Objective, TrainConfig, Trainer
    from klflow_ext.transformer import TransformerDenoiser

_LAZY = {
    "path": (
        "Path", "LogitPath", "LinearPath", "SpherePath", "MaskPath", "UniformPath", "Autoregressive", "Network", "State",
        "Move", "Prediction", "Evidence", "Layout", "SampleOptions",
    ),
    "oracle": ("ExactDenoiser",),
    "model": ("Denoiser", "DenoiserConfig", "Reader"),
    "run": ("Run", "load_run"),
    "train": ("Trainer", "TrainConfig", "Objective", "Batches"),
    "sample": ("Sampler", "register_sampler", "register_way"),
    "transformer": ("TransformerDenoiser",),
}  # fmt: skip
_WHERE = {name: module for module, names in _LAZY.items() for name in names}
_MODULES = (
    "reference",
    "path",
    "oracle",
    "model",
    "train",
    "run",
    "sample",
    "data",
    "evaluate",
    "cli",
    "checks",
    "muon",
    "sharding",
    "hub",
    "serve",
    "transformer",
)
__all__ = [  # a literal, which type checkers read
    "build_info", "ops", "Path", "LogitPath", "LinearPath", "SpherePath", "MaskPath", "UniformPath", "Autoregressive",
    "Network", "State", "Move", "Prediction", "Evidence", "Layout", "SampleOptions", "ExactDenoiser", "Denoiser",
    "DenoiserConfig", "Reader", "Run", "load_run", "Trainer", "TrainConfig", "Objective", "Batches", "Sampler",
    "register_sampler", "register_way", "TransformerDenoiser",
]  # fmt: skip


def build_info() -> dict:
    """How the library was built and what it chose on this machine (also `klflow info`)."""
    return dict(_C.build_info())


if not TYPE_CHECKING:  # else type checkers would take any name for an Any

    def __getattr__(name: str):
        if name in _WHERE:
            return getattr(import_module(f".{_WHERE[name]}", __name__), name)
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})
