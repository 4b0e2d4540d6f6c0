"""The noise contract: known answers, the same words everywhere, and the distributions that follow from it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import klflow_ext
from klflow_ext import ops, reference

KNOWN = [  # counter, key, words (Random123)
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def numpy_philox(counter, key):
    """Philox4x32-10 in numpy uint64: an implementation that shares nothing with the kernels."""
    c = [np.asarray(v, np.uint64) for v in counter]
    k = [np.uint64(v) for v in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(w) for w in numpy_philox(counter, key)) == words
    assert klflow_ext._C.philox(*counter, *key) == words
    assert tuple(int(w) for w in reference.philox([torch.tensor(v) for v in counter], key)) == words


def test_words_follow_the_contract():
    seed, step, row_offset, vocab = 0x123456789ABCDEF0, 2**33 + 5, 2**31, 11
    words = reference.words(3, vocab, torch.tensor([seed, step]), 2, row_offset)
    for row in range(3):
        for column in range(vocab):
            expected = numpy_philox(
                (column // 4, row + row_offset, step & 0xFFFFFFFF, 2), (seed & 0xFFFFFFFF, seed >> 32)
            )
            assert int(words[row, column]) == int(expected[column % 4])


SCRIPT = """
import torch
from klflow_ext import build_info, ops
x = ops.noise_interpolate(torch.zeros(3, dtype=torch.int64), 0.0, torch.tensor([77, 5]), vocab_size=1003)
torch.save((build_info()["cpu_capability"], x), "{path}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_noise(capability, tmp_path):
    path = tmp_path / "x.pt"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", SCRIPT.format(path=path)], check=True, env=env)
    used, x = torch.load(path)
    if used != {"default": "baseline"}.get(capability, capability):
        pytest.skip(f"this processor has no {capability}: it chose {used}")
    expected = reference.noise_interpolate(torch.zeros(3, dtype=torch.int64), 0.0, torch.tensor([77, 5]), vocab_size=1003,
                                           dtype=torch.float64)  # fmt: skip
    # A wrong word would move its entry by orders of magnitude; the arithmetic moves it by parts in a million.
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=0)


LEVEL = 1e-4 / 10  # of each distribution test below: about ten of them


def test_prior_is_dirichlet(device):
    rows, vocab = 400, 500
    x = (
        ops.noise_interpolate(torch.zeros(rows, dtype=torch.int64, device=device), 0.0, 42, vocab_size=vocab)
        .double()
        .cpu()
    )
    # A coordinate of Dirichlet(1, ..., 1) is Beta(1, V - 1); take few columns, so that draws are nearly independent.
    assert stats.kstest(x[:, ::50].reshape(-1).numpy(), stats.beta(1, vocab - 1).cdf).pvalue > LEVEL
    assert abs(x.var().item() * vocab**2 * (vocab + 1) / (vocab - 1) - 1) < 0.05


def test_simplex_noise_is_exponential_to_its_tail():
    e = reference.simplex_noise(2000, 2000, 3).reshape(-1)
    assert stats.kstest(e[::40].numpy(), stats.expon.cdf).pvalue > LEVEL
    for level in (8.0, 11.0, 13.0):  # tail counts are Poisson
        expected = e.numel() * np.exp(-level)
        assert stats.poisson.cdf((e > level).sum().item(), expected) > LEVEL
        assert stats.poisson.sf((e > level).sum().item() - 1, expected) > LEVEL


def test_token_exponential_has_its_small_tail():
    e = reference.token_exponential(2000, 2000, 3).reshape(-1)
    assert stats.kstest(e[::40].numpy(), stats.expon.cdf).pvalue > LEVEL
    count, expected = (e < 1e-5).sum().item(), e.numel() * 1e-5
    assert stats.poisson.cdf(count, expected) > LEVEL and stats.poisson.sf(count - 1, expected) > LEVEL
    assert len(set(e[e < 1e-5].tolist())) == count  # no floor that ties them


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_kept_distribution(top_p, device, request):
    rows, k = 200_000, 6
    if request.node.callspec.params["device"] == "simt":
        rows = 600  # a row is a block of 512 fibers there
    row = torch.tensor([2.0, 1.5, 1.5, 0.0, 1.0, -1.0, 0.5, -3.0, 1.9])
    logits = row.to(device).expand(rows, -1)
    token, log_prob = ops.topk_sample(logits, k, 11, temperature=1.3, top_p=top_p)
    order = row.argsort(descending=True, stable=True)[:k]
    p = (row[order] / 1.3).softmax(-1)
    keep = (p.cumsum(-1) - p) < top_p
    p = torch.where(keep, p, 0) / p[keep].sum()
    counts = torch.bincount(token.cpu(), minlength=9)[order]
    assert counts.sum() == rows and (counts[~keep] == 0).all()
    kept = keep.numpy()
    assert stats.chisquare(counts.numpy()[kept], (p.double() / p.double().sum()).numpy()[kept] * rows).pvalue > LEVEL
    full = torch.full((9,), -torch.inf).scatter(0, order, p.log())
    torch.testing.assert_close(log_prob.cpu(), full[token.cpu()], rtol=1e-5, atol=1e-5)
