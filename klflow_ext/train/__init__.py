"""Training: config.py its settings, batch.py what a step sees, trainer.py the steps, signals.py and report.py
how they end early, prepare.py from a text to a Trainer, tokens.py from text files to a token folder."""

from klflow_ext.run import load_run
from klflow_ext.train.batch import Batch, Batches, LossCurve, low_discrepancy
from klflow_ext.train.config import TrainConfig
from klflow_ext.train.objective import Objective
from klflow_ext.train.optimizers import make_optimizers
from klflow_ext.train.prepare import NetworkChoice, Prepared, prepare
from klflow_ext.train.processes import LostProcess, join_processes, leave_processes
from klflow_ext.train.report import NotFinite
from klflow_ext.train.signals import Stopped
from klflow_ext.train.tensorboard import TensorBoard
from klflow_ext.train.tokens import prepare_tokens
from klflow_ext.train.trainer import Trainer

__all__ = [
    "Batch", "Batches", "LossCurve", "LostProcess", "NetworkChoice", "NotFinite", "Objective", "Prepared", "Stopped", "TensorBoard", "TrainConfig",
    "Trainer", "join_processes", "leave_processes", "load_run", "low_discrepancy", "make_optimizers", "prepare", "prepare_tokens",
]  # fmt: skip
