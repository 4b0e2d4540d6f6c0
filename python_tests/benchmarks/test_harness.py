"""What the benchmarks measure with, on a pretended GPU: time of the host is in no figure, and no figure is lost."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import harness  # noqa: E402

CUDA = torch.device("cuda")


class Gpu:
    """A host and a device with a clock each, in seconds: the device works off what is queued, in order."""

    def __init__(self):
        self.now = self.done = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.queue(0.0)
                self.time = gpu.done

            def synchronize(self):
                gpu.now = max(gpu.now, self.time)

            def elapsed_time(self, end):
                return (end.time - self.time) * 1e3

        self.cuda = SimpleNamespace(Event=Event, _sleep=lambda cycles: self.queue(cycles / harness.CYCLES))

    def queue(self, seconds):
        self.done = max(self.done, self.now) + seconds

    def launches(self, count, host, device):
        """A function of so many launches, each of which takes the host and then the device so long."""

        def call():
            for _ in range(count):
                self.now += host
                self.queue(device)

        return call


@pytest.fixture
def gpu(monkeypatch):
    pretended = Gpu()
    monkeypatch.setattr(harness.torch, "cuda", pretended.cuda)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: pretended.now)
    return pretended


def test_the_time_of_launches_is_in_no_figure(gpu):
    functions = {"short": gpu.launches(10, 50e-6, 5e-6), "long": gpu.launches(2, 50e-6, 3e-3)}
    ms, rounds = harness.measure(functions, CUDA, 0.1)
    assert rounds >= 3 and ms == pytest.approx({"short": 0.05, "long": 6.0})


def test_a_first_call_that_compiles_does_not_make_the_device_sleep_as_long(gpu):
    first = [gpu.launches(1, 30.0, 1e-3)]
    calls = {"compiled": lambda: (first.pop() if first else gpu.launches(1, 20e-6, 1e-3))()}
    begin = gpu.now
    ms, rounds = harness.measure(calls, CUDA, 0.1)
    assert ms["compiled"] == pytest.approx(1.0)
    assert gpu.now - begin - 30 < 2 * harness.LONGEST_SLEEP + 0.1 + rounds * 1e-3


def test_a_call_that_waits_for_the_device_is_timed_too(gpu):
    def call():
        gpu.launches(1, 1e-5, 2e-3)()
        gpu.now = max(gpu.now, gpu.done)

    assert harness.measure({"waits": call}, CUDA, 0.1)[0]["waits"] == pytest.approx(2.0)


def test_a_slow_function_is_called_once(gpu):
    count = []
    harness.measure({"slow": lambda: (count.append(1), gpu.queue(3.0))}, CUDA, 0.1, slowest=1.0)
    assert len(count) == 1


def test_what_is_measured_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "found.json"
    record = harness.Record(path, "times", lambda rows: sorted(rows), machine="this one")
    for row, expected in ((3, [3]), (1, [1, 3])):
        record.add(row)
        assert json.loads(path.read_text()) == {"machine": "this one", "times": expected}
    harness.Record(None).add(1)


def test_a_peer_that_fails_is_named_and_left_out(capsys):
    peers = {"good": lambda: 1, "bad": lambda: 1 / 0}
    assert list(harness.that_run(peers, "3 x 31")) == ["good"]
    assert "bad does not run 3 x 31: ZeroDivisionError" in capsys.readouterr().out


def test_a_graph_is_recorded_after_a_first_call(monkeypatch):
    """The first call is on another stream, joined on both sides, and is not recorded."""
    log = []
    state = ["current"]

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Within:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            state.append(self.name)

        def __exit__(self, *_):
            state.pop()

    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(harness.torch, "cuda", SimpleNamespace(
        Stream=Stream, current_stream=lambda: Stream("current"), stream=lambda s: Within(s.name),
        CUDAGraph=lambda: graph, graph=lambda g: Within("graph")))  # fmt: skip
    harness.recorded(lambda: log.append(f"call on {state[-1]}"))()
    assert log == [
        "side waits for current", "call on side", "current waits for side", "call on graph", "replay",
    ]  # fmt: skip


def test_peak_memory_counts_each_allocation_and_nothing_else():
    held = [torch.zeros(1000)]

    def call():
        a = torch.zeros(5000)  # 20,000 bytes
        b = a + 1
        del a
        held[0] = torch.zeros(10)  # what was held before goes, 40 bytes come
        return b + 1

    assert harness.peak_bytes(call, torch.device("cpu")) == pytest.approx(40_000, abs=200)
