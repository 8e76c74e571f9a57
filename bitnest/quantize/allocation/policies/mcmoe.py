"""mcmoe: MC-MoE's pre-loading mixed precision (PMQ), one integer program per block.

For the experts i of a block and widths j

    minimise  sum_i phi_i w_i eps_ij      phi: share of tokens, w: mean gate weight,
                                          eps_ij: output error of expert i at j bits, per token

under a mean width, with at least one expert at each of the two higher widths. An expert's three
matrices have one width. The paper has widths {1, 2, 3} for budgets around 2 bits; at other budgets
they are the three around the mean [ours]. What is no expert gets 4 bits, as in the paper, or the
mean rounded up if that is more. phi and w have exponent 1. Rounding leftovers raise experts by
phi w.
"""

from __future__ import annotations

import math

import numpy as np

from bitnest.quantize.allocation.exact import solve_exact
from bitnest.quantize.allocation.policies.common import Evidence, Purse
from bitnest.quantize.allocation.problem import BudgetError, Problem

OTHERS = 4  # bits of what is no expert


def mcmoe(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """An integer program per block over widths of whole experts.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    menu = evidence.menu
    blocks = _experts(evidence)
    inside = [i for experts in blocks.values() for items in experts.values() for i in items]
    mean = _mean_width(evidence, cost, budget)
    choice = evidence.at_width(np.full(len(menu.items), max(OTHERS, math.ceil(mean))))
    rest = np.ones(len(choice), dtype=bool)
    rest[inside] = False
    left = budget - int(cost[np.nonzero(rest)[0], choice[rest]].sum())
    weights = sum(int(menu.numel[i]) for i in inside) or 1
    center = _mean_width(evidence, cost[inside], left, inside) if inside else mean
    widths = [w for w in range(max(1, math.ceil(center) - 1), math.ceil(center) + 2)]
    columns = [evidence.at_width(np.full(len(choice), w)) for w in widths]
    for experts in blocks.values():
        numel = sum(int(menu.numel[i]) for items in experts.values() for i in items)
        _block(evidence, cost, left * numel // weights, list(experts.values()), columns, choice)
    order = np.argsort(-evidence.share * evidence.gate, kind="stable")
    purse = Purse(evidence, cost, budget, choice)
    purse.trim(np.concatenate([np.nonzero(rest)[0], [i for i in order if not rest[i]]]).astype(int))
    purse.fill(order)
    return purse.choice


def _block(
    evidence: Evidence,
    cost: np.ndarray,
    budget: int,
    experts: list[list[int]],
    columns: list[np.ndarray],
    choice: np.ndarray,
) -> None:
    """Settle one block's experts, in place."""
    price = np.array(
        [[sum(int(cost[i, c[i]]) for i in items) for c in columns] for items in experts]
    )
    loss = np.array([
        [sum(evidence.gate[i] * evidence.noise[i, c[i]] for i in items) for c in columns]
        for items in experts
    ])  # fmt: skip
    try:
        picked = solve_exact(Problem(price, loss, budget)).choice
    except BudgetError:
        picked = np.zeros(len(experts), dtype=np.int64)
    for needed in range(1, min(len(columns), len(experts))):  # one expert at each higher width
        if not (picked == needed).any():
            free = [
                e for e in range(len(experts)) if (picked == picked[e]).sum() > 1 or picked[e] == 0
            ]
            gain = {e: loss[e, picked[e]] - loss[e, needed] for e in free}
            if gain:
                picked[max(gain, key=lambda e: gain[e])] = needed
    for e, items in enumerate(experts):
        for i in items:
            choice[i] = columns[int(picked[e])][i]


def _experts(evidence: Evidence) -> dict[int, dict[int, list[int]]]:
    """Layer -> expert -> items."""
    blocks: dict[int, dict[int, list[int]]] = {}
    for i, item in enumerate(evidence.menu.items):
        if item[0].expert is not None:
            blocks.setdefault(item[0].layer, {}).setdefault(item[0].expert, []).append(i)
    return blocks


def _mean_width(
    evidence: Evidence, cost: np.ndarray, budget: int, items: list[int] | None = None
) -> float:
    """The width at which the items would cost the budget, between whole ones."""
    chosen = np.arange(len(evidence.ladder)) if items is None else np.array(items)
    rows = np.arange(len(chosen))
    spent = [float(cost[rows, evidence.at_width(w)[chosen]].sum()) for w in range(1, 9)]
    return float(np.interp(budget, np.maximum.accumulate(spent), np.arange(1, 9)))
