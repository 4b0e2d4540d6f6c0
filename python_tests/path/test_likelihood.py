"""Likelihoods: the race bound of the logit path and the bound of masks beside entropies that are known, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from chains import sticky_chain

from klflow_ext import (
    Autoregressive,
    Denoiser,
    DenoiserConfig,
    ExactDenoiser,
    LinearPath,
    LogitPath,
    MaskPath,
    Network,
    Sampler,
)
from klflow_ext.path import Likelihood, Prediction, as_network
from klflow_ext.path.race import race_rate


def sticky(vocab, length):
    """A chain that starts anywhere, but not everywhere alike, and stays with probability 0.7."""
    return sticky_chain(vocab, length, 0.7, torch.arange(vocab, 0, -1).double())


def texts(sequences, weights, count):
    """Texts (count, L) of the chain, and their -log p (count,)."""
    chosen = torch.multinomial(weights, count, True, generator=torch.Generator().manual_seed(0))
    return sequences[chosen], -weights.log()[chosen]


def excess(found, nats):
    """(mean, standard error) of what is found beyond -log p, a text."""
    difference = found.nats - nats
    return float(difference.mean()), float(difference.std() / math.sqrt(len(nats)))


class Race(Network):
    """The exact posterior given the race Y itself, before it is normalised: evidence (1 - g) Y of each token (`path.race`)."""

    makes_noise = True

    def __init__(self, path, sequences, weights):
        super().__init__()
        self.head = torch.nn.Linear(1, path.vocab_size)
        self.path, self.sequences, self.log_weights = path, sequences, weights.log()
        self.generator = torch.Generator().manual_seed(1)

    def predict(self, state, times, **options):
        s = self.path.odds(torch.as_tensor(state.t).double()).expand(state.tokens.shape)[..., None]
        y = torch.empty(*state.tokens.shape, self.path.vocab_size, dtype=torch.float64).exponential_(
            generator=self.generator
        )
        token = torch.nn.functional.one_hot(state.tokens, self.path.vocab_size)
        evidence = -torch.expm1(-s) * torch.where(token == 1, y * s.exp(), y)
        joint = self.log_weights + sum(
            evidence[:, i].index_select(1, self.sequences[:, i]) for i in range(state.tokens.shape[1])
        )
        onehot = torch.nn.functional.one_hot(self.sequences, self.path.vocab_size).double()
        marginals = torch.einsum("bs,slv->blv", joint.softmax(-1), onehot)
        return Prediction(marginals.clamp_min(1e-300).log())


@pytest.mark.slow
@pytest.mark.parametrize("vocab, length, count", [(4, 3, 1000), (64, 2, 300)])
def test_the_race_bound_of_the_exact_denoiser_is_the_entropy(vocab, length, count):
    sequences, weights = sticky(vocab, length)
    path, (tokens, nats) = LogitPath(vocab), texts(sequences, weights, count)
    found = path.likelihood(Race(path, sequences, weights), tokens)
    assert not found.exact and found.tokens.eq(length).all()
    mean, error = excess(found, nats)
    assert error < 0.1 and abs(mean) < 3 * error, (mean, error)


@pytest.mark.slow
def test_race_times_part_the_bound():
    """Another estimate of the bound falls by as much between any two of them."""
    sequences, weights = sticky(4, 3)
    path, (tokens, _) = LogitPath(4), texts(sequences, weights, 400)
    model = ExactDenoiser((sequences, weights), path)
    times = path.race_times(model, tokens, 4)
    assert len(times) == 4 and times[0] == 0 and times[-1] == path.t_max and sorted(times) == times
    strata = 32
    network = as_network(model, LogitPath(4))
    falls = path._race(network, tokens, tokens, None, 1, strata)[:, :-1].mean(0).numpy()
    s = np.linspace(0, path.odds(path.t_max), strata + 1)
    below = np.interp([path.odds(t) for t in times], s, np.concatenate([[0], falls.cumsum()]))
    assert np.diff(below) == pytest.approx(below[-1] / 3, rel=0.15)


@pytest.mark.slow
def test_what_the_normalised_row_hides_is_paid_for():
    """x_t has lost the scale of the race, which tells something of four tokens: the bound is then above the entropy."""
    sequences, weights = sticky(4, 3)
    path, (tokens, nats) = LogitPath(4), texts(sequences, weights, 1000)
    mean, error = excess(path.likelihood(ExactDenoiser((sequences, weights), path), tokens), nats)
    assert 0.15 + 3 * error < mean < 0.5


@pytest.mark.slow
def test_the_rate_is_its_integral():
    """Beside a quadrature of its definition, in float64 and in y = -log w, for p from one to very small."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, 9, generator=generator) * torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0, 30.0])[:, None, None]
    target = torch.randint(9, (6, 2), generator=generator)
    y = np.linspace(0, 120, 240001)
    for s in (1e-3, 0.1, 1.0, 3.0, 9.0):
        g = math.exp(-s)
        found = race_rate(Prediction(logits.clone()), target, torch.full((6,), s))
        p = logits.double().softmax(-1).numpy()
        for row, place in itertools.product(range(6), range(2)):
            p_row, k = p[row, place], int(target[row, place])
            f = [np.trapezoid(np.exp(-y) * q / (q + (1 - q) * np.exp(-(1 - g) * y)), y) for q in p_row]
            others = sum(value for j, value in enumerate(f) if j != k)
            own = np.trapezoid(np.exp(-y) * (1 - p_row[k]) / (p_row[k] + (1 - p_row[k]) * np.exp(-(1 - g) * y)), y)
            if p_row[k] > 1e-13:  # beyond the table it is a bound
                assert abs(float(found[row, place]) - (own - g * others)) < 3e-5 * (1 + own), (s, row, place)
            else:
                assert float(found[row, place]) > own - g * others - 1e-3
    small = race_rate(Prediction(logits[:4].clone()), target[:4], torch.full((4,), 1e-4))
    assert small.abs().max() < 1e-2
    large = race_rate(Prediction(logits[:4].clone()), target[:4], torch.full((4,), 18.0))
    nats = -logits[:4].log_softmax(-1).gather(-1, target[:4][..., None])[..., 0].double()
    torch.testing.assert_close(large, nats, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_of_masks_with_the_exact_denoiser_is_the_entropy(schedule):
    """In any order the chain rule is exact, so every estimate has that mean; and the time is that of the share shown."""
    for vocab, length, count in ((4, 3, 2000), (64, 2, 1000)):
        sequences, weights = sticky(vocab, length)
        path, (tokens, nats) = MaskPath(vocab, schedule), texts(sequences, weights, count)
        mean, error = excess(path.likelihood(ExactDenoiser((sequences, weights), path), tokens, strata=6), nats)
        assert error < 0.03 and abs(mean) < 3 * error, (mean, error)
    times = path.time_of_share(torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(path.kappa(times), torch.tensor([0.0, 0.3, 1.0]).double(), atol=1e-9, rtol=0)


def test_autoregression_and_segments_are_exact():
    sequences, weights = sticky(4, 3)
    path = Autoregressive(4)
    model = ExactDenoiser((sequences, weights), path)
    for found in (path.likelihood(model, sequences), Sampler(model, path).likelihood(sequences)):
        assert found.exact
        torch.testing.assert_close(found.nats, -weights.log(), rtol=1e-6, atol=1e-6)
    for path in (LogitPath(4), MaskPath(4)):
        model = ExactDenoiser((sequences, weights), path)
        found = Sampler(model, path).likelihood(sequences, method="segments", steps=3)
        assert found.exact
        torch.testing.assert_close(found.nats, -weights.log(), rtol=1e-5, atol=1e-5)
        given = torch.rand(sequences.shape, generator=torch.Generator().manual_seed(0)) < 0.5  # of each text others
        given[given.all(1), 0] = False
        agrees = ((sequences[:, None] == sequences) | ~given[:, None]).all(-1).double() @ weights  # p(what is given)
        found = Sampler(model, path).likelihood(sequences, given, method="segments", steps=3)
        assert torch.equal(found.tokens, (~given).sum(1))
        torch.testing.assert_close(found.nats, agrees.log() - weights.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [LogitPath(4), MaskPath(4), Autoregressive(4)], ids=lambda path: path.kind)
def test_what_is_given_is_not_counted(path):
    sequences, weights = sticky(4, 3)
    model = ExactDenoiser((sequences, weights), path)
    given = torch.zeros_like(sequences, dtype=torch.bool)
    given[:, 0] = True
    last = torch.full_like(sequences, -100)
    last[:, :2] = sequences[:, :2]
    found = path.likelihood(model, sequences, given=given)
    assert found.tokens.eq(2).all()
    if path.kind == "autoregressive":
        stays = torch.where(sequences[:, 1:] == sequences[:, :-1], 0.7, 0.1).double()
        torch.testing.assert_close(found.nats, -stays.log().sum(1), rtol=1e-6, atol=1e-6)
    assert found.nats.sum() < path.likelihood(model, sequences).nats.sum()
    assert path.likelihood(model, last).tokens.eq(2).all()


def test_a_denoiser_is_asked_without_rows_and_comes_back_as_it_was():
    path = LogitPath(50)
    model = Denoiser(DenoiserConfig(50, 1, 2, 16, 16), path)
    tokens = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))
    found = path.likelihood(model, tokens, strata=4)
    assert model.training and math.log(50) < found.per_token < math.inf
    assert torch.equal(found.nats, path.likelihood(model, tokens, strata=4).nats)
    assert not torch.equal(found.nats, path.likelihood(model, tokens, strata=4, seed=1).nats)


