"""Solving the allocation problem: walk the hulls, then repair what the walk left over.

1. The greedy walk (`hulls`) until the budget cuts a step: a plan, the price of a unit of cost, and
   a bound. It goes on with the steps that still fit.
2. Reduction. With price p, m_i the least of loss + p cost of class i, and
   L = sum m_i - p budget <= optimum, a choice whose loss + p cost exceeds m_i by more than
   incumbent - L is in no better plan, and is dropped. Often few classes stay open.
3. Repair. Over open classes, those that decide least clearly first, all plans are enumerated by
   dynamic programming over (cost, loss) pairs of which none is worse than another in both, pruned
   by the same bound. Proven optimal if nothing was cut off: small problems always are.

Everything is deterministic. `exact` proves the rest by integer programming.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnest.quantize.allocation.hulls import Walk, walk
from bitnest.quantize.allocation.problem import BudgetError, Problem, Solution

STATES = 20_000  # pairs kept per class; more are cut off, worst bound first
CORE = 200  # open classes that are enumerated
EPS = 1e-12  # relative: losses closer than this are equal


@dataclass(frozen=True)
class Option:
    """One way to settle a class: items and their choices, cost and loss."""

    items: tuple[int, ...]
    choices: tuple[int, ...]
    cost: int
    loss: float


@dataclass(frozen=True)
class Reduced:
    """What is left open around an incumbent. bound: on the whole problem. options: of each open
    class, those that may be in a better plan, most clearly decided class last."""

    incumbent: np.ndarray
    bound: float
    price: float
    options: list[list[Option]]


def solve(problem: Problem) -> Solution:
    """The best plan that is found; its gap says how far the optimum may be.

    Raises:
        BudgetError: even the cheapest choices are over the budget.
    """
    reduced = reduce(problem)
    return repair(problem, reduced)


def reduce(problem: Problem) -> Reduced:
    """Walk, and drop every choice that cannot be in a better plan.

    Raises:
        BudgetError: even the cheapest choices are over the budget.
    """
    path = walk(problem)
    base = problem.cost_of(path.base)
    if base > problem.budget:
        raise BudgetError(base, problem.budget)
    choice, price, bound = _greedy(problem, path, problem.budget - base)
    return Reduced(choice, bound, price, _open_options(problem, choice, bound, price))


def _greedy(problem: Problem, path: Walk, slack: int) -> tuple[np.ndarray, float, float]:
    """The walk's plan, the price at which it stops, and the linear relaxation's bound."""
    choice = path.base.copy()
    total = path.cost.cumsum()
    stop = int(np.searchsorted(total, slack, side="right"))
    for step in range(stop):
        path.apply(choice, step, problem.bundles)
    bound = problem.loss_of(choice)
    if stop == len(total):
        return choice, 0.0, bound
    left = slack - (int(total[stop - 1]) if stop else 0)
    price = float(path.slope[stop])
    bound -= price * left
    blocked: set[int] = set()
    for step in range(stop, len(total)):
        owner, cost = int(path.owner[step]), int(path.cost[step])
        if owner not in blocked and cost <= left:
            path.apply(choice, step, problem.bundles)
            left -= cost
        else:
            blocked.add(owner)
    return choice, price, bound


def _open_options(
    problem: Problem, incumbent: np.ndarray, bound: float, price: float
) -> list[list[Option]]:
    slack = problem.loss_of(incumbent) - bound
    tolerance = EPS * max(1e-300, abs(problem.loss_of(incumbent)))
    value = problem.loss + price * problem.cost
    least = value.min(axis=1)
    over = value - least[:, None]
    alone = np.ones(len(over), dtype=bool)
    found: list[tuple[float, int, list[Option]]] = []
    for number, bundle in enumerate(problem.bundles):
        alone[list(bundle.items)] = False
        own = bundle.loss + price * sum(
            int(problem.cost[i, c]) for i, c in zip(bundle.items, bundle.choices, strict=True)
        )
        apart = float(least[list(bundle.items)].sum())
        best = min(own, apart)
        room = slack - (apart - best) + tolerance
        options = _products(problem, bundle.items, over, room) if room >= 0 else []
        if own - best <= slack + tolerance:
            cost = sum(
                int(problem.cost[i, c]) for i, c in zip(bundle.items, bundle.choices, strict=True)
            )
            options = [o for o in options if o.choices != bundle.choices or o.loss <= bundle.loss]
            options.append(Option(bundle.items, bundle.choices, cost, bundle.loss))
        if len(options) > 1:
            values = sorted(o.loss + price * o.cost for o in options)
            found.append((values[1] - values[0], len(over) + number, options))
    near = (over <= slack + tolerance) & np.isfinite(problem.loss)
    for i in np.nonzero(alone & (near.sum(axis=1) > 1))[0]:
        options = [
            Option((int(i),), (int(c),), int(problem.cost[i, c]), float(problem.loss[i, c]))
            for c in np.nonzero(near[i])[0]
        ]
        margin = float(np.partition(over[i], 1)[1])
        found.append((margin, int(i), options))
    return [options for *_, options in sorted(found, key=lambda entry: entry[:2])]


def _products(
    problem: Problem, items: tuple[int, ...], over: np.ndarray, room: float
) -> list[Option]:
    """Every combination of the items' choices whose excess is within `room`."""
    partial = [((), 0, 0.0, 0.0)]  # choices, cost, loss, excess
    for i in items:
        partial = [
            (
                (*choices, int(c)),
                cost + int(problem.cost[i, c]),
                loss + float(problem.loss[i, c]),
                excess + over[i, c],
            )  # type: ignore[misc]
            for choices, cost, loss, excess in partial
            for c in np.nonzero(np.isfinite(problem.loss[i]) & (over[i] <= room - excess))[0]
        ]
    return [Option(items, choices, cost, loss) for choices, cost, loss, _ in partial]


