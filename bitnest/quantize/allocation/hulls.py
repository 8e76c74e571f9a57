"""Lower convex hulls of choices, and the greedy walk along them.

Of an item's points (cost, loss) only those on the lower convex hull can win in the Lagrangian

    min over x of  loss[i, x] + price * cost[i, x]

Walking all hulls at once, steepest step first, passes through the solutions of the Lagrangian at
every price; where the budget cuts a step, a fraction of it gives the bound of the linear relaxation
(Sinha and Zoltners, 1979).

The items of a bundle are one class: their hulls are added (steps merged by slope), and the bundle's
own point cuts off what lies above the line from it to the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bitnest.quantize.allocation.problem import Bundle, Problem


@dataclass
class Walk:
    """All steps in the order of the walk, S of them.

    base: the cheapest choices, (N,). item, to: of each step the item that changes and its new
    choice; in a bundle that is left, its number and -1. owner: number of the class (an item's own
    number, or N + number of the bundle). slope: loss saved per cost. cost, loss: what a step adds
    and saves. first: of each bundle that is taken in `base`, the choices its items get when left.
    """

    base: np.ndarray
    item: np.ndarray
    to: np.ndarray
    owner: np.ndarray
    slope: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    first: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, choice: np.ndarray, step: int, bundles: tuple[Bundle, ...]) -> None:
        """Take one step, in place."""
        item = int(self.item[step])
        if self.to[step] >= 0:
            choice[item] = self.to[step]
        else:
            choice[list(bundles[item].items)] = self.first[item]


def item_steps(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Hulls of single items: the cheapest choice (N,), and (S, 3) steps item, from, to; the steps
    of an item in its order, items in theirs."""
    cost, loss = problem.cost.astype(np.float64), problem.loss
    rows = np.arange(len(cost))
    allowed = np.where(np.isfinite(loss), cost, np.inf)
    cheapest = allowed.min(axis=1, keepdims=True)
    here = np.where(allowed == cheapest, loss, np.inf).argmin(axis=1)
    base, found = here.copy(), []
    alive = rows
    while len(alive):
        now = here[alive]
        more = cost[alive] - cost[alive, now][:, None]
        saved = loss[alive, now][:, None] - loss[alive]
        slope = np.where((more > 0) & (saved > 0), saved / np.where(more > 0, more, 1), -1.0)
        best = slope.max(axis=1)
        farthest = np.where(slope == best[:, None], more, -1.0).argmax(axis=1)
        go = best > 0
        alive, farthest = alive[go], farthest[go]
        found.append(np.stack([alive, here[alive], farthest], axis=1))
        here[alive] = farthest
    steps = np.concatenate(found) if found else np.zeros((0, 3), dtype=np.int64)
    return base, steps[np.argsort(steps[:, 0], kind="stable")]


def walk(problem: Problem) -> Walk:
    """The whole walk, steepest step first; equal slopes in the order of classes."""
    base, steps = item_steps(problem)
    item, start, to = steps.T
    cost = problem.cost[item, to] - problem.cost[item, start]
    loss = problem.loss[item, start] - problem.loss[item, to]
    owner = item.copy()
    keep = np.ones(len(item), dtype=bool)
    extra: list[tuple[int, int, float]] = []
    first: dict[int, tuple[int, ...]] = {}
    begins = np.searchsorted(item, np.arange(len(base) + 1))
    for number, bundle in enumerate(problem.bundles):
        mine = np.concatenate([np.arange(begins[i], begins[i + 1]) for i in bundle.items])
        owner[mine] = len(base) + number
        left = _leave(problem, bundle, base, mine, item, to, cost, loss)
        if left is None:
            continue
        skipped, choices, more, saved = left
        keep[skipped] = False
        first[number] = choices
        base[list(bundle.items)] = bundle.choices
        if more:
            extra.append((number, more, saved))
    numbers = np.array([number for number, *_ in extra], dtype=np.int64)
    item = np.concatenate([item[keep], numbers])
    to = np.concatenate([to[keep], np.full(len(numbers), -1)])
    owner = np.concatenate([owner[keep], len(base) + numbers])
    cost = np.concatenate([cost[keep], np.array([m for _, m, _ in extra], dtype=np.int64)])
    loss = np.concatenate([loss[keep], np.array([s for *_, s in extra])])
    slope = loss / cost
    leaves = np.where(to == -1, 0, 1)  # a bundle is left before its items move on
    order = np.lexsort((leaves, owner, -slope))
    return Walk(base, item[order], to[order], owner[order], slope[order], cost[order], loss[order],
                first)  # fmt: skip


def _leave(
    problem: Problem,
    bundle: Bundle,
    base: np.ndarray,
    mine: np.ndarray,
    item: np.ndarray,
    to: np.ndarray,
    cost: np.ndarray,
    loss: np.ndarray,
) -> tuple[np.ndarray, tuple[int, ...], int, float] | None:
    """Where the bundle is the cheapest point of its class: the steps that the line from it to the
    rest passes over, the choices there, and what leaving costs and saves. None if it never wins."""
    items = list(bundle.items)
    own_cost = int(problem.cost[items, list(bundle.choices)].sum())
    order = mine[np.argsort(-(loss[mine] / cost[mine]), kind="stable")]
    costs = problem.cost[items, base[items]].sum() + np.concatenate([[0], cost[order].cumsum()])
    losses = problem.loss[items, base[items]].sum() - np.concatenate([[0], loss[order].cumsum()])
    if own_cost > costs[0] or (own_cost == costs[0] and bundle.loss >= losses[0]):
        return None
    more, saved = costs - own_cost, bundle.loss - losses
    slope = np.where((more > 0) & (saved > 0), saved / np.where(more > 0, more, 1), -1.0)
    if slope.max() <= 0:
        return order, bundle.choices, 0, 0.0
    count = int(len(slope) - 1 - slope[::-1].argmax())  # the farthest of equals
    reached = {i: int(base[i]) for i in items}
    for step in order[:count]:
        reached[int(item[step])] = int(to[step])
    return order[:count], tuple(reached[i] for i in items), int(more[count]), float(saved[count])
