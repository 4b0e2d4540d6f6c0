"""Every op over arguments that hypothesis draws: the result of its float64 twin, or an error that names the argument.

Shapes, dtypes, strides and offsets of any kind, tensors of no element, NaN, infinities and the largest numbers; and then, in half of
the examples, one argument that is something else. KLFLOW_FUZZ says how many examples each op has, KLFLOW_FUZZ_SEED which.
"""

import inspect
import math
import os
import re
from decimal import Decimal
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from cases import EPS
from hypothesis import strategies as st

from klflow_ext import ops, reference

EXAMPLES = int(os.environ.get("KLFLOW_FUZZ", "40"))
SEED = int(os.environ.get("KLFLOW_FUZZ_SEED", "0"))
ERRORS = (TypeError, ValueError, IndexError, RuntimeError)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXTREMES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, -1e30, 1e10, -1e4, 1e-30, 1e-44, 0.0, -0.0)
ROWS = ((), (1,), (3,), (9,), (0,), (2, 3), (3, 1), (2, 0), (0, 2), (1, 2, 2))
NUMBERS = (
    "rng", "vocab_size", "beta", "row_offset", "k", "top", "keep", "ignore_index", "label_smoothing", "z_loss", "softcap", "lowest",
    "chunk_rows", "logit_bytes",
)  # fmt: skip


class Draw:
    """Arguments for an op, by what hypothesis says."""

    def __init__(self, data, is_cpu):
        self.data, self.is_cpu = data, is_cpu
        self.shape = self.of(*ROWS)
        long = (511, 513, 1000) if not is_cpu else (511, 2047, 2048, 2049, 4100)
        self.vocab = self.of(2, 3, 5, 8, 16, 17, 31, 33, 64, 65, self.of(*long))
        self.extreme = self.of(False, False, True)

    def of(self, *choices):
        return self.data.draw(st.sampled_from(choices))

    def generator(self):
        return torch.Generator().manual_seed(self.data.draw(st.integers(0, 2**16)))

    def laid_out(self, x):
        layout = self.of("plain", "plain", "strided", "shifted", "transposed", "expanded", "negated", "inside")
        if layout == "strided":
            return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        if layout == "shifted":
            return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
        if layout == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "expanded" and x.dim() > 1 and len(x):
            return x[:1].expand(x.shape)
        if layout == "negated" and x.dtype == torch.float32:
            return torch.complex(torch.zeros_like(x), -x).conj().imag
        if layout == "inside" and x.dim():
            return torch.nn.functional.pad(x, (1, 1) * x.dim())[tuple(slice(1, -1) for _ in x.shape)]
        return x

    def floats(self, *shape, dtypes=FLOATS, std=None, extreme=None):
        generator = self.generator()
        x = torch.randn(shape, generator=generator) * (self.of(0.1, 1.0, 5.0, 50.0) if std is None else std)
        if (self.extreme if extreme is None else extreme) and x.numel():
            places = torch.rand(shape, generator=generator) < self.of(0.02, 0.3, 1.0)
            x[places] = self.of(*EXTREMES)
        return self.laid_out(x.to(self.of(*dtypes)))

    def positive(self, *shape):
        return self.floats(*shape, std=1.0, extreme=False).abs() * self.of(0.0, 1.0, 1.0, 1.0)

    def tokens(self, *shape, ignored=None):
        x = torch.randint(self.vocab, shape, generator=self.generator())
        if ignored is not None:
            x[torch.rand(shape, generator=self.generator()) < self.of(0.0, 0.3, 1.0)] = ignored
        return self.laid_out(x.to(self.of(torch.int64, torch.int32)))

    def distinct(self, count, unused):
        generator = self.generator()
        rows = [torch.randperm(self.vocab, generator=generator)[:count] for _ in range(math.prod(self.shape))]
        x = torch.stack(rows).view(*self.shape, count) if rows else torch.zeros(*self.shape, count, dtype=torch.int64)
        if unused:
            x[torch.rand(x.shape, generator=generator) < 0.3] = -1
        return x

    def share(self):
        """A time or a rate: a number, or a tensor that broadcasts to the rows."""
        number = self.of(0.0, 0.02, 0.2, 0.5, 0.99, 1.0)
        kind = self.of("number", "numpy", "scalar", "rows", "rows", "double", "last")
        if kind == "number":
            return number
        if kind == "numpy":
            return np.float32(number)
        if kind == "scalar":
            return torch.tensor(number)
        shape = self.shape if kind != "last" else self.shape[-1:]
        x = torch.rand(shape, generator=self.generator())
        return self.laid_out(torch.where(x < 0.1, 0.0, torch.where(x > 0.9, 1.0, x)).to(
            torch.float64 if kind == "double" else torch.float32))  # fmt: skip

    def temperature(self):
        return self.of(
            1.0,
            0.7,
            1e-30,
            1e30,
            1e-3,
            torch.tensor(0.5),
            torch.linspace(0.2, 3.0, math.prod(self.shape)).view(self.shape),
        )

    def rng(self):
        kind = self.of("seed", "large", "generator", "state", "rows", "sequences")
        if kind == "generator":
            return torch.Generator().manual_seed(3)
        if kind == "state":
            return torch.tensor([2**62 + 7, 3])
        if kind in ("rows", "sequences") and (kind == "rows" or len(self.shape) > 1):
            shape = self.shape if kind == "rows" else self.shape[:-1]
            return self.laid_out(torch.randint(2**40, (*shape, 2), generator=self.generator()))
        return self.of(0, 1, -1) if kind == "seed" else self.of(2**64 - 1, -(2**63), 2**63)

    def noise(self):
        more = {"row_offset": self.of(0, 5, 2**32 - 1, 2**32 - 3), "beta": self.of(0.01, 0.5, 1e-30, 0.999)}
        if self.of(False, True):
            more["given"] = self.flags()
        return {"target": self.tokens(*self.shape), "t": self.share(), "rng": self.rng(), **more}

    def flags(self):
        return torch.rand(self.of(self.shape, self.shape[-1:]), generator=self.generator()) < self.of(0.0, 0.4, 1.0)

    def given_known(self):
        given = self.flags()
        known = torch.where(given.expand(self.shape), self.tokens(*self.shape).long(), self.of(0, -1, 2**40))
        return self.of({}, {"given": given, "known": known})

    def prior(self):
        x = self.floats(self.vocab, dtypes=(*FLOATS, torch.float64), std=self.of(0.1, 2.0), extreme=False)
        return self.of(x, torch.where(torch.arange(self.vocab) % 5 == 3, -math.inf, x))

    def loss(self, name="weight"):
        choices = {
            name: lambda: self.positive(self.vocab),
            "row_weight": lambda: self.of(self.positive(*self.shape), 2.0, torch.tensor(3)),
            "label_smoothing": lambda: self.of(0.1, 1.0, 0.0),
            "z_loss": lambda: self.of(1e-3, 1.0),
            "softcap": lambda: self.of(30.0, 1e-30, 1e30, 1.0),
        }
        return {key: make() for key, make in choices.items() if self.of(False, False, True)}

    def targets(self):
        """Arguments of the loss: tokens, of which some are ignored, or soft targets."""
        if self.of(False, False, True):
            soft = self.floats(*self.shape, self.vocab, std=2.0, extreme=False)
            return {"target": soft.float().softmax(-1).to(soft.dtype)}
        ignored = self.of(-100, 0, 2**40, -(2**63))
        x = self.tokens(*self.shape, ignored=ignored if ignored in (-100, 0) else None)
        return {"target": x, "ignore_index": ignored}


