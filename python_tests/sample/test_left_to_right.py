"""Generation from left to right."""

import pytest
import torch
from chains import SMALL, Causal, small_chain

from klflow_ext import (
    Autoregressive,
    ExactDenoiser,
    Sampler,
)


def test_autoregression_draws_from_the_joint_distribution():
    draws, path, (_, weights) = 20_000, Autoregressive(SMALL), small_chain()
    sampler = Sampler(ExactDenoiser(small_chain(), path), path)
    result = sampler.sample((draws, 3), top_k=None)
    assert result.nfe == 3
    index = (result.tokens * (SMALL ** torch.arange(2, -1, -1))).sum(-1)
    found = torch.bincount(index, minlength=SMALL**3)
    assert ((found - draws * weights).square() / (draws * weights)).sum() < 80  # chi-square of 26 degrees, p = 2e-7
    prompted = sampler.complete([[2]] * draws, 3, top_k=None)
    assert prompted.nfe == 2 and (prompted.tokens[:, 0] == 2).all()
    assert abs((prompted.tokens[:, 1] == 2).float().mean() - 0.8) < 0.015


def test_cached_decoding_of_ragged_prompts():
    prompts, path = [[1, 2, 3], [4, 5], [], [6] * 7], Autoregressive(50)
    results = {}
    for cached in (True, False):
        model = Causal(50, cached)
        results[cached] = Sampler(model, path).complete(prompts, 8, seed=[1, 2, 3, 4], return_history=True)
        assert results[cached].nfe == 8 == len(results[cached].history)
        if cached:
            assert model.read == [1] * 8  # each pass reads one new position
    tokens = results[True].tokens
    assert torch.equal(tokens, results[False].tokens)
    for i, prompt in enumerate(prompts):
        alone = Sampler(Causal(50, True), path).complete([prompt], 8, seed=[i + 1])
        assert alone.nfe == 8 - len(prompt) and torch.equal(alone.tokens[0], tokens[i])
        assert tokens[i, : len(prompt)].tolist() == prompt
    # greedy decoding is the argmax of the model on its own output; a token given later takes its place, unseen before
    model = Causal(50, True)
    holes = torch.tensor([[0, 9, 0, 0, 17, 0]])
    result = Sampler(model, path).infill(holes, holes > 0, final="argmax")
    inputs = torch.cat([torch.tensor([[50]]), result.tokens[:, :-1]], 1)
    greedy = model(inputs, torch.zeros(1)).argmax(-1)
    assert torch.equal(result.tokens, torch.where(holes > 0, holes, greedy)) and result.nfe == 6
    blind = Sampler(model, path).infill(holes * 0, holes < 0, final="argmax")
    assert blind.tokens[0, 0] == result.tokens[0, 0]


def test_autoregression_needs_a_causal_model():
    with pytest.raises(ValueError, match="model: got one whose config.causal is False"):
        model = Causal(5, False)
        model.causal = False
        Sampler(model, Autoregressive(5))


def test_top_k_of_autoregression():
    sampler = Sampler(lambda x, t: torch.arange(50.0).mul(0.01).expand(*x.shape[:2], -1), Autoregressive(50))
    assert set(sampler.sample((30, 9), top_k=3).tokens.unique().tolist()) == {47, 48, 49}
    assert len(sampler.sample((30, 9), top_k=None).tokens.unique()) > 30
