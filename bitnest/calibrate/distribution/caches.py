"""Local routing consistency of one layer: SRP, SCH, and hit rates of LRU, LFU and Belady's policy.

    SRP(m) = max_a 2 matches / (predictions + actual)
             f(e,t) activations of expert e in tokens [t, t+m); matches = sum of f where f >= a,
             predictions = m * #{f >= a}, actual = sum of f: the best F1 of keeping, for a window,
             the experts that reach a
    LRU    evicts the expert whose last request is oldest
    LFU    ... the one with the fewest requests since the trace began, of equals the oldest
    Belady ... the one whose next request is farthest: the most hits of all that load what they miss
    SCH    ... of those the present token does not use, the one with the fewest requests in the
           next m tokens, of equals the oldest; a cache of rho * top_k experts
    hit rate = hits / (tokens * k)

A trace is a matrix (tokens, k) of expert numbers, its sequences one after another. All caches see
one sequence of requests: token after token, within a token in the trace's order (the router's).
They stay as they are from sequence to sequence, as a server's would, and are empty only at first,
so a cache of all experts misses each once. SRP's windows cross no start of a sequence.

SRP and SCH are from "Not All Models Suit Expert Offloading" (arXiv 2505.16056). As in the code
published with it, SRP's windows overlap (every t whose m tokens lie in one sequence) and one
threshold a holds for all experts and windows of a layer. Ours are SCH's m tokens behind the present
one, the empty cache, and its life through sequences: that code counts the present token as the
first of the m, does not count the misses that fill the cache, and starts anew with every sequence.
Ours too: LFU's counts outlive an eviction, which makes one pass serve all sizes.

Left out: prefetching, experts of several layers in one cache, and the cost of a miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitnest.errors import BitnestError
from bitnest.kernels.cache_trace import COUNT, MOST_REQUESTS, Counts, Integers, stack_hits

Floats = NDArray[np.float64]

POLICIES = ("lru", "lfu", "belady")
WINDOWS = (4, 16, 64, 256)  # m, tokens
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)  # rho, cached experts per expert that a token uses


def check_trace(trace: Integers, experts: int, where: str = "routing trace") -> None:
    """Raise unless the trace is (tokens, k) integers 0..experts-1, distinct within a token.

    Raises:
        BitnestError: it is not, or holds no or more than 2^28 requests.
    """
    hint = "give one row of expert numbers per token, as the router chose them"
    if trace.ndim != 2 or not np.issubdtype(trace.dtype, np.integer):
        what = f"a trace is an integer matrix (tokens, k), not {trace.dtype} {trace.shape}"
    elif not 0 < trace.size <= MOST_REQUESTS:
        what = f"a trace of {trace.size} requests: between 1 and {MOST_REQUESTS} can be analysed"
    elif trace.min() < 0 or trace.max() >= experts:
        what = f"expert numbers {trace.min()}..{trace.max()} in a layer of {experts} experts"
    elif (np.diff(np.sort(trace, axis=1), axis=1) == 0).any():
        what = "a token uses the same expert twice"
    else:
        return
    raise BitnestError(what, where=where, hint=hint)


def priorities(trace: Integers, policy: str) -> Counts:
    """What `stack_hits` needs for a policy of POLICIES, (tokens * k,): higher stays longer.

    Raises:
        BitnestError: no such policy.
    """
    requests = trace.ravel()
    n = len(requests)
    number = np.arange(n)
    if policy == "lru":
        return number
    order = np.argsort(requests, kind="stable")  # expert by expert, each in time
    first = np.diff(requests[order], prepend=-1) != 0
    found = np.empty(n, dtype=np.int64)
    if policy == "lfu":
        found[order] = number - np.maximum.accumulate(np.where(first, number, 0))
        return found * COUNT + number
    if policy == "belady":
        found[order] = np.where(np.append(first[1:], True), n, np.append(order[1:], n))
        return -found
    raise BitnestError(f"no such cache policy: '{policy}'", hint="one of " + ", ".join(POLICIES))


def hit_rates(
    trace: Integers, experts: int, sizes: Sequence[int], native: bool | None = None
) -> dict[str, Floats]:
    """Hit rates of LRU, LFU and Belady's policy: a row (len(sizes),) for each of POLICIES.

    trace: (tokens, k). sizes: experts a cache holds, at least 1; from `experts` on nothing is
    evicted. native: as for `stack_hits`.

    Raises:
        BitnestError: not a trace, or a size below 1.
    """
    check_trace(trace, experts)
    if min(sizes, default=1) < 1:
        raise BitnestError(f"a cache of {min(sizes)} experts", hint="a cache holds 1 or more")
    places = np.minimum(np.asarray(sizes, dtype=np.int64), experts) - 1
    return {
        policy: stack_hits(trace, priorities(trace, policy), experts, 0, native)[places]
        / trace.size
        for policy in POLICIES
    }


def capacity(rho: float, top_k: int) -> int:
    """Whole experts in a cache of rho * top_k (rounded down: what fits)."""
    return math.floor(rho * top_k)


def sch(
    trace: Integers,
    experts: int,
    windows: Sequence[int] = WINDOWS,
    ratios: Sequence[float] = RATIOS,
    native: bool | None = None,
) -> Floats:
    """Segment cache hit rates SCH(m, rho), (len(windows), len(ratios)).

    trace: (tokens, k). windows: m, tokens looked ahead beyond the present one. ratios: rho, at
    least 1, since the present token's experts are not evicted; NaN where rho * k > experts.
    native: as for `stack_hits`.

    Raises:
        BitnestError: not a trace, a window or ratio below 1.
    """
    check_trace(trace, experts)
    if min(windows, default=1) < 1 or min(ratios, default=1) < 1:
        raise BitnestError(
            f"SCH of windows {list(windows)} and cache ratios {list(ratios)}",
            hint="a window is at least 1 token, a ratio at least 1",
        )
    found = np.full((len(windows), len(ratios)), np.nan)
    for row, m in zip(found, windows, strict=True):
        hits = stack_hits(trace, priorities(trace, "lru"), experts, m, native)
        for i, rho in enumerate(ratios):
            if rho * trace.shape[1] <= experts:
                row[i] = hits[capacity(rho, trace.shape[1]) - 1] / trace.size
    return found


def srp(
    trace: Integers,
    experts: int,
    windows: Sequence[int] = WINDOWS,
    starts: Sequence[int] | Integers = (0,),
) -> Floats:
    """Segment routing best performance per window length, (len(windows),); NaN if none fits.

    trace: (tokens, k). windows: m, tokens. starts: where sequences begin, ascending from 0.

    Raises:
        BitnestError: not a trace, a window below 1, starts out of order or range.
    """
    check_trace(trace, experts)
    ends = sequences(starts, len(trace))[:, 1]
    if min(windows, default=1) < 1:
        raise BitnestError(f"windows of {min(windows)} tokens", hint="a window has 1 or more")
    end = np.repeat(ends, np.diff(ends, prepend=0))  # of each token's sequence
    total = np.zeros((len(trace) + 1, experts), dtype=np.int32)  # activations before token t
    np.put_along_axis(total[1:], trace.astype(np.int64), 1, axis=1)
    np.cumsum(total, axis=0, out=total)
    return np.array(
        [_best_f1(total, np.flatnonzero(np.arange(len(end)) + m <= end), m) for m in windows]
    )


def _best_f1(total: Integers, begin: Counts, m: int) -> float:
    """SRP of the windows that begin at some tokens. total: (tokens + 1, E) running counts."""
    if len(begin) == 0:
        return float("nan")
    f = total[begin + m] - total[begin]  # (windows, E)
    number = np.bincount(f.ravel(), minlength=m + 1)
    matches = np.cumsum((number * np.arange(m + 1))[::-1])[::-1]  # by threshold
    predictions = m * np.cumsum(number[::-1])[::-1]
    return float((2 * matches[1:] / (predictions[1:] + matches[0])).max())


def sequences(starts: Sequence[int] | Integers, tokens: int) -> Counts:
    """First token of each sequence and the one after its last, (sequences, 2).

    starts: ascending from 0.

    Raises:
        BitnestError: starts out of order or range.
    """
    begin = np.asarray(starts, dtype=np.int64).ravel()
    found = np.stack([begin, np.append(begin, tokens)[1:]], axis=1)
    if begin[:1].tolist() != [0] or (found[:, 0] >= found[:, 1]).any():
        raise BitnestError(
            f"sequence starts must ascend from 0 and stay below {tokens}, the number of tokens",
            where="routing trace",
            hint="give the place of each sequence's first token in the trace",
        )
    return found
