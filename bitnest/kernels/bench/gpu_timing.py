"""Times of GPU work, and a stand-in that runs the same calls in Triton's interpreter.

A measurement takes calls that do the same work on different weights, together several times the L2
cache, so that every call finds its weight in memory. They are captured in one CUDA graph; before
each replay a buffer twice the cache is written. Time is that between events around the replay,
divided by the number of calls: median, and p20 and p80, in microseconds. The interpreter's times
say nothing, and are there to prove the path.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
REPLAYS = 15
MOST_SETS = 48


@dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float


@dataclass
class Bench:
    """Where calls run, and when they have to be done. deadline: of `time.monotonic`."""

    device: torch.device
    deadline: float
    interpreted: bool = False
    warming: bool = False  # only compiles: one weight is enough

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def cache(self) -> int:
        """Bytes of the L2 cache."""
        if self.interpreted:
            return 1 << 16
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def sets(self, nbytes: int) -> int:
        """Weights of `nbytes` that are together three times the cache."""
        if self.interpreted or self.warming:
            return 2 - self.warming
        return max(2, min(MOST_SETS, -(-3 * self.cache // max(1, nbytes))))

    def times(self, calls: Sequence[Call]) -> Times:
        """See above."""
        for call in calls[:2]:
            call()
        if self.interpreted:
            return _times([_seconds(call) * 1e6 for call in calls])
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        flush = torch.empty(2 * self.cache, dtype=torch.int8, device=self.device)
        found = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e3 / len(calls))
        del kept
        return _times(found[1:])

    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes, the best of several sizes."""
        best = 0.0
        for size in (1 << 14,) if self.interpreted else (1 << 28, 1 << 29, 1 << 30):
            source = torch.empty(size, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            copies = [lambda t=target, s=source: t.copy_(s)] * 4
            best = max(best, 2 * size / self.times(copies).median * 1e6)
        return best

    def product_rate(self) -> float:
        """Floating-point operations a second of a large bfloat16 product."""
        n = 64 if self.interpreted else 8192
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        b = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n**3 / self.times([lambda: a @ b] * 4).median * 1e6


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _times(found: list[float]) -> Times:
    found = sorted(found)
    last = len(found) - 1
    return Times(statistics.median(found), found[round(0.2 * last)], found[round(0.8 * last)])
