"""How good a model and its text are.

losses.py    held-out loss by time, entropies
judge.py     bits per byte under an independent judge
"""

from klflow_ext.evaluate.judge import Judge
from klflow_ext.evaluate.losses import loss_by_time, token_entropy, unigram_entropy, unigram_log_prior
from klflow_ext.evaluate.sandbox import Outcome, run_program

__all__ = ["Judge", "Outcome", "loss_by_time", "run_program", "token_entropy", "unigram_entropy", "unigram_log_prior"]
