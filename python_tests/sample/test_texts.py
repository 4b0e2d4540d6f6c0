"""Texts in, texts out: strings as prompts and with holes, the seeds of samples, and temperature 0."""

import pytest
import torch
from chains import EVERY, METHODS, Causal, Counting, name

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, LogitPath, SampleOptions, Sampler, data, load_run


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["once upon a time there was a cat"] * 3, 280)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    vocab_size = data.vocab_size_of(tokenizer)
    return Sampler(Counting(vocab_size), LogitPath(vocab_size), tokenizer=tokenizer)


def test_prompts_as_strings(sampler, tokenizer):
    prompts = ["once upon", "a", ""]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    found = sampler.complete(prompts, 12, steps=4)
    assert torch.equal(found.tokens, sampler.complete(ids, 12, steps=4).tokens) and found.tokens.shape == (3, 12)
    assert all(text.startswith(prompt) for text, prompt in zip(found.texts, prompts, strict=True))
    assert found.texts == [tokenizer.decode(row.tolist()) for row in found.tokens]
    found = sampler.complete(prompts, new_tokens=5, steps=4)
    assert [len(row) for row in found.tokens] == [len(row) + 5 for row in ids]
    assert [len(row) for row in sampler.complete(prompts, steps=2).tokens] == [len(row) + 64 for row in ids]


def test_holes_in_strings(sampler, tokenizer):
    found = sampler.infill(["once {?3} a time", "{?2}"], steps=2)
    assert found.texts[0].startswith("once ") and found.texts[0].endswith(" a time")
    assert [len(row) for row in found.tokens][1] == 2


def test_spaces_before_gaps_with_the_model_of_the_package():
    model, path, stories = load_run()
    sampler = Sampler(model, path, tokenizer=stories)
    texts = ["Tom was sad because{?4}. He{?2} home.", "Tom was sad because {?4}. He {?2} home."]
    without, spaced = (sampler.infill([text], steps=6, temperature=0) for text in texts)
    assert torch.equal(without.tokens[0], spaced.tokens[0]) and without.texts == spaced.texts
    scores = [sampler.log_likelihoods(found, steps=6) for found in (without, spaced)]
    assert scores[0] == scores[1]
    brought = stories.decode([spaced.tokens[0][spaced.spaces[0][0]].item()])
    assert brought.startswith(" ") and len(brought) > 1  # a whole word, not the rest of one after a lone space
    prompts = ["Once upon a time there was a", "Once upon a time there was a "]
    without, spaced = (sampler.complete([prompt], new_tokens=4, steps=4, temperature=0) for prompt in prompts)
    assert torch.equal(without.tokens[0], spaced.tokens[0]) and spaced.texts[0].startswith(prompts[1])


def test_what_is_written_before_a_gap_is_shown(sampler, tokenizer):
    for seed in range(5):  # a model that knows of no spaces
        found = sampler.infill(["once {?3} upon{?1}", "{?2}"], steps=2, seed=seed)
        assert found.texts[0].startswith("once ") and " upon" in found.texts[0]
        for length in (None, 12):
            found = sampler.complete(["once ", "a"], length, steps=2, seed=seed)
            assert found.texts[0].startswith("once ") and not found.texts[0].startswith("once  ")
            assert found.tokens[0][: found.spaces[0][0]].tolist() == tokenizer.encode("once").ids
    assert sampler.complete(["once "], new_tokens=0).texts == ["once "]


def test_a_sequence_is_made_again_by_its_seed(sampler):
    found = sampler.sample((5, 9), steps=3, seed=7)
    assert len(set(found.seeds)) == 5
    again = sampler.sample((1, 9), steps=3, seed=found.seeds[3:4])
    assert torch.equal(again.tokens[0], found.tokens[3]) and again.seeds == found.seeds[3:4]
    ragged = sampler.complete([[1, 2], [3], [4, 5]], new_tokens=6, steps=3, seed=7)
    assert ragged.seeds == found.seeds[:3]
    again = sampler.complete([[3]], new_tokens=6, steps=3, seed=ragged.seeds[1:2])
    assert torch.equal(again.tokens[0], ragged.tokens[1])
    assert sampler.sample((2, 0), seed=[3, 4]).seeds == [3, 4]


