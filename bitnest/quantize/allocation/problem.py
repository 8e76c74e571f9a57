"""The allocation problem: every item takes one choice, costs add up to a budget, losses add up.

    minimise   sum_i loss[i, x_i]    subject to   sum_i cost[i, x_i] <= budget

a multiple-choice knapsack. An item is a site, or several that must be equal. Costs are whole
numbers, bytes or bits of code; losses are nats. A bundle lets all its items take fixed choices
together for a loss of its own: dropping an expert costs nothing and loses what the expert adds, not
the sum of what its matrices would lose one by one.

Whether a choice is there at all is said by its loss: infinite where it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitnest.errors import RecipeError


class BudgetError(RecipeError):
    """The cheapest choices together cost more than the budget. least: what they cost, in `unit`."""

    def __init__(self, least: int, budget: int, unit: str = "bytes") -> None:
        self.least, self.budget = least, budget
        super().__init__(
            f"the smallest choice of every weight costs {least:,} {unit}, more than the budget of "
            f"{budget:,}",
            hint="a larger budget, or smaller formats among the candidates",
        )

    def counting(self, unit: str) -> BudgetError:
        """The same in another unit, where costs are not bytes."""
        return BudgetError(self.least, self.budget, unit)


@dataclass(frozen=True)
class Bundle:
    """Items that may take `choices` together, at `loss` in place of the sum of theirs. The choices
    are the items' cheapest."""

    items: tuple[int, ...]
    choices: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Problem:
    """See above. cost: (N, C) int64. loss: (N, C) float64. An item is in one bundle at most.

    Raises:
        ValueError: shapes that differ, an item without choices, overlapping bundles.
    """

    cost: np.ndarray
    loss: np.ndarray
    budget: int
    bundles: tuple[Bundle, ...] = ()

    def __post_init__(self) -> None:
        if self.cost.shape != self.loss.shape or self.cost.ndim != 2:
            raise ValueError(f"costs {self.cost.shape} and losses {self.loss.shape} differ")
        if np.isnan(self.loss).any() or (self.cost < 0).any():
            raise ValueError("a loss is NaN or a cost is negative")
        if not np.isfinite(self.loss).any(axis=1).all():
            raise ValueError("an item has no choice")
        members = [i for bundle in self.bundles for i in bundle.items]
        if len(set(members)) != len(members):
            raise ValueError("an item is in two bundles")
        allowed = np.where(np.isfinite(self.loss), self.cost, np.iinfo(np.int64).max)
        least = allowed.min(axis=1)
        for bundle in self.bundles:
            for i, c in zip(bundle.items, bundle.choices, strict=True):
                if self.cost[i, c] > least[i]:
                    raise ValueError(f"a bundle takes more of item {i} than its cheapest choice")

    def bundled(self, choice: np.ndarray) -> list[Bundle]:
        """Bundles that are taken: all items have the bundle's choices, and lose less together."""
        return [bundle for bundle in self.bundles if self._taken(bundle, choice)]

    def _taken(self, bundle: Bundle, choice: np.ndarray) -> bool:
        items = list(bundle.items)
        if any(choice[i] != c for i, c in zip(items, bundle.choices, strict=True)):
            return False
        return bundle.loss < float(self.loss[items, list(bundle.choices)].sum())

    def cost_of(self, choice: np.ndarray) -> int:
        """Of one choice per item, (N,)."""
        return int(self.cost[np.arange(len(choice)), choice].sum())

    def loss_of(self, choice: np.ndarray) -> float:
        """Of one choice per item, (N,)."""
        own = self.loss[np.arange(len(choice)), choice].copy()
        extra = 0.0
        for bundle in self.bundled(choice):
            own[list(bundle.items)] = 0.0
            extra += bundle.loss
        return math.fsum(own.tolist()) + extra


@dataclass(frozen=True)
class Solution:
    """choice: number of the choice of every item, (N,). cost, loss: their sums. bound: no plan
    within the budget loses less. price: loss that one unit of cost is worth at this budget.
    """

    choice: np.ndarray
    cost: int
    loss: float
    bound: float
    price: float

    @property
    def gap(self) -> float:
        """Share of the loss that a better plan could save at most; 0 if proven optimal."""
        return max(0.0, (self.loss - self.bound) / self.loss) if self.loss > 0 else 0.0
