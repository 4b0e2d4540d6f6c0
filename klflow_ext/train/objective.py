"""A model and its path as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from klflow_ext.path import Evidence, Path
from klflow_ext.train.config import Dtype


class Objective(nn.Module):
    """A module whose call is the loss, which is what torch's engines wrap: DistributedDataParallel(Objective(model, path)) or
    fully_shard(Objective(model, path)) train as one process does. Around the model alone they do not see its loss.

    Args:
        model: as in `Path.loss`, a module.
        path: from noise to text.
        dtype: of the matrix products, as in `TrainConfig`; "bfloat16" by autocast.
    """

    def __init__(self, model: nn.Module, path: Path, dtype: Dtype = "float32"):
        super().__init__()
        self.model, self.path, self.dtype = model, path, dtype

    def forward(
        self,
        target: Tensor,
        t: Tensor,
        rng: Tensor,
        *,
        given: Tensor | None = None,
        order: Tensor | None = None,
        evidence: Evidence | None = None,
        reduction: str = "mean",
        row_offset: int = 0,
    ) -> Tensor:
        """`path.loss` of the model, with the same arguments."""
        with torch.autocast(target.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.path.loss(
                self.model, target, t, rng, given=given, order=order, evidence=evidence, reduction=reduction,
                row_offset=row_offset,
            )  # fmt: skip
            return (
                loss.clone() if reduction == "none" else loss
            )  # no view of another tensor, on which fully_shard hangs nothing
