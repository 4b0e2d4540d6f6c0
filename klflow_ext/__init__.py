"""KL-geodesic flow matching of text on the simplex: kernels (`ops`), their PyTorch twins (`reference`), a trainer and a sampler.

    x_t = softmax((1 - t) log x_0 + t log x_1),   x_0 ~ Dirichlet(1, ..., 1),   x_1 = (1 - beta) onehot + beta / V

(Sevriugov & Oseledets, "KL-geodesics flow matching with a novel sampling scheme", arXiv 2411.16821).
"""

from importlib import import_module
from pkgutil import extend_path

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

_LAZY = {
    "Path": "path", "LogitPath": "path", "LinearPath": "path", "SpherePath": "path", "MaskPath": "path",
    "UniformPath": "path", "Network": "path", "SampleOptions": "path", "Autoregressive": "path", "ExactDenoiser": "oracle", "Denoiser": "model", "DenoiserConfig": "model",
    "Trainer": "train", "TrainConfig": "train", "Run": "run", "load_run": "run", "Sampler": "sample", "register_sampler": "sample",
}  # fmt: skip
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
)
__all__ = ["build_info", "ops", *_LAZY]


def build_info() -> dict:
    """How the library was built and what it chose on this machine (also `klflow info`)."""
    return dict(_C.build_info())


def __getattr__(name):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
