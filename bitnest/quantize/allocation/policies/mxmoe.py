"""mxmoe: MxMoE's search over every matrix of every expert by output error and time.

    minimise  (sum delta[i, x_i])^r * (sum T[i, x_i])^(1 - r)    under the byte budget

delta is the output error a choice causes, weighted by how often the expert runs (H-weighted, no
gradient), T the time it takes. MxMoE's r is .75. T is measured where a table was given, else the
bytes a token reads. The product is minimised by solving

    minimise  sum delta / D + q * sum T / S     D, S: both sums at the start, q = (1 - r) / r

and repeating with the sums of the solution (the logarithm's tangent) [the paper enumerates; ours].
"""

from __future__ import annotations

import math

import numpy as np

from bitnest.quantize.allocation.exact import solve_exact
from bitnest.quantize.allocation.policies.common import Evidence
from bitnest.quantize.allocation.problem import Problem
from bitnest.quantize.allocation.solver import solve

R = 0.75
ROUNDS = 5


def mxmoe(evidence: Evidence, cost: np.ndarray, budget: int) -> np.ndarray:
    """Output error against time.

    Raises:
        BudgetError: the coarsest formats are over the budget.
    """
    rows = np.arange(len(cost))
    allowed = np.zeros_like(evidence.menu.allowed)
    for i, steps in enumerate(evidence.ladder):
        allowed[i, steps] = True
    delta, time = evidence.noise, evidence.latency
    solver = solve_exact if evidence.exact else solve
    choice = solver(Problem(cost, np.where(allowed, delta, np.inf), budget)).choice
    best = choice
    for _ in range(ROUNDS):
        error, seconds = delta[rows, choice].sum(), time[rows, choice].sum()
        if error <= 0 or seconds <= 0:
            break
        mixed = R * delta / error + (1 - R) * time / seconds
        choice = solver(Problem(cost, np.where(allowed, mixed, np.inf), budget)).choice
        if _value(evidence, choice) >= _value(evidence, best):
            break
        best = choice
    return best


def _value(evidence: Evidence, choice: np.ndarray) -> float:
    rows = np.arange(len(choice))
    error = max(float(evidence.noise[rows, choice].sum()), 1e-300)
    seconds = max(float(evidence.latency[rows, choice].sum()), 1e-300)
    return R * math.log(error) + (1 - R) * math.log(seconds)