# ---- the ops: the arguments of each, and how far its result may be from that of the twin


def noise_interpolate(d):
    more = {"dtype": d.of(*FLOATS, None), "log": d.of(False, True), "vocab_size": d.vocab}
    if d.of(False, False, True):
        more |= {"output": "posterior", "log_prior": d.prior()}
    return d.noise() | more


def logit_interpolate(d):
    x = d.floats(*d.shape, d.vocab)
    end = d.of(d.tokens(*d.shape), d.floats(*d.shape, d.vocab, dtypes=(x.dtype,)))
    return {"log_x0": x, "log_x1": end, "t": d.share(), "log": d.of(False, True), "beta": d.of(0.01, 0.5)}


def cross_entropy(d):
    more = {"reduction": d.of("mean", "sum", "none"), "return_lse": d.of(False, True)}
    return {"logits": d.floats(*d.shape, d.vocab)} | d.targets() | d.loss() | more


def cross_entropy_grad(d):
    upstream = d.of({}, {"dloss": d.of(0.5, d.floats(*d.shape, std=1.0, extreme=False))})
    return {"logits": d.floats(*d.shape, d.vocab)} | d.targets() | d.loss() | upstream


def linear_cross_entropy(d):
    width, dtype = d.of(1, 4, 9), d.of(*FLOATS)
    hidden, weight, bias = (
        d.floats(*shape, dtypes=(dtype,), std=1.0, extreme=False)
        for shape in ((*d.shape, width), (d.vocab, width), (d.vocab,))
    )
    more = {"reduction": d.of("mean", "sum", "none"), "return_lse": d.of(False, True), "bias": d.of(None, bias)}
    more |= d.of({}, {"chunk_rows": d.of(1, 2, 1000)}, {"logit_bytes": d.of(1, 10**6)})
    return {"hidden": hidden, "weight": weight} | d.targets() | d.loss("class_weight") | more


