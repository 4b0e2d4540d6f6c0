"""Paths between noise and text: `sample` makes the noisy input of a network, `loss` its training loss, `step` the dynamics.

    LogitPath       the KL geodesic of the simplex (this package's own): logits on a straight line from Dirichlet noise
    LinearPath      a straight line on the simplex          SpherePath   its Fisher-Rao geodesic, a great circle
    MaskPath        discrete flow matching from masks       UniformPath  the same from uniform tokens
    Autoregressive  no path at all: one token after the other, from the same interface

All noise is a function of (seed, step, row, column) alone; see `ops`.
"""

from klflow_ext.path.autoregressive import Autoregressive
from klflow_ext.path.base import IGNORE, Path
from klflow_ext.path.discrete import KAPPA, MaskPath, UniformPath
from klflow_ext.path.evidence import Evidence
from klflow_ext.path.layout import Layout
from klflow_ext.path.likelihood import Likelihood
from klflow_ext.path.logit import LogitPath, identification_accuracy
from klflow_ext.path.network import Network, Streams, as_network
from klflow_ext.path.options import ResolvedOptions, SampleOptions
from klflow_ext.path.simplex import LinearPath, SpherePath
from klflow_ext.path.state import Move, Prediction, State

__all__ = [
    "IGNORE", "KAPPA", "Path", "LogitPath", "LinearPath", "SpherePath", "MaskPath", "UniformPath", "Autoregressive",
    "State", "Prediction", "Move", "Network", "Streams", "as_network", "Evidence", "Layout", "Likelihood", "SampleOptions", "ResolvedOptions", "identification_accuracy",
]  # fmt: skip
