"""What a Trainer does, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from klflow_ext.checkpoint import CONFIG, Checkpoint
from klflow_ext.checks import check_choice, check_field, check_flag, check_scalar
from klflow_ext.data import Shuffle
from klflow_ext.files import reading

Dtype = Literal["float32", "bfloat16"]
TimeSampling = Literal["middle", "uniform", "learned"]
OptimizerName = Literal["muon", "adamw"]
Schedule = Literal["linear", "cosine"]
EngineName = Literal["ddp", "fsdp"]
MOST_SECONDS = 1e9  # thirty years; the clocks of torch's process groups end somewhere behind
MOST_TOKENS = 2**28  # of a step, whose tokens and times alone then take some gigabytes


@dataclass(frozen=True)
class TrainConfig:
    """What a Trainer does.

    Raises:
        ValueError: a field is outside its range; the message names it.
        TypeError: it is no number where one is needed.
    """

    steps: int = 1000
    """Optimizer steps, at least 1."""
    max_seconds: float | None = None
    """Training time: stop earlier, the learning rate following the clock. None: no limit; an exact resume needs it."""
    batch_size: int = 32
    """Sequences of a step, of all processes together."""
    length: int = 64
    """Tokens of a sequence, at least 2."""
    shuffle: Shuffle = "windows"
    """What changes its place from epoch to epoch: "windows" of the text as it stands, or whole "documents", packed one after
    another (of token folders only)."""
    optimizer: OptimizerName = "muon"
    """Of the hidden matrices; all else is trained by AdamW in any case."""
    lr: float = 3e-3
    """Highest learning rate, of AdamW and Muon."""
    warmup: float = 0.02
    """Share of the budget in which the learning rate rises."""
    decay: float = 0.4
    """Share of the budget, its end, in which it falls to 0."""
    schedule: Schedule = "linear"
    """How it falls: in a line, or as half a cosine."""
    weight_decay: float = 0.01
    """Of the hidden matrices."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients, in [0, 1)."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares, in [0, 1)."""
    momentum: float = 0.95
    """Muon's, in [0, 1)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    given_share: float = 0.6
    """Share of sequences that see a part in the clear: the beginnings of equal segments (half of them; see `SampleOptions`),
    scattered tokens (a quarter), a prefix, or all but one hole. Of half of them the rest is at t = 0."""
    flow_share: float = 0.3
    """Of a network with slices, the share of sequences whose questions carry the path's noise at the drawn time; the others know
    nothing but what stands."""
    evidence_share: float = 0.0
    """Of a network that reads posteriors, the share of sequences whose free positions are observed through a channel that confuses
    their tokens with seven others (`klflow_ext.train.channel`), of any strength. Such a network can be given `Evidence`."""
    middle_share: float = 0.8
    """Share of the times drawn as "middle" and "learned" say; the rest is uniform."""
    seed: int = 0
    """Of everything random, in [0, 2^63)."""
    checkpoint_seconds: float = 60.0
    """Between checkpoints."""
    keep: int = 1
    """Checkpoints that stay, the last ones, at least 1; an older one goes when a new one is whole. With 2 a run whose last one is
    damaged on the disk can still go on."""
    heldout_every: int = 0
    """Steps between looks at the loss of held-out text, the mean of `klflow_ext.evaluate.loss_by_time`; 0: none. The checkpoint
    where it was lowest stays beside the last ones."""
    heldout_count: int = 64
    """Sequences of that text, the same each time."""
    accumulate: int = 1
    """Parts in which each process computes its share of a batch, to save memory; the gradient is that of the whole."""
    time_sampling: TimeSampling | None = None
    """How times are drawn, low-discrepancy over the batch. "uniform": from [0, t_max]. "middle": from the middle [.2, .8] t_max,
    where the loss moves. "learned": where the loss is measured to fall fastest (`LossCurve`). None: "middle", or "uniform"
    where t_max = 1."""
    ema: float = 0.0
    """Decay d of the average of the weights, in [0, 1), as d = min(ema, (1 + step) / (10 + step)); 0: none. The average is what
    `load_run` and `Trainer.averaged_model` give."""
    dtype: Dtype = "float32"
    """Of the matrix products. "bfloat16" (autocast) keeps weights, their gradients, loss and sums in float32. On processors
    without AVX-512 it is many times slower, and warned of."""
    compile: bool = False
    """torch.compile of the loss, in one graph."""
    engine: EngineName | None = None
    """Of several processes. "ddp", where None: each has the whole model, and gradients are averaged during the backward pass
    (DistributedDataParallel). "fsdp": each has a part of every parameter, gradient and optimizer state (fully_shard). One
    process needs none."""
    shard_size: int | None = None
    """With "fsdp", processes that share one copy of the model, for example those of a machine; the others have copies of it. None:
    all."""
    timeout: float = 300.0
    """Seconds that a process is waited for. Then it is lost, and the others end."""
    recompute: bool = False
    """Keep only the inputs of each block for the backward pass, which computes the block again: less memory, a third more time."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("length", 2), ("accumulate", 1), ("keep", 1),
                            ("heldout_every", 0), ("heldout_count", 1)):  # fmt: skip
            check_field(name, getattr(self, name), least)
        for name in ("warmup", "decay", "given_share", "flow_share", "evidence_share", "middle_share"):
            check_scalar(name, getattr(self, name), 0, 1, "a number in [0, 1]")
        check_scalar("lr", self.lr, 0, math.inf, "a positive number", open_low=True, open_high=True)
        for name in ("clip", "checkpoint_seconds"):
            check_scalar(name, getattr(self, name), 0, math.inf, "a positive number", open_low=True)
        check_scalar("timeout", self.timeout, 0, MOST_SECONDS, f"a number in (0, {MOST_SECONDS:g}]", open_low=True)
        check_field("seed", self.seed, 0, "an integer in [0, 2^63)")
        if self.max_seconds is not None:
            check_scalar("max_seconds", self.max_seconds, 0, math.inf, "None or a positive number", open_low=True)
        for name in ("ema", "beta1", "beta2", "momentum"):
            check_scalar(name, getattr(self, name), 0, 1, "a number in [0, 1)", open_high=True)
        check_scalar("weight_decay", self.weight_decay, 0, math.inf, "a number >= 0", open_high=True)
        if self.batch_size * self.length > MOST_TOKENS:
            raise ValueError(
                f"batch_size: got {self.batch_size} sequences of {self.length} tokens, allowed are {MOST_TOKENS} tokens in all"
            )
        if self.heldout_count * self.length > MOST_TOKENS:
            raise ValueError(
                f"heldout_count: got {self.heldout_count} sequences of {self.length} tokens, allowed are {MOST_TOKENS} tokens"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: got {self.accumulate}, allowed is a divisor of batch_size = {self.batch_size}"
            )
        check_choice("shuffle", self.shuffle, get_args(Shuffle))
        check_choice("optimizer", self.optimizer, get_args(OptimizerName))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("time_sampling", self.time_sampling, (None, *get_args(TimeSampling)))
        check_flag("compile", self.compile)
        check_flag("recompute", self.recompute)
        check_choice("engine", self.engine, (None, *get_args(EngineName)))
        if self.shard_size is not None:
            check_field("shard_size", self.shard_size, 1, "None or an integer >= 1")
            if self.engine != "fsdp":
                raise ValueError(f"shard_size: got {self.shard_size}, allowed is None without engine='fsdp'")
        if self.compile and self.engine == "fsdp":
            raise ValueError("compile: got True, allowed is False with engine='fsdp', whose parameters come and go")

    def learning_rate(self, progress: float) -> float:
        """At a share of the budget in [0, 1]: warm-up, stable, then decay to zero."""
        up = min(1.0, (progress + 1e-3) / max(self.warmup, 1e-3))
        down = min(1.0, (1 - progress) / max(self.decay, 1e-9))
        if self.schedule == "cosine":
            down = (1 - math.cos(math.pi * down)) / 2
        return self.lr * min(up, down)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TrainConfig:
        """That of a run; an error names the file."""
        with reading(checkpoint.folder / CONFIG):
            return cls(**checkpoint.config()["train"])