def noise_posterior(d):
    more = {"log_prior": d.prior(), "top": d.of(1, 2, d.vocab)}
    noise = d.noise()
    if d.of(False, True):
        count = d.of(1, 2)
        noise["target"] = d.distinct(count, d.of(False, True))
        noise["target"][..., 0] = noise["target"][..., 0].clamp(min=0)  # of a given row
        if count == 2:
            noise["target"][..., 1][noise["target"][..., 0] == noise["target"][..., 1]] = -1
        more["boost"] = d.floats(*d.shape, count, dtypes=(*FLOATS, torch.float64), std=4.0, extreme=False)
    return noise | more


def token_posterior(d):
    return {"log_x": d.floats(*d.shape, d.vocab), "t": d.share(), "log_prior": d.prior(), "top": d.of(1, 2, d.vocab),
            "beta": d.of(0.01, 0.5)}  # fmt: skip


def posterior_embedding(d):
    count = d.of(1, 2, d.vocab)
    q = torch.rand(*d.shape, count, generator=d.generator()).softmax(-1) * 0.7
    rest = torch.rand(d.shape, generator=d.generator()) * 0.3
    return {"ids": d.laid_out(d.distinct(count, False).to(d.of(torch.int32, torch.int64))), "q": d.laid_out(q),
            "rest": d.laid_out(rest), "weight": d.floats(d.vocab, d.of(1, 3, 16, 33), std=1.0, extreme=False),
            "log_prior": d.floats(d.vocab, std=1.0, extreme=False)}  # fmt: skip


def noise_embedding(d):
    more = d.of({}, {"log_prior": d.floats(d.vocab, std=1.0, extreme=False), "top": d.of(None, 1, d.vocab)})
    return d.noise() | {"weight": d.floats(d.vocab, d.of(1, 3, 16, 33), std=1.0, extreme=False)} | more


def merge_boosts(d):
    a, b = (d.distinct(min(n, d.vocab), True) for n in (d.of(1, 3), d.of(1, 2)))
    dtype = d.of(*FLOATS, torch.float64)
    boosts = [d.floats(*x.shape, dtypes=(dtype,), extreme=False) for x in (a, b)]
    return {"ids": a, "boost": boosts[0], "new_ids": b, "new_boost": boosts[1], "keep": d.of(1, 2, 99)}


def sample_arguments(d):
    return {"logits": d.floats(*d.shape, d.vocab), "k": d.of(1, 2, d.vocab), "rng": d.rng(), "temperature": d.temperature(),
            "top_p": d.of(1.0, 0.9, 1e-30, torch.tensor(0.5)), "row_offset": d.of(0, 2**32 - 1)}  # fmt: skip


def topk_renoise(d):
    return sample_arguments(d) | {"t_next": d.share(), "dtype": d.of(None, *FLOATS)} | d.given_known()


def euler_step(d):
    return {"log_x": d.floats(*d.shape, d.vocab), "logits": d.floats(*d.shape, d.vocab), "rate": d.share(),
            "temperature": d.temperature(), "dtype": d.of(None, *FLOATS)} | d.given_known()  # fmt: skip


def softmax_expectation(d):
    rows = math.prod(d.shape)
    knots = d.of((2,), (17,), (4096,), (max(rows, 1), 5)) if rows else d.of((2,), (17,))
    return {"logits": d.floats(*d.shape, d.vocab), "table": d.floats(*knots, dtypes=(torch.float32,), std=1.0, extreme=False),
            "lowest": d.of(-32.0, -3, -1e-3)}  # fmt: skip


def near(got, want, relative, absolute):
    """Within the rounding of the dtype and these; where one is no number or beyond float32, so is the other."""
    assert got.shape == want.shape, (got.shape, want.shape)
    tiny = {torch.float16: 2.0**-25}.get(got.dtype, 2.0**-126)  # gradual underflow
    rounded, got = want.to(got.dtype).double(), got.double()
    within = (got - want).abs() <= relative * want.abs() + absolute + tiny
    bad = ~(within | (got == rounded) | (~got.isfinite() & ~(want.abs() < 1e36)))
    assert not bad.any(), (got[bad][0].item(), want[bad][0].item(), bad.nonzero()[0].tolist())


def dtype_step(x):
    return 16 * 2.0**-23 if x.dtype == torch.float32 else EPS[x.dtype]


