"""bitnest: the plan of least predicted KL, calibrated on measured probes (`objective`)."""

from __future__ import annotations

import numpy as np

from bitnest.quantize.allocation.policies.common import Evidence


def bitnest(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """Least predicted KL over every format on the menu.

    Raises:
        BudgetError: the cheapest choices are over the budget.
    """
    return evidence.objective.minimise(cost, budget, exact=evidence.exact).choice
