"""The paths: what their noise is distributed like, what leaks from it, what the loss counts, and the exact posteriors."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from klflow_ext import (
    Autoregressive,
    ExactDenoiser,
    LinearPath,
    LogitPath,
    MaskPath,
    Path,
    SpherePath,
    UniformPath,
    ops,
)
from klflow_ext.path import IGNORE, KAPPA, Move, Network, ResolvedOptions, State, identification_accuracy
from klflow_ext.path.noise import log_gamma

V = 11
NOISY = [
    LogitPath(V),
    LogitPath(V, alpha=0.2),
    LinearPath(V),
    SpherePath(V),
    MaskPath(V),
    MaskPath(V, "cosine"),
    UniformPath(V, "square"),
]
PATHS = [*NOISY, Autoregressive(V)]
name = lambda path: f"{path.kind}-{getattr(path, 'alpha', getattr(path, 'schedule', ''))}"  # noqa: E731
noisy = pytest.mark.parametrize("path", NOISY, ids=name)
each = pytest.mark.parametrize("path", PATHS, ids=name)


def states(rows, seed=0):
    return torch.stack([torch.arange(rows) + 100 * seed, torch.full((rows,), 5)], 1)


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def shown(path, target):
    """What x_t is where it shows its token."""
    return target if path.reads == "tokens" else torch.nn.functional.one_hot(target, path.vocab_size).float()


# ---- noise


def test_kappa_schedules():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    middle = {"linear": 0.3, "square": 0.09, "cubic": 0.216, "cosine": 1 - math.cos(0.15 * math.pi)}
    assert set(KAPPA) == set(middle)
    for schedule, value in middle.items():
        kappa = MaskPath(V, schedule).kappa(t)
        assert kappa[0] == 0 and abs(kappa[-1] - 1) < 1e-15 and (kappa.diff() > 0).all()
        assert abs(kappa[30] - value) < 1e-12


@pytest.mark.parametrize("schedule", sorted(KAPPA))
def test_discrete_marginals(schedule):
    n = 60_000
    target = torch.full((n,), 4)
    for t in (0.0, 0.35, 1.0):
        mask, uniform = MaskPath(V, schedule), UniformPath(V, schedule)
        kappa = float(mask.kappa(t))
        x = mask.sample(target, t, 1)
        assert set(x.unique().tolist()) <= {4, V}
        assert stats.binomtest(int((x == 4).sum()), n, kappa).pvalue > 1e-6
        found = torch.bincount(uniform.sample(target, t, 2), minlength=V).double()
        expected = n * (kappa * torch.nn.functional.one_hot(torch.tensor(4), V).double() + (1 - kappa) / V)
        if t == 1:
            assert found[4] == n
        else:
            assert stats.chisquare(found, expected).pvalue > 1e-6


def test_linear_is_the_straight_line_and_sphere_the_great_circle():
    target, rng = tokens(50), 3
    x0 = ops.noise_interpolate(target, 0.0, rng, vocab_size=V)
    onehot = torch.nn.functional.one_hot(target, V).float()
    torch.testing.assert_close(LinearPath(V).sample(target, 0.3, rng), 0.7 * x0 + 0.3 * onehot, atol=1e-6, rtol=0)
    y0, y = x0.sqrt(), SpherePath(V).sample(target, 0.3, rng).sqrt()
    theta = y0.gather(-1, target[:, None])[:, 0].acos()
    torch.testing.assert_close((y0 * y).sum(-1).acos(), 0.3 * theta, atol=1e-3, rtol=0)
    torch.testing.assert_close(y.gather(-1, target[:, None])[:, 0].acos(), 0.7 * theta, atol=1e-3, rtol=0)
    torch.testing.assert_close(y.square().sum(-1), torch.ones(50))


@pytest.mark.parametrize("alpha", [0.01, 0.4, 1.0, 7.0])
def test_log_gamma(alpha):
    n = 200_000
    draws = log_gamma(alpha, torch.Size([n // 100]), 100, 9, 0, torch.device("cpu")).flatten()
    assert draws.isfinite().all()
    a = torch.tensor(alpha, dtype=torch.float64)
    mean, variance = torch.digamma(a), torch.polygamma(1, a)
    fourth = torch.polygamma(3, a) + 3 * variance**2
    assert abs(draws.mean() - mean) < 5 * (variance / n).sqrt()
    assert abs(draws.var() - variance) < 5 * ((fourth - variance**2) / n).sqrt()
    # exp underflows for alpha = 0.01, where the distribution function is below 6e-4
    assert stats.kstest(torch.special.gammainc(a, draws.exp()).numpy(), "uniform").pvalue > 1e-6


def test_accuracy_of_other_noise():
    assert identification_accuracy(50, 0.01, 0.2, 1 + 1e-7) == pytest.approx(
        identification_accuracy(50, 0.01, 0.2), abs=1e-5
    )
    for alpha in (0.05, 3.0):
        path = LogitPath(50, alpha=alpha)
        x = path.sample(torch.full((4000,), 7), path.t_max, 3)
        assert abs((x.argmax(-1) == 7).float().mean() - 0.985) < 0.01, path


@noisy
def test_noise_leaks_nothing(path):
    """At t = 0, and of padding at any t, nothing of the tokens; the first position is no exception."""
    a, b, rng = tokens(4, 6), tokens(4, 6, seed=1), states(4)
    # the kernel adds a row up with its target last, so that rows differ by a rounding
    rounding = 1e-7 if path.kind == "logit" and path.alpha == 1 else 0
    torch.testing.assert_close(path.sample(a, 0.0, rng), path.sample(b, 0.0, rng), atol=rounding, rtol=0)
    padded = a.clone()
    padded[2, 3:] = padded[0, 0] = IGNORE
    x = path.sample(padded, 0.9, rng, given=torch.full_like(a, True, dtype=torch.bool))
    noise = path.sample(0 * a, 0.0, rng)
    assert torch.equal(x[2, 3:], noise[2, 3:]) and torch.equal(x[0, 0], noise[0, 0])
    assert torch.equal(x[1], shown(path, a)[1])


@noisy
def test_given_positions_and_time_one_show_the_token(path):
    target, rng = tokens(4, 6), states(4)
    given = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    x = path.sample(target, torch.tensor([0.0, 0.1, 0.5, 0.7])[:, None], rng, given=given)
    assert torch.equal(x[given], shown(path, target)[given])
    assert not torch.equal(x[~given], shown(path, target)[~given])
    if path.kind != "logit":  # whose end point is smoothed
        assert torch.equal(path.sample(target, 1.0, rng), shown(path, target))


@noisy
def test_noise_depends_on_seed_step_and_row_alone(path):
    target, rng, t = tokens(5, 6), states(5), torch.linspace(0.1, 0.6, 5)[:, None]
    x = path.sample(target, t, rng)
    assert torch.equal(path.sample(target[3:4], t[3:4], rng[3:4]), x[3:4])
    assert torch.equal(path.sample(target.flip(0), t.flip(0), rng.flip(0)).flip(0), x)
    assert torch.equal(path.sample(target[:, 2:], t, rng, row_offset=2), x[:, 2:])
    flat = path.sample(target.flatten(), 0.2, torch.tensor([7, 1]))
    assert torch.equal(path.sample(target.flatten()[9:], 0.2, torch.tensor([7, 1]), row_offset=9), flat[9:])
    for other in ([8, 1], [7, 2]):
        assert not torch.equal(path.sample(target.flatten(), 0.2, torch.tensor(other)), flat)
    assert torch.equal(path.sample(target, 0.2, 3), path.sample(target, 0.2, torch.tensor([3, 0])))


# ---- the loss


class Table(Network):
    """A model of rows or ids with the pieces of a Denoiser, fused or not."""

    makes_noise = True

    def __init__(self, ids, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Parameter(torch.randn(ids, width)), torch.nn.Linear(width, V, bias=False)

    def embed(self, x, t):
        return x @ self.table if x.is_floating_point() else self.table[x]

    def embed_noise(self, target, t, rng, **options):
        return ops.noise_embedding(target, t, self.table, rng, **options)

    def hidden(self, h, t):
        h = h + t.reshape(len(t), -1, 1)
        return torch.tanh(h + h.mean(1, keepdim=True))

    def forward(self, x, t):
        return self.head(self.hidden(self.embed(x, t), t))


@each
def test_loss_counts_free_positions_that_are_no_padding(path):
    target, t, rng = tokens(6, 7), torch.linspace(0.05, 0.8, 6), states(6)
    given = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    target[:, 5:] = IGNORE
    given[:, 6] = True
    model = Table(V + 1 if path.reads == "tokens" else V)
    x = path.sample(target, t[:, None], rng, given=given)
    counted = ~given & (target != IGNORE)
    if path.kind == "mask":
        counted &= x == V
    by_position = torch.where(given, 1.0, t[:, None])
    times = {"autoregressive": 0 * t, "uniform": by_position}.get(path.kind, t)
    for network in (model, lambda x, t: model(x, t)):
        # Only a network that tells positions apart is told that given rows of the simplex are at time 1.
        told = by_position if network is model and path.reads == "rows" else times
        log_p = model(x, told).log_softmax(-1)
        expected = -log_p.gather(-1, target.clamp_min(0)[..., None])[..., 0].masked_fill(~counted, 0)
        for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / counted.sum())):
            loss = path.loss(network, target, t, rng, given=given, reduction=reduction)
            torch.testing.assert_close(loss, value, atol=2e-5, rtol=1e-5)
    path.loss(model, target, t, rng, given=given).backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.table.grad.abs().sum() > 0


# other noise than Dirichlet(1) tries again until all of it is accepted, which no graph holds
@pytest.mark.parametrize("path", [p for p in PATHS if getattr(p, "alpha", 1) == 1], ids=name)
def test_the_loss_compiles_whole(path):
    model, target = Table(V + 1 if path.reads == "tokens" else V), tokens(2, 5)
    t, rng, given = torch.full((2,), 0.3), torch.tensor([3, 4]), torch.zeros(2, 5, dtype=torch.bool)
    whole = torch.compile(path.loss, backend="eager", fullgraph=True)
    assert torch.equal(whole(model, target, t, rng, given=given), path.loss(model, target, t, rng, given=given))


@pytest.mark.parametrize("path", [LogitPath(V), MaskPath(V)], ids=name)
def test_half_the_sequences_condition_on_their_own_estimate(path):
    model, seen = Table(V + 1 if path.reads == "tokens" else V), []
    model.self_conditions = True
    plain = model.hidden

    def hidden(h, t, previous=None):
        seen.append(None if previous is None else (previous, plain(h, t), torch.is_grad_enabled()))
        return plain(h, t)

    model.hidden = hidden
    path.loss(model, tokens(4, 5), torch.full((4,), 0.3), 0)
    first, (previous, estimate, with_gradient) = seen
    assert first is None and with_gradient
    assert torch.equal(previous[::2], estimate[::2]) and not previous[1::2].any() and not previous.requires_grad
    path.loss(model.eval(), tokens(4, 5), torch.full((4,), 0.3), 0)
    assert seen[2:] == [None]


def test_mask_loss_of_a_batch_without_masks_is_zero():
    model = Table(V + 1)
    loss = MaskPath(V).loss(model, tokens(2, 5), torch.ones(2), 0)
    loss.backward()
    assert loss == 0 and model.head.weight.grad.abs().sum() == 0


def test_autoregressive_reads_what_comes_before():
    target = torch.tensor([[3, 1, 4, IGNORE, IGNORE]])
    path = Autoregressive(V)
    assert path.sample(target, 0.0, 0).tolist() == [[V, 3, 1, 4, V]]
    assert path.time(torch.tensor([0.3, 0.9])).tolist() == [0, 0]


# ---- times


def test_time_grids():
    path = LogitPath(V, t_max=0.6)
    tau = -torch.log1p(-path.time_grid(5))
    torch.testing.assert_close(tau.diff(), tau.diff().mean().expand(5))
    assert path.time_grid(5)[0] == 0 and path.time_grid(5)[-1] == 0.6 and path.time_grid(0).tolist() == [0]
    tau = -torch.log1p(-path.time_grid(4, power=0.5))
    torch.testing.assert_close(tau / tau[-1], (torch.arange(5, dtype=torch.float64) / 4).sqrt())
    assert MaskPath(V).time_grid(3).tolist() == [0, 0.25, 0.5, 0.75]  # a pass at 1, where all is said, would be wasted
    assert UniformPath(V).time_grid(1, power=2.0).tolist() == [0, 0.25]
    assert LinearPath(V).time(0.25) == 0.25 and LinearPath(V, t_max=0.2).time(0.5) == 0.1


# ---- steps


@pytest.mark.parametrize("path", [LinearPath(V), SpherePath(V)], ids=name)
def test_a_step_of_certainty_follows_the_path(path):
    """With p = onehot(k) the ODE is the path itself, and a step is exact."""
    target, rng = tokens(3, 4), states(3)
    given = torch.zeros(3, 4, dtype=torch.bool)
    given[0, 1] = True
    said = torch.where(given, (target + 1) % V, target)  # what the model says of a given position changes nothing
    logits = torch.where(torch.nn.functional.one_hot(said, V) == 1, 0.0, -5.0)
    move = SimpleNamespace(t=0.2, t_next=0.7, temperature=0.1, given=given)
    x = path.step(State(path.sample(target, 0.2, rng, given=given)), SimpleNamespace(logits=logits), move).x
    torch.testing.assert_close(x, path.sample(target, 0.7, rng, given=given), atol=2e-6, rtol=0)
    assert torch.equal(x[given], shown(path, target)[given])


def test_the_state_of_sparse_noise_outlives_underflow():
    """Of alpha = 0.01 most entries of x_0 are below the smallest float32; their logarithms still move."""
    path, given = LogitPath(V, alpha=0.01), torch.zeros(2, 6, dtype=torch.bool)
    start = path.renoise(tokens(2, 6), 0.0, states(2), given)
    assert (start.x == 0).any() and start.log_x.isfinite().all()
    move = Move(
        t=0.0,
        t_next=0.9,
        rng=states(2),
        given=given,
        known=tokens(2, 6),
        temperature=1.0,
        options=ResolvedOptions(boosts=None),
    )
    log_x = start.log_x.clone()
    end = path.step(start, SimpleNamespace(logits=torch.zeros(2, 6, V)), move)
    torch.testing.assert_close(end.log_x, (0.1 * log_x).log_softmax(-1), atol=1e-4, rtol=1e-5)


# ---- exact posteriors


EXACT = [
    (LogitPath(3, t_max=0.6), 0.2), (LogitPath(3, t_max=0.6, alpha=0.3), 0.3), (LogitPath(3, t_max=0.6, alpha=4.0), 0.1),
    (LinearPath(3), 0.25), (SpherePath(3), 0.25), (MaskPath(3), 0.25), (UniformPath(3), 0.25),
]  # fmt: skip


@pytest.mark.parametrize("path,t", EXACT, ids=[name(path) for path, _ in EXACT])
def test_exact_posteriors(path, t):
    """1[k = j] - p(j | x_t) has mean 0 against every function of x_t, which only the true posterior has."""
    n, prior = 100_000, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    target = torch.multinomial(prior, n, replacement=True, generator=torch.Generator().manual_seed(0))
    x = path.sample(target, t, 4)
    p = ExactDenoiser(prior, path)(x, t).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(n, dtype=torch.float64))
    residual = torch.nn.functional.one_hot(target, 3) - p
    seen = torch.nn.functional.one_hot(x, 4).double() if path.reads == "tokens" else x.double()
    features = torch.cat([torch.ones(n, 1), seen, seen[:, :3].square(), p, p.square(), p.clamp_min(1e-9).log()], 1)
    products = residual[:, :, None] * features[:, None]
    z = products.mean(0) / (products.std(0) / math.sqrt(n)).clamp_min(1e-12)
    assert z.abs().max() < 5.5, z
    assert 0.02 < (p * (1 - p)).sum(-1).mean() < (prior * (1 - prior)).sum() - 0.02  # neither certain nor blind


# ---- files and errors


@each
def test_dict_round_trip(path):
    values = json.loads(json.dumps(path.to_dict()))
    for read in (Path.from_dict, type(path).from_dict):
        again = read(values)
        assert type(again) is type(path) and again.to_dict() == values and repr(again) == repr(path)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: MaskPath(1), "vocab_size: got 1"),
        (lambda: UniformPath(5, "fast"), "schedule: got 'fast', allowed is one of"),
        (lambda: MaskPath(5, t_split=2), "t_split: got 2"),
        (lambda: LinearPath(5, t_max=0.0), "t_max: got 0.0"),
        (lambda: SpherePath(5, t_max=1.1), "t_max: got 1.1"),
        (lambda: LogitPath(5, alpha=0.0), "alpha: got 0.0"),
        (lambda: LogitPath(5, t_max=1.0), "t_max: got 1.0"),
        (lambda: LogitPath(5).time_of_accuracy(1.0), "accuracy: got 1.0"),
        (lambda: MaskPath(5).time_grid(-1), "moves: got -1"),
        (lambda: MaskPath(5).time_grid(3, power=0), "power: got 0"),
        (lambda: MaskPath(5).sample(torch.tensor([1]), 1.5, 0), "t: got 1.5"),
        (lambda: Path.from_dict({"kind": "spline"}), "kind: got 'spline', allowed is one of"),
        (lambda: LogitPath.from_dict(MaskPath(5).to_dict()), "kind: got 'mask'"),
        (lambda: MaskPath.from_dict({"kind": "mask", "vocab_size": 5, "beta": 1}), "beta: got 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each
def test_targets_outside_the_vocabulary(path):
    with pytest.raises(IndexError, match=f"target: row 1 holds {V}"):
        path.sample(torch.tensor([3, V]), 0.2, 0)
