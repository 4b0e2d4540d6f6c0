"""Texts written to prompts, against those that were wanted."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, LogitPath, Sampler, data
from klflow_ext.evaluate import text
from klflow_ext.evaluate.conditional import Pair, measure_conditional, read_pairs

WORDS = "one two three four five six seven eight nine ten"
PAIRS = [Pair(f"Write of {word}.", f"{word} {WORDS} {word} {i}") for i, word in enumerate(WORDS.split())]
TOKENIZER = data.train_tokenizer([pair.document for pair in PAIRS], 300)


class Writes:
    """A sampler that writes what was wanted in its second try, and what the prompt before wanted in its first."""

    tokenizer, network = TOKENIZER, SimpleNamespace(max_length=64)

    def complete(self, prompts, *, new_tokens, seed, progress, steps=1):
        half = len(prompts) // 2
        by_prompt = {tuple(TOKENIZER.encode(pair.prompt + "\n\n").ids): pair.text for pair in PAIRS}
        rows = []
        for i, prompt in enumerate(prompts):
            meant = prompts[(i - 1) % half] if i < half else prompt
            rows.append(torch.tensor(prompt + TOKENIZER.encode(by_prompt[tuple(meant)]).ids[:new_tokens]))
        return SimpleNamespace(tokens=rows, nfe=steps)


def test_figures_of_a_sampler_that_knows_what_is_wanted():
    found = measure_conditional(PAIRS, Writes(), count=6, new_tokens=8, tries=2, steps=3)
    assert (found["prompts"], found["tries"], found["nfe"], found["options"]) == (6, 2, 3, {"steps": 3})
    figures, texts = found["figures"], found["texts"]
    assert [row["prompt"] for row in texts] == [pair.prompt for pair in PAIRS[:6]]
    assert all(row["written"][1] == row["wanted"] for row in texts)
    assert texts[1]["written"][0] == texts[0]["wanted"] != texts[1]["wanted"]
    for name in ("bleu", "chrf", "rouge_l"):
        assert figures["samples"][name]["best"] == {
            "mean": pytest.approx(100),
            "low": pytest.approx(100),
            "high": pytest.approx(100),
        }
        each = [text.sentence_scores(row["written"][0], row["wanted"])[name] for row in texts]
        assert figures["samples"][name]["mean"]["mean"] == pytest.approx((100 + sum(each) / 6) / 2)
        other = [text.sentence_scores(texts[(i + 1) % 6]["wanted"], row["wanted"])[name] for i, row in enumerate(texts)]
        assert figures["other_text"][name] == {"mean": text.mean_interval(other)._asdict()}
        assert figures["other_prompt"][name]["mean"]["mean"] < figures["samples"][name]["mean"]["mean"]


def test_what_does_not_fit_is_left_out():
    long = Pair("Write " + "of one and of another " * 9, PAIRS[0].text)
    found = measure_conditional([long, Pair("Write.", "one"), *PAIRS[:2]], Writes(), new_tokens=8, window=24, tries=2)
    assert (found["prompts"], found["left_out"], found["window"]) == (2, 2, 24)
    for options, message in (
        ({"new_tokens": 64}, "new_tokens: got 64 in a window of 64, in which 0 of 10 pairs fit"),
        ({"new_tokens": 0}, "new_tokens: got 0"),
        ({"tries": 0}, "tries: got 0"),
        ({"count": 1}, "count: got 1"),
        ({"window": 65}, "window: got 65"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_conditional(PAIRS, Writes(), **options)


@pytest.mark.parametrize("kind", [LogitPath, Autoregressive])
def test_samplers_of_any_path(kind):
    path = kind(data.vocab_size_of(TOKENIZER))
    options = {"causal": True, "input": "tokens"} if kind is Autoregressive else {}
    torch.manual_seed(0)
    sampler = Sampler(
        Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 64, time="none", **options), path), path, tokenizer=TOKENIZER
    )
    found = measure_conditional(PAIRS, sampler, count=3, new_tokens=6, tries=2, seed=4, steps=2)
    alone = measure_conditional(PAIRS, sampler, count=3, new_tokens=6, tries=1, seed=5, steps=2)
    assert [row["written"][1:] for row in found["texts"]] == [row["written"] for row in alone["texts"]]
    assert set(alone["figures"]["samples"]["bleu"]) == {"mean"} and json.dumps(found)


def test_texts_end_at_an_end_token():
    class Ends(Writes):
        def complete(self, prompts, *, new_tokens, **options):
            end = TOKENIZER.token_to_id(data.END)
            return SimpleNamespace(tokens=[torch.tensor([*prompt, *[end] * new_tokens]) for prompt in prompts], nfe=1)

    found = measure_conditional(PAIRS[:2], Ends(), new_tokens=4, tries=1)
    assert [row["written"] for row in found["texts"]] == [[""], [""]]


def test_pairs_of_a_file(tmp_path, data_folder):
    training, held_out = read_pairs(data_folder / "snakes" / "llm_stories.jsonl.gz")
    assert len(training) + len(held_out) == 11818 and 0.04 < len(held_out) / 11818 < 0.06
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    assert training[0].document == f"{training[0].prompt}\n\n{training[0].text}"
    for content, message in (
        ('{"prompt": "a", "text": "b"}\n', "with 1 prompts and 0 held out"),
        (
            '{"prompt": "a", "text": "b"}\n{"prompt": "a"}\n',
            'line 2: got \'{"prompt": "a"}.*allowed is an object with prompt .str., text',
        ),
        ("[]", "line 1: got"),
        ('{"prompt": 1, "text": "b"}', "line 1: got"),
        ("{", "line 1"),
    ):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    for name in ("p.jsonl.gz", "nowhere.jsonl"):
        with pytest.raises(ValueError, match=f"conditional: .*{name} cannot be read"):
            read_pairs(tmp_path / name)
