"""The load test of benchmarks/serve.py, on a tiny model."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

from servers import make_sampler, running

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import serve  # noqa: E402


def test_clients_get_the_tokens_that_one_alone_gets():
    requests = serve.bodies(SimpleNamespace(requests=12, new_tokens=4, steps=2))
    assert len({body["seed"] for body in requests}) == 12 and len({body["prompt"] for body in requests}) > 1
    with running(make_sampler(), max_n=1, max_wait_ms=20) as server:
        found = {}
        for clients in (1, 6):
            before = serve.counted(server.url)
            rows, seconds = asyncio.run(serve.asked(server.url, requests, clients))
            batches, sequences, model = (b - a for a, b in zip(before, serve.counted(server.url), strict=True))
            assert sequences == 12 and 0 < model <= seconds and (batches == 12) == (clients == 1)
            found[clients] = [answer.json()["choices"][0] for _, answer in rows]
            assert all(0 < took <= seconds for took, _ in rows)
        assert found[1] == found[6] and [choice["seed"] for choice in found[6]] == list(range(12))
