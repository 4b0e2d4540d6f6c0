"""What a server answers: the Sampler's own tokens, whatever else it is asked meanwhile."""

import random

import pytest
from servers import held, make_sampler, running, until

PROMPTS = ["Once upon a time", "The cat", "", "a dog"]


@pytest.fixture(scope="module")
def server():
    with running(make_sampler(), max_wait_ms=20, max_n=12, max_tokens=40) as found:
        yield found


def test_an_answer(server):
    answer = server.ask(prompt="The cat", max_tokens=6, seed=7, steps=3, top_k=5, temperature=0.8).json()
    expected = server.sampler.complete(["The cat"], new_tokens=6, seed=[7], steps=3, top_k=5, temperature=0.8)
    (choice,) = answer["choices"]
    tokens = expected.tokens[0].tolist()
    size = len(tokens) - 6
    assert choice["tokens"] == tokens[size:] and "The cat" + choice["text"] == expected.texts[0]
    assert (choice["index"], choice["seed"], choice["finish_reason"]) == (0, 7, "length")
    assert choice["logprobs"] is None and "log_likelihood" not in choice
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["usage"] == {"prompt_tokens": size, "completion_tokens": 6, "total_tokens": size + 6}


def test_the_same_tokens_whatever_the_batch(server):
    draw = random.Random(0)
    asked = [
        {
            "prompt": draw.choice(PROMPTS), "max_tokens": draw.choice([4, 5]), "seed": draw.randrange(2**53),
            "method": draw.choice(["slices", "segments", "hybrid"]), "steps": 3, "temperature": draw.choice([1.0, 0.7]),
            "n": draw.choice([1, 2]),
        }
        for _ in range(24)
    ]  # fmt: skip
    alone = [server.choices(**values) for values in asked]
    server.sampler.sizes.clear()
    server.sampler.gate.clear()
    threads = [server.in_thread(**values) for values in asked]
    server.sampler.gate.set()
    for (thread, found), expected in zip(threads, alone, strict=True):
        thread.join()
        assert found[0].json()["choices"] == expected
    assert max(server.sampler.sizes) > 2 and sum(server.sampler.sizes) == sum(values["n"] for values in asked)


def test_what_is_of_one_kind_runs_together(server):
    """By length, and by the number of free positions where the method asks for it."""
    kinds = [
        ([{"max_tokens": 5}, {"max_tokens": 5}], [2]),
        ([{"max_tokens": 5}, {"max_tokens": 6}], [1, 1]),
        ([{"max_tokens": 5}, {"max_tokens": 5, "temperature": 0.5}], [1, 1]),
        ([{"max_tokens": 5}, {"max_tokens": 5, "log_likelihood": True, "stop": "x", "echo": True}], [2]),
        ([{"prompt": [1, 2], "max_tokens": 4}, {"prompt": [1, 2, 3], "max_tokens": 3}], [1, 1]),
        ([{"prompt": [1, 2], "max_tokens": 4, "method": "segments"}, {"prompt": [3], "max_tokens": 5, "method": "segments"}],
         [2]),
    ]  # fmt: skip
    for asked, sizes in kinds:
        blocker, _ = held(server)
        server.sampler.sizes.clear()
        threads = [server.in_thread(steps=2, **values)[0] for values in asked]
        until(lambda: server.batcher.waiting == 2)
        server.sampler.gate.set()
        for thread in [blocker, *threads]:
            thread.join()
        assert server.sampler.sizes == [1, *sizes], asked


def test_seeds(server):
    found = server.choices(prompt=["The cat", "a"], n=3, max_tokens=5, steps=2, seed=11)
    assert [choice["index"] for choice in found] == list(range(6)) and found[0]["seed"] == 11
    assert len({choice["seed"] for choice in found}) == 6 and all(0 <= choice["seed"] < 2**53 for choice in found)
    for i, prompt in ((0, "The cat"), (2, "The cat"), (4, "a")):
        (alone,) = server.choices(prompt=prompt, max_tokens=5, steps=2, seed=found[i]["seed"])
        assert alone == {**found[i], "index": 0}
    seeds = [choice["seed"] for choice in found]
    assert server.choices(prompt=["The cat", "a"], n=3, max_tokens=5, steps=2, seed=seeds) == found
    one, other = (server.choices(max_tokens=5)[0]["seed"] for _ in range(2))
    assert one != other  # where none is asked for


def test_infilling(server):
    sampler = server.sampler
    for prompt, suffix in (
        ("The cat saw a", " and ran."),
        ("The cat saw a ", " and ran."),
        ("The", ""),
        ("", " and ran."),
        ("", ""),
    ):
        (choice,) = server.choices(prompt=prompt, suffix=suffix, max_tokens=4, seed=3, steps=2)
        expected = sampler.infill([f"{prompt}{{?4}}{suffix}"], seed=[3], steps=2)
        assert prompt + choice["text"] + suffix == expected.texts[0]
        size = len(sampler.tokenizer.encode(prompt.removesuffix(" ")).ids)
        assert choice["tokens"] == expected.tokens[0][size : size + 4].tolist()
    (choice,) = server.choices(prompt=[5, 6], suffix=" and ran.", max_tokens=4, seed=3, steps=2)
    after = sampler.tokenizer.encode(" and ran.").ids
    expected = sampler.infill([[5, 6, 0, 0, 0, 0, *after]], [[True] * 2 + [False] * 4 + [True] * len(after)],
                              seed=[3], steps=2)  # fmt: skip
    assert choice["tokens"] == expected.tokens[0][2:6].tolist()


