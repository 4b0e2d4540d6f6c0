"""Sums of matrix products in float32, whatever the dtype of the factors."""

import torch

BLOCK = 8192  # rows of a 16-bit product on a CPU


def add_product(out, a, b, first):
    """out (float32) += a @ b; = a @ b where it is the first of a sum."""
    beta = 0 if first else 1
    if a.dtype == torch.float32:
        out.addmm_(a, b, beta=beta)
    elif a.is_cuda:  # one kernel, which reads out once
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:  # no such product on a CPU: 16-bit ones in blocks that stay in cache until they are added
        for start in range(0, len(out), BLOCK):
            block = slice(start, start + BLOCK)
            product = torch.mm(a[block], b)
            out[block].copy_(product) if first else out[block].add_(product.float())
