"""Sums of products in float32, those of CUDA with what is called there pretended."""

import pytest
import torch

from klflow_ext.ops import linear, products


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_of_products(dtype, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 5)
    g = torch.Generator().manual_seed(0)
    factors = [(torch.randn(17, 8, generator=g).to(dtype), torch.randn(8, 6, generator=g).to(dtype)) for _ in range(3)]
    out = torch.full((17, 6), torch.nan)
    for number, (a, b) in enumerate(factors):
        products.add_product(out, a, b, number == 0)
    exact = sum(a.double() @ b.double() for a, b in factors)
    assert (out - exact).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


@pytest.mark.parametrize("first", [True, False])
def test_on_cuda_a_16_bit_product_is_added_by_one_kernel(first, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: calls.append((a, k)))
    a, out = torch.zeros(3, 4, dtype=torch.bfloat16).as_subclass(OnCuda), torch.zeros(3, 5)
    b = torch.zeros(4, 5, dtype=torch.bfloat16)
    products.add_product(out, a, b, first)
    (arguments, options), *more = calls
    assert all(x is y for x, y in zip(arguments, (out, a, b), strict=True)) and not more
    assert options.pop("out") is out and options == {"out_dtype": torch.float32, "beta": 0 if first else 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_on_cuda_a_gradient_is_scaled_and_rounded_in_one_pass(dtype):
    gradient, factor = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    want = gradient * factor
    pretended = gradient.clone().as_subclass(OnCuda)
    scaled = linear._scale(pretended, factor, dtype)
    assert torch.equal(scaled, want.to(dtype or torch.float32)) and scaled.dtype == (dtype or torch.float32)
    assert torch.equal(pretended, want) == (dtype != torch.bfloat16)  # in place, unless the dtype is another
