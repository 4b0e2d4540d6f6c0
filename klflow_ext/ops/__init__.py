"""The kernels as functions. Rows are positions of any leading shape; the simplex axis, of V tokens, is last.

Every function checks its arguments before any work and raises TypeError, ValueError or IndexError naming the argument, its
value and what is allowed. Floating tensors are float32, bfloat16 or float16 with float32 arithmetic inside; `reference`
holds a plain PyTorch twin of each, which also runs in float64. The operators below are torch.ops.klflow.*: functional or
with declared mutation, with fake kernels, usable under torch.compile(fullgraph=True) and CUDA graphs.

Accuracy: sums and probabilities come from float32 exponentials within 2 units in the last place of their argument's, added
up in double. On a CPU exp2 and log2 are this package's own, with the same bound for each instruction set.

Randomness: `rng` is an int seed, a torch.Generator, or an int64 tensor of (seed, step), shape (2,) or (*rows, 2). Noise is a
function of (seed, step, global row, column) alone, global row = flattened row + row_offset: the same on every device and
for any split of the batch. With rows (..., L), an rng of shape (..., 2) is a state for each sequence, whose rows are
numbered along L (+ row_offset): its noise does not depend on the batch. Conventions: c = log(V / beta - V + 1) is the logit gap of the smoothed target.
"""

from klflow_ext.ops.embedding import noise_embedding, posterior_embedding
from klflow_ext.ops.expectation import softmax_expectation
from klflow_ext.ops.interpolate import logit_interpolate, noise_interpolate
from klflow_ext.ops.linear import linear_cross_entropy
from klflow_ext.ops.loss import cross_entropy, cross_entropy_grad
from klflow_ext.ops.posterior import merge_boosts, noise_posterior, token_posterior
from klflow_ext.ops.sharded import sharded_linear_cross_entropy, vocabulary_shard
from klflow_ext.ops.steps import euler_step, topk_renoise, topk_sample

__all__ = [
    "noise_interpolate", "logit_interpolate", "noise_posterior", "token_posterior", "posterior_embedding",
    "noise_embedding", "merge_boosts", "cross_entropy", "cross_entropy_grad",
    "linear_cross_entropy", "sharded_linear_cross_entropy", "vocabulary_shard", "topk_sample", "topk_renoise", "euler_step", "softmax_expectation",
]  # fmt: skip
TOGETHER = (
    "sharded_linear_cross_entropy",
    "vocabulary_shard",
)  # of several processes: not under torch.compile or a CUDA graph
