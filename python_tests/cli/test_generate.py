"""klflow sample, complete, infill and eval: without a run, with many prompts, as JSONL."""

import json

import pytest
import torch

from klflow_ext import Sampler, data, load_run
from klflow_ext.cli import printable

SMALL = ["--steps", "3"]


def lines(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_run_is_needed(klflow, stories):
    done = klflow("sample", *SMALL)
    four = [line["text"] for line in lines(klflow("sample", *SMALL, "--jsonl"))]
    assert len(four) == 4 and "3 passes" in done.stderr, done.stderr
    assert done.stdout == "\n\n".join(map(printable, four)) + "\n"  # blank lines between them, nothing after the last
    sampler = Sampler(*load_run()[:2], tokenizer=load_run()[2])
    shown = [line["text"] for line in lines(klflow("sample", *SMALL, "--length", "9", "--count", "2", "--jsonl"))]
    assert shown == sampler.sample((2, 9), steps=3).texts
    assert klflow("complete", *SMALL, "--prompt", "Once upon a time").stdout.startswith("Once upon a time")
    found = klflow("infill", *SMALL, "--text", "Once {?3} a time").stdout
    assert found.startswith("Once ") and found.endswith(" a time\n")
    named = klflow("sample", str(stories), *SMALL, "--jsonl")
    assert named.stdout == klflow("sample", *SMALL, "--jsonl").stdout


def test_without_the_model(klflow, monkeypatch, tmp_path):
    monkeypatch.setattr("klflow_ext.run.STORIES", tmp_path / "none")
    done = klflow("sample")
    assert done.returncode == 1 and "run: got none, and this klflow_ext came without a model" in done.stderr


def test_jsonl(klflow, stories):
    done = klflow("complete", *SMALL, "--prompt", "a", "--prompt", "Once upon", "--count", "2", "--new-tokens", "5",
                  "--method", "hybrid", "--jsonl")  # fmt: skip
    found = lines(done)
    assert [line["prompt"] for line in found] == ["a", "a", "Once upon", "Once upon"] and "3 passes" in done.stderr
    tokenizer = load_run()[2]
    for line in found:
        assert set(line) == {"text", "tokens", "seed", "prompt", "method", "steps", "passes"}
        assert line["text"].startswith(line["prompt"]) and line["text"] == tokenizer.decode(line["tokens"])
        assert len(line["tokens"]) == len(tokenizer.encode(line["prompt"]).ids) + 5
        assert (line["method"], line["steps"], line["passes"]) == ("hybrid", 3, 3)
    assert len({line["seed"] for line in found}) == 4
    again = klflow("complete", *SMALL, "--prompt", "Once upon", "--new-tokens", "5", "--method", "hybrid", "--jsonl",
                   "--seeds", str(found[3]["seed"]))  # fmt: skip
    assert lines(again) == found[3:]


def test_log_likelihoods(klflow, stories):
    words = ["complete", *SMALL, "--prompt", "a", "--prompt", "Once upon", "--new-tokens", "5", "--jsonl"]
    found = lines(klflow(*words, "--log-likelihood"))
    assert [{k: v for k, v in line.items() if k != "log_likelihood"} for line in found] == lines(klflow(*words))
    model, path, tokenizer = load_run()
    for line in found:
        tokens = torch.tensor(line["tokens"])[None]
        given = torch.arange(tokens.shape[1])[None] < tokens.shape[1] - 5
        exact = Sampler(model, path).likelihood(tokens, given, steps=3)
        assert line["log_likelihood"] == pytest.approx(-exact.per_token, rel=1e-5)
    done = klflow(*words, "--log-likelihood", "--method", "hybrid")
    assert [line["log_likelihood"] for line in lines(done)] == [None, None]
    assert "log_likelihood: hybrid has no exact one, so it is null" in done.stderr
    done = klflow("sample", "--log-likelihood")
    assert done.returncode == 1 and "log_likelihood: got it without jsonl" in done.stderr


def test_lengths_and_temperature(klflow, stories):
    size = len(load_run()[2].encode("Once upon").ids)
    for options, length in ((["--length", "9"], 9), (["--new-tokens", "9"], size + 9), ([], 32)):  # max_length is 32
        found = lines(klflow("complete", *SMALL, "--prompt", "Once upon", *options, "--jsonl"))
        assert len(found[0]["tokens"]) == length
    one, other = (
        klflow("sample", *SMALL, *options, "--jsonl") for options in (["--temperature", "0"], ["--top-k", "1"])
    )
    assert lines(one) == lines(other) != lines(klflow("sample", *SMALL, "--jsonl"))


def test_a_layout_is_an_option(klflow, stories):
    found = lines(klflow("sample", "--length", "8", "--count", "1", "--layout", "0 2 | 1 3", "--jsonl"))
    assert found[0]["passes"] == 2


def test_what_is_refused(klflow, stories, tmp_path):
    (tmp_path / "empty").write_text("")
    for command, message in (
        (["infill"], "text: got none, allowed is a text with a hole"),
        (["infill", "--text", "a{?2}", "--count", "0"], "count: got 0"),
        (["infill", "Tom {?3}."], "run: Tom {?3}. is no run folder (did you mean --text 'Tom {?3}.'?)"),
        (
            ["infill", "--text", "a{?2} {?x}"],
            "text: got '{?' at character 7, allowed is a hole {?n} with n in [1, 1,000,000]",
        ),
        (["complete", "Once upon"], "run: Once upon is no run folder (did you mean --prompt 'Once upon'?)"),
        (["train", "--config", "empty"], "config: empty cannot be read"),
        (["complete", "--count", "0"], "count: got 0"),
        (["complete", "--length", "0"], "length: got 0"),
        (["sample", "--count", "1000000000"], "count: got 1000000000, allowed is an integer in [1, 1,000,000]"),
        (["complete", "--length", "9", "--new-tokens", "2"], "new_tokens: got 2 beside length=9"),
        (["complete", "--prompts-file", "nowhere"], "prompts_file: nowhere cannot be read: No such file"),
        (["complete", "--prompts-file", "empty"], "prompts_file: empty holds no text"),
        (["sample", "--seeds", "1", "2"], "seed: got 2 seeds, allowed is one or 4"),
        (["sample", "--temperature", "1", "0"], "temperature: got 0.0, allowed is 0 alone"),
        (["eval", "--length", "8"], "data: got no text, allowed is --data with a text"),
    ):
        done = klflow(*command)
        assert done.returncode == 1 and message in done.stderr, (command, done.stderr)


@pytest.mark.slow
def test_eval_of_a_saved_model_is_given_a_text(klflow, stories, tmp_path):
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(f"Once a cat {i}. " * 20 for i in range(60)))
    done = klflow("eval", "--length", "8", "--data", "t.txt")
    assert done.returncode == 0 and "unigram entropy" in done.stdout, done.stderr
    load_run()[2].save(str(tmp_path / "own.json"))
    data.train_tokenizer(["other words"], 300).save(str(tmp_path / "other.json"))
    for name in ("own", "other"):
        done = klflow("prepare", "t.txt", "--out", name, "--tokenizer", f"{name}.json", "--heldout", "0.3")
        assert done.returncode == 0, done.stderr
    assert klflow("eval", str(stories), "--length", "8", "--data", "own").returncode == 0
    assert "other has another tokenizer" in klflow("eval", "--length", "8", "--data", "other").stderr