def as64(name, value):
    """An argument as the twin takes it: what is a number for each row is float32 inside."""
    if isinstance(value, torch.Generator):
        return reference.state_of(torch.Generator().set_state(value.get_state()))[0]
    if name in ("t", "t_next", "rate", "temperature", "top_p", "dloss", "row_weight") and value is not None:
        value = (
            value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(float(value), dtype=torch.float64)
        )
        return value.float().double()
    if isinstance(value, torch.Tensor) and (name not in NUMBERS or value.dim()):
        return value.detach().double() if value.is_floating_point() else value.detach()
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.item()
    return (
        float(value)
        if isinstance(value, Fraction) or (type(value) is int and name != "rng" and abs(value) >= 2**62)
        else value
    )


def posterior_tolerance(log_q, log_prior):
    """Of q, relative: log q is right to 1e-6 of its row's largest |log q - log_prior|, and 1e-5."""
    far = torch.where(log_prior > -math.inf, (log_q - log_prior).abs(), 0.0)
    return 1e-6 * torch.where(far.isfinite(), far, 0.0).amax(-1, keepdim=True) + 1e-5


def near_entries(got, log_q, log_prior, top, shape):
    """(ids, q, rest): `top` of the largest entries, in order; ties and near-ties may go either way."""
    ids, q, rest = got
    assert ids.shape == q.shape == (*shape, top) and rest.shape == shape and ids.dtype == torch.int32
    ids, q, rest = ids.view(-1, top).long(), q.view(-1, top), rest.view(-1)
    assert (ids.diff() > 0).all() and ((ids >= 0) & (ids < log_q.shape[-1])).all()
    full, relative = log_q.exp(), posterior_tolerance(log_q, log_prior).clamp(min=6e-5)  # the evidence is right to 1e-6
    want = full.gather(1, ids)
    near(q, want, relative + 4 * 2.0**-23, 1e-10)
    near(rest, full.scatter(1, ids, 0.0).sum(-1), relative[:, 0], 6e-7)
    bound = full.sort(-1, descending=True).values[:, top - 1 : top]
    assert ((want >= bound * (1 - 2 * relative)) | bound.isnan()).all()


def near_points(got, parts, want, log):
    """Softmax of a sum of two parts, or its logarithm: each part is rounded in float32."""
    size = sum(torch.where(p.isfinite(), p.abs(), 0.0) for p in parts)
    p = want.exp() if log else want
    error = 2.0**-22 * (8 + torch.where(p > 0, size, 0.0).amax(-1, keepdim=True))
    assert torch.equal(got.isnan(), want.isnan())
    if log:
        near(got, want, 1.01 * EPS[got.dtype], error + 2.0**-22 * size)
    else:
        near(got, want, dtype_step(got) + 4 * error.clamp(max=1.0), 1e-10 + (error > 0.1) * 1.0)


def near_draws(token, log_prob, x, d):
    """Tokens that win their draw, up to near-ties; log_prob None: not asked for."""
    shape, vocab = x["logits"].shape[:-1], x["logits"].shape[-1]
    z = x["logits"].reshape(-1, vocab)
    bad = z.isnan().any(-1) | ~z.amax(-1).isfinite()
    token = token.reshape(-1)
    assert token.shape == z.shape[:1] and torch.equal(token == -1, bad)
    if log_prob is not None:
        log_prob = log_prob.reshape(-1)
        assert torch.equal(log_prob.isnan(), bad)
    rng = reference.state_of(x["rng"], shape, x.get("row_offset", 0))
    e = reference.token_exponential(len(z), vocab, rng, x.get("row_offset", 0))
    t, top_p = (torch.as_tensor(x[n]).expand(shape).reshape(-1) for n in ("temperature", "top_p"))
    for i in (~bad).nonzero()[:, 0].tolist():
        order = z[i].argsort(descending=True, stable=True)[: x["k"]]
        p = ((z[i][order] - z[i].amax()) / t[i]).softmax(-1)
        before = p.cumsum(-1) - p
        place = (order == token[i]).nonzero()[:, 0].tolist()
        assert place, "none of the k largest"
        sure = (before < top_p[i] - 1e-5) | (torch.arange(len(p)) == 0) if top_p[i] < 1 else p >= 0
        maybe = (before < top_p[i] + 1e-5) | sure
        score = p.log() - e[i][order].log() if len(p) > 1 else p
        limit = score[sure].amax()
        assert maybe[place[0]] and score[place[0]] >= limit - 1e-4 * (1 + limit.abs()), (score[place[0]], limit)
        if log_prob is not None and torch.equal(sure, maybe):
            want = (p[place[0]] / p[sure].sum()).log()
            near(log_prob[i], want, 1e-5, 2e-5)


