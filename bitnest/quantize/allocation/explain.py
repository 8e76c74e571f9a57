"""explain: why an item got its choice, in the terms the solver decides by.

At a price p per byte (or bit) an item takes the choice of least loss + p cost. Shown are all its
choices with both, the price the budget settled at, and what the next step up or down would change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.patterns import Names
from bitnest.quantize.allocation.planned import Planned


@dataclass(frozen=True)
class Line:
    """One choice. loss: predicted mean KL of this item alone. value: loss + price * cost, relative
    to the least. mark: `chosen`, `not on the hull` or empty."""

    format: str
    nbytes: int
    bits: float
    loss: float
    value: float
    mark: str


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
    loss = objective.linear(planned.choice)
    price = marginal_price(loss, cost, planned.choice)
    return [
        _explanation(planned, i, loss[i], cost[i], price, "bit" if bits else "byte") for i in items
    ]


def marginal_price(loss: np.ndarray, cost: np.ndarray, choice: np.ndarray) -> float:
    """The price at which the plan's choices are best: between the best step up that was not taken
    and the worst one that was."""
    rows = np.arange(len(choice))
    here_cost, here_loss = cost[rows, choice][:, None], loss[rows, choice][:, None]
    more, saved = cost - here_cost, here_loss - loss
    up = np.where((more > 0) & np.isfinite(loss), saved / np.where(more > 0, more, 1), 0.0)
    down = np.where((more < 0) & np.isfinite(loss), saved / np.where(more < 0, more, 1), np.inf)
    best, worst = float(up.max()), float(down.min())
    return (best + worst) / 2 if np.isfinite(worst) else best


def _explanation(
    planned: Planned, item: int, loss: np.ndarray, cost: np.ndarray, price: float, unit: str
) -> Explanation:
    menu = planned.menu
    order = np.lexsort((loss, cost))
    allowed = [int(f) for f in order if np.isfinite(loss[f])]
    values = loss + price * cost
    least = min(float(values[f]) for f in allowed)
    hull = _hull(allowed, cost, loss)
    lines = []
    for f in allowed:
        mark = "chosen" if f == planned.choice[item] else "" if f in hull else "not on the hull"
        lines.append(
            Line(
                menu.formats[f], int(menu.nbytes[item, f]),
                float(menu.bits[item, f] / menu.numel[item]), float(loss[f]),
                float(values[f]) - least, mark,
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
