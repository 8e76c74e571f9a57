"""The continuous relaxation: widths as real numbers, in closed form (BAQ).

    minimise  sum_i c_i 2^(-2 R_i)   subject to  sum_i n_i R_i = n mean,  low_i <= R_i <= high_i

Where no limit binds, the derivative per weight is equal everywhere:

    R_i = mean + 1/2 log2( (c_i / n_i) / geometric mean of (c / n), weighted by n )

With n_i equal this is BAQ's formula. Limits are met by bisection of the common level. Its loss is
a sanity check of the allocator: what widths of a fraction of a bit would reach, if loss fell by
four with every bit.
"""

from __future__ import annotations

import numpy as np

TINY = 1e-300


def level(losses: np.ndarray, widths: np.ndarray) -> float:
    """c of loss = c 2^(-2 R), fitted to losses (F,) at widths (F,) in logarithms."""
    known = np.maximum(losses, TINY)
    return float(np.exp(np.mean(np.log(known) + 2 * np.log(2) * widths)))


def equal_slope_widths(
    c: np.ndarray, numel: np.ndarray, mean: float, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """R_i (N,) of level c_i (N,) and n_i weights (N,), at that mean or the nearest the limits
    allow."""
    score = 0.5 * np.log2(np.maximum(c, TINY) / numel)
    share = numel / numel.sum()
    bottom, top = float((low - score).min()), float((high - score).max())
    for _ in range(200):
        middle = (bottom + top) / 2
        reached = float(np.clip(score + middle, low, high) @ share)
        bottom, top = (middle, top) if reached < mean else (bottom, middle)
    return np.asarray(np.clip(score + top, low, high))


def relaxed_loss(c: np.ndarray, widths: np.ndarray) -> float:
    """sum_i c_i 2^(-2 R_i)."""
    return float((c * 4.0 ** (-widths)).sum())
