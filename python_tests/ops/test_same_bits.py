"""The same bits from several threads at once, under any number of torch's own threads, and after a fork."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_layouts import NAMES, PRODUCTS, as_list, cases

VOCAB = 5_003  # 12 rows of which are shared out among threads
# torch's matrix products may add up in another order under another number of threads.
SUMS = {*PRODUCTS, "noise_embedding backward"}


def results(name):
    arguments, call = cases(VOCAB, "cpu")[name]
    return as_list(call(**arguments))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_eight_threads_at_once(threads):
    threads(2)
    alone = {name: results(name) for name in NAMES}

    def work(number):
        order = NAMES[number % len(NAMES) :] + NAMES[: number % len(NAMES)]
        return [name for name in order if not same(results(name), alone[name])]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(0, 8 * 3, 3))) == [[]] * 8


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_torchs_threads(name, threads):
    threads(1)
    want = results(name)
    for count in (2, 8):
        threads(count)
        if name in SUMS:
            for a, b in zip(results(name), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert same(results(name), want)


def forked(work, seconds=60):
    """The exit status of work() in a forked process: 0 if it is true, 1 if not or if it raises, None if it hangs."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(1)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def fork_after(count):
    """Every op and a parallel operator of torch with `count` threads, and again in forked processes; prints how these ended."""
    torch.set_num_threads(count)
    alone = {name: results(name) for name in NAMES}
    x = torch.linspace(-5, 5, 4_000_000).view(400, -1)
    want = x.softmax(-1)

    def in_a_thread(work):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    def ours():
        return all(same(results(name), alone[name]) for name in NAMES)

    def torchs():
        return torch.equal(x.softmax(-1), want)

    for run in (lambda work: work(), in_a_thread):
        of_torch = run(lambda: forked(torchs, 10))
        print(of_torch, "unasked" if of_torch is None else run(lambda: forked(ours)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_after_a_fork(count):
    """Right where torch itself is; torch hangs where the thread that forks has shared work out among others."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import test_same_bits; test_same_bits.fork_after({count})"],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pairs = [line.split() for line in done.stdout.splitlines()]
    assert len(pairs) == 2
    for torchs, ours in pairs:
        assert ours == "0" or torchs != "0", (torchs, ours)
    print(f"{count} threads, (torch's exit status, ours) from the main thread and from another: {pairs}")
