"""Tensors of which each process holds a part: Muon on sharded matrices, and the way to whole ones and back."""

import pytest
import torch
from processes import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from klflow_ext.muon import Muon
from klflow_ext.sharding import is_sharded, local, sharded_like, whole

SHAPES = ((6, 20), (20, 6), (20, 6), (20, 6), (1, 5), (5, 7))  # odd numbers of rows and of matrices


def parameters():
    return [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(SHAPES)]


def gradient(shape, step, i):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + i))


def muon(rank, meshes):
    for shape in meshes:
        mesh = init_device_mesh("cpu", shape)
        placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
        found = [torch.nn.Parameter(distribute_tensor(x, mesh, placements)) for x in parameters()]
        optimizer = Muon(found, lr=0.1, weight_decay=0.2)
        expected = [torch.nn.Parameter(x) for x in parameters()]
        alone = Muon(expected, lr=0.1, weight_decay=0.2)
        for step in range(3):
            for i, (p, q) in enumerate(zip(found, expected, strict=True)):
                q.grad = gradient(q.shape, step, i)
                p.grad = distribute_tensor(q.grad, mesh, placements)
            if step == 2:
                found[1].grad = expected[1].grad = None
            optimizer.step()
            alone.step()
        for p, q in zip(found, expected, strict=True):
            assert is_sharded(p) and local(p).shape[0] <= -(-q.shape[0] // mesh.size(-1))
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
        momenta = whole(optimizer.state_dict())["state"]
        for i, values in alone.state_dict()["state"].items():
            buffer = momenta[i]["momentum_buffer"]
            torch.testing.assert_close(buffer, values["momentum_buffer"], rtol=1e-6, atol=1e-7)
            again = sharded_like(buffer, found[i])
            assert torch.equal(local(again), local(optimizer.state[found[i]]["momentum_buffer"]))


@pytest.mark.slow
def test_muon_on_sharded_matrices(tmp_path):
    together(2, tmp_path, muon, [(2,), (2, 1), (1, 2)])


def test_plain_tensors_stay_what_they_are():
    x = torch.arange(6.0).view(2, 3)
    assert not is_sharded(x) and local(x) is x and whole({"a": [x, 3]})["a"][0] is x
    assert sharded_like(x, torch.zeros(2, 3)) is x
