"""Hits of caches of every size on a trace of expert requests, in one pass.

A cache that misses loads the expert and evicts the one of lowest key, never the one just requested.
Where keys do not depend on the cache's size, the larger cache holds what the smaller one does, so
one stack describes all (Mattson, Gecsei, Slutz, Traiger 1970): its c top experts are what a cache
of c experts holds, and a request at depth d hits in every cache of more than d.

    key = priority of the expert's last request
          [+ 2^32 * its requests in the next `window` tokens + 2^61 if the present token uses it]

Priorities make the policy: the request's number is LRU, minus the number of the expert's next
request Belady's. Caches are empty at first.

Two implementations with one signature and one result: C (`cache_trace.c`) and Python, the
reference, tens of times slower. Left out: policies whose keys differ from size to size (counts that
an eviction resets, ARC), prefetching, and experts of unequal size.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from bitnest.kernels import native as compiled

Integers = NDArray[np.integer]
Counts = NDArray[np.int64]

COUNT = 1 << 32  # above every request's number
IN_USE = 1 << 61  # above every count
MOST_REQUESTS = 1 << 28  # so that neither reaches the next


def available() -> bool:
    """Whether there is native code on this machine."""
    return compiled.load("cache_trace") is not None


def stack_hits(
    trace: Integers,
    priority: Integers,
    experts: int,
    window: int = 0,
    native: bool | None = None,
) -> Counts:
    """Hits of caches of 1, 2 .. experts experts, (experts,).

    trace: (tokens, k) expert numbers, distinct within a token. priority: (tokens * k,), of each
    request in the trace's order; with a window at least 0 and below 2^28. window: tokens looked
    ahead, 0 for none. native: False for the reference, True for C or an error, None for C where it
    is to be had.

    Raises:
        ValueError: shapes that do not belong together, an expert or priority out of range, more
            than 2^28 requests.
        RuntimeError: native is True and there is no native code.
    """
    if trace.ndim != 2 or priority.shape != (trace.size,) or trace.size > MOST_REQUESTS:
        raise ValueError(f"a trace of {trace.shape} does not go with priorities {priority.shape}")
    if trace.size and not (trace.min() >= 0 and trace.max() < experts):
        raise ValueError(f"expert numbers go from 0 to {experts - 1}")
    if window < 0 or (
        window and trace.size and not (priority.min() >= 0 and priority.max() < MOST_REQUESTS)
    ):
        raise ValueError("a window is not negative, and its priorities go from 0 to 2^28")
    library = None if native is False else compiled.load("cache_trace")
    if native and library is None:
        raise RuntimeError("native code was asked for and there is none here; see the log")
    if library is None:
        depths = _reference(trace, priority, experts, window)
    else:
        depths = _native(library, trace, priority, experts, window)
    return np.cumsum(depths)


def _native(
    library: ctypes.CDLL, trace: Integers, priority: Integers, experts: int, window: int
) -> Counts:
    requests = np.ascontiguousarray(trace, dtype=np.int32)
    ranks = np.ascontiguousarray(priority, dtype=np.int64)
    depths = np.zeros(experts, dtype=np.int64)
    failed = library.cache_trace(
        ctypes.c_void_p(requests.ctypes.data),
        *map(ctypes.c_int64, requests.shape),
        ctypes.c_void_p(ranks.ctypes.data),
        ctypes.c_int64(experts),
        ctypes.c_int64(min(window, len(requests))),
        ctypes.c_void_p(depths.ctypes.data),
    )
    if failed:
        raise MemoryError("no memory for the stack of a layer's experts")
    return depths


def _reference(trace: Integers, priority: Integers, experts: int, window: int) -> Counts:
    tokens: list[list[int]] = trace.tolist()
    ranks = iter(priority.tolist())
    key, own, stack = [0] * experts, [0] * experts, list[int]()
    depths = np.zeros(experts, dtype=np.int64)
    _add(key, [x for token in tokens[:window] for x in token], COUNT)
    for t, token in enumerate(tokens):
        if window:
            _add(key, token, IN_USE - COUNT)
            _add(key, tokens[t - 1] if t else [], -IN_USE)
            _add(key, tokens[t + window] if t + window < len(tokens) else [], COUNT)
        for x in token:
            rank = next(ranks)
            key[x] += rank - own[x]
            own[x] = rank
            depth = _touch(stack, key, x)
            if depth is not None:
                depths[depth] += 1
    return depths


def _add(key: list[int], experts: list[int], amount: int) -> None:
    for x in experts:
        key[x] += amount


def _touch(stack: list[int], key: list[int], x: int) -> int | None:
    """Depth at which x was found; it is on top afterwards."""
    carry = x
    for d, met in enumerate(stack):
        if met == x:
            stack[d] = carry
            return d
        if d == 0 or key[met] < key[carry]:
            stack[d], carry = carry, met
    stack.append(carry)
    return None
