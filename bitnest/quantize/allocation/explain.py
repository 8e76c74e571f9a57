"""explain: why an item got its choice, in the terms the solver decides by.

At a price p per byte (or bit) an item takes the choice of least loss + p cost. Shown are all its
choices with both, the price the budget settled at, and what the next step up or down would change.
The matrices of an expert that can be dropped whole decide together: what is compared for one of
them are the best plans of the expert in which it has each format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.patterns import Names
from bitnest.quantize.allocation.planned import Planned
from bitnest.quantize.allocation.problem import Bundle, Problem

HALVINGS = 50  # of the interval that holds a price
TIE = 1e-9  # relative: values closer than this are equal


@dataclass(frozen=True)
class Line:
    """One choice. loss: predicted mean KL of this item alone. value: loss + price * cost, relative
    to the least. mark: `chosen`, `not on the hull` or empty. whole: the expert is dropped whole
    with it, and loss is the expert's."""

    format: str
    nbytes: int
    bits: float
    loss: float
    value: float
    mark: str
    whole: bool = False


@dataclass(frozen=True)
class Explanation:
    """sites: that go together. share: of tokens that reach it. rule: of the plan that names it.
    price: nats per unit of cost."""

    sites: tuple[str, ...]
    kind: str
    share: float
    rule: str
    price: float
    unit: str
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "lines": [vars(line) for line in self.lines]}


def explain(planned: Planned, pattern: str) -> list[Explanation]:
    """Explanations of the items that hold a site matching `pattern`.

    Raises:
        RecipeError: a broken pattern.
    """
    menu = planned.menu
    names = Names(site for item in menu.items for site in item)
    items = dict.fromkeys(menu.number[name] for name in names.matching(pattern))
    bits = "bits" in planned.plan.asked
    cost = menu.bits if bits else menu.nbytes
    objective = planned.evidence.objective
    problem = objective.problem(cost, 0, planned.choice)
    price = marginal_price(problem, planned.choice)
    unit = "bit" if bits else "byte"
    return [_explanation(planned, problem, i, price, unit) for i in items]


def marginal_price(problem: Problem, choice: np.ndarray) -> float:
    """The price at which the plan's choices are best: between the best step up that was not taken
    and the worst one that was. Where the budget cut a step there is none, and it is the price at
    which all choices together are nearest to the best. An expert that is dropped whole comes back
    as a whole, and its matrices have no steps of their own."""
    rows = np.arange(len(choice))
    cost, loss = problem.cost, problem.loss
    here_cost, here_loss = cost[rows, choice][:, None], loss[rows, choice][:, None]
    with np.errstate(invalid="ignore"):  # of experts that go, whose matrices have no loss alone
        more, saved = cost - here_cost, here_loss - loss
    up = np.where((more > 0) & np.isfinite(loss), saved / np.where(more > 0, more, 1), 0.0)
    down = np.where((more < 0) & np.isfinite(loss), saved / np.where(more < 0, more, 1), np.inf)
    whole = problem.bundled(choice)
    dropped = [i for bundle in whole for i in bundle.items]
    up[dropped], down[dropped] = 0.0, np.inf
    best, worst = float(up.max()), float(down.min())
    for bundle in problem.bundles:
        if bundle in whole:
            best = max(best, _leaving(problem, bundle))
            continue
        items = list(bundle.items)
        freed = int(here_cost[items].sum()) - _cost(problem, bundle)
        if freed > 0:
            worst = min(worst, (bundle.loss - float(here_loss[items].sum())) / freed)
    if worst < best:
        return _nearest(problem, int(here_cost.sum()), max(0.0, worst), best)
    return (best + worst) / 2 if np.isfinite(worst) else best


def _nearest(problem: Problem, spent: int, low: float, high: float) -> float:
    """The price between two at which the best choices begin to cost no more than what was spent."""
    for _ in range(HALVINGS):
        price = (low + high) / 2
        values = problem.loss + price * problem.cost
        chosen = values.argmin(axis=1)
        least = values.min(axis=1)
        cost = problem.cost[np.arange(len(chosen)), chosen]
        total = int(cost.sum())
        for bundle in problem.bundles:
            items, own = list(bundle.items), _cost(problem, bundle)
            if bundle.loss + price * own < float(least[items].sum()):
                total += own - int(cost[items].sum())
        low, high = (price, high) if total > spent else (low, price)
    return (low + high) / 2