class Near:
    """How the result of each op is compared: got, its arguments, and these as the twin takes them."""

    @staticmethod
    def noise_interpolate(got, a, x, d):
        want = reference.noise_interpolate(**x | {"dtype": torch.float64})
        eps = 1.2 * EPS[got.dtype]
        if x.get("output") == "posterior":
            log = want if x["log"] else want.log()
            relative = posterior_tolerance(log, x["log_prior"])
            near(got, want, eps + (0 if x["log"] else relative), relative if x["log"] else 1e-10)
        elif x["log"]:
            near(got, want, eps, 1.1e-5)
        else:
            near(got, want, (1.3e-6 if d.is_cpu else 9e-6) + eps, 1e-12)

    @staticmethod
    def logit_interpolate(got, a, x, d):
        want = reference.logit_interpolate(**x)
        t = torch.as_tensor(x["t"], dtype=torch.float64).expand(x["log_x0"].shape[:-1])[..., None]
        end = x["log_x1"]
        size = end if end.is_floating_point() else torch.full_like(want, reference.gap(want.shape[-1], x["beta"]))
        near_points(got, ((1 - t) * x["log_x0"], t * size), want, x["log"])

    @staticmethod
    def loss_tolerance(x, logits, name):
        rows = math.prod(logits.shape[:-1])
        size = logits.abs().nan_to_num(0.0, posinf=3e38).amax(-1).reshape(-1)
        cap = x.get("softcap")
        weight = 1.0 if x.get(name) is None else x[name].abs().amax()
        row_weight = 1.0 if x.get("row_weight") is None else x["row_weight"].abs()
        size_error = size.clamp(max=math.inf if cap is None else cap) * 2.0**-49  # lse - z are double
        error = 2e-6 + size_error + (0 if cap is None else size.clamp(max=cap) * 2.0**-21)
        return (torch.as_tensor(row_weight * weight).expand(logits.shape[:-1]).reshape(-1) * error).expand(rows)  # fmt: skip

    @staticmethod
    def seen_lse(x, logits, lse):
        """Where +inf stays what it is, lse is NaN."""
        return lse if x.get("softcap") is not None else torch.where((logits == math.inf).any(-1), math.nan, lse)

    @staticmethod
    def losses(got, x, logits, name, own):
        """own: (rows,) how far each loss may be beyond the promises of cross_entropy."""
        options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "row_weight": None} | x
        loss, lse, divisor = reference.loss_rows(
            logits, x["target"], x.get(name), *(options[n] for n in ("ignore_index", "label_smoothing", "z_loss", "softcap", "row_weight"))
        )  # fmt: skip
        got, got_lse = got if x["return_lse"] else (got, None)
        if got_lse is not None:
            lse = Near.seen_lse(x, logits, lse)
            near(got_lse, lse, 1e-6, 3e-6 + own.view(lse.shape))
        error = Near.loss_tolerance(x, logits, name).view(loss.shape) + own.view(loss.shape) * (
            1 + 4 * options["z_loss"] * lse.abs()
        )
        relative = 40 * 2.0**-23
        if x["reduction"] == "none":
            near(got, loss, relative, error)
            return
        total, error = loss.sum(), (error + relative * loss.abs()).sum()
        if x["reduction"] == "mean":
            if divisor == 0:  # then NaN, or infinite with a z_loss
                assert not got.isfinite() or not logits.numel()
                return
            total, error = total / divisor, error / divisor.abs()
        near(got, total, relative, error if error.isfinite() else 0.0)

    @staticmethod
    def cross_entropy(got, a, x, d):
        Near.losses(got, x, x["logits"], "weight", torch.zeros(x["logits"].shape[:-1]).view(-1))

    @staticmethod
    def cross_entropy_grad(got, a, x, d):
        loss, lse, grad = reference.cross_entropy_grad(**x)
        error = Near.loss_tolerance(x, x["logits"], "weight").view(loss.shape)
        near(got[0], loss, 40 * 2.0**-23, error)
        near(got[1], Near.seen_lse(x, x["logits"], lse), 1e-6, 3e-6)
        if not x["target"].is_floating_point():  # the row of an ignored one may hold anything
            grad = torch.where((x["target"].long() == x.get("ignore_index", -100))[..., None], 0.0, grad)
        upstream = 1.0 if x.get("dloss") is None else torch.as_tensor(x["dloss"]).abs()
        z_loss = 1 + 2 * x.get("z_loss", 0.0) * torch.where(lse.isfinite(), lse.abs(), 0.0)
        near(got[2], grad, 40 * 2.0**-23 + 1.01 * EPS[got[2].dtype], (0.3 * error * upstream * z_loss)[..., None])

    @staticmethod
    def linear_cross_entropy(got, a, x, d):
        bias = x.get("bias")
        logits = torch.nn.functional.linear(x["hidden"], x["weight"], bias)
        size = torch.nn.functional.linear(x["hidden"].abs(), x["weight"].abs(), None if bias is None else bias.abs())
        weight = 1.0 if x.get("class_weight") is None else float(x["class_weight"].amax())
        row_weight = (
            1.0
            if x.get("row_weight") is None
            else float(torch.as_tensor(x["row_weight"]).abs().max())
            if x["target"].numel()
            else 1.0
        )
        own = size.amax(-1).view(-1) * 3 * EPS[a["hidden"].dtype] * max(1.0, weight * row_weight)
        Near.losses(got, x, logits, "class_weight", own)

    @staticmethod
    def noise_posterior(got, a, x, d):
        names = ("target", "t", "rng", "log_prior", "beta", "given", "row_offset", "boost")
        defaults = {"beta": 0.01, "given": None, "row_offset": 0, "boost": None}
        log_q = reference._posterior_rows(*[(defaults | x)[n] for n in names])
        shape = x["target"].shape if x.get("boost") is None else x["target"].shape[:-1]
        near_entries(got, log_q, x["log_prior"], x["top"], shape)

    @staticmethod
    def token_posterior(got, a, x, d):
        z = x["log_x"].reshape(-1, x["log_x"].shape[-1])
        bad = z.isnan().any(-1) | (z == math.inf).any(-1) | (z == -math.inf).all(-1)
        vocab, top = z.shape[-1], x["top"]
        t = torch.as_tensor(x["t"], dtype=torch.float64).expand(x["log_x"].shape[:-1]).reshape(-1)
        zero = torch.where(bad[:, None], 0.0, z)
        _, q, _ = reference.token_posterior(zero, t, x["log_prior"], top=vocab, beta=x["beta"])
        log_q = torch.where(bad[:, None], math.nan, q.log())
        ids, q, rest = got
        assert torch.equal(rest.reshape(-1).isnan(), bad)
        keep = ~bad
        near_entries(
            (ids.reshape(-1, top)[keep], q.reshape(-1, top)[keep], rest.reshape(-1)[keep]),
            log_q[keep],
            x["log_prior"],
            top,
            (int(keep.sum()),),
        )
        assert ((ids >= 0) & (ids < vocab)).all() and q.reshape(-1, top)[bad].isnan().all()

    @staticmethod
    def posterior_embedding(got, a, x, d):
        finite = (x["q"].isfinite().all(-1) & x["rest"].isfinite())[..., None]
        assert not (got.isfinite() & ~finite).any()
        x, got = (
            x | {"q": torch.where(finite, x["q"], 0), "rest": torch.where(finite[..., 0], x["rest"], 0)},
            torch.where(finite, got, 0),
        )
        want = torch.where(finite, reference.posterior_embedding(**x), 0)
        prior = x["log_prior"].softmax(0)
        others = 1 - prior[x["ids"].long()].sum(-1)
        error = 1e-5 + torch.where(
            others > 1e-6, 1e-6 * x["rest"].abs() / others, x["rest"].abs() * (x["ids"].shape[-1] < len(prior))
        )
        near(got, want, 1.01 * EPS[got.dtype], error[..., None] * x["weight"].abs().amax())

    @staticmethod
    def noise_embedding(got, a, x, d):
        rows = {n: v for n, v in x.items() if n not in ("weight", "top", "log_prior")}
        weight, relative = x["weight"], torch.tensor(1e-5)
        if x.get("log_prior") is None:
            q = reference.noise_interpolate(**rows, vocab_size=len(weight), dtype=torch.float64)
        else:
            q = reference.noise_interpolate(
                **rows, vocab_size=len(weight), dtype=torch.float64, output="posterior", log_prior=x["log_prior"]
            )
            relative = 2 * posterior_tolerance(q.log(), x["log_prior"])
        want = q @ weight
        if (
            x.get("log_prior") is not None
            and x.get("top", 512) is not None
            and min(x.get("top", 512), len(weight)) < len(weight)
        ):
            entries = reference.noise_posterior(**rows, log_prior=x["log_prior"], top=x.get("top", 512))
            want = reference.posterior_embedding(*entries, weight, x["log_prior"])
        near(got, want, 1.01 * EPS[got.dtype], relative * weight.abs().amax() * 2)

    @staticmethod
    def merge_boosts(got, a, x, d):
        ids, boost = got
        keep = min(x["keep"], a["ids"].shape[-1] + a["new_ids"].shape[-1])
        assert ids.shape == boost.shape == (*a["ids"].shape[:-1], keep) and boost.dtype == a["boost"].dtype
        flat = [y.reshape(-1, y.shape[-1]) for y in (a["ids"], a["boost"], a["new_ids"], a["new_boost"], ids, boost)]
        for i in range(len(flat[0])):
            sums = {}
            for k, b in ((0, 1), (2, 3)):
                for j, value in zip(flat[k][i].tolist(), flat[b][i], strict=True):
                    if j >= 0:
                        sums[j] = sums[j] + value if j in sums else value
            sums = {j: v.item() for j, v in sums.items()}
            order = sorted(sums, key=lambda j: (0, j) if math.isnan(sums[j]) else (1, -sums[j], j))[:keep]
            assert flat[4][i].tolist() == order + [-1] * (keep - len(order))
            want = torch.tensor([sums[j] for j in order] + [0.0] * (keep - len(order)), dtype=torch.float64)
            near(flat[5][i], want, 0, 0)

    @staticmethod
    def topk_sample(got, a, x, d):
        near_draws(*got, x, d)

    @staticmethod
    def topk_renoise(got, a, x, d):
        token, noisy = got
        given = (
            torch.zeros(x["logits"].shape[:-1], dtype=torch.bool)
            if x.get("given") is None
            else x["given"].expand(x["logits"].shape[:-1])
        )
        free = ~given.reshape(-1)
        if given.any():
            assert torch.equal(token[given], x["known"].long().expand(x["logits"].shape[:-1])[given])
        drawn, _ = ops.topk_sample(
            **{n: v for n, v in a.items() if n in ("logits", "k", "temperature", "top_p", "row_offset")}, rng=x["rng"]
        )
        assert torch.equal(token.reshape(-1)[free], drawn.reshape(-1)[free])
        near_draws(drawn, None, x, d)
        want = reference.noise_interpolate(token.clamp(min=0), x["t_next"], x["rng"], vocab_size=x["logits"].shape[-1], beta=x.get("beta", 0.01),
                                           given=x.get("given"), row_offset=x.get("row_offset", 0), dtype=torch.float64)  # fmt: skip
        want = torch.where((token < 0)[..., None], math.nan, want)
        near(noisy, want, (1.3e-6 if d.is_cpu else 9e-6) + 1.2 * EPS[noisy.dtype], 1e-12)

    @staticmethod
    def euler_step(got, a, x, d):
        logits, rate = (
            x["logits"],
            torch.as_tensor(x["rate"], dtype=torch.float64).expand(x["logits"].shape[:-1])[..., None],
        )
        z = logits - logits.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf).amax(-1, keepdim=True)
        p = (z / torch.as_tensor(x["temperature"]).expand(x["logits"].shape[:-1])[..., None]).softmax(-1)
        c = reference.gap(x["logits"].shape[-1], x.get("beta", 0.01))
        state = torch.where(rate == 1, 0.0, (1 - rate) * x["log_x"])
        l = state + rate * c * p
        given = None if x.get("given") is None else x["given"].expand(x["logits"].shape[:-1]).reshape(-1)
        flat, known = l.reshape(-1, x["logits"].shape[-1]), x.get("known")
        for result, log in ((got[0], True), (got[1], False)):
            want = flat.log_softmax(-1) if log else flat.softmax(-1)
            want = reference._onehot_rows(
                want, given, None if known is None else known.reshape(-1) if known.dim() else known, flat.shape[:1], log
            )
            near_points(
                result.reshape(flat.shape), (state.reshape(flat.shape), torch.full_like(flat, 4 * c)), want, log
            )

    @staticmethod
    def softmax_expectation(got, a, x, d):
        lowest = x.get("lowest", -32.0)
        mean, lse = reference.softmax_expectation(**x)
        table = x["table"]
        steepest = table.diff(dim=-1).abs().max().item() * (table.shape[-1] - 1) / -lowest
        near(got[0], mean, 0, 1e-6 * table.abs().max().item() + (2e-6 if d.is_cpu else 6e-6) * steepest)
        near(got[1], lse, 1e-6, 2e-6)


