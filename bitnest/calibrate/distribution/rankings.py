"""Rankings of a layer's experts side by side, and how far they agree.

The literature disagrees on what makes an expert matter: how often it is chosen, the gate weight it
gets, the size of what it adds (REAP), the energy of its inputs (trace of the Hessian) or what the
loss minds (Fisher). Two rankings agree by Spearman's coefficient, Pearson's of their ranks r:

    rho = sum_e (r_e - r') (q_e - r') / sqrt(sum_e (r_e - r')^2  sum_e (q_e - r')^2),  r' = (E+1)/2

with the average of their ranks for experts of equal value. A ranking that is missing, or gives
every expert the same value, agrees with nothing, itself included: None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bitnest.calibrate.distribution.significance import Array, finite, same
from bitnest.errors import DataError

NAMES = ("frequency", "gate mass", "REAP", "Hessian trace", "Fisher")

Matrix = list[list[float | None]]


def average_ranks(values: ArrayLike) -> Array:
    """Ranks 1..E of values (E,), the smallest first; equal values share the mean of their ranks.

    Raises:
        DataError: values that are not finite.
    """
    x = finite(values, "ranking", "E", signed=True)
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where.reshape(-1)]


def spearman(a: ArrayLike | None, b: ArrayLike | None) -> float | None:
    """Rank correlation of two rankings (E,), -1..1; None where one is missing or constant.

    Raises:
        DataError: different lengths, or values that are not finite.
    """
    if a is None or b is None:
        return None
    r, q = average_ranks(a), average_ranks(b)
    same({"one ranking": len(r), "the other": len(q)}, "experts")
    r, q = r - (len(r) + 1) / 2, q - (len(q) + 1) / 2
    spread = float((r @ r) * (q @ q))
    return None if spread == 0 else float(np.clip(r @ q / np.sqrt(spread), -1, 1))


def best_first(values: ArrayLike) -> list[int]:
    """Expert numbers, the largest of values (E,) first, equal ones by number.

    Raises:
        DataError: values that are not finite.
    """
    return np.argsort(-finite(values, "ranking", "E", signed=True), kind="stable").tolist()


def rankings_section(layers: Mapping[int, Mapping[str, ArrayLike | None]]) -> dict[str, Any]:
    """The report's `rankings`.

    layers: layer -> {one of NAMES: a number per expert (E,), larger is better}; missing ones are
    left out or None, and their order is None. The mean of a correlation is over the layers that
    have it. A constant ranking keeps its order, by expert number.

    Raises:
        DataError: an unknown name, different numbers of experts, values that are not finite.
    """
    matrices: list[Matrix] = []
    shown, top = [], []
    for layer in sorted(layers):
        unknown = sorted(set(layers[layer]) - set(NAMES))
        if unknown:
            raise DataError(
                f"unknown ranking '{unknown[0]}'",
                where=f"layer {layer}",
                hint="known: " + ", ".join(NAMES),
            )
        values = [layers[layer].get(name) for name in NAMES]
        matrix = [[spearman(a, b) for b in values] for a in values]
        matrices.append(matrix)
        shown.append({"layer": layer, "correlation": matrix})
        orders = [None if v is None else best_first(v) for v in values]
        top.append({"layer": layer, "order": dict(zip(NAMES, orders, strict=True))})
    return {"names": list(NAMES), "mean": _mean(matrices), "layers": shown, "top": top}


def _mean(matrices: list[Matrix]) -> Matrix:
    """Entry by entry over the layers where it is defined."""
    mean: Matrix = []
    for i in range(len(NAMES)):
        cells = [[m[i][j] for m in matrices if m[i][j] is not None] for j in range(len(NAMES))]
        mean.append([float(np.mean(np.array(c, dtype=np.float64))) if c else None for c in cells])
    return mean
