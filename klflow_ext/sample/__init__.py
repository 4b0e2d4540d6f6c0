"""Sampling: the ways through a text over any path, for whole texts, prompts and holes.

    sampler.py        Sampler: checks what it is asked, and hands sequences of one length to a way
    samples.py        what it takes and gives: texts or ids, seeds, and Samples
    ways.py           the registry: a name and the way that it stands for
    denoise.py        basic, sampling, hybrid: all positions move from noise to text together
    race.py           the exact reverse of the noise, to test the others by
    slices.py         some positions after others, for a network trained with them, which keeps what stands
    confidence.py     the surest positions first, for any network
    segments.py       the same order for any network, which reads everything again
    left_to_right.py  one position after the other, for an Autoregressive path
    replay.py         the sampling scheme by recorded CUDA graphs
    scoring.py        the passes of a way over a text that is there: its likelihood
    passes.py         what all ways ask: the network's passes, counted, shown and looked at
    watching.py       Pass: what a pass leaves behind, for who watches

Every sequence has its own seed, so its tokens do not depend on the batch. With a Denoiser, a sampling step holds tokens and
seeds: neither the noisy rows nor all logits exist at once.
"""

from klflow_ext.data import parse_holes
from klflow_ext.path.options import SampleOptions, Temperature
from klflow_ext.sample.confidence import confidence
from klflow_ext.sample.denoise import basic_step, denoise, hybrid_step, register_sampler, sampling_step
from klflow_ext.sample.left_to_right import left_to_right
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.race import race_step
from klflow_ext.sample.sampler import Sampler
from klflow_ext.sample.samples import Samples
from klflow_ext.sample.segments import segments
from klflow_ext.sample.slices import slices
from klflow_ext.sample.watching import UNKNOWN, Pass
from klflow_ext.sample.ways import register_way

__all__ = [
    "Pass", "Passes", "SampleOptions", "Sampler", "Samples", "Temperature", "UNKNOWN", "basic_step", "confidence", "denoise", "hybrid_step", "left_to_right",
    "parse_holes", "race_step", "register_sampler", "register_way", "sampling_step", "segments", "slices",
]  # fmt: skip
