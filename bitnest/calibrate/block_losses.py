"""What a block that is left out loses, in the unit of other losses [ours].

Its KL was measured (`prune/block_fates`), and a plan in which nothing else changes is to be
predicted to lose just that. So its loss, counted at one site of the block, is the s at which the
predictor gives that KL, found by bisection: a prediction grows with every loss. Beside other losses
it grows with them as any does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitnest.statistics import Statistics

RANGE = (1e-18, 1e6)  # nats, of a loss
HALVINGS = 100


def measured_blocks(statistics: Statistics) -> dict[int, np.ndarray]:
    """KL by block, (L,), of those that were measured; labels that were not at the others' mean."""
    found = {}
    for item in (statistics.header.get("fates") or {}).get("blocks", ()):
        if item["kl"] is not None:
            values = np.array([np.nan if kl is None else kl for kl in item["kl"]], dtype=float)
            found[item["layer"]] = np.where(np.isnan(values), np.nanmean(values), values)
    return found


def loss_of(kl: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The losses that `predict` gives `kl` for; it grows by label. All (L,)."""
    low, high = (np.full(kl.shape, np.log(end)) for end in RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = predict(np.exp(middle)) > kl
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return np.asarray(np.where(low > np.log(RANGE[0]), np.exp(high), 0.0))
