"""Derivatives of every order and mode, of every differentiable op, against its float64 twin in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jvp, vmap

from klflow_ext import ops, reference

N, V, D = 6, 37, 8
TARGET = torch.tensor([1, 36, -100, 0, 7, 7])
TOKENS = TARGET.clamp(min=0)
PRIOR = torch.randn(V, generator=torch.Generator().manual_seed(3)).log_softmax(0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(options):
    return (
        lambda x: ops.cross_entropy(
            x, options.get("target", TARGET), **{k: v for k, v in options.items() if k != "target"}
        ),
        lambda x: reference.cross_entropy(
            x, options.get("target", TARGET), **{k: v for k, v in options.items() if k != "target"}
        ),
        random(N, V),
    )


def both(function, inputs):
    return (lambda *x: function(ops, *x)), (lambda *x: function(reference, *x)), inputs


OPTIONS = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "weight": torch.linspace(0.5, 2, V),
            "row_weight": torch.linspace(0, 2, N)},
    "sum": {"reduction": "sum", "label_smoothing": 0.2},
    "soft": {"target": random(N, V, seed=5).softmax(-1), "label_smoothing": 0.1},
}  # fmt: skip
# name: (op, twin, inputs that are differentiated); each result is one number
FUNCTIONS = {
    **{f"cross_entropy {name}": loss_of(options) for name, options in OPTIONS.items()},
    "cross_entropy lse": both(
        lambda m, x: sum(r.square().sum() for r in m.cross_entropy(x, TARGET, reduction="none", return_lse=True)),
        random(N, V),
    ),
    "linear_cross_entropy": both(
        lambda m, h: m.linear_cross_entropy(h, random(V, D, seed=1).to(h), TARGET), random(N, D)
    ),
    "linear_cross_entropy weight": both(
        lambda m, w: (
            m.linear_cross_entropy(random(N, D).to(w), w, TARGET, bias=w[:, 0], reduction="none").square().sum()
        ),
        random(V, D),
    ),
    "logit_interpolate": both(
        lambda m, x: (m.logit_interpolate(x, x.flip(-1), 0.3) * random(N, V, seed=2).to(x)).sum(), random(N, V)
    ),
    "logit_interpolate log": both(
        lambda m, x: (m.logit_interpolate(x, TOKENS, 0.3, log=True) * random(N, V, seed=2).to(x)).sum(), random(N, V)
    ),
    "logit_interpolate t": both(
        lambda m, t: m.logit_interpolate(random(N, V).to(t), TOKENS, t.sigmoid()).square().sum(), random(N)
    ),
    "noise_embedding": both(
        lambda m, w: (m.noise_embedding(TOKENS, 0.1, w, 5) * random(N, D, seed=2).to(w)).square().sum(), random(V, D)
    ),
    "noise_embedding posterior": both(
        lambda m, w: m.noise_embedding(TOKENS, 0.1, w, 5, log_prior=PRIOR.to(w), top=None).square().sum(), random(V, D)
    ),
    "noise_embedding sparse": both(
        lambda m, w: m.noise_embedding(TOKENS, 0.1, w, 5, log_prior=PRIOR.to(w), top=9).square().sum(), random(V, D)
    ),
}
CASES = pytest.mark.parametrize("op,twin,x", FUNCTIONS.values(), ids=FUNCTIONS)


def near(actual, expected):
    expected = expected.double()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-5 * (1 + expected.abs().max().item()))


@CASES
def test_gradient_penalty(op, twin, x):
    """loss + |gradient|^2: a gradient of a gradient."""

    def penalty(f, x):
        x = x.clone().requires_grad_()
        loss = f(x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        return x.grad

    near(penalty(op, x), penalty(twin, x.double()))


@CASES
def test_directional_derivative(op, twin, x):
    direction = random(*x.shape, seed=9)
    got, want = jvp(op, (x,), (direction,)), jvp(twin, (x.double(),), (direction.double(),))
    near(got[0], want[0])
    near(got[1], want[1])
    with torch.autograd.forward_ad.dual_level():
        dual = op(torch.autograd.forward_ad.make_dual(x, direction))
        near(torch.autograd.forward_ad.unpack_dual(dual).tangent, want[1])


@CASES
def test_functional_gradient_and_hessian(op, twin, x):
    near(grad(op)(x), grad(twin)(x.double()))
    product = torch.autograd.functional.hvp(op, x, x)[1]
    near(product, torch.autograd.functional.hvp(twin, x.double(), x.double())[1])
    near(jvp(grad(op), (x,), (x,))[1], product)


def test_hessian_of_the_loss():
    x, target = random(2, 5), torch.tensor([1, 4])
    near(
        hessian(lambda x: ops.cross_entropy(x, target))(x),
        hessian(lambda x: F.cross_entropy(x, target))(x.double()),
    )
    near(jacfwd(lambda x: ops.cross_entropy(x, target, reduction="none"))(x),
         jacfwd(lambda x: F.cross_entropy(x, target, reduction="none"))(x.double()))  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_by_vmap(reduction):
    x, target = random(3, N, V), torch.stack([TARGET, TARGET.roll(1), TARGET.roll(2)])
    near(vmap(lambda x, y: ops.cross_entropy(x, y, reduction=reduction))(x, target),
         vmap(lambda x, y: F.cross_entropy(x, y, reduction=reduction))(x.double(), target))  # fmt: skip
    near(vmap(lambda x: ops.cross_entropy(x, TARGET, reduction=reduction), in_dims=1)(x.movedim(0, 1)),
         vmap(lambda x: F.cross_entropy(x, TARGET, reduction=reduction))(x.double()))  # fmt: skip
    near(vmap(lambda x: ops.logit_interpolate(x, TOKENS, 0.3))(x),
         reference.logit_interpolate(x.double(), TOKENS.expand(3, N), 0.3))  # fmt: skip


def test_gradients_of_each_sample_by_vmap():
    x, target = random(3, N, V), torch.stack([TARGET, TARGET.roll(1), TARGET.roll(2)])
    near(vmap(grad(lambda x, y: ops.cross_entropy(x, y)))(x, target),
         vmap(grad(lambda x, y: F.cross_entropy(x, y)))(x.double(), target))  # fmt: skip
    weight, hidden = random(V, D), random(3, N, D)
    near(vmap(grad(lambda w, h, y: ops.linear_cross_entropy(h, w, y)), in_dims=(None, 0, 0))(weight, hidden, target),
         vmap(grad(lambda w, h, y: F.cross_entropy(h @ w.T, y)), in_dims=(None, 0, 0))(
             weight.double(), hidden.double(), target))  # fmt: skip


def test_second_backward_makes_the_gradient_again():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random(N, V).to(dtype).requires_grad_()
        loss, lse = ops.cross_entropy(x, TARGET, return_lse=True)
        first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)[0]
        torch.testing.assert_close(second, 2 * first, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0)
        (mixed,) = torch.autograd.grad([loss, lse], x, [torch.tensor(1.0), torch.ones(N)])
        z = x.detach().double().requires_grad_()
        want = torch.autograd.grad(F.cross_entropy(z, TARGET) + z.logsumexp(-1).sum(), z)[0]
        torch.testing.assert_close(mixed.double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)


def test_gradients_in_place_have_no_derivatives():
    x = random(N, V).requires_grad_()
    loss = ops.cross_entropy(x * 1, TARGET, inplace_backward=True)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)
