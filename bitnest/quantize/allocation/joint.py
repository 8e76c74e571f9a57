"""A plan of weights and, given it, of their inputs.

Weights are planned first: their budget is bytes, which inputs have no part in. What the inputs add
to the manifest is only known afterwards, so under a size the weights' plan may have to be a little
smaller than the first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bitnest.errors import StatisticsError
from bitnest.formats.inputs import DENSE
from bitnest.patterns import Names
from bitnest.plan import Plan, digest_of
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.inputs import (
    DENSE_BITS,
    InputDials,
    PlannedInputs,
    build_inputs,
    may_round,
    planned_inputs,
)
from bitnest.quantize.allocation.planned import Planned, expected

if TYPE_CHECKING:
    from bitnest.quantize.allocation.planner import Planner

TRIES = 6  # of a size, until weights and the names of their inputs fit


def with_inputs(planner: Planner, budget: Budget, policy: str) -> Planned:
    """The plan of a policy under a budget, its inputs planned beside it.

    Raises:
        RecipeError, BudgetError: a budget cannot be met.
        StatisticsError: a loss that was not measured.
    """
    own = budget
    for _ in range(TRIES):
        found = add_inputs(planner, planner.plan_weights(own, policy), budget)
        if budget.size is None or found.sizes.total <= budget.size:
            return found
        assert own.size is not None
        own = replace(own, size=own.size - (found.sizes.total - budget.size))
    raise AssertionError("inputs' names never fit beside weights")


def add_inputs(planner: Planner, found: Planned, budget: Budget | None) -> Planned:
    """The plan with inputs chosen for its weights. budget: that it was made under."""
    assert planner.inputs is not None
    base, weights = found.evidence.objective, found.plan.formats(planner.job.sites)
    grounds = build_inputs(
        planner.predictor, weights, planner.inputs, base, found.choice, ruled_inputs(planner)
    )
    choice = grounds.solve(exact=planner.exact)
    chosen = planned_inputs(grounds, base, found.choice, choice)
    planned = counted(found, chosen)
    whole = chosen.joined(weights)
    rules = Plan.of(whole).rules
    sizes = planner.sizes_of(found.menu.plan(found.choice), budget, chosen.formats)
    planned = replace(planned, sizes=sizes)
    plan = replace(
        Plan.of(whole), model=found.plan.model, source=found.plan.source, target=found.plan.target,
        policy=found.plan.policy, asked=found.plan.asked, prune=found.plan.prune,
        expected=expected(planned), rules=rules,
    )  # fmt: skip
    return replace(planned, plan=plan)


def evaluated_inputs(planner: Planner, found: Planned, plan: Plan) -> Planned:
    """The figures of a plan whose rules say inputs, with what these lose.

    Raises:
        StatisticsError: that was not measured.
    """
    said = plan.inputs(planner.job.sites)
    weights = plan.formats(planner.job.sites)
    sites = [site for site in planner.predictor.sites if may_round(site, weights)]
    chosen = {site.name: said.get(site.name, DENSE) for site in sites}
    if all(name == DENSE for name in chosen.values()):
        return found
    try:
        planner.predictor.statistics.check_inputs(list(chosen.values()))
    except StatisticsError as error:
        raise StatisticsError(error.what, where=plan.where, hint=error.hint) from error
    base = found.evidence.objective
    names = tuple(dict.fromkeys([*chosen.values(), *planner.predictor.statistics.inputs]))
    dials = InputDials(names, bits=float(DENSE_BITS) if len(names) > 1 else None)
    grounds = build_inputs(
        planner.predictor, weights, dials, base, found.choice, {}, apart=True
    )  # fmt: skip
    choice = grounds.menu.choice(chosen)
    planned = counted(found, planned_inputs(grounds, base, found.choice, choice))
    return replace(planned, sizes=planner.sizes_of(found.menu.plan(found.choice), None, chosen))


def counted(found: Planned, chosen: PlannedInputs) -> Planned:
    """The plan with what its inputs lose."""
    factor = chosen.mean / found.mean if found.mean > 0 else 1.0
    known = found.low is not None and found.high is not None and math.isfinite(factor)
    return replace(
        found, inputs=chosen, mean=chosen.mean,
        kl=dict(zip(found.kl, chosen.kl.tolist(), strict=True)),
        low=found.low * factor if known and found.low is not None else None,
        high=found.high * factor if known and found.high is not None else None,
    )  # fmt: skip


def with_ruled(planner: Planner, found: Planned) -> Planned:
    """The plan with what rules give to inputs, of which nothing else is planned."""
    weights = found.plan.formats(planner.job.sites)
    if not (ruled := ruled_names(planner, weights)):
        return found
    rules = Plan.of({**weights, **ruled}).rules
    return replace(found, plan=replace(found.plan, rules=rules, digest=digest_of(rules)))


def ruled_names(planner: Planner, weights: Mapping[str, str]) -> dict[str, str]:
    """Weights and inputs of sites to whose inputs rules give something, `dense` spelt out: the
    recipe may round those of all others. weights: format of every site."""
    given = ruled_inputs(planner)
    return {
        site.name: f"{weights[site.name]}/{given[site.name]}" for site in planner.job.sites
        if site.name in given and may_round(site, weights)
    }  # fmt: skip


def ruled_inputs(planner: Planner) -> Mapping[str, str]:
    """What the recipe's rules give to inputs, which no plan overrules."""
    names = Names(planner.job.sites)
    found: dict[str, str] = {}
    for rule in planner.job.recipe.rules:
        if rule.inputs is not None:
            found.update(dict.fromkeys(names.matching(rule.pattern), rule.inputs))
    return found
