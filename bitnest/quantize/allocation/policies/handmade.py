"""handmade: what an experienced person writes by hand for a Mixture-of-Experts.

Attention, shared experts, embedding and head are small and read by every token: they get three bits
more than the experts. The experts (in dense models: the MLPs) of the first and the last block get
one bit more than the others. Routers stay as they are. The widest such plan that fits is taken;
what is left goes towards the next: a bit to attention and its like, then to the first and last
block, then, evenly spread, to the rest. (The same idea is in llama.cpp's K mixes; the steps here
are ours.)
"""

from __future__ import annotations

import numpy as np

from bitnest.quantize.allocation.policies.common import Evidence, Purse, richest, spread

BULK = ("expert", "mlp")
PROTECTED, ENDS = 3, 1  # bits above the rest


def handmade(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """Protect what is small and shared.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    menu = evidence.menu
    bulk = np.array([menu.kinds[k] in BULK for k in menu.kind])
    layers = np.array([item[0].layer for item in menu.items])
    inner = layers[bulk] if bulk.any() else layers
    ends = bulk & ((layers == inner.min()) | (layers == inner.max()))
    lift = np.where(bulk, np.where(ends, ENDS, 0), PROTECTED)
    plans = [evidence.at_width(np.minimum(8, low + lift)) for low in range(1, 9)]
    start = richest(evidence, cost, budget, plans)
    order = spread(len(lift))
    purse = Purse(evidence, cost, budget, start)
    return purse.settle(np.concatenate([order[(lift == x)[order]] for x in (PROTECTED, ENDS, 0)]))
