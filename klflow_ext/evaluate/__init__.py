"""How good a model and its text are.

losses.py    held-out loss by time, entropies
judge.py     bits per byte under an independent judge
"""

from klflow_ext.evaluate.judge import Judge
from klflow_ext.evaluate.losses import loss_by_time, token_entropy, unigram_entropy, unigram_log_prior

__all__ = ["Judge", "loss_by_time", "token_entropy", "unigram_entropy", "unigram_log_prior"]
