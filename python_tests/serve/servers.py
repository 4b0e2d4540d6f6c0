"""A tiny model behind a real socket, and a gate before it by which a test decides when it runs."""

import threading
import time
from contextlib import contextmanager

import httpx
import torch

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, Sampler, data
from klflow_ext.serve import Limits
from klflow_ext.serve.app import App
from klflow_ext.serve.served import Served
from klflow_ext.serve.server import Server, address, listen

TEXT = "Once upon a time there was a cat. The cat saw a dog and ran."


class Gated(Sampler):
    """Runs only while `gate` is set, and notes the size of every batch."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate, self.sizes = threading.Event(), []
        self.gate.set()

    def infill(self, tokens, *arguments, **options):
        assert self.gate.wait(10)
        self.sizes.append(len(tokens))
        return super().infill(tokens, *arguments, **options)


def make_sampler(slices=True, kind=Gated):
    tokenizer = data.train_tokenizer([TEXT] * 3, 290)
    path = LogitPath(data.vocab_size_of(tokenizer))
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 64, time="none", slices=slices), path)
    torch.nn.init.normal_(model.head.weight)
    return kind(model, path, tokenizer=tokenizer)


class Running:
    """A server that runs, and a client of it."""

    def __init__(self, app, server, client, url):
        self.app, self.server, self.client, self.url = app, server, client, url
        self.sampler, self.batcher = app.served.sampler, app.batcher

    def ask(self, **values):
        return self.client.post("/v1/completions", json=values)

    def choices(self, **values):
        answer = self.ask(**values)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def in_thread(self, **values):
        """(thread, list that the answer comes into)."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.ask(**values)))
        thread.start()
        return thread, found


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@contextmanager
def running(sampler, name="tiny", **limits):
    app = App(Served(sampler, name, Limits(**limits)))
    with listen("127.0.0.1", 0) as socket:
        server, url = Server(app), address(socket)
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        until(lambda: server.started)
        try:
            with httpx.Client(base_url=url, timeout=20) as client:
                yield Running(app, server, client, url)
        finally:
            sampler.gate.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def held(server):
    """A request that runs until the gate opens: (thread, list that the answer comes into)."""
    server.sampler.gate.clear()
    thread, found = server.in_thread(max_tokens=1, seed=1)
    until(lambda: server.batcher.running == 1)
    return thread, found
