"""frequency: experts that see more tokens get more bits.

A quarter of a layer's experts, those with most tokens, get two bits more than the rest; everything
outside experts gets as many as they do. The widest such plan that fits is taken; what is left
raises experts by their share of tokens. (Frequency is the common first idea for mixed-precision
experts; the grades are ours.)
"""

from __future__ import annotations

import numpy as np

from bitnest.quantize.allocation.policies.common import Evidence, Purse, richest

HOT = 0.25  # of a layer's experts
LIFT = 2  # bits


def frequency(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """More bits to experts with more tokens.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    lift = np.where(_hot(evidence), LIFT, 0)
    plans = [evidence.at_width(np.minimum(8, low + lift)) for low in range(1, 9)]
    start = richest(evidence, cost, budget, plans)
    order = np.argsort(-evidence.share, kind="stable")
    return Purse(evidence, cost, budget, start).settle(order)


def _hot(evidence: Evidence) -> np.ndarray:
    """Items outside experts, and of each layer the experts with most tokens, (N,) bool."""
    hot = np.ones(len(evidence.share), dtype=bool)
    layers: dict[int, dict[int, list[int]]] = {}
    for i, item in enumerate(evidence.menu.items):
        if item[0].expert is not None:
            layers.setdefault(item[0].layer, {}).setdefault(item[0].expert, []).append(i)
    for experts in layers.values():
        ranked = sorted(experts, key=lambda e: -float(evidence.share[experts[e][0]]))
        for expert in ranked[max(1, round(HOT * len(ranked))) :]:
            hot[experts[expert]] = False
    return hot
