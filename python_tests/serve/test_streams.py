"""Answers as server-sent events: the same as without, pass by pass for who asks."""

import json

import pytest
from servers import held, make_sampler, running, until


@pytest.fixture(scope="module")
def server():
    with running(make_sampler(), max_wait_ms=0) as found:
        yield found


def events(server, **values):
    """[(name, data)], and whether the stream came to its end."""
    with server.client.stream("POST", "/v1/completions", json={"stream": True, **values}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        parts = "".join(answer.iter_text()).split("\n\n")[:-1]
    done = parts[-1] == "data: [DONE]"
    found = []
    for part in parts[: len(parts) - done]:
        name, _, data = part.rpartition("data: ")
        found.append((name.strip().removeprefix("event: "), json.loads(data)))
    return found, done


def test_an_answer(server):
    values = {"prompt": ["The", "a"], "max_tokens": 6, "seed": 3, "steps": 3, "log_likelihood": True}
    whole = server.ask(**values).json()
    found, done = events(server, **values)
    assert done and [name for name, _ in found] == ["", ""]
    for (_, chunk), choice in zip(found, whole["choices"], strict=True):
        assert chunk["choices"] == [choice] and "usage" not in chunk
        assert (chunk["object"], chunk["model"], chunk["id"]) == ("text_completion", "tiny", found[0][1]["id"])
    found, done = events(server, **values, stream_options={"include_usage": True})
    assert done and found[2][1]["choices"] == [] and found[2][1]["usage"] == whole["usage"]


@pytest.mark.parametrize("method, passes", [("slices", 3), ("segments", 3), ("hybrid", 4)])
def test_passes(server, method, passes):
    values = {"prompt": "The", "suffix": " cat", "max_tokens": 6, "seed": 3, "steps": passes, "method": method, "n": 2}
    choices = server.choices(**values)
    found, done = events(server, **values, passes=True)
    assert done and [name for name, _ in found] == ["pass"] * 2 * passes + [""] * 2
    assert [chunk["choices"][0] for name, chunk in found if not name] == choices
    for choice in choices:
        mine = [data for name, data in found if name and data["index"] == choice["index"]]
        assert [(data["pass"], data["of"]) for data in mine] == [(i + 1, passes) for i in range(passes)]
        last = mine[-1]
        assert last["tokens"] == choice["tokens"] and all(last["stands"]) and last["object"] == "text_completion.pass"
        assert all(len(data[name]) == 6 for data in mine for name in ("tokens", "stands", "confidence"))
        if method == "slices":
            assert (
                mine[0]["tokens"].count(None) == 4 == mine[0]["text"].count("·") and mine[0]["stands"].count(True) == 2
            )


def test_who_does_not_ask_sees_no_passes(server):
    """One that watches and one that does not run together, with the tokens that each has alone."""
    blocker, _ = held(server)
    values = {"prompt": "The", "max_tokens": 5, "steps": 2, "stream": True}
    threads = [server.in_thread(**values, seed=1, passes=True), server.in_thread(**values, seed=2)]
    until(lambda: server.batcher.waiting == 2)
    server.sampler.gate.set()
    for thread, _ in [(blocker, None), *threads]:
        thread.join()
    watched, other = (found[0].text for _, found in threads)
    assert server.sampler.sizes[-1] == 2 and watched.count("event: pass") == 2 and other.count("event: pass") == 0
    for text, seed in ((watched, 1), (other, 2)):
        choice = json.loads(text.split("data: ")[-2])["choices"][0]
        assert choice == server.choices(prompt="The", max_tokens=5, steps=2, seed=seed)[0]


def test_errors(server, monkeypatch, capfd):
    calls, renoise = [], server.sampler.path.renoise

    def fail_later(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("a mistake")
        return renoise(*arguments, **options)

    monkeypatch.setattr(server.sampler.path, "renoise", fail_later)
    found, done = events(server, max_tokens=6, steps=6, passes=True)
    assert not done and [name for name, _ in found] == ["pass", "pass", ""]
    assert found[-1][1]["error"]["message"] == "server: the model failed"
    assert "a mistake" in capfd.readouterr().err


def test_a_client_that_goes_away(server):
    blocker, answer = held(server)
    before = len(server.sampler.sizes)
    with pytest.raises(Exception, match="timed out"):
        server.client.post("/v1/completions", json={"stream": True, "passes": True, "max_tokens": 3}, timeout=0.1)
    until(lambda: server.batcher.waiting == 0)
    server.sampler.gate.set()
    blocker.join()
    assert answer[0].status_code == 200 and len(server.sampler.sizes) == before + 1
