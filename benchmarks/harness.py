"""What the benchmarks share: arguments, functions timed in turn, peak memory, what machine it was, and result files."""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, says when it starts and stops

import torch  # noqa: E402

from klflow_ext import build_info  # noqa: E402
from klflow_ext.files import write_file  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")


# ---- arguments


def parser_of(doc, *, seconds=None, dtypes=None, shapes=None, plots=False, json=None):
    """A parser of what most scripts take: --device, --threads, --json, and what is asked for.

    Args:
        doc: the script's docstring.
        seconds: (default, help) of --seconds.
        dtypes: (default, help) of --dtypes.
        shapes: help of --shapes.
        plots: whether there is --plot.
        json: help of --json.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help=json)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds[0], help=seconds[1])
    if dtypes is not None:
        parser.add_argument("--dtypes", default=dtypes[0], help=dtypes[1])
    if shapes is not None:
        parser.add_argument("--shapes", help=shapes)
    if plots:
        parser.add_argument("--plot", type=Path)
    return parser


def parse(parser):
    """The arguments, checked as far as all scripts do; --dtypes is a list. Sets the number of threads."""
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but this torch sees no CUDA device")
    if hasattr(arguments, "dtypes"):
        arguments.dtypes = choices(parser, "dtypes", arguments.dtypes, DTYPES)
    for path in (arguments.json, getattr(arguments, "plot", None)):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def choices(parser, option, text, allowed):
    """ "a,b" as a list; each must be allowed."""
    values = text.split(",")
    for value in values:
        if value not in allowed:
            parser.error(f"--{option}: got {value!r}, allowed are {', '.join(allowed)}")
    return values


def shapes_of(parser, text, names, least):
    """ "1024x50259,8x7" as tuples of as many numbers as there are names, each at least its least."""
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]
        assert all(len(s) == len(names) and all(n >= l for n, l in zip(s, least, strict=True)) for s in shapes)
    except (ValueError, AssertionError):
        ranges = ", ".join(f"{name} >= {l}" for name, l in zip(names, least, strict=True))
        parser.error(f"--shapes: got {text!r}, allowed is {'x'.join(n.upper() for n in names)},... with {ranges}")
    return shapes


# ---- measurements


def that_run(peers, what):
    """Those of {name: function} that run at all. A failure is told; another library's versions and limits are its own affair."""
    found = {}
    for name, function in peers.items():
        try:
            function()
            found[name] = function
        except Exception as error:
            print(f"{name} does not run {what}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    return found


CYCLES = 2e9  # of torch.cuda._sleep, in a second of a fast GPU
LONGEST_SLEEP = 0.02  # seconds


class Clock:
    """Milliseconds of calls. On CUDA the device first sleeps for longer than the host needs to queue the call, so that its
    kernels follow one another at once and no time of Python or of a launch is in the figure."""

    def __init__(self, device):
        self.on_cuda, self.queueing = device.type == "cuda", {}  # name: seconds that the host needed, the least so far

    def __call__(self, name, function):
        if not self.on_cuda:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(CYCLES * min(LONGEST_SLEEP, 2 * self.queueing.get(name, LONGEST_SLEEP))))
        start = time.perf_counter()
        begin.record()
        function()
        end.record()
        self.queueing[name] = min(self.queueing.get(name, math.inf), time.perf_counter() - start)
        end.synchronize()
        return begin.elapsed_time(end)


def recorded(function):
    """The kernels of a call as a CUDA graph: a function that replays them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is made in a first call only is no part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(functions, device, seconds, *, before=lambda: None, slowest=math.inf, label=""):
    """({name: median milliseconds}, rounds): all functions called in turn for about `seconds`, at least three rounds.

    Args:
        functions: {name: function of nothing}; each is called once before, untimed.
        before: called before each call, untimed.
        slowest: a function whose first call takes longer, in seconds, is not called again.
        label: of the line with the time left, on a terminal.
    """

    clock = Clock(device)

    def timed(name):
        before()
        return clock(name, functions[name])

    first = {name: timed(name) for name in functions}
    again = [name for name in functions if first[name] < 1e3 * slowest]
    times = {name: [] if name in again else [ms] for name, ms in first.items()}
    start, rounds = time.perf_counter(), 0
    while again and (rounds < 3 or time.perf_counter() - start < seconds):
        for name in again:
            times[name].append(timed(name))
        rounds += 1
        show_left(max(0.0, seconds - (time.perf_counter() - start)), label)
    return {name: statistics.median(values) for name, values in times.items()}, rounds


def show_left(seconds, label=""):
    """A line on the terminal with the time left, which the next line that is printed takes the place of."""
    if sys.stderr.isatty():
        print(f"\r{label}{seconds:.0f} s left ", end="\r", file=sys.stderr, flush=True)


def peak_bytes(function, device):
    """What a call adds to the memory that torch holds, at its peak. Exact on a CPU, where torch's profiler sees each allocation
    (of the ops too, but not the scratch that a library of products keeps to itself); on CUDA torch counts itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# ---- results


def machine(device, **more):
    """What the figures are of; also printed."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": build_info()["cpu_capability"],
        "cuda_arch": build_info()["cuda_arch"],
        **more,
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    return about


class Record:
    """What is measured. It is written to --json as soon as it is: a run that is stopped loses no figure.

    Args:
        path: of the file, or None.
        name: what the list of measurements is called in it.
        found: what else it holds.
        join: function (measurements) -> what is written of them; None: all.
    """

    def __init__(self, path, name="results", join=None, **found):
        self.path, self.name, self.found, self.rows = path, name, found, []
        self.join = join or (lambda rows: rows)

    def add(self, row):
        self.rows.append(row)
        if self.path:
            text = json.dumps(self.whole(), indent=1) + "\n"
            write_file(self.path, lambda path: path.write_text(text))

    def whole(self):
        return {**self.found, self.name: self.join(self.rows)}


def figure(rows=1, columns=1, sharex=False, sharey=False, squeeze=True, **options):
    """(figure, axes) of matplotlib, to be drawn without a screen; not pyplot's, which keeps each figure."""
    from matplotlib.figure import Figure

    drawing = Figure(**options)
    return drawing, drawing.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=squeeze)
