"""The protocol of networks: heads with bias, softcap and padding, shapes of times, tied weights, what a plain model gives."""

import math

import pytest
import torch

from klflow_ext import Evidence, LinearPath, LogitPath, MaskPath, Network, Sampler, UniformPath
from klflow_ext.path import State, as_network
from klflow_ext.path.network import load_own_state, own_state, second_names

V, D = 30, 12
KINDS = [(None, None, True), (None, 5.0, True), (V + 7, None, True), (V + 7, 5.0, False), (V + 7, 5.0, True)]


class Own(Network):
    """Reads rows by a matrix; its head may be padded, with rows behind V that would win everything."""

    def __init__(self, padded=None, softcap=None, bias=True, path=None):
        super().__init__()
        torch.manual_seed(0)
        self.path, self.softcap, self.seen = path or LogitPath(V), softcap, []
        self.table = torch.nn.Linear(V, D, bias=False)
        self.mix = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, padded or V, bias=bias)
        if padded:
            self.vocab_size = V
            with torch.no_grad():
                self.head.weight[:V] = Own(None, softcap, bias).head.weight
                self.head.weight[V:] = 100.0
                if bias:
                    self.head.bias[:V] = Own(None, softcap, bias).head.bias
                    self.head.bias[V:] = 1000.0

    def embed(self, x, t):
        self.seen.append((t.dtype, tuple(t.shape)))
        return self.table(self.path.scaled(x)) + t.reshape(len(x), -1, 1)

    def hidden(self, h, t):
        return h + torch.tanh(self.mix(h)) * (1 + t.reshape(len(h), -1, 1))


def logits_by_hand(model, x, t):
    h = model.hidden(model.embed(x, t), t)
    logits = h @ model.head.weight[:V].T + (0 if model.head.bias is None else model.head.bias[:V])
    return logits if model.softcap is None else model.softcap * torch.tanh(logits / model.softcap)


@pytest.mark.parametrize("padded,softcap,bias", KINDS)
def test_heads(padded, softcap, bias):
    """The loss, its gradients, the draws and the full logits are those of the logits by hand; nothing behind V is ever drawn."""
    model, path = Own(padded, softcap, bias), LogitPath(V)
    tokens, t = torch.randint(V, (3, 8)), torch.tensor([0.05, 0.2, 0.4])
    loss = path.loss(model, tokens, t, rng=1)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    by_hand = path.loss(lambda x, t: logits_by_hand(model, x, t), tokens, t, rng=1)
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    if padded:
        assert not model.head.weight.grad[V:].any()
    x = path.sample(tokens, t[:, None], 1)
    with torch.no_grad():
        want = logits_by_hand(model, x, t)
        torch.testing.assert_close(model(x, t), want)
        prediction = as_network(model, LogitPath(V)).predict(State(x), t)
        rng = torch.tensor([[5, 0]]).expand(3, 2)
        drawn = prediction.draw(V, rng)
        assert torch.equal(drawn, as_network(lambda x, t: want, LogitPath(V)).predict(State(x), t).draw(V, rng))
        torch.testing.assert_close(prediction.at(torch.tensor([[2], [0], [7]])).logits[1, 0], want[1, 0])
    assert Sampler(model, path).sample((4, 8), steps=4, top_k=V).tokens.max() < V
    if softcap:
        assert prediction.logits.abs().max() < softcap


@pytest.mark.parametrize("padded,softcap,bias", KINDS)
def test_heads_where_something_was_observed(padded, softcap, bias):
    """The loss among the tokens that are listed, and what is drawn with a likelihood."""
    model = Own(padded, softcap, bias)
    x, t, label = torch.full((1, 2, V), 1 / V), torch.zeros(1), torch.tensor([[3, 4]])
    evidence = Evidence(torch.tensor([[[3, 8, 9], [4, 0, -1]]]), torch.tensor([[[0.1, -0.4, 0.3], [-0.5, 0.2, 0.0]]]))
    with torch.no_grad():
        prediction = as_network(model, LogitPath(V)).predict(State(x), t)
        log_p = evidence.add_to(logits_by_hand(model, x, t)).log_softmax(-1)
        torch.testing.assert_close(prediction.loss_among(evidence, label), -log_p.gather(2, label[..., None])[..., 0])
        torch.testing.assert_close(prediction.with_evidence(evidence).logits.log_softmax(-1), log_p)


