#!/usr/bin/env python
"""Load test of `klflow serve` on the loopback: requests per second and latency by the number of clients.

    python benchmarks/serve.py --json results.json            # the model of the package; 1 to 2 minutes
    python benchmarks/serve.py runs/train --clients 1,32 --requests 200

The server is a process of its own. As many clients as --clients says ask one request after the other, of a few lengths, each with a
seed of its own. Every number of clients asks the same requests: all must be answered, with the tokens that one client alone got.
"batch" is the mean number of sequences that ran together, "model" the share of the time in which the model ran.
"""

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from harness import Record, machine, parse, parser_of, show_left

PROMPTS = (
    "Once upon a time",
    "Tom and Lily went to the park. They saw a",
    "The cat",
    "One day, a little girl named Sue",
)
READY = "answers at "


def parse_arguments():
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder; without it, the model of the package")
    parser.add_argument("--clients", default="1,4,16,64", help="how many ask at once")
    parser.add_argument("--requests", type=int, default=64, help="of all clients together")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=16)
    arguments = parse(parser)
    arguments.clients = [int(n) for n in arguments.clients.split(",")]
    return arguments


@contextmanager
def served(arguments):
    """The address of a server that runs meanwhile."""
    words = [sys.executable, "-m", "klflow", "serve", "--port", "0", "--max-batch", str(arguments.max_batch)]
    words += ["--max-queue", "4096", "--device", arguments.device] + ([str(arguments.run)] if arguments.run else [])
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parent.parent)
    try:
        line = process.stderr.readline()
        if READY not in line:
            raise SystemExit(f"the server does not start: {line}{process.stderr.read()}")
        yield line.split(READY)[1].strip().removesuffix("/v1/completions")
    finally:
        process.terminate()
        process.wait(60)


def bodies(arguments):
    shape = {"max_tokens": arguments.new_tokens, "steps": arguments.steps}
    draw = random.Random(0)
    return [{"prompt": draw.choice(PROMPTS), "seed": seed, **shape} for seed in range(arguments.requests)]


async def asked(url, requests, clients):
    """([(seconds, answer)] in the order of requests, seconds of all)."""
    found, left = [None] * len(requests), iter(enumerate(requests))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as session:

        async def client():
            for i, body in left:
                start = time.perf_counter()
                answer = await session.post("/v1/completions", json=body)
                found[i] = time.perf_counter() - start, answer
                done = sum(x is not None for x in found)
                show_left((time.perf_counter() - begin) / done * (len(found) - done), f"{clients} clients: ")

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return found, time.perf_counter() - begin


def counted(url):
    """Batches, sequences and seconds that the model has run."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(url + "/metrics").text.splitlines() if line[0] != "#")
    names = ("klflow_batch_size_count", "klflow_batch_size_sum", "klflow_model_seconds_total")
    return [float(lines[name]) for name in names]


def main():
    arguments = parse_arguments()
    about = machine(arguments.device, cores=os.cpu_count(), load_before=round(os.getloadavg()[0], 1))
    names = ("requests", "new_tokens", "steps", "max_batch")
    settings = {name: getattr(arguments, name) for name in names}
    record = Record(arguments.json, "rows", machine=about, settings=settings, prompts=PROMPTS)
    requests, alone = bodies(arguments), None
    print(f"{arguments.requests} requests of {arguments.new_tokens} tokens, {arguments.steps} passes")
    print(
        f"{'clients':>8}{'requests/s':>12}{'tokens/s':>10}{'median s':>10}{'99 % s':>8}{'batch':>7}{'model':>7}{'lost':>6}{'differ':>8}"
    )
    with served(arguments) as url:
        asyncio.run(asked(url, requests[: 2 * len(PROMPTS)], 2))  # what is made once is no part of the figures
        for clients in arguments.clients:
            before = counted(url)
            found, seconds = asyncio.run(asked(url, requests, clients))
            count, sequences, model = (b - a for a, b in zip(before, counted(url), strict=True))
            lost = sum(answer.status_code != 200 for _, answer in found)
            tokens = [
                answer.json()["choices"][0]["tokens"] if answer.status_code == 200 else None for _, answer in found
            ]
            alone = alone or tokens
            differ = sum(a != b for a, b in zip(tokens, alone, strict=True))
            taken = sorted(took for took, _ in found)
            row = {
                "clients": clients, "requests_per_second": len(found) / seconds,
                "tokens_per_second": arguments.new_tokens * len(found) / seconds, "median_seconds": statistics.median(taken),
                "p99_seconds": taken[min(len(taken) - 1, int(0.99 * len(taken)))], "mean_batch": sequences / count,
                "model_share": model / seconds,                 "lost": lost, "other_tokens": differ,
            }  # fmt: skip
            record.add(row)
            print(
                f"{clients:8}{row['requests_per_second']:12.1f}{row['tokens_per_second']:10.0f}{row['median_seconds']:10.3f}"
                f"{row['p99_seconds']:8.3f}{row['mean_batch']:7.1f}{row['model_share']:7.0%}{lost:6}{differ:8}",
                flush=True,
            )
    if any(row["lost"] or row["other_tokens"] for row in record.rows):
        raise SystemExit("a request was lost, or got other tokens than alone")


if __name__ == "__main__":
    main()
