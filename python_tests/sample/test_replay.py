"""Steps recorded as CUDA graphs."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    Evidence,
    LogitPath,
    MaskPath,
    Sampler,
    build_info,
)
from klflow_ext.path import ResolvedOptions
from klflow_ext.sample import replay
from klflow_ext.sample import sampler as sampler_module

# ---- steps recorded as CUDA graphs


def small_denoiser(device="cpu", vocab=60, **config):
    """Of random weights, at V = 60 with a posterior of 4 entries, which is the sparse one."""
    torch.manual_seed(0)
    path = LogitPath(vocab)
    model = Denoiser(DenoiserConfig(vocab, 1, 2, 16, 8, **{"top": 4, **config}), path).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    return model.to(device), path


class CallsAgain:
    """In place of replay.Recorder: a replay is a call of the function. Counts what is recorded."""

    def __init__(self, device):
        self.count = 0

    def record(self, function):
        self.count += 1
        function()  # as a warm-up does, it leaves something in the buffers
        return function


@pytest.fixture
def calling_again(monkeypatch):
    """Sampler(model, path, cuda_graph=True) with steps that are called again instead of replayed."""
    monkeypatch.setattr(replay, "Recorder", CallsAgain)
    monkeypatch.setattr(Sampler, "_recordable", lambda self: self.network)
    return lambda model, path: Sampler(model, path, cuda_graph=True)


@pytest.mark.parametrize(
    "config",
    [{}, {"top": None}, {"input": "simplex", "time": "adaln"}, {"self_conditioning": True}],
    ids=["sparse", "dense", "simplex", "self-conditioning"],
)
def test_recorded_steps_give_the_tokens_of_the_sampler(config, calling_again):
    model, path = small_denoiser(**config)
    ordinary, recorded = Sampler(model, path), calling_again(model, path)
    tokens = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    given = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    seen = []
    for flags in (given, torch.zeros_like(given), ~given):
        for options in (
            dict(steps=1),
            dict(steps=2, top_k=None, seed=[5, 6, 7]),
            dict(steps=6, top_k=5, top_p=0.9, seed=9, grid_power=0.5),
            dict(steps=6, top_k=5, temperature=(1.5, 0.5), final="draw"),
            dict(steps=3, top_k=5, times=(0, 0.1, 0.2)),
        ):
            expected, found = (s.infill(tokens, flags, method="sampling", **options) for s in (ordinary, recorded))
            assert torch.equal(found.tokens, expected.tokens) and found.nfe == expected.nfe
            assert found.tokens.data_ptr() != recorded._replays.buffers[3, 7].tokens.data_ptr()
            seen.append(expected.tokens)
    assert len(torch.stack(seen).unique(dim=0)) == len(seen)
    prompts = [[1, 2], [], [3] * 6, [4] * 8]
    expected, found = (s.complete(prompts, 8, steps=3, method="sampling") for s in (ordinary, recorded))
    assert torch.equal(found.tokens, expected.tokens)
    ragged = [[0] * n for n in (3, 5, 3)]
    expected, found = (
        s.infill(ragged, [[False] * len(x) for x in ragged], steps=3, method="sampling") for s in (ordinary, recorded)
    )
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, expected.tokens, strict=True))


def test_what_is_recorded_anew(calling_again):
    model, path = small_denoiser()
    sampler = calling_again(model, path)
    count = lambda: sampler._replays.recorder.count  # noqa: E731

    def new(shape=(2, 5), **options):
        before = count()
        options = {"steps": 4, "method": "sampling", "final": "draw", **options}
        tokens = sampler.sample(shape, **options).tokens
        assert torch.equal(tokens, Sampler(model, path).sample(shape, **options).tokens)
        return count() - before

    with torch.inference_mode():  # its tensors must not stay behind in the buffers
        assert new() == 1
    assert new() == new(seed=3) == new(steps=9) == new(grid_power=0.5) == 0
    assert new(top_k=5) == new(top_p=0.5) == new(temperature=0.5) == new(shape=(1, 5)) == new(final="argmax") == 1
    assert new(temperature=(1.0, 2.0)) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert new() == 1
    torch.nn.init.normal_(model.head.weight)
    assert new() == 0
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    assert new() == new(shape=(1, 5)) == 1


def test_recorded_slices_give_the_tokens_of_the_sampler(calling_again):
    model, path = small_denoiser(slices=True, time="none")
    ordinary, recorded = Sampler(model, path), calling_again(model, path)
    count = lambda: recorded._replays.recorder.count  # noqa: E731
    tokens = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    given = torch.zeros(3, 7, dtype=torch.bool)
    some = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(i)) < 3 for i in range(3)])
    seen = []
    for flags in (given, some, ~given):
        for options in (
            dict(steps=1, top_k=None),
            dict(steps=3, top_k=5, seed=[5, 6, 7]),
            dict(steps=4, top_k=5, top_p=0.9, temperature=(1.5, 0.5), slice_steps=2),
            dict(layout="0 3 | 1 2 4 5 6" if flags is given else None, steps=2),
        ):
            expected, found = (s.infill(tokens, flags, method="slices", **options) for s in (ordinary, recorded))
            assert torch.equal(found.tokens, expected.tokens) and found.nfe == expected.nfe
            seen.append(expected.tokens)
    assert len(torch.stack(seen[:8]).unique(dim=0)) == 8
    recordings = count()
    for flags in (given, some.flip(1), some.roll(1, 1)):  # where the same number of positions is given, in other places
        expected, found = (s.infill(tokens, flags, method="slices", steps=3, top_k=5) for s in (ordinary, recorded))
        assert torch.equal(found.tokens, expected.tokens) and found.nfe == expected.nfe == 3
    assert count() == recordings
    ragged = [[1, 2], [], [3] * 5]  # as many given positions as they have tokens, so each is a way of its own
    expected, found = (s.complete(ragged, 8, steps=3, method="slices") for s in (ordinary, recorded))
    assert torch.equal(found.tokens, expected.tokens)


def test_recorded_slices_name_the_pass_that_said_nothing(calling_again):
    model, path = small_denoiser(slices=True, time="none")
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ValueError, match="finite maximum in pass 1, sequence 0"):
        calling_again(model, path).sample((2, 6), steps=3, method="slices")


class LooksAtNothing(TorchFunctionMode):
    """Python numbers become no tensors, which on CUDA is a copy that waits; that values are read the meta device forbids."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor) or isinstance(args[0], torch.Tensor), args
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("input", ["posterior", "simplex"])
@pytest.mark.parametrize("time", ["token", "add", "adaln", "none"])
def test_a_recorded_step_looks_at_no_value(input, time):
    model, path = small_denoiser("meta", input=input, time=time, self_conditioning=True)
    buffers = replay.Buffers.allocate((3, 7), model, torch.device("meta"))
    with torch.no_grad(), LooksAtNothing():
        replay.sampling_step_in_place(model, path, buffers, ResolvedOptions(top_p=0.9), 5, 0.7)


