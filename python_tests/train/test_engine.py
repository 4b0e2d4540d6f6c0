"""The engines: two processes' losses and gradients are those of one, by DistributedDataParallel and by fully_shard."""

import pytest
import torch
import torch.distributed as dist
from processes import alone, together
from runs import V, small_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from klflow_ext import Objective, Sampler, TrainConfig
from klflow_ext.path.network import as_network
from klflow_ext.sharding import is_sharded, local, whole
from klflow_ext.train.engine import Replicas, make_engine

B, L = 8, 16
PLAIN = {"float32": {}, "recompute": {"recompute": True}, "bfloat16": {"dtype": "bfloat16"}}
SHAPES = [{}, {"time": "adaln", "self_conditioning": True}, {"time": "none", "slices": True}]
ENGINES = [{"engine": None}, {"engine": "fsdp"}, {"engine": "fsdp", "shard_size": 1}]


def fresh(**shape):
    """A model away from the zero weights, behind which there are no gradients."""
    model, path = small_model(**shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model, path


def case():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (B, L), generator=generator)
    given = torch.rand(B, L, generator=generator) < torch.linspace(0, 0.9, B)[:, None]  # different counts in each part
    return tokens, 0.3 * torch.rand(B, generator=generator), torch.tensor([3, 1]), given


def gradients(model, engine, first, size, parts):
    """(loss, gradients by name) of sequences first to first + size, in parts."""
    tokens, t, rng, given = case()
    total = torch.zeros(())
    for k in range(parts):
        part = slice(first + k * size // parts, first + (k + 1) * size // parts)
        with engine.part(k == parts - 1):
            loss = engine.loss(
                tokens[part], t[part], rng, given=given[part], reduction="sum", row_offset=part.start * L
            )
            engine.backward(loss / (B * L))
        total += loss.detach() / (B * L)
    engine.sum(total)
    return total, whole({name: p.grad for name, p in model.named_parameters()})


def near(found, expected, limit):
    assert abs(found[0] - expected[0]) <= limit * abs(expected[0])
    for name, gradient in expected[1].items():
        assert gradient.any() and (found[1][name] - gradient).norm() <= limit * gradient.norm(), name


def compare(rank):
    cases = [(PLAIN[name], {}) for name in PLAIN] + [({}, shape) for shape in SHAPES[1:]]
    for options, shape in cases:
        model, path = fresh(**shape)
        config = TrainConfig(batch_size=B, length=L, **options)
        one = gradients(model, make_engine(model, path, config, 1), 0, B, 4)
        for choice in ENGINES:
            model, path = fresh(**shape)
            if rank:  # all start from the weights of process 0
                torch.nn.init.ones_(model.embedding)
            config = TrainConfig(batch_size=B, length=L, accumulate=2, **options, **choice)
            engine = make_engine(model, path, config, 2)
            found = gradients(model, engine, rank * B // 2, B // 2, 2)
            near(found, one, 0.01 if options.get("dtype") else 3e-6)
            sharded = choice["engine"] == "fsdp"
            for p in model.parameters():
                assert is_sharded(p) == sharded and p.dtype == p.grad.dtype == torch.float32
                parts = 2 if sharded and "shard_size" not in choice else 1
                assert local(p).numel() == -(-p.shape[0] // parts) * p[0].numel() or parts == 2 and rank
            state = whole(model.state_dict())
            assert torch.equal(state["embedding"], fresh(**shape)[0].embedding)
            changed = {name: x + 1 for name, x in state.items()}
            engine.load_model(changed)
            assert all(torch.equal(x, changed[name]) for name, x in whole(model.state_dict()).items())


def nothing_is_sent_before_the_last_part(rank):
    model, path = fresh()
    engine = make_engine(model, path, TrainConfig(batch_size=B, length=L), 2)
    assert isinstance(engine, Replicas)
    tokens, t, rng, _ = case()
    for last, same in ((False, False), (True, True)):
        with engine.part(last):
            engine.backward(engine.loss(tokens[rank : rank + 1], t[:1], rng))
        both = [torch.zeros_like(model.embedding) for _ in range(2)]
        dist.all_gather(both, model.embedding.grad)
        assert torch.equal(*both) == same


def a_sharded_model_in_path_loss(rank):
    """As anyone would shard it, with torch's own settings, and with all parameters away after the forward pass."""
    tokens, t, rng, given = case()
    for settings in (
        {},
        {"reshard_after_forward": True},
        {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    ):
        narrow = "mp_policy" in settings
        for inputs in ("posterior", "simplex"):
            one, path = fresh(input=inputs)
            expected = path.loss(one, tokens, t, rng, given=given)
            expected.backward()
            model, path = fresh(input=inputs)
            for block in model.blocks:
                fully_shard(block, **settings)
            fully_shard(model, **settings)
            for _ in range(2):
                model.zero_grad()
                loss = path.loss(model, tokens, t, rng, given=given)
                loss.backward()
            found = loss.detach(), whole({name: p.grad for name, p in model.named_parameters()})
            near(found, (expected.detach(), {n: p.grad for n, p in one.named_parameters()}), 0.05 if narrow else 3e-6)
            assert loss.dtype == torch.float32
            with torch.no_grad():
                assert abs(path.loss(model, tokens, t, rng, given=given) - expected) < (0.05 if narrow else 1e-5)
            assert is_sharded(model.head.weight) or not settings.get("reshard_after_forward")
    model, path = fresh()
    fully_shard(model)
    with pytest.raises(ValueError, match="model: got one whose parameters are split over processes"):
        Sampler(model, path).sample((1, L), steps=2)


def all_of_it(rank):
    compare(rank)
    nothing_is_sent_before_the_last_part(rank)
    a_sharded_model_in_path_loss(rank)
    model, path = fresh()
    with pytest.raises(ValueError, match="shard_size: got 3, allowed is a divisor of the 2 processes"):
        make_engine(model, path, TrainConfig(engine="fsdp", shard_size=3), 2)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    together(2, tmp_path, all_of_it)


def test_a_wrapped_network_is_refused(tmp_path):
    model, path = small_model()
    tokens, t, rng, _ = case()
    with alone(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for given in (wrapped, torch.compile(wrapped)):
            with pytest.raises(ValueError, match=r"model: got a Network within DistributedDataParallel, allowed is"):
                path.loss(given, tokens, t, rng)
        with pytest.raises(ValueError, match=r"DistributedDataParallel\(Objective\(network, path\)\)"):
            Sampler(wrapped, path)
        shared = torch.nn.parallel.DistributedDataParallel(Objective(model, path))
        assert torch.equal(shared(tokens, t, rng), path.loss(model, tokens, t, rng))
    assert as_network(torch.compile(model), path) is model


def test_the_objective_is_the_loss():
    tokens, t, rng, given = case()
    model, path = fresh()
    options = {"given": given, "reduction": "none", "row_offset": 5}
    assert torch.equal(Objective(model, path)(tokens, t, rng, **options), path.loss(model, tokens, t, rng, **options))
    narrow = Objective(model, path, "bfloat16")(tokens, t, rng)
    assert 0 < abs(narrow - path.loss(model, tokens, t, rng)) < 0.05


@pytest.mark.parametrize(
    "options,message",
    [
        ({"engine": "zero"}, "engine: got 'zero', allowed is one of"),
        ({"shard_size": 2}, "shard_size: got 2, allowed is None without engine='fsdp'"),
        ({"shard_size": 0, "engine": "fsdp"}, "shard_size: got 0"),
        ({"compile": True, "engine": "fsdp"}, "compile: got True, allowed is False with engine='fsdp'"),
        ({"recompute": 1}, "recompute: got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