def test_log_likelihood_of_each(sampler):
    prompts = [[1, 2], [3, 3, 3, 3], [], [4], [1, 2]]
    found = sampler.complete(prompts, new_tokens=4, steps=3, method="segments", top_k=None)
    assert [row.tolist() for row in found.given] == [[True] * len(p) + [False] * 4 for p in prompts]
    scores = sampler.log_likelihoods(found, steps=3, method="segments")
    for tokens, given, score in zip(found.tokens, found.given, scores, strict=True):
        alone = sampler.likelihood(tokens[None], given[None], steps=3, method="segments")
        assert score == pytest.approx(-alone.per_token, rel=1e-6) and score < 0
    assert len(set(scores)) > 1
    whole = sampler.complete([[1, 2], []], 2, steps=3)  # nothing of the first is free
    assert whole.given.tolist() == [[True, True], [False, False]]
    assert [score is None for score in sampler.log_likelihoods(whole, steps=3)] == [True, False]
    assert sampler.has_likelihood(method="segments") and not sampler.has_likelihood(method="hybrid")
    with pytest.raises(ValueError, match="^method: got 'hybrid'"):
        sampler.log_likelihoods(found, method="hybrid")


def test_a_length_is_that_of_the_model():
    path = LogitPath(30)
    sampler = Sampler(Denoiser(DenoiserConfig(30, 1, 2, 16, 16), path).eval(), path)  # max_length 16
    assert [len(row) for row in sampler.complete([[1, 2]], steps=2).tokens] == [16]
    with pytest.raises(ValueError, match="^new_tokens: got 15 after a prompt of 2 tokens, allowed are max_length = 16"):
        sampler.complete([[1, 2]], new_tokens=15)


def test_what_is_refused(sampler):
    bare = Sampler(sampler.model, sampler.path)
    for call, error, message in (
        (lambda: bare.complete(["a"], 4), ValueError, "prompts: got a Sampler without a tokenizer"),
        (lambda: bare.infill(["a{?3}"]), ValueError, "tokens: got a Sampler without a tokenizer"),
        (lambda: bare.sample((1, 2), steps=1).texts, ValueError, "texts: got a Sampler without a tokenizer"),
        (lambda: sampler.complete("once", 4), TypeError, "prompts: got 'once', allowed is a list"),
        (
            lambda: sampler.complete(["once", [3]], 4),
            TypeError,
            "prompts: got .*, allowed is a list of strings or of token ids such as",
        ),
        (lambda: sampler.complete([[3]], 4, new_tokens=2), ValueError, "new_tokens: got 2 beside length=4"),
        (lambda: sampler.complete([[3]], new_tokens=-1), ValueError, "new_tokens: got -1"),
        (lambda: sampler.complete(None), TypeError, r"prompts: got None, allowed .* such as \[\[5, 6, 7\]\]"),
        (
            lambda: sampler.complete([5, 6, 7]),
            TypeError,
            r"prompts: got \[5, 6, 7\], allowed .* such as \[\[5, 6, 7\]\]",
        ),
        (lambda: sampler.complete(torch.tensor([5, 6])), TypeError, r"prompts: got tensor\(\[5, 6\]\), allowed"),
        (
            lambda: sampler.infill("a{?3}"),
            TypeError,
            r"tokens: got 'a\{\?3\}', allowed is a list of strings or, with `given`",
        ),
        (lambda: sampler.infill(None), TypeError, "tokens: got None, allowed is a list of strings or"),
        (
            lambda: sampler.infill([5, 6], [True, False]),
            TypeError,
            r"tokens: got \[5, 6\], allowed is a list of strings or",
        ),
        (
            lambda: sampler.likelihood(torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"tokens: got shape \(3,\), allowed is",
        ),
        (lambda: sampler.infill(torch.zeros(1, 2, dtype=torch.int64)), TypeError, "given: got NoneType"),
        (lambda: sampler.infill(["a{?3}"], [[True]]), TypeError, "given: got list beside tokens of list"),
        (lambda: sampler.infill(["a"]), ValueError, "text: got 'a', allowed is a text with a hole"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", EVERY, ids=name)
def test_temperature_0_is_the_likeliest_token(path, method):
    sampler = Sampler(Counting(50), path)
    options = dict(steps=4, method=method, final="draw")
    found = sampler.sample((3, 9), temperature=0, **options).tokens
    assert torch.equal(found, sampler.sample((3, 9), top_k=1, **options).tokens)
    assert not torch.equal(found, sampler.sample((3, 9), **options).tokens)


def test_temperature_0_stands_alone():
    sampler = Sampler(Causal(50, False), Autoregressive(50))
    one = sampler.sample((2, 6), temperature=0.0).tokens
    assert torch.equal(one, sampler.sample((2, 6), top_k=1).tokens)
    for schedule in ((1.0, 0.0), lambda progress: 0.0):
        with pytest.raises(ValueError, match="^temperature: got 0.0, allowed is 0 alone, a number in"):
            sampler.sample((2, 6), temperature=schedule)
    for wrong in (-1, float("nan"), (1.0, 0.0), (1.0,)):
        with pytest.raises(ValueError, match="^temperature: got"):  # as soon as it is said
            SampleOptions(temperature=wrong)
