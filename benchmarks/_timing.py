"""Two times of a call: on the device, from replays of its CUDA graph, and on the wall, as the caller waits for it."""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHORTEST_SAMPLE = 1e-3  # seconds; shorter calls on a CPU are repeated, so that the clock and its noise do not count
MAX_SAMPLES = 200
# Overwritten before every replay. It empties the L2 cache, and takes the GPU so long that the replay and its two
# events are queued before it ends: no time between the events is spent waiting for the host.
FLUSH_BYTES = 256 << 20


class NotCapturable(Exception):
    """A call cannot become a CUDA graph; the message says why."""


class Time(NamedTuple):
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


def summarise(seconds: Sequence[float]) -> Time:
    samples = torch.tensor(seconds, dtype=torch.float64) * 1e6
    p20, median, p80 = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Time(median, p20, p80)


def wall_samples(call: Callable[[], Any], machine: Cpu | Gpu, budget: float) -> list[float]:
    """Seconds from a call to its finished result, sampled for about ``budget`` seconds; one sample at least."""

    def sample(repeats: int) -> float:
        start = machine.clock()
        for _ in range(repeats):
            call()
        machine.synchronize()
        return (machine.clock() - start) / repeats

    machine.synchronize()
    once = sample(1)
    if once > budget:
        return [once]
    once = max(min(once, sample(1)), 1e-9)
    repeats = math.ceil(machine.shortest_sample / once) or 1
    count = max(3, min(MAX_SAMPLES, int(budget / (once * repeats))))
    return [sample(repeats) for _ in range(count)]


def device_samples(replays: Sequence[Callable[[], Any]], gpu: Gpu, budget: float) -> list[float]:
    """Seconds that the GPU spends in one replay, for about ``budget`` seconds; the replays take turns."""

    def sample(count: int) -> list[float]:
        events = []
        for i in range(count):
            gpu.flush()
            start = gpu.record()
            replays[i % len(replays)]()
            events.append((start, gpu.record()))
        gpu.synchronize()
        return [gpu.seconds_between(start, end) for start, end in events]

    first = sample(len(replays) + 1)  # the first replay of a graph uploads it
    once = min(first) + gpu.flush_seconds
    return sample(max(5, min(MAX_SAMPLES, int(budget / once))))


class Cpu:
    """The clock of a machine without a GPU."""

    type = "cpu"
    shortest_sample = SHORTEST_SAMPLE
    clock = staticmethod(time.perf_counter)

    def synchronize(self) -> None:
        pass

    def peak_extra_mb(self, call: Callable[[], Any]) -> float:
        """Resident memory (MB) that a call adds at its highest point, native allocations and outputs included.

        The first call starts threads and loads code; freed pages then go back to the kernel, so that whatever the
        second call touches counts again. Linux and glibc; the kernel counts to within about 0.3 MB.
        """

        def resident(field: str) -> float:
            return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

        call()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before


class Gpu:
    """An NVIDIA GPU: its events, its graphs and its allocator."""

    type = "cuda"
    shortest_sample = 0.0  # every sample is one call and the wait for it
    clock = staticmethod(time.perf_counter)

    def __init__(self, device: str):
        index = torch.device(device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.set_device(self.device)
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._capturing = torch.cuda.Stream(self.device)
        self.flush_seconds = self._time_flush()

    def _time_flush(self) -> float:
        self.flush()
        start = self.record()
        for _ in range(5):
            self.flush()
        end = self.record()
        self.synchronize()
        return self.seconds_between(start, end) / 5

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        self._flushed.zero_()

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """(replay, result): ``replay`` runs the call's CUDA graph, which writes ``result`` anew."""
        # A failed capture can leave the allocator in a state that later calls trip over. What usually makes one
        # fail, waiting for the GPU, is found without it.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            raise NotCapturable(first_line(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            self._capturing.wait_stream(before)
            with torch.cuda.stream(self._capturing):
                call()
            self.synchronize()
            with torch.cuda.graph(graph, stream=self._capturing):
                result = call()
        except RuntimeError as error:
            raise NotCapturable(first_line(error)) from error
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own
        return graph.replay, result

    def peak_extra_mb(self, call: Callable[[], Any]) -> float:
        """Memory (MB) that a call takes from torch's allocator at its highest point, outputs included."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6


def machine_of(device: str) -> Cpu | Gpu:
    return Gpu(device) if torch.device(device).type == "cuda" else Cpu()


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a column."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:120]
