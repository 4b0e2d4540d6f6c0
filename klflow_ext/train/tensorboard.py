"""What a run records of its steps, for TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def summary_writer() -> Any:
    """The class that writes TensorBoard's files. ImportError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard is missing: pip install tensorboard") from None
    return SummaryWriter


class TensorBoard:
    """A callback of `Trainer.fit` that writes every number of a record, and its sample, where there is one; used as a context.

    with TensorBoard("runs/mine/tensorboard", trainer.step) as board:
        trainer.fit(callback=board)

    Args:
        folder: of TensorBoard's files, `tensorboard --logdir`.
        step: where the run stands; what was written of later steps, which will be made again, is left out.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: str | Path, step: int = 0):
        self._writer = summary_writer()(str(folder), purge_step=step + 1 if step else None)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