def _cost(problem: Problem, bundle: Bundle) -> int:
    return int(problem.cost[list(bundle.items), list(bundle.choices)].sum())


def _leaving(problem: Problem, bundle: Bundle) -> float:
    """The most loss per unit of cost that any other choices of a bundle's items save: the price at
    which the best of them is as good as the bundle (Dinkelbach, 1967)."""
    items, price = list(bundle.items), 0.0
    rows = np.arange(len(items))
    cost, loss = problem.cost[items], problem.loss[items]
    while True:
        best = (loss + price * cost).argmin(axis=1)
        more = int(cost[rows, best].sum()) - _cost(problem, bundle)
        saved = bundle.loss - float(loss[rows, best].sum())
        if more <= 0 or saved <= price * more * (1 + 1e-12):
            return price
        price = saved / more


def _values(
    problem: Problem, item: int, choice: np.ndarray, price: float
) -> tuple[np.ndarray, int | None, float]:
    """Loss + price * cost of an item's choices; the choice, if there is one, that drops its expert
    whole, and the expert's loss. With a bundle the items beside it are counted in, at their best.
    """
    values = problem.loss + price * problem.cost
    own = values[item].copy()
    for bundle in problem.bundles:
        if item not in bundle.items:
            continue
        drop = bundle.choices[bundle.items.index(item)]
        own += sum(float(values[i].min()) for i in bundle.items if i != item)
        together = bundle.loss + price * _cost(problem, bundle)
        if together < own[drop] or bundle in problem.bundled(choice):
            own[drop] = together
            return own, drop, bundle.loss
    return own, None, 0.0


def _explanation(
    planned: Planned, problem: Problem, item: int, price: float, unit: str
) -> Explanation:
    menu, loss, cost = planned.menu, problem.loss[item], problem.cost[item]
    order = np.lexsort((loss, cost))
    values, drop, dropped = _values(problem, item, planned.choice, price)
    alone = [int(f) for f in order if np.isfinite(loss[f])]
    allowed = [int(f) for f in order if np.isfinite(loss[f]) or f == drop]
    least = min(float(values[f]) for f in allowed)
    above = np.where(values - least > TIE * abs(least), values - least, 0.0)
    hull = _hull(alone, cost, loss) | {f for f in allowed if f not in alone}
    lines = []
    for f in allowed:
        mark = "chosen" if f == planned.choice[item] else "" if f in hull else "not on the hull"
        lines.append(
            Line(
                menu.names_of(item)[f], int(menu.nbytes[item, f]),
                float(menu.bits[item, f] / menu.numel[item]),
                dropped if f == drop else float(loss[f]), float(above[f]), mark, f == drop,
            )
        )  # fmt: skip
    return Explanation(
        sites=tuple(site.name for site in menu.items[item]),
        kind=menu.kinds[menu.kind[item]],
        share=float(planned.evidence.share[item]),
        rule=_rule(planned, menu.items[item][0].name),
        price=price,
        unit=unit,
        lines=tuple(lines),
    )


def _rule(planned: Planned, name: str) -> str:
    from bitnest.patterns import matcher

    site = next(s for item in planned.menu.items for s in item if s.name == name)
    found = [r for r in planned.plan.rules if matcher(r.pattern)(site)]
    return f"{found[-1].pattern}: {found[-1].format}" if found else "none: dense"


def _hull(allowed: list[int], cost: np.ndarray, loss: np.ndarray) -> set[int]:
    """Choices on the lower convex hull."""
    hull: list[int] = []
    for f in allowed:
        if hull and loss[f] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], cost, loss) <= _slope(
            hull[-1], f, cost, loss
        ):
            hull.pop()
        hull.append(f)
    return set(hull)


def _slope(a: int, b: int, cost: np.ndarray, loss: np.ndarray) -> float:
    return float((loss[a] - loss[b]) / max(1, cost[b] - cost[a]))