def repair(problem: Problem, reduced: Reduced) -> Solution:
    """The best plan over the open classes that are enumerated, the others as in the incumbent."""
    core, rest = reduced.options[:CORE], reduced.options[CORE:]
    whole = not rest
    choice = reduced.incumbent.copy()
    fixed = choice.copy()
    inside = [i for options in core for i in options[0].items]
    spent = problem.cost_of(fixed) - int(problem.cost[inside, fixed[inside]].sum())
    kept = _loss_without(problem, fixed, inside)
    best = problem.loss_of(choice)
    picks, complete = _enumerate(core, problem.budget - spent, best - kept, reduced.price)
    for option in picks:
        choice[list(option.items)] = option.choices
    loss = problem.loss_of(choice)
    if loss > best:  # rounding of a tie
        choice, loss = reduced.incumbent, best
    bound = loss if whole and complete else min(reduced.bound, loss)
    return Solution(choice, problem.cost_of(choice), loss, bound, reduced.price)


def _loss_without(problem: Problem, choice: np.ndarray, items: list[int]) -> float:
    """Loss of the items not in `items`, which holds bundles whole or not at all."""
    out = np.ones(len(choice), dtype=bool)
    out[items] = False
    own = problem.loss[np.arange(len(choice)), choice].copy()
    extra = 0.0
    for bundle in problem.bundled(choice):
        if out[bundle.items[0]]:
            own[list(bundle.items)] = 0.0
            extra += bundle.loss
    return float(own[out].sum()) + extra


def _enumerate(
    classes: list[list[Option]], budget: int, incumbent: float, price: float
) -> tuple[list[Option], bool]:
    """One option per class, better than `incumbent` together and within `budget`; empty if there is
    none. Also whether nothing was cut off."""
    least = [min(o.loss + price * o.cost for o in options) for options in classes]
    ahead = np.concatenate([np.cumsum(least[::-1])[::-1], [0.0]])
    cheap = [min(o.cost for o in options) for options in classes]
    needed = np.concatenate([np.cumsum(cheap[::-1])[::-1], [0]])
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    parents: list[np.ndarray] = []
    chosen: list[np.ndarray] = []
    complete = True
    for k, options in enumerate(classes):
        more = np.array([o.cost for o in options], dtype=np.int64)
        lost = np.array([o.loss for o in options])
        new_cost = (cost[:, None] + more).ravel()
        new_loss = (loss[:, None] + lost).ravel()
        bound = new_loss + price * (new_cost - budget) + ahead[k + 1]
        fits = (new_cost + needed[k + 1] <= budget) & (bound < incumbent - EPS * abs(incumbent))
        index = np.nonzero(fits)[0]
        order = index[np.lexsort((new_loss[index], new_cost[index]))]
        front = np.minimum.accumulate(new_loss[order]) if len(order) else new_loss[order]
        better = np.ones(len(order), dtype=bool)
        better[1:] = front[1:] < front[:-1]
        order = order[better]
        if len(order) > STATES:
            complete = False
            order = order[np.sort(np.argsort(bound[order], kind="stable")[:STATES])]
        cost, loss = new_cost[order], new_loss[order]
        parents.append(order // len(options))
        chosen.append(order % len(options))
    if not len(cost) or not classes:
        return [], complete
    state = int(loss.argmin())
    picks: list[Option] = []
    for k in reversed(range(len(classes))):
        picks.append(classes[k][int(chosen[k][state])])
        state = int(parents[k][state])
    return picks, complete
