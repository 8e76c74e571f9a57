"""Significance of experts' input channels, of experts, and how both change between datasets.

For expert e of a layer, dataset l and input channel c of one of its projections W (out, in):

    s_lec = mean over the tokens of l routed to e of |x_c|  *  ||W[:, c]||_2  *  share_le
    S_le  = sum_c,projection s_lec / sum_e,c,projection s_lec    (an expert's share of its layer)

share_le is the part of the layer's routed slots of l that e gets, so that s_lec is, up to a factor
common to the layer and the dataset, the sum over tokens of ||x_c W[:, c]||, the size of what
channel c adds to the projection's output. Channels, then experts, then their joint distribution
over datasets are the stages of MoQa and DynaMo. Those systems do not publish a formula for the
significance of a channel nor for its change: the formulas here are ours.

A dataset that sent no token through a layer has significance 0 everywhere in it. It says nothing
about the layer and is left out wherever datasets are compared. Left out on purpose: correlation
between channels, and the gate weights (`rankings` shows what gate mass would say).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitnest.errors import DataError, RecipeError

Array = NDArray[np.float64]

ROUNDING = 1e-12  # of a channel's own share: a smaller change between datasets is float64 noise


def finite(values: ArrayLike, name: str, axes: str, *, signed: bool = False) -> Array:
    """`values` as float64 with one axis per letter of `axes`.

    signed: whether negative numbers are allowed.

    Raises:
        DataError: another number of axes, a value that is not finite, or a forbidden sign.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(axes):
        raise DataError(
            f"{name} has shape {array.shape}, needs the axes ({', '.join(axes)})",
            where="distribution analysis",
            hint="merge or collect the statistics again",
        )
    wrong = ~np.isfinite(array) if signed else ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"{name} holds {array[place]} at {place} of the axes ({', '.join(axes)})",
            where="distribution analysis",
            hint="an expert without tokens has a mean of 0; collect the statistics again",
        )
    return array


def same(sizes: Mapping[str, int], axis: str) -> None:
    """Refuse arrays that differ in the length of an axis they share.

    Raises:
        DataError: they differ.
    """
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"arrays differ in their number of {axis}: {found}",
            where="distribution analysis",
            hint="use statistics of one model and one set of datasets",
        )


def channel_significance(mean_abs: ArrayLike, norms: ArrayLike, share: ArrayLike) -> Array:
    """s_lec (L, E, C) of one projection of a layer's experts; see above. Ours.

    mean_abs: (L, E, C) mean of |x_c| over the tokens routed to the expert, 0 without tokens.
    norms: (E, C) Euclidean norms of the weight's columns, ||W[:, c]||_2.
    share: (L, E) share of the dataset's routed slots, 0..1.

    Raises:
        DataError: shapes that do not fit, numbers that are negative or not finite.
    """
    x = finite(mean_abs, "mean |x|", "LEC")
    w = finite(norms, "column norms", "EC")
    g = finite(share, "routing share", "LE")
    same({"mean |x|": x.shape[0], "routing share": g.shape[0]}, "datasets")
    same({"mean |x|": x.shape[1], "norms": w.shape[0], "routing share": g.shape[1]}, "experts")
    same({"mean |x|": x.shape[2], "norms": w.shape[1]}, "channels")
    return x * w[None] * g[:, :, None]


def expert_significance(channels: Mapping[str, ArrayLike]) -> Array:
    """S_le (L, E): each expert's share of its layer's significance, per dataset.

    channels: projection -> (L, E, C of that projection), as from `channel_significance`.
    Rows sum to 1; the row of a dataset without tokens in this layer is 0.

    Raises:
        DataError: no projection, or shapes that do not fit.
    """
    if not channels:
        raise DataError("a layer without projections has no significance")
    sums = {p: finite(s, f"significance of {p}", "LEC").sum(2) for p, s in channels.items()}
    same({p: s.shape[0] for p, s in sums.items()}, "datasets")
    same({p: s.shape[1] for p, s in sums.items()}, "experts")
    return _shares(np.sum(list(sums.values()), axis=0))


@dataclass(frozen=True)
class Joint:
    """Expert significance over datasets, each dataset counting the same; all (E,).

    mean: of the shares, sums to 1. deviation: standard deviation of the shares over datasets.
    dynamics: see `dynamics`. All 0 where no dataset has tokens.
    """

    mean: Array
    deviation: Array
    dynamics: Array


def joint_significance(significance: ArrayLike) -> Joint:
    """How the expert significance (L, E) of one layer is spread over the datasets that reach it.

    Raises:
        DataError: as `finite`.
    """
    s = _reached(finite(significance, "expert significance", "LE"))
    if not len(s):
        nothing = np.zeros(s.shape[1])
        return Joint(nothing, nothing, nothing)
    return Joint(s.mean(0), s.std(0), dynamics(s))


