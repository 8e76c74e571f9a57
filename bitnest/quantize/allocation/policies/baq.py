"""baq: BAQ's closed form, rounded to the widths there are.

With loss_i = c_i 2^(-2 R_i) and a mean width, every item ends at an equal loss per weight,

    R_i = mean + 1/2 log2( (c_i / n_i) / geometric mean ),  clipped to the widths there are

(`relaxation`). c_i is fitted to the H-weighted output error, BAQ's own measure, which knows no
gradient. Widths are rounded down; what is left raises those that lost most by it.
"""

from __future__ import annotations

import numpy as np

from bitnest.quantize.allocation.policies.common import Evidence, Purse
from bitnest.quantize.allocation.relaxation import equal_slope_widths, level


def baq(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """Equal loss everywhere.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    menu = evidence.menu
    rounded = np.round(menu.widths)
    low = np.array([rounded[steps[0]] for steps in evidence.ladder])
    high = np.array([min(8, rounded[steps[-1]]) for steps in evidence.ladder])
    c = np.array([
        level(evidence.noise[i, steps], rounded[steps]) for i, steps in enumerate(evidence.ladder)
    ])  # fmt: skip
    rows = np.arange(len(c))
    lower, upper = float(low.min()), 8.0
    for _ in range(40):  # the mean width whose rounded plan costs the budget
        middle = (lower + upper) / 2
        widths = equal_slope_widths(c, menu.numel, middle, low, high)
        spent = int(cost[rows, evidence.at_width(np.floor(widths + 1e-9))].sum())
        lower, upper = (middle, upper) if spent <= budget else (lower, middle)
    widths = equal_slope_widths(c, menu.numel, lower, low, high)
    start = evidence.at_width(np.floor(widths + 1e-9))
    order = np.argsort(-(widths - np.floor(widths + 1e-9)), kind="stable")
    return Purse(evidence, cost, budget, start).settle(order)
