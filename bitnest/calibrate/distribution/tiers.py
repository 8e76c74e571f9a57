"""Fuzzy c-means tiers: experts grouped by significance into INT8, INT6, INT4 and INT2.

Points x_i (one per expert), centres v_k, Euclidean distances d_ik, fuzzifier m > 1:

    u_ik = 1 / sum_j (d_ik / d_ij)^(2 / (m - 1))       v_k = sum_i u_ik^m x_i / sum_i u_ik^m

alternate until no centre moves (Bezdek, 1981). MoQa and DynaMo use four clusters; m = 2 is ours.
Centres in descending order get the given widths; a point goes to the centre it belongs to most,
ties to the lower precision.

Made definite here, ours: the start is the quantiles of the distinct points, so neither chance nor
the order of the points matters; a point on centres belongs to those in equal parts; with fewer
distinct points than clusters each is a centre and the lowest one's is repeated, so that the tie
rule gives it the lowest precision (equal experts all get it: nothing sets one above another).

Left out on purpose: a byte budget. Clustering has none, which makes it a baseline for an allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitnest.calibrate.distribution.significance import Array, finite
from bitnest.errors import DataError, RecipeError

BITS = (8, 6, 4, 2)
DIGITS = 12  # of points over the largest: closer ones are equal, the rest is float64 noise
TIE = 1e-8  # memberships closer than this are equal: centres are known to `tolerance` only


@dataclass(frozen=True)
class Tiers:
    """c tiers of N points, tier 0 the most significant.

    centres: (c,) or (c, D) as the points were, descending (by mean coordinate when D > 1).
    memberships: (N, c), rows sum to 1. tiers: (N,) 0..c-1. bits: (c,) width of each tier.
    converged: whether the centres came to rest within the given rounds.
    """

    centres: Array
    memberships: Array
    tiers: NDArray[np.int64]
    bits: tuple[int, ...]
    converged: bool

    def section(self) -> dict[str, Any]:
        """The report's `tiers`; a centre of several coordinates is shown by their mean."""
        centres = self.centres.reshape(len(self.bits), -1).mean(1)
        counts = np.bincount(self.tiers, minlength=len(self.bits))
        return {"centres": centres.tolist(), "bits": list(self.bits), "counts": counts.tolist()}


def fuzzy_tiers(
    points: ArrayLike,
    bits: Sequence[int] = BITS,
    *,
    fuzzifier: float = 2.0,
    tolerance: float = 1e-10,
    rounds: int = 10_000,
) -> Tiers:
    """Tiers of points (N,), experts' mean significance, or (N, D), their significance per dataset.

    One coordinate gives tiers that follow significance. Several may group experts by the dataset
    they serve instead: centres of almost equal mean then get different widths.

    bits: one width per cluster, descending. tolerance: the largest move of a centre, as a part of
    the points' range, that counts as rest. rounds: updates at most; `Tiers.converged` says.

    Raises:
        DataError: no points, or points that are not finite.
        RecipeError: no or ascending widths, a fuzzifier that is not above 1.
    """
    x = finite(points, "points", "N" if np.ndim(points) == 1 else "ND", signed=True)
    if not x.size:
        raise DataError("no points to cluster", hint="tiers need a model with experts")
    _check(bits, fuzzifier)
    size = np.abs(x).max() or 1.0
    flat = np.round(x.reshape(len(x), -1) / size, DIGITS)
    distinct, where, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    low, high = flat.min(), flat.max()
    scale = high - low if high > low else 1.0
    unit = (distinct - low) / scale  # one scale for all axes keeps the distances' proportions
    centres, converged = _centres(unit, counts, len(bits), fuzzifier, tolerance, rounds)
    u = memberships(unit, centres, fuzzifier)[where.reshape(-1)]
    tied = u >= u.max(1, keepdims=True) - TIE
    tiers = len(bits) - 1 - tied[:, ::-1].argmax(1)
    centres = ((centres * scale + low) * size).reshape(-1, *x.shape[1:])
    return Tiers(centres, u, tiers, tuple(bits), converged)


def memberships(points: Array, centres: Array, fuzzifier: float) -> Array:
    """u_ik (N, c) of points (N, D) in clusters around centres (c, D); rows sum to 1."""
    d2 = np.square(points[:, None] - centres[None]).sum(2)
    nearest = d2.min(1, keepdims=True)
    on_centre = nearest == 0
    # (nearest / d)^(2/(m-1)) lies in 0..1, so that no ratio overflows
    ratio = np.divide(nearest, d2, out=np.ones_like(d2), where=~on_centre & (d2 > 0))
    u = np.where(on_centre, d2 == 0, ratio ** (1 / (fuzzifier - 1)))
    return np.asarray(u / u.sum(1, keepdims=True), dtype=np.float64)


def _centres(
    x: Array, counts: NDArray[np.intp], c: int, m: float, tolerance: float, rounds: int
) -> tuple[Array, bool]:
    """Centres (c, D) of distinct points x (n, D) that occur `counts` times, descending."""
    order = _descending(x)
    if len(x) <= c:
        return x[order[np.minimum(np.arange(c), len(x) - 1)]], True
    v = x[order[((np.arange(c) + 0.5) * len(x) / c).astype(int)]]
    converged = False
    for _ in range(rounds):
        weight = memberships(x, v, m) ** m * counts[:, None]
        total = weight.sum(0)[:, None]
        # a fuzzifier near 1 can leave a centre without any weight: it stays
        moved = np.divide(weight.T @ x, total, out=v.copy(), where=total > 0)
        converged = bool(np.abs(moved - v).max() <= tolerance)
        v = moved
        if converged:
            break
    return v[_descending(v)], converged


def _descending(x: Array) -> NDArray[np.intp]:
    """Order of points (n, D) by mean coordinate, then by the first coordinate, the second ..."""
    return np.lexsort([*(-x.T[::-1]), -x.mean(1)])


def _check(bits: Sequence[int], fuzzifier: float) -> None:
    if not bits or list(bits) != sorted(bits, reverse=True):
        raise RecipeError(f"tiers of {list(bits)} bits are not one or more descending widths")
    if not fuzzifier > 1:
        raise RecipeError(
            f"a fuzzifier of {fuzzifier} is not above 1",
            hint="2 is usual; towards 1 the clusters become hard",
        )
