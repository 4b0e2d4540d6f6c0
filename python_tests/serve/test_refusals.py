"""What a server refuses, and how: limits, time-outs, clients that go away, a model that fails, and its end."""

import json
import os
import signal
import socket
import sys
import threading
import time

import httpx
import pytest
from servers import held, make_sampler, running, until

from klflow_ext import cli
from klflow_ext.serve import Limits
from klflow_ext.serve.metrics import Histogram


@pytest.fixture(scope="module")
def server():
    limits = {
        "max_tokens": 40,
        "max_n": 4,
        "max_steps": 8,
        "max_body": 4000,
        "max_queue": 3,
        "timeout": 0.4,
        "max_batch": 2,
    }
    with running(make_sampler(), max_wait_ms=0, **limits) as found:
        yield found


def refused(answer, status, param, text, code=None):
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert text in error["message"] and len(error["message"]) <= 500 and (code is None or error["code"] == code)


@pytest.mark.parametrize(
    "values, status, param, text",
    [
        ({"model": "gpt"}, 404, "model", "got 'gpt', allowed is 'tiny'"),
        ({"prompt": 3}, 400, "prompt", "got 3, allowed are strings or token ids"),
        ({"prompt": []}, 400, "prompt", "got an empty list"),
        ({"prompt": [[1, 2.5]]}, 400, "prompt", "got [1, 2.5], allowed"),
        ({"prompt": [True]}, 400, "prompt", "got True, allowed"),
        ({"prompt": [1, 290]}, 400, "prompt", "got the token 290, allowed is 0 to V - 1 = 289"),
        ({"prompt": [-1]}, 400, "prompt", "got the token -1"),
        ({"prompt": ["a"] * 5}, 422, "n", "got 1 for each of 5 prompts, allowed are 4"),
        ({"prompt": [5] * 64}, 422, "prompt", "got 64 tokens and room for 1 more, allowed are 64 in all"),
        ({"prompt": [5] * 40, "max_tokens": 25}, 422, "prompt", "got 40 tokens and room for 25 more"),
        ({"suffix": 3}, 400, "suffix", "got 3, allowed is a string"),
        ({"max_tokens": 0}, 400, "max_tokens", "got 0, allowed is an integer >= 1"),
        ({"max_tokens": 41}, 422, "max_tokens", "got 41, allowed are at most 40"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "got 2.5"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "got 1000"),
        ({"n": 5}, 422, "n", "got 5, allowed are 4"),
        ({"n": True}, 400, "n", "got True"),
        ({"steps": 9}, 422, "steps", "got 9, allowed are at most 8"),
        ({"steps": 0}, 400, "steps", "got 0"),
        ({"temperature": -1}, 400, "temperature", "got -1"),
        ({"temperature": "hot"}, 400, "temperature", "got 'hot'"),
        ({"temperature": "x" * 3000}, 400, "temperature", "got 'xxx"),
        ({"temperature": 1e-40}, 400, "temperature", "got 1e-40"),
        ({"top_p": 0}, 400, "top_p", "got 0"),
        ({"top_k": 0}, 400, "top_k", "got 0"),
        ({"method": "race"}, 400, "method", "got 'race', allowed is one of slices, segments"),
        ({"method": 3}, 400, "method", "got 3"),
        ({"seed": -1}, 400, "seed", "got -1, allowed is an integer in [0, 2^53)"),
        ({"seed": [1, 2]}, 400, "seed", "got 2 of them, allowed is an integer in [0, 2^53), or 1 of them"),
        ({"seed": 1.5}, 400, "seed", "got 1.5"),
        ({"stop": [""]}, 400, "stop", "got ''"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": 3}, 400, "stop", "got 3"),
        ({"stop": [None]}, 400, "stop", "got None"),
        ({"stop": "x", "suffix": "y"}, 400, "stop", "a hole is filled to its end"),
        ({"echo": 1}, 400, "echo", "got 1, allowed is True or False"),
        ({"log_likelihood": "yes"}, 400, "log_likelihood", "got 'yes'"),
        ({"stream": 1}, 400, "stream", "got 1, allowed is True or False"),
        ({"passes": True}, 400, "passes", "got it without stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "got it without stream"),
        ({"stream_options": {"other": 1}}, 400, "stream_options", "got {'other': 1}"),
        ({"stream": True, "steps": 9}, 422, "steps", "got 9"),
        ({"logprobs": 2}, 400, "logprobs", "got 2, but this server has none"),
        ({"best_of": 2}, 400, "best_of", "got 2"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "got 0.5"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "got {'5': 1}"),
        ({"lenght": 3}, 400, "lenght", "no such field, allowed are model, prompt"),
    ],
)  # fmt: skip
def test_fields(server, values, status, param, text):
    refused(server.ask(**values), status, param, text)


@pytest.mark.parametrize(
    "body, text",
    [
        (b"", "it is no JSON"), (b"{", "it is no JSON"), (b"\xff", "it is no JSON"), (b"[1]", "got list, allowed is an object"),
        (b"[" * 3000, "it is no JSON"), (b'{"prompt": "\\ud800"}', "got half of a surrogate pair"),
        (b'{"temperature": NaN}', "got nan"),
    ],
)  # fmt: skip
def test_bodies(server, body, text):
    answer = server.client.post("/v1/completions", content=body)
    assert answer.status_code == 400 and text in answer.json()["error"]["message"]


def test_long_bodies(server):
    body = json.dumps({"prompt": "a" * 4000}).encode()
    refused(server.client.post("/v1/completions", content=body), 413, None, "allowed are 4000")
    parts = (body[i : i + 1000] for i in range(0, len(body), 1000))  # which says no length
    refused(server.client.post("/v1/completions", content=parts), 413, None, "got more than 4000 bytes")
    with connected(server) as slow:  # one that still sends would not hear: the answer waits for its end
        slow.sendall(HEAD % 4200 + b"a" * 4100)
        slow.settimeout(0.3)
        with pytest.raises(TimeoutError):
            slow.recv(1000)
        slow.sendall(b"a" * 100)
        slow.settimeout(30)
        assert slow.recv(1000).startswith(b"HTTP/1.1 413")
    with connected(server) as far:  # far too much is refused by its length, unread
        far.sendall(HEAD % 8001)
        assert far.recv(1000).startswith(b"HTTP/1.1 413")


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


def test_other_addresses(server):
    refused(server.client.get("/v1/nothing"), 404, None, "Not Found", "not_found")
    refused(server.client.get("/v1/completions"), 405, None, "Method Not Allowed", "method_not_allowed")


@pytest.fixture(autouse=True)
def open_again(request):
    """A test that fails leaves no gate closed."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").sampler.gate.set()


def test_a_full_queue(server):
    blocker, answer = held(server)
    waiting = [server.in_thread(max_tokens=2, steps=1) for _ in range(3)]
    until(lambda: server.batcher.waiting == 3)
    full = server.ask(max_tokens=2)
    refused(full, 429, None, "queue: 3 sequences wait and 1 would join them, allowed are 3", "queue_full")
    assert full.headers["retry-after"] == "1"
    assert "\nklflow_queue_length 3\n" in server.client.get("/metrics").text
    server.sampler.gate.set()
    for thread, found in [(blocker, answer), *waiting]:
        thread.join()
        assert found[0].status_code == 200
    assert server.batcher.waiting == 0


def test_time_outs():
    with running(make_sampler(), max_wait_ms=0, timeout=0.5) as server:
        blocker, answer = held(server)
        for more in ({}, {"stream": True}):
            start = time.monotonic()
            refused(server.ask(max_tokens=2, **more), 504, None, "queue: got no turn in 0.5 s", "timeout")
            assert time.monotonic() - start >= 0.5 and server.batcher.waiting == 0
        with connected(server) as client:
            client.sendall(HEAD % 20 + b'{"prompt"')
            assert b"408" in client.recv(4096).split(b"\r\n")[0]  # the rest does not come
        server.sampler.gate.set()
        blocker.join()
        assert answer[0].status_code == 200  # what runs has all the time that it needs


def test_a_client_that_goes_away(server):
    blocker, answer = held(server)
    body = b'{"max_tokens": 2, "steps": 1}'
    before = len(server.sampler.sizes)
    with connected(server) as client:
        client.sendall(HEAD % len(body) + body)
        until(lambda: server.batcher.waiting == 1)
    until(lambda: server.batcher.waiting == 0)  # long before its time is over
    server.sampler.gate.set()
    blocker.join()
    assert answer[0].status_code == 200 and len(server.sampler.sizes) == before + 1
    until(lambda: 'path="/v1/completions",code="499"} 1' in server.client.get("/metrics").text)


def test_a_model_that_fails(server, monkeypatch, capfd):
    def fail(*arguments, **options):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(server.sampler.path, "renoise", fail)
    answer = server.ask(max_tokens=2)
    refused(answer, 500, None, "server: the model failed", "server_error")
    assert "a mistake" not in answer.text and "a mistake" in capfd.readouterr().err
    monkeypatch.undo()
    assert server.ask(max_tokens=2).status_code == 200 and server.batcher.running == 0


def test_metrics():
    with running(make_sampler()) as server:
        for values in ({"prompt": [5, 6], "max_tokens": 3, "n": 2}, {"prompt": [5], "max_tokens": 4}, {"n": 99}):
            server.ask(**values)
        server.client.get("/nowhere/else")
        lines = server.client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert found['klflow_requests_total{path="/v1/completions",code="200"}'] == "2"
    assert found['klflow_requests_total{path="/v1/completions",code="422"}'] == "1"
    assert found['klflow_requests_total{path="other",code="404"}'] == "1"
    assert found["klflow_prompt_tokens_total"] == "5" and found["klflow_completion_tokens_total"] == "10"
    assert found["klflow_batch_size_count"] == "2" and float(found["klflow_batch_size_sum"]) == 3
    assert found['klflow_batch_size_bucket{le="1"}'] == "1" and found['klflow_batch_size_bucket{le="2"}'] == "2"
    assert found['klflow_completion_seconds_bucket{le="+Inf"}'] == "2" == found["klflow_completion_seconds_count"]
    assert found["klflow_passes_total"] == "7" and float(found["klflow_model_seconds_total"]) > 0
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(any(name.startswith(known) for known in names) for name in found)


def test_histogram():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.add(value)
    assert histogram.lines("x") == ['x_bucket{le="1"} 2', 'x_bucket{le="2"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 12.000000",
                                    "x_count 4"]  # fmt: skip


def test_the_end():
    """What runs is answered, what waits and what comes is refused, and the thread ends."""
    with running(make_sampler(), max_batch=1, max_wait_ms=0) as server:
        late = httpx.Client(base_url=server.url, timeout=20)
        late.get("/health")  # a connection that is there already
        runs, answer = held(server)
        waits, refusal = server.in_thread(max_tokens=2)
        until(lambda: server.batcher.waiting == 1)
        server.server.should_exit = True
        waits.join()
        refused(refusal[0], 503, None, "server: it is stopping", "stopping")
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/health")
        with pytest.raises(httpx.TransportError):
            late.get("/health")
        assert runs.is_alive() and server.batcher.closed
        server.sampler.gate.set()
        runs.join()
        assert answer[0].status_code == 200
        until(lambda: not server.batcher._thread.is_alive())


def main(monkeypatch, *words):
    """What the command ends with."""
    monkeypatch.setattr(sys, "argv", ["klflow", "serve", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command(monkeypatch, stories, capsys, number):
    port, found = free_port(), []

    def client():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

            def answers():
                try:
                    return client.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            until(answers)
            found.append(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "steps": 2}).json())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=client)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # a job in the background ignores SIGINT
    try:
        thread.start()
        code = main(monkeypatch, "--port", str(port))
        thread.join()
    finally:
        signal.signal(number, before)
    assert code == 128 + number and found[0]["model"] == "stories" and len(found[0]["choices"][0]["tokens"]) == 3
    said = capsys.readouterr()
    assert f"klflow: stories answers at http://127.0.0.1:{port}/v1/completions\n" in said.err
    assert "klflow: stopped; what ran is answered" in said.err and not said.out


def test_what_the_command_refuses(monkeypatch, stories, klflow):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = klflow("serve", "--port", port)
        said = f"klflow: port: got {port} on '127.0.0.1', allowed is one that is free: Address already in use"
        assert done.returncode == 1 and said in done.stderr
    for words, message in (
        (["--port", "70000"], "port: got 70000, allowed is an integer in [0, 65535]"),
        (["--host", "no.such.host.invalid"], "port: got 8000 on 'no.such.host.invalid'"),
        (["--max-batch", "0"], "max_batch: got 0, allowed is an integer in [1, 2^31]"),
        (["nowhere"], "nowhere"),
    ):
        done = klflow("serve", *words)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    monkeypatch.setitem(sys.modules, "klflow_ext.serve.app", None)
    done = klflow("serve")
    assert done.returncode == 1 and "needs the serve extra: pip install 'klflow_ext[serve]'" in done.stderr


def test_limits():
    assert Limits(max_queue=0).max_queue == 0
    for name, value in (
        ("max_n", 0),
        ("max_queue", -1),
        ("max_wait_ms", -1),
        ("timeout", 0),
        ("timeout", float("nan")),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got {value}"):
            Limits(**{name: value})
    with pytest.raises(TypeError, match="^max_steps: got 'x'"):
        Limits(max_steps="x")