CASES = {
    "noise_interpolate": noise_interpolate, "logit_interpolate": logit_interpolate, "cross_entropy": cross_entropy,
    "cross_entropy_grad": cross_entropy_grad, "linear_cross_entropy": linear_cross_entropy, "noise_posterior": noise_posterior,
    "token_posterior": token_posterior, "posterior_embedding": posterior_embedding, "noise_embedding": noise_embedding,
    "merge_boosts": merge_boosts, "topk_sample": sample_arguments, "topk_renoise": topk_renoise, "euler_step": euler_step,
    "softmax_expectation": softmax_expectation,
}  # fmt: skip


def test_every_op_is_here():
    assert set(CASES) == set(ops.__all__) - set(ops.TOGETHER)  # those of several processes have tests of their own


class Subclass(torch.Tensor):
    pass


def something_else(d, name, value):
    """Another value for an argument, of any kind; no number that would only ask for much memory."""
    numbers = [
        math.nan, math.inf, -math.inf, -1, 0, 1, 2, 1.5, -0.5, 1e300, 10**30, -(10**30), 2**63, True, None, "x", b"x", [], [1], {}, 1j,
        Decimal("0.5"), Fraction(1, 2), np.float64(0.25), np.int32(1), np.bool_(True), np.array([1, 2]), np.array(0.5), torch.tensor(0.5),
        torch.tensor(1), torch.tensor(True), torch.tensor([0.25]), torch.tensor(1j), torch.tensor(math.nan), torch.tensor([]),
        torch.float64, object,
    ]  # fmt: skip
    if name == "out":
        shape = (*d.shape, d.vocab)
        return d.of(d.floats(*shape, extreme=False), d.floats(*shape, extreme=False), d.floats(d.vocab), d.of(*numbers))
    if not isinstance(value, torch.Tensor) or d.of(False, False, True):
        return d.of(*numbers)
    changes = {
        "double": torch.Tensor.double, "int": torch.Tensor.int, "long": torch.Tensor.long, "bool": torch.Tensor.bool, "half": torch.Tensor.half,
        "complex": lambda x: x.to(torch.complex64), "int8": lambda x: x.to(torch.int8), "float8": lambda x: x.float().to(torch.float8_e4m3fn),
        "more axes": lambda x: x[None], "an axis behind": lambda x: x[..., None], "flat": lambda x: x.reshape(-1), "meta": lambda x: x.to("meta"),
        "sparse": lambda x: x.to_sparse(), "csr": lambda x: x.reshape(len(x), -1).to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
        "mkldnn": lambda x: x.float().to_mkldnn(), "list": torch.Tensor.tolist, "numpy": lambda x: np.array(x.float()),
        "grad": lambda x: x.float().detach().requires_grad_(), "parameter": lambda x: torch.nn.Parameter(x.float()),
        "large": lambda x: x + 10**9, "negative": lambda x: -x.float() - 1 if x.is_floating_point() else -x.long() - 1,
        "nan": lambda x: torch.full_like(x.float(), math.nan), "infinite": lambda x: torch.full_like(x.float(), math.inf),
        "subclass": lambda x: x.as_subclass(Subclass), "nested": lambda x: torch.nested.nested_tensor([x.reshape(-1)]),
        "jagged": lambda x: torch.nested.nested_tensor([x.reshape(-1)], layout=torch.jagged),
        "shorter": lambda x: x[..., :-1], "longer": lambda x: torch.cat([x, x], -1), "none": lambda x: x[:0], "twice": lambda x: x.expand(2, *x.shape),
        "one": lambda x: x.reshape(-1)[0], "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "inference": lambda x: made_in_inference(x), "numpy's": lambda x: torch.from_numpy(np.array(x.float())),
    }  # fmt: skip
    try:
        return changes[d.of(*changes)](value)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):  # torch has no such tensor of it
        hypothesis.reject()