@pytest.mark.parametrize("slice_steps", [1, 2])
@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_recorded_slices_look_at_no_value(input, slice_steps):
    model, path = small_denoiser("meta", input=input, time="none", slices=True)
    buffers = replay.SliceBuffers.allocate((3, 7), torch.device("meta"))
    options = ResolvedOptions(top_p=0.9, steps=4, slice_steps=slice_steps)
    with torch.no_grad(), LooksAtNothing():
        replay.slices_in_place(model, path, buffers, options, [1, 2, 2, 2])


def test_bad_uses_of_cuda_graph(calling_again, monkeypatch):
    model, path = small_denoiser()
    sampler = calling_again(model, path)
    looks = ({"method": "sampling", "return_history": True}, {"method": "slices", "watch": print})
    observed = {"method": "slices", "evidence": Evidence(torch.zeros(2, 5, 1, dtype=torch.int64), torch.zeros(2, 5, 1))}
    for options in ({}, {"method": "basic"}, {"method": "hybrid"}, *looks, observed):
        with pytest.raises(
            ValueError, match="cuda_graph: got True with method=.* are 'sampling' or 'slices', False and"
        ):
            sampler.sample((2, 5), **options)
    with pytest.raises(ValueError, match="method: got 'slices', allowed is another"):
        sampler.sample((2, 5), method="slices")
    assert sampler._replays.recorder.count == 0
    monkeypatch.undo()
    others = [(LogitPath(60, alpha=0.5), "simplex"), (MaskPath(60), "tokens")]
    models = [(Denoiser(DenoiserConfig(60, 1, 2, 16, 8, input=reads), p), p) for p, reads in others]
    for m, p in ((lambda x, t: x, path), *models):
        with pytest.raises(
            ValueError, match="cuda_graph: got True with a .* allowed with it is a Denoiser on a LogitPath"
        ):
            Sampler(m, p, "cuda", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: got True with device cpu, allowed with it is a CUDA device"):
        Sampler(model, path, cuda_graph=True)
    monkeypatch.setattr(sampler_module, "DEBUG_CHECK", True)
    with pytest.raises(ValueError, match="cuda_graph: got True with KLFLOW_CHECK=1"):
        Sampler(model, path, "cuda", cuda_graph=True)


def replays_as_sampled(method, autocast, every_options, **config):
    model, path = small_denoiser("cuda", **config)
    ordinary, recorded = (Sampler(model, path, "cuda", cuda_graph=flag) for flag in (False, True))
    for seed, prompts in enumerate(([[1, 2], [], [3] * 6], [[5], [6] * 7, []], [[7]])):  # the shapes come in turn
        for options in every_options:
            for _ in range(2):
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    expected, found = (
                        s.complete(prompts, 8, method=method, seed=seed, **options) for s in (ordinary, recorded)
                    )
                assert torch.equal(found.tokens, expected.tokens)
                torch.nn.init.normal_(model.head.weight, std=0.5)


@pytest.mark.skipif(not torch.cuda.is_available() or not build_info()["cuda"], reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [{"vocab": 5003, "top": 64}, {"input": "simplex"}, {"self_conditioning": True}])
def test_replay_on_cuda_gives_the_tokens_of_the_sampler(config, autocast):
    options = (dict(steps=1), dict(steps=7, top_k=5), dict(steps=7, temperature=(1.5, 0.5), final="draw"))
    replays_as_sampled("sampling", autocast, options, **config)


@pytest.mark.skipif(not torch.cuda.is_available() or not build_info()["cuda"], reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_replay_of_slices_on_cuda_gives_the_tokens_of_the_sampler(autocast):
    options = (dict(steps=1), dict(steps=4, top_k=5), dict(steps=4, slice_steps=2, temperature=(1.5, 0.5)))
    replays_as_sampled("slices", autocast, options, vocab=5003, top=64, slices=True, time="none")
