"""What a pass leaves behind: of every way, and that nobody who watches changes a token."""

import pytest
import torch
from chains import Causal
from test_slices import VOCAB, slices_model

from klflow_ext import Autoregressive, Evidence, LogitPath, MaskPath, Sampler
from klflow_ext.sample import UNKNOWN

LENGTH = 9
WAYS = ["basic", "sampling", "hybrid", "segments", "slices", "confidence", "left_to_right", "masks", "two steps"]


def sampler_of(way):
    """(sampler, options) of a way."""
    if way == "left_to_right":
        return Sampler(Causal(VOCAB, True), Autoregressive(VOCAB)), {}
    path = MaskPath(VOCAB) if way == "masks" else LogitPath(VOCAB)
    method = {"masks": "basic", "two steps": "slices"}.get(way, way)
    return Sampler(slices_model(path), path), {
        "steps": 4,
        "method": method,
        "slice_steps": 2 if way == "two steps" else 1,
    }


def prompts():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    given = torch.zeros(3, LENGTH, dtype=torch.bool)
    given[:, [0, 1, 7]] = True
    return tokens, given


def watched(way, **more):
    (sampler, options), (tokens, given), passes = sampler_of(way), prompts(), []
    found = sampler.infill(tokens, given, watch=passes.append, seed=3, **options, **more)
    return found, passes


@pytest.mark.parametrize("way", WAYS)
def test_a_watched_way_draws_the_same_tokens(way):
    (sampler, options), (tokens, given) = sampler_of(way), prompts()
    plain = sampler.infill(tokens, given, seed=3, **options)
    found, passes = watched(way, top=5, return_history=True)
    assert torch.equal(plain.tokens, found.tokens) and plain.history == []
    assert torch.equal(plain.tokens, watched(way)[0].tokens)
    assert [p.number for p in passes] == list(range(1, plain.nfe + 1))
    assert all(p.total == plain.nfe and p.members == [0, 1, 2] for p in passes)
    for seen, kept in zip(passes, found.history, strict=True):
        assert torch.equal(torch.where(seen.tokens == UNKNOWN, kept, seen.tokens), kept)


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_and_what_is_known(way):
    (tokens, given), (found, passes) = prompts(), watched(way, top=5)
    before = given
    for p in passes:
        assert torch.equal(p.given, given) and (p.stands | ~before).all(), "what stands goes on standing"
        assert torch.equal(p.tokens[given], tokens[given]) and (p.confidence[given] == 1).all()
        assert torch.equal(p.tokens[p.stands], found.tokens[p.stands])
        unknown = p.tokens == UNKNOWN
        assert (p.confidence[unknown] == 0).all() and not (unknown & p.stands).any()
        assert (p.confidence[~unknown] > 0).all() and (p.confidence <= 1).all()
        known = ~unknown & ~given
        assert (p.top_tokens[unknown] == UNKNOWN).all() and (p.top_tokens[given] == UNKNOWN).all()
        assert (p.top_tokens[known] >= 0).all() and (p.top_p.diff(dim=-1) <= 0).all()
        best = known & (p.top_tokens[..., 0] == p.tokens)
        torch.testing.assert_close(p.confidence[best], p.top_p[..., 0][best])
        before = p.stands
    assert passes[-1].stands.all() and torch.equal(passes[-1].tokens, found.tokens)
    if way in ("slices", "left_to_right", "two steps"):
        assert (passes[0].tokens == UNKNOWN).any()
    if way in ("segments", "slices", "confidence", "left_to_right", "masks"):
        assert passes[-2].stands.sum() > given.sum()


def test_confidence_tops_and_entropy_are_those_of_the_network():
    """Of segments in one pass, whose logits `posterior` asks for, too."""
    sampler, _ = sampler_of("segments")
    (tokens, given), passes = prompts(), []
    sampler.infill(
        tokens, given, watch=passes.append, top=VOCAB, method="segments", steps=1, temperature=3.0, seed=[0] * 3
    )
    ids, p = sampler.posterior(tokens, given, top=VOCAB)
    (seen,) = passes
    free = ~given
    torch.testing.assert_close(seen.top_p[free], p[free])
    torch.testing.assert_close(seen.entropy, (torch.special.entr(p).sum(-1) * free).sum(1) / free.sum(1))
    own = (p * (ids == seen.tokens[..., None])).sum(-1)
    torch.testing.assert_close(seen.confidence[free], own[free])


@pytest.mark.parametrize("way", ["segments", "slices", "confidence"])
def test_what_was_observed_is_a_part_of_p(way):
    (sampler, options), (tokens, given), passes = sampler_of(way), prompts(), []
    ids = torch.arange(4).expand(3, LENGTH, 4)
    options |= {"evidence": Evidence(ids, torch.zeros(ids.shape)), "seed": 3}  # one of four, everywhere
    plain = sampler.infill(tokens, given, **options)
    found = sampler.infill(tokens, given, watch=passes.append, top=5, **options)
    assert torch.equal(plain.tokens, found.tokens)
    free = ~given
    assert all((p.tokens[free] < 4).all() and (p.tokens[free] >= 0).all() for p in passes), "all that is heard is shown"
    assert all((p.entropy <= 1.387).all() and (p.entropy >= 0).all() for p in passes)
    torch.testing.assert_close(passes[-1].top_p[free][:, :4].sum(1), torch.ones(int(free.sum())))


def test_groups_say_whose_passes_they_are():
    sampler, options = sampler_of("slices")
    passes = []
    prompts = [[1, 2], [], [3, 4], list(range(LENGTH))]
    found = sampler.complete(prompts, LENGTH, watch=passes.append, top=2, **options)
    assert {tuple(p.members) for p in passes} == {(0, 2), (1,)}  # of the last nothing is asked
    for p in passes:
        assert p.tokens.shape == (len(p.members), LENGTH) and p.top_p.shape == (len(p.members), LENGTH, 2)
        if p.number == p.total:
            assert torch.equal(p.tokens, found.tokens[p.members])


def test_tops_are_made_where_they_are_asked_for():
    assert all(p.top_tokens is None and p.top_p is None for p in watched("sampling")[1])
    sampler, _ = sampler_of("sampling")
    with pytest.raises(ValueError, match="top: got 61, allowed is an integer in"):
        sampler.sample((1, 4), watch=print, top=VOCAB + 1)


def test_who_stops_watching_stops_the_passes():
    sampler, options = sampler_of("sampling")
    seen = []

    def watch(p):
        seen.append(p.number)
        if p.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample((1, 4), watch=watch, **options)
    assert seen == [1, 2]
