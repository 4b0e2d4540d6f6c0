"""How good a model and its text are.

losses.py       held-out loss by time, entropies
judge.py        bits per byte under an independent judge, and what it sees in a text
text.py         variety, repetition, what was copied, BLEU, ROUGE-L, intervals
distance.py     how far texts as a whole are from real ones
table.py        all of these for some texts side by side
code.py         programs with holes, pass@k and compiles@k
infilling.py    a sampler fills these holes
conditional.py  a sampler writes to prompts, and what it writes against what was wanted
rows.py         the files of both
sandbox.py      a program that nobody has read, run where it costs its own score only; guard.py is what shuts it in
"""

from klflow_ext.evaluate.judge import Judge, Scorer, open_judge
from klflow_ext.evaluate.losses import loss_by_time, token_entropy, unigram_entropy, unigram_log_prior
from klflow_ext.evaluate.sandbox import Outcome, run_program

__all__ = [
    "Judge", "Outcome", "Scorer", "loss_by_time", "open_judge", "run_program", "token_entropy", "unigram_entropy",
    "unigram_log_prior",
]  # fmt: skip
