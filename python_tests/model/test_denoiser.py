"""The Denoiser: inputs, ways to say the time, causal attention and its cache, self-conditioning, sizes, errors."""

import dataclasses

import pytest
import torch

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, MaskPath

V, L = 20, 6
TOKEN_PATH = MaskPath(V)
INPUTS = ["simplex", "posterior", "tokens"]
TIMES = ["token", "add", "adaln", "none"]


def make(input="posterior", seed=0, trained=False, **options):
    """A small model; trained: with weights in place of all the zeros that it starts with."""
    torch.manual_seed(seed)
    path = TOKEN_PATH if input == "tokens" else LogitPath(V)
    model = Denoiser(DenoiserConfig(V, 2, 2, 16, 8, input=input, **options), path)
    if trained:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def some_input(input, b=3, seed=1):
    ids = torch.randint(V, (b, L), generator=torch.Generator().manual_seed(seed))
    return ids if input == "tokens" else LogitPath(V).sample(ids, 0.2, seed)


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("time", TIMES)
def test_starts_uniform_and_every_weight_learns(input, time):
    model = make(input, time=time)
    x, t = some_input(input), torch.tensor([0.0, 0.1, 0.3])
    assert torch.equal(model(x, t), torch.zeros(3, L, V))
    with torch.no_grad():  # behind projections of zero no gradient flows; one step opens the way, the next shows it
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.nn.functional.cross_entropy(model(x, t).flatten(0, 1), torch.arange(3 * L) % V).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("time", TIMES)
def test_zero_weights_are_zero_and_leave_zero_by_learning(time):
    model = make(time=time, self_conditioning=True)
    zero = {n for n, p in model.named_parameters() if not p.any()}
    expected = {"head.weight", "self_in.weight"}
    for i in range(2):
        expected |= {f"blocks.{i}.attention_out.weight", f"blocks.{i}.mlp_out.weight"}
        expected |= {f"blocks.{i}.modulation.weight"} if time == "adaln" else set()
    assert zero == expected
    previous, x, optimizer = (
        torch.ones(3, L, 16),
        some_input("posterior"),
        torch.optim.AdamW(model.parameters(), lr=0.01),
    )
    for _ in range(4):  # the head first, then what it reads, then what gates that
        h = model.hidden(model.embed(x, 0.2), 0.2, previous=previous)
        torch.nn.functional.cross_entropy(model.head(h).flatten(0, 1), torch.arange(3 * L) % V).backward()
        optimizer.step()
    assert all(p.any() for p in model.parameters())


@pytest.mark.parametrize("time", ["add", "adaln", "none"])
def test_blocks_start_as_the_identity(time):
    model = make("tokens", time=time)
    h = torch.randn(2, L, 16)
    norm = torch.nn.functional.rms_norm
    h_in = norm(h, (16,), eps=1e-6)
    if time == "add":
        h_in = h_in + model._time(torch.tensor(0.3))
    torch.testing.assert_close(model.hidden(h, 0.3), norm(h_in, (16,), eps=1e-6))


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_order_of_positions_matters(input, causal):
    model = make(input, trained=True, causal=causal, time="none")
    x, order = some_input(input), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        assert (model(x, 0.2)[:, order] - model(x[:, order], 0.2)).abs().max() > 1e-2


@pytest.mark.parametrize("time", TIMES)
def test_the_time_is_seen(time):
    model = make("tokens", trained=True, time=time)
    x, t = some_input("tokens"), torch.tensor([0.0, 0.2, 0.4])
    with torch.no_grad():
        logits = model(x, t)
        torch.testing.assert_close(logits, model(x, t[:, None].expand(3, L)))
        torch.testing.assert_close(logits[1], model(x, 0.2)[1])
        moved = (logits[2] - model(x, 0.2)[2]).abs().max()
    assert moved == 0 if time == "none" else moved > 1e-2


