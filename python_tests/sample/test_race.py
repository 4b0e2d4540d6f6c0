"""The race: with the exact posterior of the clocks, many passes draw from the distribution of the data."""

import math

import pytest
import torch
from chains import SMALL, small_chain, small_variation

from klflow_ext import LogitPath, MaskPath, Network, Sampler
from klflow_ext.path import Prediction
from klflow_ext.sample.race import RaceState


class Clocks(Network):
    """The exact posterior given the clocks themselves (`path.race`), evidence (1 - g) y; before the first step the prior."""

    def __init__(self, path):
        super().__init__()
        self.path, self.head = path, torch.nn.Linear(1, SMALL)

    def predict(self, state, times, **options):
        sequences, weights = small_chain()
        joint = weights.log().expand(len(times), -1)
        if isinstance(state, RaceState):
            g = torch.exp(-self.path.odds(times.double().reshape(len(times), -1)[:, :1]))[..., None]
            evidence = (1 - g) * state.y
            joint = joint + sum(evidence[:, i].index_select(1, sequences[:, i]) for i in range(3))
        onehot = torch.nn.functional.one_hot(sequences, SMALL).double()
        return Prediction(torch.einsum("bs,slv->blv", joint.softmax(-1), onehot).clamp_min(1e-300).log())


@pytest.mark.slow
def test_many_passes_draw_from_the_joint_distribution():
    draws, weights = 4000, small_chain()[1]
    floor = (weights * (1 - weights) / (2 * math.pi * draws)).sqrt().sum().item()
    path = LogitPath(SMALL, t_max=0.8)
    sampler = Sampler(Clocks(path), path)
    found = {
        n: small_variation(
            sampler.sample((draws, 3), steps=n, method="race", top_k=None, final="draw", seed=n).tokens, draws
        )
        for n in (2, 8, 64)
    }
    assert found[2] > 1.3 * found[8] > 1.5 * found[64] and found[64] < floor + 0.02, (found, floor)


@pytest.mark.parametrize("corrector", [0, 0.5, 4])
def test_a_clock_has_its_distribution_at_every_step(corrector):
    """Given one certain token, y_j is Exp(1) and y_k is Exp(1) / g after any number of steps: means and second moments."""
    path, token = LogitPath(SMALL, t_max=0.6), 1
    states = []

    def model(x, t):
        return torch.full((*x.shape[:2], SMALL), -50.0).index_fill(-1, torch.tensor(token), 50.0)

    sampler = Sampler(model, path)
    predict = sampler.network.predict
    object.__setattr__(
        sampler.network, "predict", lambda s, t, **k: states.append((s, float(t[0]))) or predict(s, t, **k)
    )
    sampler.sample((1, 20000), steps=6, method="race", seed=3, corrector=corrector)
    assert len(states) == 6
    for state, t in states[1:]:
        y = state.y[0] / torch.tensor([1.0, math.exp(path.odds(t)), 1.0])
        torch.testing.assert_close(y.mean(0), torch.ones(3).double(), rtol=0, atol=0.04)
        torch.testing.assert_close(y.square().mean(0), torch.full((3,), 2.0).double(), rtol=0, atol=0.2)
        torch.testing.assert_close(state.x.sum(-1), torch.ones(1, 20000))


def test_with_a_corrector_clocks_depend_less_on_those_before():
    """That of the token is fresh after much of it; the others keep what they have at the end of the process."""
    path, found = LogitPath(SMALL, t_max=0.6), []
    for corrector in (0, 1, 1000):
        states = []

        def model(x, t):
            return torch.full((*x.shape[:2], SMALL), -50.0).index_fill(-1, torch.tensor(1), 50.0)

        sampler = Sampler(model, path)
        predict = sampler.network.predict
        object.__setattr__(
            sampler.network,
            "predict",
            lambda s, t, states=states, predict=predict, **k: states.append(s) or predict(s, t, **k),
        )
        sampler.sample((1, 20000), steps=12, method="race", seed=3, corrector=corrector)
        pairs = torch.stack([state.y[0] for state in states[5:7]], 1)  # (positions, 2, V)
        found.append([torch.corrcoef(pairs[:, :, j].T)[0, 1].item() for j in (0, 1)])
    (other, own), (other_1, own_1), (other_many, own_many) = found
    assert other > other_1 + 0.01 > other_many + 0.02 and own > own_1 + 0.01 and abs(own_many) < 0.05, found


def test_given_rows_show_their_token_and_others_paths_are_refused():
    model = lambda x, t: torch.zeros(*x.shape[:2], SMALL)  # noqa: E731
    given = torch.tensor([[True, False, False]])
    path = LogitPath(SMALL)
    found = Sampler(model, path).infill(torch.full((1, 3), 2), given, steps=3, method="race")
    assert found.tokens[0, 0] == 2
    for other in (MaskPath(SMALL), LogitPath(SMALL, alpha=0.5)):
        with pytest.raises(ValueError, match="^method: got 'race'"):
            Sampler(model, other).sample((1, 3), steps=3, method="race")
