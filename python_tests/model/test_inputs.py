"""What the denoiser is fed: posteriors, embeddings of noise, times of positions."""

import dataclasses

import pytest
import torch
from runs import V, small_model, trainer

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    ExactDenoiser,
    LogitPath,
)
from klflow_ext.path import IGNORE


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_positions_matter(input):
    run = trainer(20, input=input)
    run.fit(progress=False)
    x = run.path.sample(torch.arange(6)[None], 0.2, 1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        assert (run.model(x, 0.2)[:, order] - run.model(x[:, order], 0.2)).abs().max() > 1e-3


def test_loss_counts_free_rows_only():
    _, path = small_model()
    target = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(0))
    target[0, 4:] = IGNORE
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[1, :3] = True
    logits = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(1))
    seen = []

    def model(x, t):
        seen.append(x)
        return logits

    loss = path.loss(model, target, torch.tensor([0.1, 0.2]), 5, given=given)
    free = (target != IGNORE) & ~given
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[free], target[free]))
    assert torch.equal(seen[0][given], torch.nn.functional.one_hot(target[given], V).float())
    assert not torch.equal(seen[0][0, 4].argmax(), seen[0][0, 4].argmin())  # padding is noise, not a token in the clear
    assert seen[0][0, 4].max() < 1


@pytest.mark.parametrize("vocab,t", [(40, 0.05), (40, 0.3), (2000, 0.2)])
def test_posterior_input_is_the_exact_posterior(vocab, t):
    path = LogitPath(vocab)
    prior = torch.rand(vocab, generator=torch.Generator().manual_seed(2)) + 0.01
    prior /= prior.sum()
    model = Denoiser(DenoiserConfig(vocab, 1, 1, 8, 8), path, prior.log())
    x = path.sample(torch.randint(vocab, (2, 8), generator=torch.Generator().manual_seed(3)), t, 4)
    expected = ExactDenoiser(prior, path)(x, t).exp()
    torch.testing.assert_close(model.posterior(x, torch.full((2,), t)).double(), expected, rtol=2e-3, atol=1e-5)
    clear = torch.eye(vocab)[None, :4]
    assert torch.equal(model.posterior(clear, torch.zeros(1)), clear)


@pytest.mark.parametrize("input,top", [("posterior", None), ("posterior", 512), ("simplex", 512)])
def test_training_without_rows_is_training_with_them(input, top):
    """The loss from tokens and seeds, and the dense twin (x_t, logits): the same losses, step by step, to rounding."""
    runs = []
    for dense in (False, True):
        run = trainer(12, input=input)
        run.model.config = dataclasses.replace(run.model.config, top=top)
        if dense:
            loss = run.path.loss
            run.path.loss = lambda model, *a, loss=loss, **k: loss(lambda x, t: model(x, t), *a, **k)
        runs.append([run.train_step() for _ in range(12)])
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=2e-4, atol=0)


def test_the_embedding_of_noise_is_that_of_its_rows():
    path = LogitPath(3000)
    prior = 1 / torch.arange(2.7, 3002.7)  # Zipf's law, as in texts: few tokens hold most of a posterior
    target = torch.multinomial(prior, 12, generator=torch.Generator().manual_seed(3)).view(2, 6)
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[0, 3] = True
    t = torch.tensor([0.05, 0.2])
    x = path.sample(target, t[:, None], 4, given=given)
    for input, top, tolerance in (("simplex", 512, 1e-4), ("posterior", None, 1e-3), ("posterior", 700, 0.03)):
        model = Denoiser(DenoiserConfig(3000, 1, 1, 32, 8, input=input, top=top), path, (prior / prior.sum()).log())
        with torch.no_grad():
            rows, noise = model.embed(x, t), model.embed_noise(target, t, 4, given=given)
        assert (rows - noise).norm(dim=-1).div(rows.norm(dim=-1)).max() < tolerance, (input, top)


@pytest.mark.parametrize("input", ["posterior", "simplex"])
def test_times_per_position(input):
    run = trainer(10, input=input)
    run.fit(progress=False)
    x = run.path.sample(torch.arange(6)[None].expand(2, 6), 0.2, 1)
    with torch.no_grad():
        expected = run.model(x, torch.tensor([0.2, 0.2]))
        assert torch.equal(run.model(x, torch.full((2, 6), 0.2)), expected)
        x[:, 2] = torch.eye(V)[2]
        later = torch.full((2, 6), 0.2)
        later[:, 2] = 1.0  # a given row is at t = 1: it says the same as a given row at t
        assert torch.equal(run.model(x, later), run.model(x, 0.2))
    with pytest.raises(ValueError, match=r"t: got shape \(3,\)"):
        run.model(x, torch.zeros(3))
