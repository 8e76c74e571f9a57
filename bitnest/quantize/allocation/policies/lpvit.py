"""lpvit: LPViT's layer ratios, at equal slope of the distortion curves, with a price on arithmetic.

Every item picks, of all its formats (`int4-g128%b16x16-25` to `-75` and `int4-g128`, for instance),
the x that minimises

    D_i(x) + lambda M_i(x) + mu cost_i(x)

D: distortion of the model's output, second order (here the predicted KL's tangent, which has the
Fisher of every row in it; the paper has a Taylor expansion of the output error). M: multiply-
accumulates per token, weights kept times the share of tokens that reach the item. At one mu all
items stand at one slope of their curves; mu is found by bisection so that the cost meets the
budget, and what is left over goes to the steepest steps that still fit.

The paper's lambda is a dial without a unit. Here it is POWER * D / M, both of the plan without it
[ours]: a share of the arithmetic saved is worth POWER times that share of distortion. A format's
width is no multiply-accumulate: only what is dropped counts.
"""

from __future__ import annotations

import numpy as np

from bitnest.calibrate.predict import DROP
from bitnest.quantize.allocation.policies.common import Evidence
from bitnest.quantize.allocation.problem import BudgetError

POWER = 1.0
HALVINGS = 100  # of the range of prices, in logarithms


def lpvit(evidence: Evidence, cost: np.ndarray, budget: int, power: float = POWER) -> np.ndarray:
    """Equal slope of distortion and multiply-accumulates.

    Raises:
        BudgetError: the cheapest formats are over the budget.
    """
    menu = evidence.menu
    allowed = menu.allowed.copy()
    if DROP in menu.formats:
        whole = menu.formats.index(DROP)
        allowed[:, whole] &= allowed.sum(1) == 1
    least = int(np.where(allowed, cost, np.iinfo(np.int64).max).min(1).sum())
    if least > budget:
        raise BudgetError(least, budget)
    distortion = np.where(allowed, evidence.objective.linear(None), np.inf)
    choice = equal_slope(distortion, cost, budget)
    rows = np.arange(len(choice))
    lost, work = distortion[rows, choice].sum(), evidence.macs[rows, choice].sum()
    if power > 0 and lost > 0 and work > 0:
        choice = equal_slope(distortion + power * lost / work * evidence.macs, cost, budget)
    return choice


def equal_slope(loss: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """One choice per item, (N,), at one price of cost. loss: (N, F), infinite where there is no
    such choice. cost: (N, F), its cheapest choices within the budget."""
    rows = np.arange(len(loss))

    def at(price: float) -> np.ndarray:
        value = loss + price * cost
        ties = np.where(value == value.min(1, keepdims=True), cost, np.iinfo(np.int64).max)
        return np.asarray(ties.argmin(1))

    found = at(0.0)
    if cost[rows, found].sum() > budget:
        finite = np.isfinite(loss)
        low, high = 1e-30, 1.0 + 2 * float(loss[finite].max() - loss[finite].min())
        for _ in range(HALVINGS):
            middle = float(np.sqrt(low * high))
            over = cost[rows, at(middle)].sum() > budget
            low, high = (middle, high) if over else (low, middle)
        found = at(high)
    return _fill(loss, cost, budget, found)


def _fill(loss: np.ndarray, cost: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Spend what is left: of each item the step that saves most per cost, steepest first."""
    rows = np.arange(len(choice))
    left = budget - int(cost[rows, choice].sum())
    more = cost - cost[rows, choice][:, None]
    saved = loss[rows, choice][:, None] - loss
    fits = (more > 0) & (more <= left) & (saved > 0)
    slope = np.where(fits, saved / np.where(more > 0, more, 1), 0.0)
    best = slope.argmax(1)
    found = choice.copy()
    for i in np.argsort(-slope[rows, best], kind="stable"):
        if slope[i, best[i]] > 0 and more[i, best[i]] <= left:
            found[i] = best[i]
            left -= int(more[i, best[i]])
    return found
