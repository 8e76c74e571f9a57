"""moqa: MoQa's and DynaMo's clusters of experts.

Experts are clustered by significance (fuzzy c-means, four clusters,
`calibrate/distribution/tiers`); clusters in descending order get INT8, INT6, INT4 and INT2. The
papers give no budget. Here the four widths are lowered together, (8, 6, 4, 2), (7, 5, 3, 2), (6, 5,
3, 2) ..., to the widest pattern that fits, and what is left raises experts by significance [ours].
What is no expert gets the first cluster's width: the papers quantise experts only.
"""

from __future__ import annotations

import numpy as np

from bitnest.calibrate.distribution.tiers import fuzzy_tiers
from bitnest.quantize.allocation.policies.common import Evidence, Purse, richest

PATTERNS = (
    (8, 8, 8, 8), (8, 8, 6, 6), (8, 7, 6, 5), (8, 7, 6, 4), (8, 6, 5, 4), (8, 6, 5, 3),
    (8, 6, 4, 3), (8, 6, 4, 2), (7, 5, 4, 2), (6, 5, 4, 2), (6, 4, 3, 2), (5, 4, 3, 2),
    (4, 4, 3, 2), (4, 3, 3, 2), (4, 3, 2, 2), (3, 3, 2, 2), (3, 2, 2, 2), (2, 2, 2, 2),
    (2, 2, 2, 1), (2, 2, 1, 1), (1, 1, 1, 1),
)  # fmt: skip


def moqa(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """Four clusters of experts by significance.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    tiers = np.zeros(len(evidence.share), dtype=np.int64)
    experts = np.nonzero(np.isfinite(evidence.significance))[0]
    if len(experts):
        tiers[experts] = fuzzy_tiers(evidence.significance[experts], (8, 6, 4, 2)).tiers
    plans = [evidence.at_width(np.array(pattern)[tiers]) for pattern in PATTERNS]
    start = richest(evidence, cost, budget, plans)
    value = np.where(np.isfinite(evidence.significance), evidence.significance, np.inf)
    return Purse(evidence, cost, budget, start).settle(np.argsort(-value, kind="stable"))
