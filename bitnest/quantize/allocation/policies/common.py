"""What policies are given, and how each comes to spend exactly the budget it is compared at.

A policy ranks or grades; a byte budget does not interest the published ones. To compare them at
equal cost, every policy starts from the grade its rule gives, and then

    trim   lowers items by one step, the least important first, until the plan fits
    fill   raises items by one step, the most important first, round after round, until nothing fits

in the policy's own order of importance [ours]. Steps are those of the ladder: of every item the
allowed formats of one to eight bits, the cheapest of each width, ascending; dense only where there
is little else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitnest.calibrate.predict import DROP
from bitnest.formats import kept_weights, parse_format
from bitnest.quantize.allocation.menu import Menu
from bitnest.quantize.allocation.objective import Objective
from bitnest.quantize.allocation.problem import BudgetError


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at, besides the menu.

    objective: predicted KL. share: tokens that reach each item, as a part of all, (N,). gate: mean
    gate weight of the tokens routed to it, (N,), 1 outside experts. noise: output error per token,
    sum over sites of share * tr(dW H dW^T), (N, F). significance: of each item's expert, (N,), NaN
    outside experts. latency: cost in time of each choice, (N, F). exact: prove optima.
    """

    objective: Objective
    share: np.ndarray
    gate: np.ndarray
    noise: np.ndarray
    significance: np.ndarray
    latency: np.ndarray
    exact: bool = False

    @property
    def menu(self) -> Menu:
        """The menu."""
        return self.objective.menu

    @cached_property
    def macs(self) -> np.ndarray:
        """Multiply-accumulates per token of every choice, (N, F): weights kept times the share of
        tokens that reach the item."""
        formats = [parse_format(name) for name in self.menu.formats]
        known: dict[tuple[int, int], np.ndarray] = {}
        for item in self.menu.items:
            for site in item:
                if site.shape not in known:
                    known[site.shape] = np.array([kept_weights(f, site.shape) for f in formats])
        kept = [np.sum([known[s.shape] for s in item], axis=0) for item in self.menu.items]
        return np.stack(kept) * self.share[:, None]

    @cached_property
    def ladder(self) -> list[np.ndarray]:
        """Choices of every item, one per width, ascending; a sparse format only at widths, rounded,
        that no other has."""
        menu = self.menu
        order = np.lexsort((menu.nbytes.sum(axis=0), menu.widths))
        usable = [f for f in order if menu.formats[f] != DROP]
        usable.sort(key=lambda f: "%" in menu.formats[f])
        ladder = []
        for allowed in menu.allowed:
            steps: dict[int, int] = {}
            for f in usable:
                if allowed[f]:
                    steps.setdefault(round(float(menu.widths[f])), int(f))
            steps = dict(sorted(steps.items()))
            if len(steps) > MANY:  # nobody keeps 16 bits where eight lose nothing
                steps = {width: f for width, f in steps.items() if width <= 8}
            ladder.append(np.array(list(steps.values())))
        return ladder

    def at_width(self, width: float | np.ndarray) -> np.ndarray:
        """Of every item the finest choice of at most `width` bits, or the coarsest there is."""
        widths = np.broadcast_to(width, (len(self.ladder),))
        rounded = np.round(self.menu.widths)
        return np.array([
            steps[max(0, int((rounded[steps] <= w + 1e-9).sum()) - 1)]
            for steps, w in zip(self.ladder, widths, strict=True)
        ])  # fmt: skip


MANY = 3  # widths from which 16 bits are no step of the ladder

Policy = Callable[[Evidence, np.ndarray, int], np.ndarray]
"""(evidence, cost (N, F), budget) -> choice of every item, (N,), within the budget."""


class Purse:
    """A plan under way, and what is left of the budget.

    Raises:
        BudgetError: the coarsest choices are over the budget.
    """

    def __init__(
        self, evidence: Evidence, cost: np.ndarray, budget: int, choice: np.ndarray
    ) -> None:
        self.ladder, self.cost, self.choice = evidence.ladder, cost, choice.copy()
        self.step = np.array([
            int(np.nonzero(steps == c)[0][0]) for steps, c in zip(self.ladder, choice, strict=True)
        ])  # fmt: skip
        least = sum(int(cost[i, steps[0]]) for i, steps in enumerate(self.ladder))
        if least > budget:
            raise BudgetError(least, budget)
        self.left = budget - int(cost[np.arange(len(choice)), choice].sum())

    def move(self, item: int, by: int) -> bool:
        """One step up or down, if there is one and it fits."""
        step = self.step[item] + by
        if not 0 <= step < len(self.ladder[item]):
            return False
        new = self.ladder[item][step]
        more = int(self.cost[item, new] - self.cost[item, self.choice[item]])
        if by > 0 and more > self.left:
            return False
        self.step[item], self.choice[item] = step, new
        self.left -= more
        return True

    def trim(self, order: Sequence[int] | np.ndarray) -> None:
        """Lower items, the last of `order` first, round after round, until the plan fits."""
        while self.left < 0:
            for item in reversed(list(order)):
                if self.left >= 0:
                    break
                self.move(int(item), -1)

    def fill(self, order: Sequence[int] | np.ndarray) -> None:
        """Raise items, the first of `order` first, round after round, until nothing fits."""
        moved = True
        while moved and self.left > 0:
            moved = False
            for item in order:
                moved |= self.move(int(item), 1)

    def settle(self, order: Sequence[int] | np.ndarray) -> np.ndarray:
        """`trim`, then `fill`."""
        self.trim(order)
        self.fill(order)
        return self.choice


def spread(count: int) -> np.ndarray:
    """0 .. count - 1 in an order whose every beginning is spread evenly (bit-reversed counting)."""
    bits = max(1, (count - 1).bit_length())
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)]
    return np.array([i for i in reverse if i < count])


def richest(
    evidence: Evidence, cost: np.ndarray, budget: int, plans: Sequence[np.ndarray]
) -> np.ndarray:
    """The most expensive of `plans` (choices) within the budget; the cheapest if none is."""
    rows = np.arange(len(evidence.ladder))
    spent = [int(cost[rows, plan].sum()) for plan in plans]
    fitting = [i for i, total in enumerate(spent) if total <= budget]
    best = max(fitting, key=lambda i: (spent[i], -i)) if fitting else int(np.argmin(spent))
    return plans[best]
