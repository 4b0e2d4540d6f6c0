"""The embedding ops: posteriors and embeddings of noisy rows against their float64 twins, and their gradients."""

import math

import pytest
import torch
from cases import assert_close, case_of, prior_of, targets_of, to64, weight_of

from klflow_ext import ops, reference
from klflow_ext.ops import embedding
from klflow_ext.path.logit import log_evidence

SHAPES = [(60, 2), (60, 3), (40, 31), (9, 1000), (9, 2500), (3, 50257)]


def dense_of(ids, q, vocab):
    return torch.zeros(*ids.shape[:-1], vocab, dtype=torch.float64).scatter(-1, ids.long().cpu(), q.double().cpu())


# ---- noise_posterior


@pytest.mark.parametrize("top", [1, 20, 512, None])
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_noise_posterior(rows, vocab, top, device):
    target, t, rng, given = case_of(rows, vocab, device)
    log_prior = prior_of(vocab, device, never=True)
    top = min(top or vocab, vocab)
    options = {"given": given, "row_offset": 11}
    ids, q, rest = ops.noise_posterior(target, t, rng, log_prior, top=top, **options)
    assert ids.dtype == torch.int32 and ids.shape == q.shape == (rows, top) and rest.shape == (rows,)
    assert (ids[:, 1:] > ids[:, :-1]).all() and ids.min() >= 0 and ids.max() < vocab
    full = reference._posterior_rows(to64(target), to64(t), to64(rng), to64(log_prior), 0.01, to64(given), 11).exp()
    # z is right to 1e-6 of the evidence; where z decides, the evidence is within about 60 of its largest.
    want = full.gather(1, ids.long().cpu())
    assert_close(q, want, torch.float32, scale=60, absolute=1e-10)
    bound = full.sort(-1, descending=True).values[:, top - 1]
    assert (want.amin(-1) >= bound * (1 - 1e-4)).all()  # the top entries, near-ties aside
    assert_close(rest, (1 - want.sum(-1)).clamp(min=0), torch.float32, scale=60, absolute=3e-7)
    onehot = given | (t == 1)
    assert torch.equal(dense_of(ids, q, vocab)[onehot.cpu()], full[onehot.cpu()])
    assert (rest >= 0).all() and (rest[onehot] == 0).all()


def test_the_prior_at_time_zero_and_ties(device):
    vocab = 5000
    log_prior = torch.full((vocab,), -math.log(vocab), device=device)
    target = targets_of(4, vocab, device)
    ids, q, rest = ops.noise_posterior(target, 0.0, 1, log_prior, top=700)
    assert torch.equal(ids.cpu(), torch.arange(700, dtype=torch.int32).expand(4, -1))  # ties: the lower columns
    torch.testing.assert_close(q, torch.full_like(q, 1 / vocab), rtol=1e-6, atol=0)
    torch.testing.assert_close(rest, torch.full_like(rest, 1 - 700 / vocab), rtol=1e-6, atol=0)
    log_prior[3000:3600] += 1  # more at the top than fit, behind others
    ids, _, _ = ops.noise_posterior(target, 0.0, 1, log_prior, top=500)
    assert torch.equal(ids.cpu(), torch.arange(3000, 3500, dtype=torch.int32).expand(4, -1))
    ids, _, _ = ops.noise_posterior(target, 0.0, 1, log_prior, top=700)
    expected = torch.cat([torch.arange(100), torch.arange(3000, 3600)]).int()
    assert torch.equal(ids.cpu(), expected.expand(4, -1))


def test_the_posterior_of_a_certain_row(device):
    """Given rows and t = 1: the lowest columns fill the places that onehot(target) leaves."""
    target = torch.tensor([0, 3, 9], device=device)
    log_prior = prior_of(10, device)
    for options in ({"t": 1.0}, {"t": 0.1, "given": torch.ones(3, dtype=torch.bool, device=device)}):
        ids, q, rest = ops.noise_posterior(target, rng=0, log_prior=log_prior, top=4, **options)
        assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 9]]
        assert q.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]] and rest.tolist() == [0, 0, 0]


def test_the_posterior_is_that_of_the_noisy_row(device):
    """q from the noise = q from x_t of noise_interpolate: the same noise, an independent formula."""
    rows, vocab = 30, 200
    target, t = targets_of(rows, vocab, device), torch.linspace(0.02, 0.5, rows, device=device)
    log_prior = prior_of(vocab, device)
    ids, q, _ = ops.noise_posterior(target, t, 5, log_prior, top=vocab)
    log_x = ops.noise_interpolate(target, t, 5, vocab_size=vocab, log=True)
    t64 = to64(t)[:, None]
    u = (to64(log_x) / (1 - t64)).softmax(-1)
    evidence = -vocab * torch.log1p(torch.expm1(-reference.gap(vocab, 0.01) * t64 / (1 - t64)) * u)
    torch.testing.assert_close(q.double().cpu(), (to64(log_prior) + evidence).softmax(-1), rtol=2e-3, atol=1e-6)