def test_a_space_at_the_end_of_a_prompt(server):
    for seed in range(4):
        (choice,) = server.choices(prompt="The cat ", max_tokens=4, seed=seed, steps=2)
        expected = server.sampler.complete(["The cat "], new_tokens=4, seed=[seed], steps=2)
        assert "The cat " + choice["text"] == expected.texts[0] and choice["tokens"] == expected.tokens[0][-4:].tolist()
        (echo,) = server.choices(prompt="The cat ", max_tokens=4, seed=seed, steps=2, echo=True)
        assert echo["text"] == expected.texts[0]


def test_token_ids_and_texts_are_prompts(server):
    ids = server.sampler.tokenizer.encode("The cat").ids
    for prompt in ("The cat", ids, ["The cat"], [ids]):
        (choice,) = server.choices(prompt=prompt, max_tokens=4, seed=1, steps=2)
        assert choice == server.choices(prompt="The cat", max_tokens=4, seed=1, steps=2)[0]
    assert len(server.choices(prompt=["The cat", ids], max_tokens=4)) == 2


def test_the_ends_of_a_text(server, monkeypatch):
    whole = server.choices(prompt="The", max_tokens=20, seed=2, steps=4)[0]
    text = whole["text"]
    first, second = text[5:7], text[8:10]
    found = server.choices(prompt="The", max_tokens=20, seed=2, steps=4, stop=[second, first])[0]
    assert found["text"] == text[: min(text.find(first), text.find(second))] and found["finish_reason"] == "stop"
    assert found["tokens"] == whole["tokens"]
    same = server.choices(prompt="The", max_tokens=20, seed=2, steps=4, stop="not there")[0]
    assert same == whole
    echo = server.choices(prompt="The", max_tokens=20, seed=2, steps=4, stop=first, echo=True)[0]
    assert echo["text"] == "The" + text[: text.find(first)]
    monkeypatch.setattr(server.app.served, "end", whole["tokens"][6])
    found = server.choices(prompt="The", max_tokens=20, seed=2, steps=4)[0]
    size = whole["tokens"].index(whole["tokens"][6])
    assert found["text"] == server.sampler.tokenizer.decode(whole["tokens"][:size])
    assert found["finish_reason"] == "stop" and found["tokens"] == whole["tokens"]
    filled = server.choices(prompt="The", suffix=" cat", max_tokens=9, seed=2, steps=4)[0]
    assert filled["finish_reason"] == "length"  # a hole has no end of its own


def test_log_likelihood(server):
    found = server.choices(prompt=["The cat", "a"], max_tokens=5, seed=2, steps=3, log_likelihood=True)
    samples = server.sampler.complete(
        ["The cat", "a"], new_tokens=5, seed=[choice["seed"] for choice in found], steps=3
    )
    expected = server.sampler.log_likelihoods(samples, steps=3)
    assert [choice["log_likelihood"] for choice in found] == pytest.approx(expected, rel=1e-5)
    (choice,) = server.choices(max_tokens=5, method="hybrid", steps=3, log_likelihood=True)
    assert choice["log_likelihood"] is None


@pytest.mark.parametrize("method", ["slices", "hybrid"])
def test_confidence(server, method):
    values = {"prompt": "The", "suffix": " cat", "max_tokens": 5, "seed": 2, "steps": 3, "method": method, "n": 2}
    found, passes = server.choices(**values, confidence=True), []
    server.sampler.infill(["The{?5} cat"], seed=[2], steps=3, method=method, watch=passes.append)
    size = len(server.sampler.tokenizer.encode("The").ids)
    assert found[0]["confidence"] == pytest.approx(passes[-1].confidence[0, size : size + 5].tolist(), rel=1e-5)
    assert [{k: v for k, v in choice.items() if k != "confidence"} for choice in found] == server.choices(**values)


def test_lengths(server):
    assert len(server.choices(prompt="The", steps=1)[0]["tokens"]) == 40  # max_tokens
    assert len(server.choices(prompt=[5] * 60, steps=1)[0]["tokens"]) == 4  # the model's max_length is 64
    assert len(server.choices(prompt=[5] * 30, suffix=" cat", max_tokens=20, steps=1)[0]["tokens"]) == 20


def test_temperature_0_is_the_likeliest(server):
    one = server.choices(prompt="The", max_tokens=5, temperature=0, seed=1)[0]
    other = server.choices(prompt="The", max_tokens=5, top_k=1, seed=1)[0]
    assert one["tokens"] == other["tokens"] != server.choices(prompt="The", max_tokens=5, seed=1)[0]["tokens"]


def test_neutral_values_of_absent_fields(server):
    fields = {
        "model": "tiny", "logprobs": None, "best_of": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
        "stream": False, "suffix": None, "user": "me", "stop": None, "seed": None,
    }  # fmt: skip
    assert len(server.choices(prompt="The", max_tokens=2, **fields)) == 1


def test_what_else_is_told(server):
    (about,) = server.client.get("/v1/models").json()["data"]
    assert about == server.client.get("/v1/models/tiny").json()
    assert about["id"] == "tiny" and about["object"] == "model" and about["max_length"] == 64
    assert about["methods"] == ["slices", "segments", "confidence", "basic", "sampling", "hybrid"]
    assert about["method"] == "slices"
    assert server.client.get("/v1/models/huge").status_code == 404
    assert server.client.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


def test_a_model_without_slices():
    with running(make_sampler(slices=False)) as server:
        (about,) = server.client.get("/v1/models").json()["data"]
        assert "slices" not in about["methods"] and about["method"] == "segments"
        answer = server.ask(method="slices")
        assert (
            answer.status_code == 400 and "allowed is one of segments, confidence" in answer.json()["error"]["message"]
        )
        assert len(server.choices(prompt="The", max_tokens=3)[0]["tokens"]) == 3
