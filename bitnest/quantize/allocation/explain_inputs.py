"""explain, of inputs: what each format loses for matrices that read one tensor, and its price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.patterns import Names
from bitnest.quantize.allocation.explain import marginal_price
from bitnest.quantize.allocation.planned import Planned

TIE = 1e-9  # relative: values closer than this are equal


@dataclass(frozen=True)
class InputLine:
    """One choice. bits: mean width of a code. loss: predicted mean KL of these inputs alone. value:
    loss + price * cost, relative to the least."""

    format: str
    bits: float
    loss: float
    value: float
    chosen: bool


@dataclass(frozen=True)
class InputExplanation:
    """sites: that read the tensor. work: their share of all multiply-accumulates. price: nats per
    bit of the mean width, or per share of the time."""

    sites: tuple[str, ...]
    work: float
    price: float
    unit: str
    lines: tuple[InputLine, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "lines": [vars(line) for line in self.lines]}


def explain_inputs(planned: Planned, pattern: str) -> list[InputExplanation]:
    """Of the items that hold a site matching `pattern`; empty where no inputs are rounded.

    Raises:
        RecipeError: a broken pattern.
    """
    if planned.inputs is None:
        return []
    grounds, choice = planned.inputs.grounds, planned.inputs.choice
    menu = grounds.menu
    problem = grounds.objective.problem(grounds.cost, 0, choice)
    price = marginal_price(problem, choice)
    seconds = grounds.unit != "bit"
    whole = grounds.widest if seconds else int(menu.numel.sum())
    names = Names(site for item in menu.items for site in item)
    found = []
    for i in dict.fromkeys(menu.number[name] for name in names.matching(pattern)):
        values = problem.loss[i] + price * problem.cost[i]
        least = float(values.min())
        above = np.where(values - least > TIE * abs(least), values - least, 0.0)
        lines = [
            InputLine(
                menu.formats[p], float(menu.bits[i, p] / max(1, menu.numel[i])),
                float(problem.loss[i, p]), float(above[p]), bool(p == choice[i]),
            )
            for p in np.argsort(menu.bits[i], kind="stable") if menu.allowed[i, p]
        ]  # fmt: skip
        found.append(InputExplanation(
            tuple(site.name for site in menu.items[i]),
            float(menu.numel[i] / max(1, menu.numel.sum())), price * whole,
            "share of the time" if seconds else "bit of the mean width", tuple(lines),
        ))  # fmt: skip
    return found