# ---- all of the posterior: noise_interpolate(..., output="posterior")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("rows,vocab", SHAPES)
def test_the_whole_posterior(rows, vocab, log, device):
    target, t, rng, given = case_of(rows, vocab, device)
    log_prior = prior_of(vocab, device, never=True)
    options = {"given": given, "row_offset": 11, "vocab_size": vocab, "output": "posterior", "log": log}
    room = torch.full((rows, vocab + 3), math.nan, device=device)
    out = room[:, 1 : 1 + vocab]
    got = ops.noise_interpolate(target, t, rng, log_prior=log_prior, out=out, **options)
    assert got.data_ptr() == out.data_ptr() and room[:, 0].isnan().all() and room[:, 1 + vocab :].isnan().all()
    options["given"] = to64(given)
    want = reference.noise_interpolate(
        to64(target), to64(t), to64(rng), log_prior=to64(log_prior), dtype=torch.float64, **options
    )
    if log:  # z is right to 1e-6 of the evidence, whose largest is about that of log q over the prior
        largest = (want - to64(log_prior)).nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
        error = torch.where(got.double().cpu() == want, 0.0, (got.double().cpu() - want).abs())  # -inf - -inf
        assert (error <= 1e-6 * largest + 1e-5).all(), (error / (1e-6 * largest + 1e-5)).max()
    else:
        assert_close(got, want, torch.float32, scale=60, absolute=1e-10)
        torch.testing.assert_close(got.sum(-1), torch.ones(rows, device=device), rtol=6e-5, atol=0)
    onehot = given | (t == 1)
    assert torch.equal(got[onehot].double().cpu(), want[onehot.cpu()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_posterior_in_low_precision(dtype, device):
    target, t, rng, given = case_of(20, 300, device)
    options = {"vocab_size": 300, "output": "posterior"}
    got = ops.noise_interpolate(target, t, rng, given=given, log_prior=prior_of(300, device), dtype=dtype, **options)
    want = reference.noise_interpolate(
        to64(target),
        to64(t),
        to64(rng),
        given=to64(given),
        log_prior=to64(prior_of(300)),
        dtype=torch.float64,
        **options,
    )
    assert got.dtype == dtype
    assert_close(got, want, dtype, scale=1.02, absolute=1e-10)


def test_the_whole_posterior_is_that_of_the_oracle(device):
    """The closed form of path.logit.log_evidence, from the float64 rows x_t of the same noise."""
    rows, vocab = 30, 200
    target, t = targets_of(rows, vocab, device), torch.linspace(0.0, 0.6, rows, device=device)
    options = {"vocab_size": vocab, "log": True}
    log_prior = prior_of(vocab, device)
    got = ops.noise_interpolate(target, t, 5, output="posterior", log_prior=log_prior, **options)
    log_x = reference.noise_interpolate(to64(target), to64(t), 5, dtype=torch.float64, **options)
    want = (to64(log_prior) + log_evidence(log_x, to64(t), reference.gap(vocab, 0.01))).log_softmax(-1)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=2e-5)


def test_slices_of_the_whole_posterior_have_the_same_bits(device):
    target, t, rng, given = case_of(12, 2500, device)
    for log in (False, True):
        options = {"vocab_size": 2500, "output": "posterior", "log_prior": prior_of(2500, device), "log": log}
        whole = ops.noise_interpolate(target, t, rng, given=given, **options)
        part = ops.noise_interpolate(target[5:8], t[5:8], rng, given=given[5:8], row_offset=5, **options)
        assert torch.equal(whole[5:8], part)
        assert ops.noise_interpolate(target[:0], 0.1, rng, **options).shape == (0, 2500)


# ---- noise_embedding: (log_prior given, top) of its three forms

FORMS = {"simplex": (False, None), "posterior": (True, None), "sparse": (True, 40), "sparse_all": (True, 10**6)}


def embed(module, form, target, t, weight, rng, log_prior=None, **options):
    prior, top = FORMS[form]
    if log_prior is None:
        log_prior = prior_of(weight.shape[0], weight.device)
    log_prior = log_prior.to(weight.dtype if module is reference else torch.float32)
    return module.noise_embedding(target, t, weight, rng, log_prior=log_prior if prior else None, top=top, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows,vocab,width", [(20, 2, 5), (20, 3, 33), (20, 31, 16), (12, 1000, 384), (3, 50257, 70)])
def test_noise_embedding_and_its_gradient(rows, vocab, width, form, device, monkeypatch, request):
    if request.node.callspec.params["device"] == "simt":
        vocab = min(vocab, 5003)  # each of its rows is a block of 512 fibers there
    monkeypatch.setattr(embedding, "TILE", {"cpu": (8, 1024), "cuda": (8, 1024)})
    target, t, rng, given = case_of(rows, vocab, device)
    weight = weight_of(vocab, width, device).requires_grad_()
    weight64 = to64(weight).requires_grad_()
    upstream = weight_of(rows, width, device, seed=3)
    options = {"given": given, "row_offset": 3}
    out = embed(ops, form, target, t, weight, rng, **options)
    want = embed(reference, form, to64(target), to64(t), weight64, to64(rng), **{**options, "given": to64(given)})
    torch.testing.assert_close(out.double().cpu(), want.detach(), rtol=2e-5, atol=3e-5)
    assert torch.equal(out[given], weight[target[given]])
    out.backward(upstream)
    want.backward(to64(upstream))
    torch.testing.assert_close(weight.grad.double().cpu(), weight64.grad, rtol=2e-5, atol=3e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_embedding_in_low_precision(dtype, form, device):
    rows, vocab, width = 20, 300, 40
    target, t, rng, given = case_of(rows, vocab, device)
    weight = weight_of(vocab, width, device, dtype).requires_grad_()
    out = embed(ops, form, target, t, weight, rng, given=given)
    out.backward(torch.ones_like(out))
    weight64 = to64(weight).requires_grad_()
    want = embed(reference, form, to64(target), to64(t), weight64, to64(rng), given=to64(given))
    want.sum().backward()
    assert out.dtype == weight.grad.dtype == dtype
    on_gpu = device.type == "cuda"  # tiles of noise are then rounded to bfloat16
    assert_close(out, want.detach(), dtype, absolute=(2e-2 if on_gpu else 1e-5))
    assert_close(weight.grad, weight64.grad, dtype, absolute=(2e-2 if on_gpu else 1e-5))
    assert torch.equal(out[given], weight[target[given]])


def test_broadcasting_and_layouts(device):
    vocab, width = 50, 12
    target = targets_of(12, vocab, device).int().reshape(3, 4)
    t = torch.tensor([[0.1], [0.2], [0.3]], device=device)
    seeds = torch.stack([torch.arange(12), torch.full((12,), 3)], 1).reshape(3, 4, 2).to(device)
    log_prior = prior_of(vocab, device)
    room = weight_of(vocab, width + 5, device)
    for weight in (room[:, 1 : 1 + width], weight_of(width, vocab, device).T):
        for form in FORMS:
            out = embed(ops, form, target, t, weight, seeds)
            same = embed(
                ops,
                form,
                target.reshape(-1).long(),
                t.expand(3, 4).reshape(-1),
                weight.contiguous(),
                seeds.reshape(12, 2),
            )
            assert out.shape == (3, 4, width)
            torch.testing.assert_close(out.reshape(12, width), same)
    ids, q, rest = ops.noise_posterior(target, t, seeds, log_prior, top=9)
    assert ids.shape == q.shape == (3, 4, 9) and rest.shape == (3, 4)
    for form in FORMS:
        weight = weight_of(vocab, width, device).requires_grad_()
        out = embed(ops, form, target[:0], 0.1, weight, 0)
        assert out.shape == (0, 4, width)
        out.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("vocab", [31, 1000, 50257])
def test_slices_have_the_same_bits(vocab, device):
    rows, width = 12, 40
    target, t, rng, given = case_of(rows, vocab, device)
    log_prior, weight = prior_of(vocab, device), weight_of(vocab, width, device)
    whole = ops.noise_posterior(target, t, rng, log_prior, top=30, given=given)
    part = ops.noise_posterior(target[5:8], t[5:8], rng, log_prior, top=30, given=given[5:8], row_offset=5)
    assert all(torch.equal(a[5:8], b) for a, b in zip(whole, part, strict=True))
    whole = ops.noise_embedding(target, t, weight, rng, log_prior=log_prior, top=30)
    part = ops.noise_embedding(target[5:8], t[5:8], weight, rng, log_prior=log_prior, top=30, row_offset=5)
    assert torch.equal(whole[5:8], part)


@pytest.mark.parametrize("form", ["simplex", "posterior"])
def test_the_size_of_the_tiles_is_rounding(form, device, monkeypatch):
    target, t, rng, given = case_of(20, 1003, device)
    results = []
    for tile, pitch in (((512, 2048), 1), ((7, 100), 1), ((20, 1003), 1), ((1, 4), 1), ((7, 100), 64)):
        monkeypatch.setattr(embedding, "TILE", {"cpu": tile, "cuda": tile})
        monkeypatch.setattr(embedding, "PITCH", {"cpu": pitch, "cuda": pitch})
        weight = weight_of(1003, 24, device).requires_grad_()
        out = embed(ops, form, target, t, weight, rng, given=given)
        out.square().sum().backward()
        results.append((out.detach(), weight.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_rows_of_a_tile_begin_where_a_product_wants_them(monkeypatch):
    """64 elements, of any two dtypes a multiple of 128 bytes; the last tile is narrower than the others."""
    target, t, rng, _ = case_of(20, 1003, "cpu")
    tiles = []
    for pitch in (1, 64):
        monkeypatch.setattr(embedding, "TILE", {"cpu": (16, 600)})
        monkeypatch.setattr(embedding, "PITCH", {"cpu": pitch})
        noise = embedding._Noise(target, t, rng, None, None, None, 0.01, 0, 1003, torch.float32)
        tiles.append([noise.tile(slice(16, 20), slice(j, min(j + 600, 1003))).clone() for j in (0, 600)])
        strides = [noise.tile(slice(16, 20), slice(j, min(j + 600, 1003))).stride(0) for j in (0, 600)]
        assert strides == {1: [600, 403], 64: [640, 448]}[pitch]
    assert all(torch.equal(a, b) for a, b in zip(*tiles, strict=True))


def test_the_sparse_gradient_has_the_same_bits_with_any_threads(device):
    target, t, rng, _ = case_of(40, 2000, device)
    grads = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = weight_of(2000, 40, device).requires_grad_()
            embed(ops, "sparse", target, t, weight, rng).square().sum().backward()
            grads.append(weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_the_sparse_form_is_near_the_exact_one(device):
    """512 of 50,257 entries carry the embedding to 1.5 %, 128 to 4 %: here at a smaller V, with as steep a prior."""
    vocab, rows = 8192, 24
    log_prior, weight = prior_of(vocab, device), weight_of(vocab, 64, device)
    target = torch.multinomial(log_prior.exp().cpu(), rows, True, generator=torch.Generator().manual_seed(1)).to(device)
    for t in (0.02, 0.1, 0.2):
        exact = ops.noise_embedding(target, t, weight, 7, log_prior=log_prior, top=None)
        for top, allowed in ((128, 0.04), (512, 0.015)):
            sparse = ops.noise_embedding(target, t, weight, 7, log_prior=log_prior, top=top)
            assert (sparse - exact).norm() / exact.norm() < allowed


# ---- the operators under torch.compile and opcheck


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form, device):
    target, t, rng, given = case_of(9, 64, device)
    log_prior = prior_of(64, device)
    torch._dynamo.reset()

    def step(weight):
        return embed(ops, form, target, t, weight, rng, log_prior, given=given).square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = weight_of(64, 8, device).requires_grad_()
        loss = function(weight)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    torch.testing.assert_close(*results)


def test_opcheck(device):
    klflow = torch.ops.klflow
    target, t, rng, given = case_of(6, 64, device)
    weight, log_prior = weight_of(64, 8, device).requires_grad_(), prior_of(64, device)
    ids, q, rest = ops.noise_posterior(target, t, rng, log_prior, top=5)
    order, starts = embedding._group_by_token(ids, 64)
    dout, stats = weight_of(6, 8, device), torch.empty(6, 3, device=device)
    total, plain = torch.zeros(6, dtype=torch.float64, device=device), weight.detach()
    klflow.noise_posterior(target, t, rng, None, None, log_prior, 0.01, 0, ids[:, :0], q[:, :0], rest.clone(), stats)
    empty = {"dtype": torch.float32, "device": device}
    for op, args in [
        (
            klflow.noise_tile,
            (target, t, rng, given, None, None, 0.01, 0, 64, 8, False, total, torch.empty(6, 20, **empty)),
        ),
        (
            klflow.noise_tile,
            (target, t, rng, None, log_prior, stats, 0.01, 0, 64, 8, True, None, torch.empty(6, 20, **empty)),
        ),
        (
            klflow.noise_posterior,
            (target, t, rng, given, None, log_prior, 0.01, 0, ids.clone(), q.clone(), rest.clone(), stats),
        ),
        (klflow.gather_rows, (ids, q, rest, plain, plain[0].clone(), torch.empty(6, 8, **empty))),
        (klflow.scatter_rows, (order, starts, q, log_prior.exp(), plain[0].clone(), dout, torch.empty(64, 8, **empty))),
        (klflow.noise_embedding, (target, t, rng, given, weight, None, 0.01, 0)),
        (klflow.noise_embedding, (target, t, rng, None, weight, log_prior, 0.01, 0)),
        (klflow.noise_embedding_backward, (dout, total + 1, target, t, rng, given, None, 0.01, 0, 64)),
        (klflow.embed_rows, (ids, q, rest, weight, log_prior.exp())),
        (klflow.embed_rows_backward, (dout, ids, q, rest, log_prior.exp())),
    ]:
        torch.library.opcheck(op, args)


# ---- bad input: the error names the argument and its value

Y, W, P = torch.zeros(4, dtype=torch.int64), torch.zeros(10, 3), torch.full((10,), -math.log(10))
BAD = [
    (lambda: ops.noise_posterior(Y.float(), 0.1, 0, P), TypeError, "target: got torch.float32"),
    (lambda: ops.noise_posterior(Y + 10, 0.1, 0, P, top=3), IndexError, "target: row 0 holds 10"),
    (lambda: ops.noise_posterior(Y, 1.1, 0, P, top=3), ValueError, "t: got 1.1"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P), ValueError, "top: got 512"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=0), ValueError, "top: got 0"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=2.0), TypeError, "top: got 2.0"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, [0.1]), TypeError, "log_prior: got list"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, W, top=3), ValueError, r"log_prior: got shape \(10, 3\)"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P + math.nan, top=3), ValueError, "log_prior: got a maximum of nan"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, beta=0.0), ValueError, "beta: got 0.0"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, given=Y), TypeError, "given: got torch.int64"),
    (lambda: ops.noise_posterior(Y, 0.1, 0, P, top=3, row_offset=-1), ValueError, "row_offset: got -1"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, output="q"), ValueError, "output: got 'q'"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, output="posterior"), ValueError, "log_prior: got None"),
    (lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, log_prior=P), ValueError, "log_prior: got Tensor"),
    (
        lambda: ops.noise_interpolate(Y, 0.1, 0, vocab_size=10, output="posterior", log_prior=P[:9]),
        ValueError,
        r"log_prior: got shape \(9,\)",
    ),
    (lambda: ops.noise_embedding(Y, 0.1, W.long(), 0), TypeError, "weight: got torch.int64"),
    (lambda: ops.noise_embedding(Y, 0.1, W[0], 0), ValueError, r"weight: got shape \(3,\)"),
    (lambda: ops.noise_embedding(Y - 1, 0.1, W, 0), IndexError, "target: row 0 holds -1"),
    (lambda: ops.noise_embedding(Y, 0.1, W, 0, log_prior=P[:4]), ValueError, r"log_prior: got shape \(4,\)"),
    (lambda: ops.noise_embedding(Y, 0.1, W, 0, log_prior=P, top=0), ValueError, "top: got 0"),
    (lambda: ops.noise_embedding(Y, 0.1, W, "x"), TypeError, "rng: got 'x'"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_sparse_form_of_real_text_is_close_to_the_exact_one(data_folder):
    """GPT-2 tokens of books, V = 50,257, D = 768: relative error of the embedding, all rows together, at every t."""
    import gzip
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = data_folder / "gpt2_bpe"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts, size = [], 0
    with gzip.open(data_folder / "classic_books" / "books.jsonl.gz", "rt") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"][5000:45000])
            size += len(texts[-1])
            if size > 4_000_000:
                break
    tokens = torch.tensor([i for e in tokenizer.encode_batch(texts) for i in e.ids])
    log_prior = (torch.bincount(tokens, minlength=50257) + 0.5).log().log_softmax(0)
    weight = weight_of(50257, 768)
    target = tokens[torch.randint(len(tokens), (200,), generator=torch.Generator().manual_seed(0))]
    for t in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        exact = ops.noise_embedding(target, t, weight, 1, log_prior=log_prior, top=None)
        for top, limit in ((128, 0.04), (512, 0.015)):
            sparse = ops.noise_embedding(target, t, weight, 1, log_prior=log_prior, top=top)
            error = ((sparse - exact).norm() / exact.norm()).item()
            each = ((sparse - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()
            print(f"t {t:<5} M = {top}: relative error {error:.4f}, mean over rows {each:.4f}")
            assert error < limit, (t, top)