def made_in_inference(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("name", CASES)
def test_fuzz(name, device, request):
    op, is_cpu = getattr(ops, name), request.node.callspec.params["device"] == "cpu"
    names = set(inspect.signature(op).parameters)
    counts = {"right": 0, "refused": 0, "right, of others": 0}

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink) if EXAMPLES > 100 else (hypothesis.Phase.generate,),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def fuzz(data):
        d = Draw(data, is_cpu)
        arguments, other = CASES[name](d), None
        if d.of(False, True):
            other = d.of(*sorted(set(arguments) | names & {"out"}))
            arguments[other] = something_else(d, other, arguments.get(other))
        frozen = {n: as64(n, v) if isinstance(v, torch.Generator) else v for n, v in arguments.items()}
        try:
            got = op(**arguments)
        except ERRORS as error:
            said = re.match(r"(\w+): ", str(error))
            if other is None or said is None or said[1] not in names:
                raise
            counts["refused"] += 1
            return
        if (got[0] if isinstance(got, tuple) else got).is_meta:  # where its first tensor is
            return
        if other == "out":
            arguments.pop("out"), frozen.pop("out")
        got = tuple(y.detach() for y in got) if isinstance(got, tuple) else got.detach()
        twin = {n: as64(n, v) for n, v in frozen.items()}
        getattr(Near, name)(got, frozen, twin, d)
        counts["right" if other is None else "right, of others"] += 1

    fuzz()
    print(name, "cpu" if is_cpu else "simt", counts)
