"""CUDA-graph replay: the kernels of a sampling step, or of all passes of slices, are recorded once, then launched together.

A replay runs the same kernels on the same addresses. So what changes from one to the next lies in buffers, and what is recorded
never looks at a value: times of a step and noise are tensors, and the knobs of a draw are constants of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from klflow_ext.path import Network, Path, ResolvedOptions
from klflow_ext.sample.passes import Passes
from klflow_ext.sample.slices import draw_slices, slice_passes, slice_places


@dataclass
class Buffers:
    """What a recorded step of (B, L) sequences reads and writes.

    tokens: (B, L) int64, of the state; the step replaces them by those it draws. rng: (B, 2) int64, (seed, step) of the
        state's noise; the step adds 1 to it and draws with that. t: (B,) float32, the state's time, set by the caller.
    given: (B, L) bool. known: (B, L) int64, 0 where not given.
    bad: (B,) bool, sequences whose logits said nothing; the step adds to them.
    previous: (B, L, D), hidden states of the pass before, or None for a model that does not self-condition.
    """

    tokens: Tensor
    rng: Tensor
    t: Tensor
    given: Tensor
    known: Tensor
    bad: Tensor
    previous: Tensor | None

    @classmethod
    @torch.inference_mode(False)  # an inference tensor could not be written to outside of inference mode
    def allocate(cls, shape: tuple[int, int], network: Network, device: torch.device) -> Buffers:
        tokens, known = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        rng = torch.zeros(shape[0], 2, dtype=torch.int64, device=device)
        t = torch.zeros(shape[0], dtype=torch.float32, device=device)
        given, bad = (torch.zeros(size, dtype=torch.bool, device=device) for size in (shape, shape[0]))
        previous = network.head.weight.new_zeros(*shape, network.head.in_features) if network.self_conditions else None
        return cls(tokens, rng, t, given, known, bad, previous)

    def start(self, given: Tensor, known: Tensor, rng: Tensor) -> None:
        """Fills in new sequences, as noise where they are not given."""
        for buffer, value in ((self.tokens, known), (self.known, known), (self.given, given), (self.rng, rng)):
            buffer.copy_(value)
        self.bad.zero_()
        if self.previous is not None:
            self.previous.zero_()


class Recorder:
    """Makes CUDA graphs of functions. They share one memory pool: nothing in it stays alive from one replay to another."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """The replay of a function, which may keep its results only in tensors that were there before.

        It is called four times: thrice, so that libraries and kernels are set up, and to be recorded.
        """
        graph, kind = torch.cuda.CUDAGraph(), self.device.type
        # Copies of the weights that autocast caches would be freed at its end, while the graph still reads them.
        autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.cuda.device(self.device), autocast:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(self.stream)
            with torch.cuda.graph(graph, self.pool, self.stream):
                function()
        return graph.replay


def sampling_step_in_place(
    network: Network, path: Path, b: Buffers, options: ResolvedOptions, k: int, temperature: float
) -> None:
    """A pass and the sampling step after it, from buffers into them, without a look at their values."""
    times = path.model_times(b.t, b.given, network.times_by_position)
    prediction = network.predict(path.renoise(b.tokens, b.t, b.rng, b.given), times, previous=b.previous)
    if b.previous is not None:
        assert prediction.hidden is not None
        b.previous.copy_(prediction.hidden)
    b.rng[:, 1] += 1  # the state's noise has been made: from the draw's seeds the next one will be
    drawn = prediction.draw(k, b.rng, temperature, options.top_p)
    b.tokens.copy_(torch.where(b.given, b.known, drawn))
    assert prediction.bad is not None, "a draw looks"
    b.bad |= prediction.bad


@dataclass
class SliceBuffers:
    """What recorded slices of (B, L) sequences read and write.

    known: (B, L) int64, 0 where not given. given: (B, L) bool. seeds: (B,) int64. places: (B, L) int64, as `slice_places` has them.
    found: (B, L) int64, the tokens that were drawn. bad_pass: (B,) int64, as of `Passes`.
    """

    known: Tensor
    given: Tensor
    seeds: Tensor
    places: Tensor
    found: Tensor
    bad_pass: Tensor

    @classmethod
    @torch.inference_mode(False)
    def allocate(cls, shape: tuple[int, int], device: torch.device) -> SliceBuffers:
        known, places, found = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3))
        seeds, bad_pass = (torch.zeros(shape[0], dtype=torch.int64, device=device) for _ in range(2))
        return cls(known, torch.zeros_like(known, dtype=torch.bool), seeds, places, found, bad_pass)

    def start(self, passes: Passes, places: Tensor) -> None:
        """Fills in new sequences."""
        self.known.copy_(passes.known)
        self.given.copy_(passes.given)
        self.seeds.copy_(passes.seeds)
        self.places.copy_(places)


def slices_in_place(network: Network, path: Path, b: SliceBuffers, options: ResolvedOptions, counts: list[int]) -> None:
    """All passes of slices, from buffers into them, without a look at their values."""
    passes = Passes(network, path, b.known, b.given, b.seeds)
    b.found.copy_(draw_slices(passes, options, b.places, counts))
    passes.look()
    b.bad_pass.copy_(passes.bad_pass)


class Replays:
    """The ways of the sampling scheme and of slices by what was recorded of them, when it was first asked for.

    Of the sampling scheme it is a step, one for each shape and its knobs. Of slices it is the whole way, one for each shape, the
    number of positions that are given, and the knobs.
    """

    def __init__(self, network: Network, path: Path, device: torch.device):
        self.network, self.path, self.device, self.recorder = network, path, device, Recorder(device)
        self.weights: list[int] = []
        self._lock = Lock()
        self.buffers: dict[tuple, Buffers] = {}
        self.slice_buffers: dict[tuple, SliceBuffers] = {}
        self.replays: dict[tuple, Callable[[], None]] = {}

    def __call__(self, passes: Passes, options: ResolvedOptions) -> Tensor:
        """The tokens that the way of options.method finds."""
        with self._lock:  # of the buffers, by one call at a time
            self._forget_moved()
            tokens = (self._slices if options.method == "slices" else self._steps)(passes, options).clone()
            if tokens.is_cuda:
                torch.cuda.current_stream(tokens.device).synchronize()
            return tokens

    def _steps(self, passes: Passes, options: ResolvedOptions) -> Tensor:
        """`denoise` by `sampling_step`. The last pass is a step, too, of which only the draw counts."""
        steps = options.steps
        top_ks = [options.top_k] * (steps - 1) + [options.last_top_k]
        knobs = list(zip(top_ks, options.temperatures(steps), strict=True))
        buffers, replays = self._prepare((len(passes.given), passes.given.shape[1]), options, knobs)
        buffers.start(passes.given, passes.known, passes.rng(0))
        grid = options.times or self.path.time_grid(steps - 1, options.grid_power).tolist()
        passes.expect(steps)
        for t, replay in zip(grid, replays, strict=True):
            buffers.t.fill_(t)
            replay()
            passes.advance()
        passes.note_bad(buffers.bad)  # in some pass, which a replay does not tell
        return buffers.tokens

    def _slices(self, passes: Passes, options: ResolvedOptions) -> Tensor:
        places, counts = slice_places(passes, options)
        shape = (len(places), places.shape[1])
        if shape not in self.slice_buffers:
            self.slice_buffers[shape] = SliceBuffers.allocate(shape, self.device)
        buffers = self.slice_buffers[shape]
        buffers.start(passes, places)
        steps, temperatures = slice_passes(options, counts)
        total = steps * (len(counts) - 1)
        passes.expect(total)
        knobs = (options.top_k, options.last_top_k, options.top_p, options.grid_power, steps, *temperatures[:total])
        key = (shape, self._autocast(), tuple(counts), *knobs)
        self._replay(key, partial(slices_in_place, self.network, self.path, buffers, options, counts))()
        for _ in range(total):
            passes.advance()
        passes.bad_pass = buffers.bad_pass.clone()
        return buffers.found

    def _replay(self, key: tuple, function: Callable[[], None]) -> Callable[[], None]:
        """That of a function, recorded when its key is first asked for."""
        if key not in self.replays:
            self.replays[key] = self.recorder.record(function)
        return self.replays[key]

    def _autocast(self) -> torch.dtype | bool:
        kind = self.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    def _forget_moved(self) -> None:
        """Drops what was recorded of a model that has been moved or cast since."""
        weights = [x.data_ptr() for x in (*self.network.parameters(), *self.network.buffers())]
        if weights != self.weights:
            self.weights = weights
            for made in (self.buffers, self.slice_buffers, self.replays):
                made.clear()

    def _prepare(
        self, shape: tuple[int, int], options: ResolvedOptions, knobs: Sequence[tuple[int, float]]
    ) -> tuple[Buffers, list[Callable[[], None]]]:
        """The buffers of (B, L), to be filled after this, and the replay for each of the knobs."""
        if shape not in self.buffers:
            self.buffers[shape] = Buffers.allocate(shape, self.network, self.device)
        buffers = self.buffers[shape]
        return buffers, [
            self._replay(
                (shape, self._autocast(), options.top_p, k, temperature),
                partial(sampling_step_in_place, self.network, self.path, buffers, options, k, temperature),
            )
            for k, temperature in knobs
        ]
