"""Experts that one domain uses much more than another, and experts that compute alike.

Per layer and expert, with share_l the part of dataset l's routed slots that the expert gets:

    difference = max_l share_l - min_l share_l = max over pairs of datasets |share_a - share_b|

An absolute difference is the part of the layer's work that moves, so experts found this way are
those whose loss should hurt one domain and spare the other; whether it does is for a measurement.
Likeness of experts is the cosine between their mean outputs, one of the signals for merging. Which
experts are chosen together is counted elsewhere (coactivation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bitnest.calibrate.distribution.significance import Array, finite, same


def domain_experts(
    shares: Mapping[int, ArrayLike], labels: Sequence[str], limit: int | None = 20
) -> list[dict[str, Any]]:
    """The report's `domains`: the `limit` experts (None: all) of largest difference, sorted.

    shares: layer -> (L, E) shares of each label's routed slots. Ties are in order of layer and
    expert. `label` uses the expert most, `other` least. A label without tokens in a layer is not
    compared there and its share is None. Experts that all labels use alike are left out, so with
    one label the list is empty.

    Raises:
        DataError: another number of labels, shares that are negative or not finite.
    """
    found = []
    for layer in sorted(shares):
        share = finite(shares[layer], f"layer {layer} share", "LE")
        same({f"layer {layer} share": len(share), "names": len(labels)}, "labels")
        seen = np.flatnonzero(share.any(axis=1))
        if len(seen) < 2:
            continue
        high, low = seen[share[seen].argmax(0)], seen[share[seen].argmin(0)]
        experts = np.arange(share.shape[1])
        difference = share[high, experts] - share[low, experts]
        for e in np.flatnonzero(difference).tolist():
            found.append(
                {
                    "layer": layer,
                    "expert": e,
                    "label": labels[high[e]],
                    "share": {
                        name: float(share[i, e]) if i in seen else None
                        for i, name in enumerate(labels)
                    },
                    "difference": float(difference[e]),
                    "other": labels[low[e]],
                }
            )
    found.sort(key=lambda record: -record["difference"])  # stable: layer, expert
    return found[:limit]


def output_similarity(mean_outputs: ArrayLike) -> Array:
    """Cosines (E, E) between experts' mean outputs (E, H), -1..1, symmetric.

    An expert whose mean output is 0, as one without tokens has, is like none, itself included: its
    row and column are 0, so that nothing is merged for want of data.

    Raises:
        DataError: outputs that are not finite.
    """
    y = finite(mean_outputs, "mean outputs", "EH", signed=True)
    largest = np.abs(y).max(axis=1, keepdims=True, initial=0.0)
    live = largest > 0
    unit = np.divide(y, largest, out=np.zeros_like(y), where=live)  # keeps squares in range
    norm = np.sqrt(np.square(unit).sum(1, keepdims=True))
    np.divide(unit, norm, out=unit, where=live)
    cosine = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(cosine, live[:, 0].astype(np.float64))
    return np.asarray((cosine + cosine.T) / 2, dtype=np.float64)
