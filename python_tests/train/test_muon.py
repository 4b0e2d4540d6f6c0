"""Muon is torch.optim.Muon, in whichever type is fast."""

import math

import pytest
import torch

from klflow_ext import muon
from klflow_ext.muon import Muon, orthogonalize

SHAPES = ((6, 20), (20, 6), (8, 8), (20, 6), (1, 5))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: request.param == "bfloat16")
    return getattr(torch, request.param)


def parameters():
    return [
        torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(SHAPES)
    ]


def test_steps_are_those_of_torch(dtype):
    ours, theirs, start = parameters(), parameters(), parameters()
    optimizer = Muon(ours, lr=0.1, weight_decay=0.2)
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad = p.grad.clone()
        if step == 2:  # not every matrix is used by every batch
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        peer.step()
        for p, q, before in zip(ours, theirs, start, strict=True):
            assert (p - q).norm() < 0.03 * (q - before).norm()  # torch's rounds to bfloat16
    torch.testing.assert_close(
        optimizer.state[ours[0]]["momentum_buffer"], peer.state[theirs[0]]["momentum_buffer"], rtol=1e-5, atol=1e-6
    )
    again = Muon(parameters(), lr=1.0)
    again.load_state_dict(peer.state_dict())  # checkpoints written with torch's can be gone on with
    assert again.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalize(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape, generator=generator), full_matrices=False)
    s = torch.logspace(0, 2, min(shape)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    found = orthogonalize((u * s[:, None]) @ vt)
    assert found.dtype == dtype and found.shape == (3, *shape)
    inside = u.mT @ found.float() @ vt.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (inside - torch.diag_embed(values)).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    assert torch.equal(orthogonalize(torch.zeros(1, *shape)).float(), torch.zeros(1, *shape))


def test_only_matrices():
    with pytest.raises(ValueError, match=r"params: got one of shape \(3,\), allowed are matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def matrix(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_settings_out_of_range(name, value):
    settings = {"lr": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{name}: got"):
        Muon([matrix(3, 4)], **settings)
    optimizer = Muon([matrix(3, 4)], lr=0.1)
    with pytest.raises(ValueError, match=f"{name}: got"):
        optimizer.add_param_group({"params": [matrix(3, 4)], name: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="momentum: got 1"):
        Muon([matrix(3, 4)], lr=0.1, momentum=1.0)


def test_only_matrices_can_be_added():
    optimizer = Muon([matrix(3, 4)], lr=0.1)
    for wrong in (matrix(5), [matrix(3, 4), matrix(5)], (p for p in [matrix(2, 3, 4)])):
        with pytest.raises(ValueError, match="params: got one of shape"):
            optimizer.add_param_group({"params": wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": matrix(3, 5), "lr": 0.2})
    assert optimizer.param_groups[1]["lr"] == 0.2 and optimizer.param_groups[1]["momentum"] == 0.95


def test_a_closure_makes_the_gradients():
    p, q = matrix(4, 6), matrix(4, 6)
    one, other = Muon([p], lr=0.1), Muon([q], lr=0.1)

    def closure():
        one.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().square().sum()
    assert one.step(closure) == before
    q.square().sum().backward()
    assert other.step() is None
    assert torch.equal(p, q)


def test_matrices_of_one_shape_and_two_dtypes():
    p, q = matrix(4, 6), matrix(4, 6, dtype=torch.bfloat16)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    Muon([p, q], lr=0.1).step()
    assert p.isfinite().all() and q.dtype == torch.bfloat16 and q.isfinite().all()
