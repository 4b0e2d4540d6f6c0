"""A block of the denoiser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klflow_ext.model.attention import Attend
from klflow_ext.model.config import DenoiserConfig


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class Block(nn.Module):
    def __init__(self, config: DenoiserConfig):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.mlp_in = nn.Linear(d, 4 * d, bias=False)
        self.mlp_out = nn.Linear(4 * d, d, bias=False)
        if config.time == "adaln":
            self.modulation = nn.Linear(d, 6 * d, bias=False)
            nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, time: Tensor | None, attend: Attend, layer: int) -> Tensor:
        if time is None:
            x = x + self._attention(norm(x), cos, sin, attend, layer)
            return x + self._mlp(norm(x))
        # The gates start at 1, not at DiT's 0: the output projections are 0 already, and the product of two zeros would
        # have no gradient.
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(time).chunk(6, -1)
        x = x + (1 + gate) * self._attention(norm(x) * (1 + scale) + shift, cos, sin, attend, layer)
        return x + (1 + mlp_gate) * self._mlp(norm(x) * (1 + mlp_scale) + mlp_shift)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        b, length, d = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = (rotate(norm(z), cos, sin) for z in (q, k))
        y = attend(q, k, v, layer)
        return self.attention_out(y.transpose(1, 2).reshape(b, length, d))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)).square())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
