"""The frontier: artifact size against predicted KL, many plans from one file of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.planned import Planned
from bitnest.quantize.allocation.planner import Planner
from bitnest.quantize.allocation.problem import BudgetError

LEAST_KL = 2e-4  # nats: the largest plan drawn need not be better


@dataclass(frozen=True)
class Frontier:
    """points: by policy, ascending in size. target: what they were planned for."""

    points: dict[str, list[Planned]]
    target: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "target": self.target,
            "points": [
                {
                    "policy": policy, "size": p.sizes.total, "bits": p.bits,
                    "bits_per_weight": p.bits_per_weight, "kl": p.mean, "low": p.low,
                    "high": p.high, "kl_by_text": p.kl,
                }
                for policy, found in self.points.items()
                for p in found
            ],
        }  # fmt: skip


def trace(planner: Planner, sizes: Sequence[int], count: int, policies: Sequence[str]) -> Frontier:
    """Plans of every policy at `sizes` bytes; without any, `count` evenly spread in the logarithm
    from the smallest to the smallest whose KL is LEAST_KL.

    Raises:
        RecipeError: a size that nothing fits.
    """
    wanted = list(sizes) or _spread(planner, count)
    points: dict[str, list[Planned]] = {}
    for policy in policies:
        found: list[Planned] = []
        for size in sorted(wanted):
            try:
                planned = planner.plan(Budget(size=size), policy)
            except BudgetError:
                continue  # a policy without the coarsest formats
            if not found or planned.sizes.total > found[-1].sizes.total:
                found.append(planned)
        points[policy] = found
    return Frontier(points, planner.target.name)


def _spread(planner: Planner, count: int) -> list[int]:
    evidence = planner.evidence(Budget(size=1 << 60))
    menu = evidence.menu
    rows = np.arange(len(menu.items))
    low = np.where(menu.allowed, menu.nbytes, np.iinfo(np.int64).max).argmin(axis=1)
    best = evidence.objective.minimise(menu.nbytes, int(menu.nbytes.max(axis=1).sum()))
    limit = max(LEAST_KL, 1.0001 * evidence.objective.mean(best.choice))
    high = evidence.objective.smallest(menu.nbytes, limit).choice
    rest = planner.sizes(menu, low, Budget(size=1)).total - int(menu.nbytes[rows, low].sum())
    first = int(menu.nbytes[rows, low].sum()) + rest + 4096
    last = max(first + 1, int(menu.nbytes[rows, high].sum()) + rest + 4096)
    return [round(x) for x in np.geomspace(first, last, count)]