def test_a_softcap_changes_what_is_drawn():
    """So that the tests above cannot pass without it."""
    path, x = LogitPath(V), torch.full((1, 4, V), 1 / V)
    models = [Own(softcap=c) for c in (None, 0.01)]
    for model in models:
        with torch.no_grad():
            model.head.weight.mul_(50)
    flat = [as_network(m, LogitPath(V)).predict(State(x), torch.zeros(1)).largest(1)[1].max().item() for m in models]
    assert flat[0] > 0.5 and flat[1] == pytest.approx(1 / V, rel=0.05)
    assert path.loss(models[1], torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2), 0).item() == pytest.approx(
        math.log(V), abs=0.02
    )


def test_what_a_head_must_be():
    path, tokens, t = LogitPath(V), torch.zeros(2, 5, dtype=torch.int64), torch.full((2,), 0.1)
    for change, message in (
        ({"head": torch.nn.Linear(D, V + 1)}, f"head: got {V + 1} outputs, allowed is V = {V}"),
        ({"vocab_size": V - 1}, f"head: got vocab_size = {V - 1}, allowed is V = {V}"),
        ({"head": torch.nn.Linear(D, V - 1), "vocab_size": V}, f"head: got {V - 1} outputs, allowed are at least"),
        ({"head": torch.nn.Sequential(torch.nn.Linear(D, V))}, "head: got Sequential, allowed is a torch.nn.Linear"),
        ({"softcap": -1.0}, "softcap: got -1.0, allowed is None or a positive number"),
    ):
        model = Own()
        for name, value in change.items():
            setattr(model, name, value)
        with pytest.raises(ValueError, match=f"^{message}"):
            path.loss(model, tokens, t, 0)
        with pytest.raises(ValueError, match=f"^{message}"):
            Sampler(model, path)


@pytest.mark.parametrize("path", [LogitPath(V), LinearPath(V)], ids=["logit", "linear"])
def test_the_shapes_of_times(path):
    """(B,), and (B, L) where tokens are given; a network that cannot read those is told (B,)."""
    tokens, given = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[True, False, False, True, False]] * 2)
    for by_position in (True, False):
        model = Own(path=path)
        model.times_by_position = by_position
        path.loss(model, tokens, torch.full((2,), 0.1), 0)
        path.loss(model, tokens, torch.full((2,), 0.1), 0, given=given)
        Sampler(model, path).infill(tokens, given, steps=2, method="sampling")
        assert {dtype for dtype, _ in model.seen} == {torch.float32}
        assert {shape for _, shape in model.seen} == ({(2,), (2, 5)} if by_position else {(2,)})


def test_too_long():
    model, path = Own(), LogitPath(V)
    model.max_length = 4
    with pytest.raises(ValueError, match=r"^target: got shape \(2, 5\), allowed is a length of at most max_length = 4"):
        path.loss(model, torch.zeros(2, 5, dtype=torch.int64), torch.full((2,), 0.1), 0)
    with pytest.raises(ValueError, match="got a length of 5, allowed is at most the model's max_length, 4"):
        Sampler(model, path).sample((2, 5))


def test_scaled_rows():
    """A plain layer learns from them; those of noise have unit variance after a matrix of unit variance."""
    path = LogitPath(2000)
    x = path.sample(torch.zeros(64, dtype=torch.int64), 0.0, 0)
    torch.manual_seed(0)
    weight = torch.randn(2000, 32)
    assert (path.scaled(x) @ weight).std().item() == pytest.approx(1, rel=0.1)
    assert (x @ weight).std().item() < 0.05
    for paths, rows, message in (
        (MaskPath(V), torch.zeros(2, V), "path: got MaskPath"),
        (UniformPath(V), torch.zeros(2, V), "path: got UniformPath"),
        (LogitPath(V), torch.zeros(2, V + 1), r"x: got shape \(2, 31\), allowed is \(..., V = 30\)"),
    ):
        with pytest.raises(ValueError, match=message):
            paths.scaled(rows)


def test_which_matrices_are_hidden():
    model = Own()
    assert [id(p) for p in model.hidden_matrices()] == [id(model.mix.weight)]
    plain = torch.nn.Sequential(torch.nn.Embedding(V + 5, D), torch.nn.Linear(D, 99), torch.nn.Linear(99, V))
    assert [id(p) for p in as_network(plain, LogitPath(V)).hidden_matrices()] == [id(plain[1].weight)]
    assert as_network(lambda x, t: x, LogitPath(V)).hidden_matrices() == []


def test_tied_weights_are_kept_once():
    def make():
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return model

    model, other = make(), make()
    assert second_names(model) == {"b.weight": "a.weight"}
    state = own_state(model)
    assert set(state) == {"a.weight", "a.bias", "b.bias"}
    load_own_state(other, state)
    assert torch.equal(other["b"].weight, model["a"].weight) and other["b"].weight is other["a"].weight
    with pytest.raises(RuntimeError, match="a.weight"):
        load_own_state(other, {name: x for name, x in state.items() if name != "a.weight"})