@pytest.mark.parametrize("time", TIMES)
def test_a_given_position_is_at_time_one(time):
    """Its own time reaches a position with add and adaln; a token says the least time, that of the free positions."""
    model = make("tokens", trained=True, time=time)
    x, t = some_input("tokens"), torch.full((3, L), 0.2)
    t[:, 2] = 1.0
    with torch.no_grad():
        moved = (model(x, t) - model(x, 0.2)).abs().amax((0, 2))
        if time in ("token", "none"):
            assert not moved.any()
        else:
            assert (moved > 1e-3).all()  # position 2 itself, and through attention all others
        alone = model.hidden(model.embed(x[:, 2:3], 1.0), 1.0)
        single = model.hidden(model.embed(x, t)[:, 2:3], t[:, 2:3])
    torch.testing.assert_close(alone, single)


def test_a_given_row_of_the_simplex_reads_the_same_at_time_one():
    for input in ("simplex", "posterior"):
        model = make(input, trained=True)
        clear, t = torch.eye(V)[None, :L], torch.ones(1, L)
        assert torch.equal(model.embed(clear, t), model.embed(clear, 0.1))


@pytest.mark.parametrize("input", INPUTS)
def test_causal_positions_do_not_see_later_ones(input):
    model = make(input, trained=True, causal=True, time="none")
    x, other = some_input(input, seed=1), some_input(input, seed=2)
    for position in range(L):
        mixed = x.clone()
        mixed[:, position:] = other[:, position:]
        with torch.no_grad():
            same = model(mixed, 0.2), model(x, 0.2)
        assert torch.equal(same[0][:, :position], same[1][:, :position])
        assert (same[0][:, position:] - same[1][:, position:]).abs().max() > 1e-2
    with torch.no_grad():
        both = make(input, trained=True, time="none")
        assert (both(x, 0.2) - both(mixed, 0.2))[:, 0].abs().max() > 1e-2


@pytest.mark.parametrize("pieces", [[1] * L, [L], [3, 1, 2], [1, 5]])
def test_cached_is_uncached(pieces):
    model = make("tokens", trained=True, causal=True, time="none")
    h = model.embed(some_input("tokens"), 0.0)
    cache, parts = model.cache(3), []
    for part in h.split(pieces, 1):
        parts.append(model.hidden(part, 0.0, cache=cache))
    assert cache.length == L
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(h, 0.0))


