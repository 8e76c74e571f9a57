"""uniform: one width for all.

The widest that fits; what is left raises items that are spread evenly over the model by one step.
"""

from __future__ import annotations

import numpy as np

from bitnest.quantize.allocation.policies.common import Evidence, Purse, richest, spread


def uniform(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """One width for all.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    plans = [evidence.at_width(width) for width in range(17)]
    start = richest(evidence, cost, budget, plans)
    return Purse(evidence, cost, budget, start).settle(spread(len(start)))
