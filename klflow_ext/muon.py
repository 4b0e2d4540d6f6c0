"""Muon: momentum whose singular values are all brought near one, for the hidden matrices of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from klflow_ext.sharding import local, map_items, stack_like

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are about as fast as in float32, or faster. Of x86 processors only those with AVX-512
    or newer units have them; on others torch's take 40 to 70 times as long."""
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T of each matrix U S V^T, nearly: singular values come out between about 0.7 and 1.2.

    X <- a X + (b A + c A^2) X with A = X X^T (a quintic Newton-Schulz iteration; Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), from X of Frobenius norm 1. In bfloat16 where that is fast, else in float32.

    matrices: (N, rows, columns). Returns the same shape, in the type that it was computed in.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and the step size that matches AdamW's (0.2 sqrt(max(rows, columns)), Liu et
    al. 2025, arXiv 2502.16982), but matrices of one shape go together, and not in bfloat16 where that is slow.

    Matrices may be sharded (DTensors): each process then has the updates of some of them whole for a while.

    params: matrices only. lr, weight_decay (decoupled), momentum: as there, each a number >= 0, momentum below 1.

    Raises:
        ValueError: one of them is outside its range or a parameter is no matrix, also in a group that is added later.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict) -> None:
        for name, below in (("lr", math.inf), ("weight_decay", math.inf), ("momentum", 1)):
            value = param_group.get(name, self.defaults[name])
            if not 0 <= value < below:
                allowed = "a number in [0, 1)" if below == 1 else "a finite number >= 0"
                raise ValueError(f"{name}: got {value!r}, allowed is {allowed}")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for p in params:
            p = p[1] if isinstance(p, tuple) else p  # (name, parameter)
            if p.dim() != 2:
                raise ValueError(f"params: got one of shape {tuple(p.shape)}, allowed are matrices")
        super().add_param_group({**param_group, "params": params})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; closure, if given, makes the loss and its gradients first. Returns that loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kinds: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for (shape, *_), matrices in kinds.items():
                self._step(matrices, 0.2 * max(shape) ** 0.5, group)
        return loss

    def _step(self, matrices: list[Tensor], scale: float, group: dict) -> None:
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local(p.grad) for p in matrices if p.grad is not None]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        stacked = stack_like(ahead, matrices[0])
        updates = local(map_items(orthogonalize, stacked)).to(matrices[0].dtype)
        parts = [local(p) for p in matrices]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, list(updates), alpha=-group["lr"] * scale)