@pytest.mark.parametrize("time", TIMES)
def test_self_conditioning(time):
    plain, model = make(time=time, trained=True), make(time=time, self_conditioning=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    h, previous = model.embed(some_input("posterior"), 0.2), torch.randn(3, L, 16, requires_grad=True)
    expected = plain.hidden(h, 0.2)
    assert torch.equal(model.hidden(h, 0.2, previous=previous), expected)  # self_in starts at zero
    torch.nn.init.normal_(model.self_in.weight)
    assert torch.equal(model.hidden(h, 0.2), expected)
    some = previous * torch.tensor([1.0, 0.0, 1.0])[:, None, None]  # a sequence without an estimate: zeros
    out = model.hidden(h, 0.2, previous=some)
    torch.testing.assert_close(out[1], expected[1])
    assert (out[0] - expected[0]).abs().max() > 1e-2
    out.sum().backward()
    assert previous.grad is None and model.self_in.weight.grad.any()


@pytest.mark.parametrize(
    "name,blocks,total", [("demo", 3.1, 29.0), ("small", 10.6, 49.4), ("150m", 84.9, 162.8), ("1.5b", 1474.6, 1638.2)]
)
def test_presets(name, blocks, total):
    """Million parameters at V = 50,258; nothing is allocated."""
    config = DenoiserConfig.preset(name, 50258)
    with torch.device("meta"):
        model = Denoiser(config, LogitPath(50258))
    assert round(sum(p.numel() for p in model.hidden_matrices()) / 1e6, 1) == blocks
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == total
    changed = DenoiserConfig.preset(name, 50258, max_length=77, input="simplex")
    assert changed == dataclasses.replace(config, max_length=77, input="simplex")


def test_config_survives_a_dict():
    config = DenoiserConfig(V, input="tokens", causal=True, time="none")
    assert DenoiserConfig(**config.to_dict()) == config


causal = {"input": "tokens", "causal": True, "time": "none"}


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: DenoiserConfig(V, time="late"), "time: got 'late', allowed is one of"),
        (lambda: DenoiserConfig(V, input="rows"), "input: got 'rows', allowed is one of"),
        (lambda: DenoiserConfig(V, causal=1), "causal: got 1"),
        (lambda: DenoiserConfig(V, self_conditioning="no"), "self_conditioning: got 'no'"),
        (lambda: DenoiserConfig(V, causal=True), "time: got 'token', allowed is 'none'"),
        (lambda: DenoiserConfig.preset("7b", V), "name: got '7b', allowed is one of"),
        (lambda: Denoiser(DenoiserConfig(V), TOKEN_PATH), "input: got 'posterior', allowed is one of"),
        (lambda: Denoiser(DenoiserConfig(V, input="tokens"), LogitPath(V)), "input: got 'tokens', allowed is one of"),
        (lambda: make("tokens")(torch.tensor([[0, V + 1]]), 0.1), f"x: got the id {V + 1}, allowed is 0 to V = {V}"),
        (lambda: make("tokens")(torch.tensor([[-1, 3]]), 0.1), "x: got the id -1"),
        (lambda: make("tokens")(torch.zeros(1, 2), 0.1), "x: got torch.float32, allowed is torch.int64"),
        (
            lambda: make("tokens")(torch.zeros(1, 2, V).long(), 0.1),
            r"x: got shape \(1, 2, 20\), allowed is \(B, L <= 8\)",
        ),
        (lambda: make("tokens")(torch.zeros(1, 9).long(), 0.1), r"x: got shape \(1, 9\)"),
        (lambda: make()(torch.zeros(1, 9, V), 0.1), r"x: got shape \(1, 9, 20\), allowed is \(B, L <= 8, 20\)"),
        (
            lambda: make("tokens").embed_noise(torch.zeros(1, 2).long(), 0.1, 1),
            "input: got 'tokens', allowed in embed_noise",
        ),
        (lambda: make().hidden(torch.zeros(1, 9, 16), 0.1), r"h: got shape \(1, 9, 16\), allowed is \(B, L <= 8, 16\)"),
        (lambda: make().hidden(torch.zeros(1, 2, 16), 0.1, previous=torch.zeros(1, 2, 16)), "previous: got shape"),
        (
            lambda: make(self_conditioning=True).hidden(torch.zeros(1, 2, 16), 0.1, previous=torch.zeros(1, 16)),
            r"previous: got shape \(1, 16\), allowed is \(1, 2, 16\)",
        ),
        (lambda: make().cache(2), "causal: got False, allowed is True"),
        (
            lambda: make(**causal).hidden(torch.zeros(1, 2, 16), 0, cache=make(**causal).cache(2)),
            "cache: got one of 2 sequences, allowed is one of 1",
        ),
        (
            lambda: make().hidden(torch.zeros(2, 2, 16), 0, cache=make(**causal).cache(2)),
            "cache: got one, allowed is None",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_full_cache():
    model = make(**causal)
    cache = model.cache(1)
    model.hidden(torch.zeros(1, 5, 16), 0, cache=cache)
    with pytest.raises(ValueError, match=r"h: got shape \(1, 4, 16\), allowed is \(B, L <= 3, 16\) behind 5 cached"):
        model.hidden(torch.zeros(1, 4, 16), 0, cache=cache)
    assert cache.length == 5
    assert model.hidden(torch.zeros(1, 3, 16), 0, cache=cache).shape == (1, 3, 16) and cache.length == 8


def test_ids_of_the_whole_range():
    """V itself, the mask or start, has its own row, and learns."""
    model = make("tokens", trained=True)
    x = torch.tensor([[0, V - 1, V]])
    assert model.embedding.shape == (V + 1, 16) and model(x, 0.5).shape == (1, 3, V)
    model(x, 0.5).square().sum().backward()
    assert model.embedding.grad[V].any() and not model.embedding.grad[1].any()