def dynamics(significance: ArrayLike) -> Array:
    """Change of each expert's significance between datasets, (L, E) -> (E,) in 0..1. Ours.

        (max_l S_le - min_l S_le) / (max_l S_le + min_l S_le)

    It is (r - 1) / (r + 1) of the ratio r between the dataset that needs the expert most and the
    one that needs it least: 0 when all agree, 1/2 at three to one, 1 when some dataset never uses
    it. So small experts and large ones compare, and datasets may swap places. The price: a rare
    expert's few tokens make it look dynamic; read it beside the mean. 0 for fewer than two
    datasets with tokens and for an expert that none uses.

    Raises:
        DataError: as `finite`.
    """
    s = _reached(finite(significance, "expert significance", "LE"))
    if len(s) < 2:
        return np.zeros(s.shape[1])
    high, low = s.max(0), s.min(0)
    return np.divide(high - low, high + low, out=np.zeros_like(high), where=high > 0)


@dataclass(frozen=True)
class DynamicChannel:
    """One input channel of one expert. change: of its share of its layer between two datasets."""

    layer: int
    expert: int
    projection: str
    channel: int
    change: float


@dataclass(frozen=True)
class DynamicChannels:
    """share: of all channels asked for. total: channels there are. records: largest change first,
    ties by layer, expert, projection and channel."""

    share: float
    total: int
    records: tuple[DynamicChannel, ...]

    def section(self, limit: int = 100) -> dict[str, Any]:
        """The report's `dynamic_channels`: all counted, the strongest `limit` listed."""
        listed = [dict(vars(record)) for record in self.records[:limit]]
        return {"share": self.share, "count": len(self.records), "list": listed}


def dynamic_channels(
    channels: Mapping[tuple[int, str], ArrayLike], share: float = 0.01
) -> DynamicChannels:
    """The channels of all experts whose significance changes most between datasets. Ours.

    channels: (layer, projection) -> (L, E, C), as from `channel_significance`. Significance is
    divided by its total over the layer, per dataset, and a channel's change is the largest of
    these shares less the smallest: absolute, so that a channel has to matter somewhere.
    share: of all channels, rounded to the nearest count. Channels that do not change are never
    taken, so there are none with one dataset.

    Raises:
        RecipeError: a share outside 0..1.
        DataError: shapes that do not fit, numbers that are negative or not finite.
    """
    if not 0 <= share <= 1:
        raise RecipeError(
            f"a share of {share} dynamic channels is not between 0 and 1",
            hint="0.01 keeps one channel in a hundred",
        )
    places: list[tuple[int, list[str], list[int]]] = []  # layer, projections, widths
    changes: list[Array] = []  # (E, sum of widths), flat order: expert, projection, channel
    for layer in sorted({layer for layer, _ in channels}):
        names = sorted(p for number, p in channels if number == layer)
        parts = [finite(channels[layer, p], f"layer {layer} {p}", "LEC") for p in names]
        same({p: s.shape[0] for p, s in zip(names, parts, strict=True)}, "datasets")
        same({p: s.shape[1] for p, s in zip(names, parts, strict=True)}, "experts")
        places.append((layer, names, [s.shape[2] for s in parts]))
        changes.append(_change(np.concatenate(parts, axis=2)))
    flat = np.concatenate([c.reshape(-1) for c in changes]) if changes else np.zeros(0)
    chosen = _largest(flat, round(share * flat.size))
    starts = np.cumsum([0, *(c.size for c in changes)])
    layers = np.searchsorted(starts, chosen, side="right") - 1
    records = tuple(
        _record(places[i], int(at - starts[i]), float(flat[at]))
        for i, at in zip(layers, chosen, strict=True)
    )
    return DynamicChannels(share, flat.size, records)


def _record(place: tuple[int, list[str], list[int]], offset: int, change: float) -> DynamicChannel:
    """Name the channel at `offset` in a layer's (experts, all projections' channels)."""
    layer, names, widths = place
    expert, channel = divmod(offset, sum(widths))
    for name, width in zip(names, widths, strict=True):
        if channel < width:
            return DynamicChannel(layer, expert, name, channel, change)
        channel -= width
    raise AssertionError("offset within the layer")


def _change(s: Array) -> Array:
    """(L, E, C) of one layer -> (E, C) largest less smallest share, 0 where it is rounding."""
    shares = _reached(_shares(s.reshape(len(s), s.shape[1] * s.shape[2])))
    if len(shares) < 2:
        return np.zeros(s.shape[1:])
    high, low = shares.max(0), shares.min(0)
    change = high - low
    return np.where(change > ROUNDING * high, change, 0.0).reshape(s.shape[1:])


def _largest(values: Array, count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest positive values, largest first, ties by index."""
    count = min(count, int(np.count_nonzero(values)))
    if not count:
        return np.zeros(0, dtype=np.intp)
    threshold = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)[: count - above.size]
    found = np.concatenate([above, level])
    return found[np.argsort(-values[found], kind="stable")]


def _shares(s: Array) -> Array:
    """Rows (datasets) divided by their sums; a row of zeros stays."""
    total = s.sum(1, keepdims=True)
    return np.divide(s, total, out=np.zeros_like(s), where=total > 0)


def _reached(s: Array) -> Array:
    """The rows of datasets that sent tokens through the layer."""
    return s[s.any(axis=1)]
