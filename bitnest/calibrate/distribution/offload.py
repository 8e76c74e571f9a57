"""Whether offloading suits a model: the report's section, and ties between experts.

    H   = sum_i p(i) sum_j -p(j|i) log2 p(j|i), i chosen by a token in one MoE layer, j in the next;
          each pair counts once. From log2 k2 (the same k2 experts always) to log2 E_next
    phi = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j)), n_ij tokens that use both

Routing consistency and hit rates are in `caches`. A trace is a matrix (tokens, k) of expert numbers
of one layer, its sequences one after another; `starts` says where each begins. All of this file is
ours, with textbook formulas.

Left out: traffic in bytes, prefetch accuracy, placement, and confidence intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bitnest.calibrate.distribution.caches import (
    POLICIES,
    RATIOS,
    WINDOWS,
    Floats,
    check_trace,
    hit_rates,
    sch,
    sequences,
    srp,
)
from bitnest.errors import BitnestError
from bitnest.kernels.cache_trace import Counts, Integers

TOKENS = 32768  # analysed at most
SIZES = 64  # cache sizes reported, or one or two more


def transition_counts(
    trace: Integers, following: Integers, experts: int, next_experts: int
) -> Counts:
    """Pairs of experts that a token chose in two consecutive MoE layers, (experts, next_experts).

    trace: (tokens, k). following: (tokens, k2), of the same tokens.

    Raises:
        BitnestError: not traces, or not of the same number of tokens.
    """
    check_trace(trace, experts)
    check_trace(following, next_experts)
    if len(trace) != len(following):
        raise BitnestError(
            f"traces of {len(trace)} and {len(following)} tokens",
            hint="trace both layers over the same tokens",
        )
    found = np.zeros(experts * next_experts, dtype=np.int64)
    for this in trace.astype(np.int64).T * next_experts:
        for other in following.astype(np.int64).T:
            found += np.bincount(this + other, minlength=len(found))
    return found.reshape(experts, next_experts)


def transitions(counts: Counts) -> Floats:
    """p(next | this): rows sum to 1, or are 0 for an expert without tokens. counts: (E, E_next)."""
    mass = counts.sum(axis=1, keepdims=True)
    return counts / np.maximum(mass, 1)


def transition_entropy(counts: Counts) -> float:
    """H(next | this) in bits, rows weighted by their mass; NaN without any. counts: (E, E_next)."""
    if counts.sum() == 0:
        return float("nan")
    p = transitions(counts)
    bits = -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(axis=1)
    return float(bits @ counts.sum(axis=1) / counts.sum())


def coactivation(trace: Integers, experts: int) -> Counts:
    """Tokens that use both of two experts, (experts, experts); the diagonal: that use one.

    Raises:
        BitnestError: not a trace (tokens, k).
    """
    return transition_counts(trace, trace, experts, experts)


def phi(counts: Counts, tokens: int) -> Floats:
    """Phi coefficients of coactivation, (E, E), -1..1; NaN beside an expert that none or all use.

    counts: as `coactivation` gives them for `tokens` tokens. With a fixed k, independent experts
    have about -1 / (E - 1), not 0.
    """
    n = counts.diagonal().astype(np.float64)
    spread = np.sqrt(n * (tokens - n))
    scale = np.outer(spread, spread)
    top = tokens * counts.astype(np.float64) - np.outer(n, n)
    return np.divide(top, scale, where=scale > 0, out=np.full_like(top, np.nan)).clip(-1, 1)


def offloading(
    traces: Mapping[int, Integers],
    experts: Mapping[int, int],
    starts: Sequence[int] | Integers = (0,),
    limit: int = TOKENS,
    native: bool | None = None,
) -> dict[str, Any]:
    """The report's section: SRP, SCH, hit rates and transition entropy, per layer and mean.

    traces: (tokens, k) by layer, of the same tokens. experts: how many a layer has. starts: where
    sequences begin, ascending from 0. limit: tokens analysed at most, whole sequences at even
    distances (the beginning of one that is longer). native: as for `stack_hits`.

    Means are over layers. A cache larger than a layer evicts nothing there; an SCH that some layer
    is too small for is None, and so is `top_k` where layers differ. The last layer has no
    transitions.

    Raises:
        BitnestError: no layers or tokens, not traces, or of different numbers of tokens.
    """
    _check_layers(traces, experts, limit)
    layers = sorted(traces)
    chosen, begins = _choose(starts, len(traces[layers[0]]), limit)
    cut = {i: np.ascontiguousarray(traces[i][chosen]) for i in layers}
    widths = {trace.shape[1] for trace in cut.values()}
    srps = {i: srp(cut[i], experts[i], WINDOWS, begins) for i in layers}
    entropies = [
        transition_entropy(transition_counts(cut[i], cut[j], experts[i], experts[j]))
        for i, j in pairwise(layers)
    ]
    return {
        "top_k": widths.pop() if len(widths) == 1 else None,
        "tokens": len(chosen),
        "windows": list(WINDOWS),
        "srp": [{"layer": i, "values": _plain(values)} for i, values in srps.items()],
        "srp_mean": _mean(srps.values()),
        "sch": _sch_section(cut, experts, native),
        "hit_rates": _hits_section(cut, experts, native),
        "transition_entropy": [*entropies, None],
    }


def _check_layers(traces: Mapping[int, Integers], experts: Mapping[int, int], limit: int) -> None:
    if not traces or limit < 1:
        raise BitnestError(
            f"offloading of {len(traces)} layers and at most {limit} tokens",
            hint="trace at least one MoE layer and one token",
        )
    for layer, trace in traces.items():
        where = f"routing trace of layer {layer}"
        if layer not in experts:
            raise BitnestError("a layer of an unknown number of experts", where=where)
        check_trace(trace, experts[layer], where)
    lengths = sorted({len(trace) for trace in traces.values()})
    if len(lengths) > 1:
        raise BitnestError(
            f"layers with different numbers of tokens: {lengths}",
            where="routing traces",
            hint="trace all layers over the same tokens",
        )


def _sch_section(
    cut: Mapping[int, Integers], experts: Mapping[int, int], native: bool | None
) -> dict[str, Any]:
    found = {i: sch(trace, experts[i], native=native) for i, trace in cut.items()}
    return {
        "rho": list(RATIOS),
        "m": list(WINDOWS),
        "values": _mean(found.values()),
        "layers": [{"layer": i, "values": _plain(values)} for i, values in found.items()],
    }


def _hits_section(
    cut: Mapping[int, Integers], experts: Mapping[int, int], native: bool | None
) -> dict[str, Any]:
    sizes = _sizes(max(experts[i] for i in cut))
    found = {i: hit_rates(trace, experts[i], sizes, native) for i, trace in cut.items()}
    return {
        "sizes": sizes,
        **{name: _mean(rates[name] for rates in found.values()) for name in POLICIES},
        "layers": [
            {"layer": i, **{name: _plain(rates[name]) for name in POLICIES}}
            for i, rates in found.items()
        ],
    }


def _choose(starts: Sequence[int] | Integers, tokens: int, limit: int) -> tuple[Counts, Counts]:
    """Numbers of at most `limit` tokens, and where the chosen sequences begin among them."""
    spans = sequences(starts, tokens)
    for count in range(len(spans), 0, -1):
        some = spans[np.arange(count) * len(spans) // count]
        lengths = some[:, 1] - some[:, 0]
        if lengths.sum() <= limit or count == 1:
            break
    chosen = np.concatenate([np.arange(first, last) for first, last in some])[:limit]
    return chosen, np.cumsum(lengths) - lengths


def _sizes(experts: int) -> list[int]:
    """1, multiples of a step, and `experts`; every size up to SIZES experts."""
    step = -(-experts // SIZES)
    return sorted({1, *range(step, experts, step), experts})


def _mean(layers: Iterable[Floats]) -> list[Any]:
    return _plain(np.mean(list(layers), axis=0))


def _plain(values: Floats) -> list[Any]:
    """Nested lists, None for NaN."""
    found = values.astype(object)
    found[np.isnan(values)] = None
    return list(found.tolist())
