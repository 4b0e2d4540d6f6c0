"""Which parameters are trained by what."""

from __future__ import annotations

import torch

from klflow_ext.muon import Muon
from klflow_ext.path import Path, as_network
from klflow_ext.path.network import Model
from klflow_ext.train.config import TrainConfig


def make_optimizers(model: Model, path: Path, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Those of a Trainer: AdamW, and Muon (or, where config.optimizer says so, another AdamW with weight decay) for the matrices
    from hidden states to hidden states (`Network.hidden_matrices`).

    Parameters that need no gradient are left out. What there is nothing for is not made.

    Raises:
        ValueError: nothing is there to be trained.
    """
    network = as_network(model, path)
    if network.module is None:
        raise ValueError(f"model: got a {type(model).__name__}, allowed where it is trained is a torch.nn.Module")
    hidden = [p for p in network.hidden_matrices() if p.requires_grad]
    names = {id(p) for p in hidden}
    rest = [p for p in network.module.parameters() if p.requires_grad and id(p) not in names]
    if not hidden and not rest:
        raise ValueError("model: got one without a parameter that needs a gradient, allowed is one with some")
    optimizers: list[torch.optim.Optimizer] = []
    betas = config.beta1, config.beta2
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=config.lr, betas=betas, weight_decay=0.0))
    if hidden and config.optimizer == "adamw":
        optimizers.append(torch.optim.AdamW(hidden, lr=config.lr, betas=betas, weight_decay=config.weight_decay))
    elif hidden:
        optimizers.append(Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum))
    return optimizers
