"""The allocation problem as a mixed-integer program, solved to proven optimality by HiGHS.

Binary x[i, c], one per item, and y[b] per bundle:

    minimise   sum loss[i, c] x[i, c] + sum loss[b] y[b]
    subject to sum_c x[i, c] + y[b(i)] = 1,   sum cost[i, c] x[i, c] + sum cost[b] y[b] <= budget

Choices that cannot be in a better plan than the one `solver` found are left out beforehand. Losses
are scaled to the gap that is still open and costs to their greatest common divisor, so that HiGHS's
absolute tolerances do not decide.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bitnest.quantize.allocation.problem import Problem, Solution
from bitnest.quantize.allocation.solver import Option, Reduced, reduce, repair


def solve_exact(problem: Problem, *, seconds: float | None = None) -> Solution:
    """A proven optimum, unless `seconds` run out: then the best plan with the bound proven so far.

    Raises:
        BudgetError: even the cheapest choices are over the budget.
    """
    reduced = reduce(problem)
    found = repair(problem, reduced)
    if found.gap == 0 or not reduced.options:
        return found
    return integer_program(problem, reduced, found, seconds)


def integer_program(
    problem: Problem, reduced: Reduced, found: Solution, seconds: float | None = None
) -> Solution:
    """The optimum over the open classes of `reduced`; `found` is a plan that is already there."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [option for options in reduced.options for option in options]
    owner = [k for k, options in enumerate(reduced.options) for _ in options]
    inside = [i for opts in reduced.options for i in opts[0].items]
    spent = found.cost - int(problem.cost[inside, found.choice[inside]].sum())
    cost = np.array([option.cost for option in options], dtype=np.int64)
    budget = problem.budget - spent
    unit = math.gcd(*cost.tolist()) or 1
    loss = np.array([option.loss for option in options])
    lowest = np.array([min(o.loss for o in opts) for opts in reduced.options])[owner]
    scale = max(float((loss - lowest).max()), 1e-300)
    rows = csr_array((np.ones(len(options)), (owner, range(len(options)))))
    with _silenced():
        result = milp(
            (loss - lowest) / scale * 1e3,
            constraints=[
                LinearConstraint(rows, 1, 1),
                LinearConstraint((cost // unit).astype(float)[None], -np.inf, budget // unit),
            ],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, **({} if seconds is None else {"time_limit": seconds})},
        )
    if result.x is None:
        return found
    choice = found.choice.copy()
    for option in _picked(options, owner, result.x):
        choice[list(option.items)] = option.choices
    loss_found = problem.loss_of(choice)
    if problem.cost_of(choice) > problem.budget or loss_found >= found.loss:
        choice, loss_found = found.choice, found.loss
    proven = result.status == 0
    missing = (float(result.fun) - float(result.mip_dual_bound)) * scale / 1e3
    bound = loss_found if proven else max(found.bound, loss_found - max(0.0, missing))
    return Solution(
        choice, problem.cost_of(choice), loss_found, min(bound, loss_found), found.price
    )


@contextmanager
def _silenced() -> Iterator[None]:
    """HiGHS writes remarks to the process's own stdout, which is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _picked(options: list[Option], owner: list[int], x: np.ndarray) -> list[Option]:
    """The option of every class that has the largest share."""
    best: dict[int, int] = {}
    for i, k in enumerate(owner):
        if k not in best or x[i] > x[best[k]]:
            best[k] = i
    return [options[i] for i in best.values()]