def test_figures_of_texts():
    found = Likelihood(torch.tensor([2.0, 4.0, 9.0]).double(), torch.tensor([1, 2, 3]), exact=True)
    assert found.per_token == 2.5
    residuals = torch.tensor([-0.5, -1.0, 1.5])
    assert found.standard_error == pytest.approx(float(residuals.std()) * math.sqrt(3) / 6)
    assert found.bits_per_byte(30) == pytest.approx(15 / math.log(2) / 30)
    assert repr(found) == "Likelihood(2.500 +- 0.382 nats per token, exact)"
    assert math.isnan(Likelihood(torch.ones(1), torch.ones(1), True).standard_error)


def test_what_is_refused():
    path, tokens = LogitPath(9), torch.zeros(2, 3, dtype=torch.int64)
    model = lambda x, t: torch.zeros(*x.shape[:2], 9)  # noqa: E731
    for other, name in ((LinearPath(9), "path"), (LogitPath(9, alpha=0.5), "alpha")):
        with pytest.raises(ValueError, match=f"^{name}: got .* where a likelihood is asked for"):
            other.likelihood(model, tokens)
    for each in (path, MaskPath(9)):
        with pytest.raises(ValueError, match="^strata: got 0"):
            each.likelihood(model, tokens, strata=0)
    with pytest.raises(ValueError, match="^target: got shape"):
        path.likelihood(model, tokens[0])
    with pytest.raises(ValueError, match="^target: got no token"):
        path.likelihood(model, tokens, given=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="^given: got torch.int64"):
        path.likelihood(model, tokens, given=tokens)
    with pytest.raises(ValueError, match="^method: got .* allowed where a likelihood"):
        Sampler(model, path).likelihood(tokens, method="basic")
