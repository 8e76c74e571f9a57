"""From a budget to a plan: menu, policy, sizes, prediction.

The budget is one of

    bits    average code width over the planned weights. Scales are not counted, so at each width
            only the smallest of the candidates compete: no loophole in small groups
    size    every byte of the artifact, and with a context the key-value cache. Weights get what the
            rest leaves; the rest depends a little on the plan, so it is solved again until it fits
    kl      predicted mean KL: the smallest artifact that is predicted to keep it

Planning is pure: the same statistics, target and budget give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bitnest.calibrate.predict import Predictor
from bitnest.errors import RecipeError, StatisticsError
from bitnest.formats import AnyFormat, parse_format
from bitnest.kinds import ENDS, UNNAMED_DENSE
from bitnest.plan import Plan
from bitnest.quantize.allocation.budget import Budget, smallest_of_width, too_small
from bitnest.quantize.allocation.evidence import read_evidence
from bitnest.quantize.allocation.menu import Menu, build_menu
from bitnest.quantize.allocation.planned import Planned, expected
from bitnest.quantize.allocation.policies import POLICIES, Evidence
from bitnest.quantize.compress import Job
from bitnest.quantize.sizing import Sizes, artifact_sizes
from bitnest.recipe import sized
from bitnest.sites import Site
from bitnest.targets import Target

SOLVES = 8  # of a size, until it fits
RESERVE = 1400  # bytes of manifest for the plan's summary and the prediction
UNKNOWN = 1600  # bytes more for calibration, if it is not known yet


class Planner:
    """Plans for one model, its statistics and a target.

    formats: candidates, None for those of the statistics. ends: whether embedding and head are
    planned too; None: with a size or KL they are, with bits they stay as they are, which is how
    "3-bit" is meant in the field. weights: of the dataset labels. latency: see `read_evidence`.

    Raises:
        StatisticsError: of another model, or without what planning needs.
        RecipeError: no candidate for a site.
    """

    def __init__(
        self,
        job: Job,
        predictor: Predictor,
        target: Target,
        *,
        formats: Sequence[str] | None = None,
        ends: bool | None = None,
        weights: Mapping[str, float] | None = None,
        latency: Mapping[str, float] | None = None,
        exact: bool = False,
    ) -> None:
        self.job, self.predictor, self.target = job, predictor, target
        self.ends, self.exact, self.latency = ends, exact, latency
        self.labels = [
            d for d, known in zip(predictor.labels, predictor.known, strict=True) if known
        ]
        self.weights = label_weights(self.labels, weights)
        self.known = {site.name: site for site in job.sites}
        check_sites(job, predictor)
        self.formats = tuple(predictor.formats if formats is None else formats)
        for name in self.formats:
            if name not in predictor.formats:
                raise StatisticsError(
                    f"format '{name}' is no candidate of these statistics",
                    where=str(predictor.statistics.path),
                    hint="measured: " + ", ".join(predictor.formats),
                )

    def plan(self, budget: Budget, policy: str = "bitnest") -> Planned:
        """The plan of a policy under a budget.

        Raises:
            RecipeError, BudgetError: the budget cannot be met.
        """
        if policy not in POLICIES:
            raise RecipeError(f"unknown policy '{policy}'", hint="one of " + ", ".join(POLICIES))
        evidence = self.evidence(budget)
        if budget.bits is not None:
            spend = round(budget.bits * int(evidence.menu.numel.sum()))
            return self._finish(evidence, self._bits(evidence, spend, policy), budget, policy)
        if budget.kl is not None:
            if policy != "bitnest":
                raise RecipeError(f"policy {policy} has no prediction to steer by",
                                  hint="give it --bits or --size")  # fmt: skip
            found = evidence.objective.smallest(evidence.menu.nbytes, budget.kl, exact=self.exact)
            return self._finish(evidence, found.choice, budget, policy)
        assert budget.size is not None
        return self._finish(evidence, self._sized(evidence, budget, policy), budget, policy)

    def evaluate(self, plan: Plan) -> Planned:
        """What a plan that is already there costs and loses.

        Raises:
            RecipeError: it names no site, or breaks a rule of the target.
        """
        formats = plan.formats(self.job.sites)
        evidence = self.evidence(Budget(size=1))
        chosen = {s.name: formats[s.name] for item in evidence.menu.items for s in item}
        choice = evidence.menu.choice(chosen)
        found = self._finish(evidence, choice, Budget(size=1), plan.policy)
        fresh = Plan(**{**vars(plan), "expected": found.plan.expected})
        return Planned(**{**vars(found), "plan": fresh, "gap": None})

    def evidence(self, budget: Budget) -> Evidence:
        """Menu and grounds for a kind of budget."""
        ends = self.ends if self.ends is not None else budget.bits is None
        sites = [s for s in self.predictor.sites if ends or s.kind not in ENDS]
        formats = self.formats if budget.bits is None else smallest_of_width(self.formats, sites)
        place = {site.name: i for i, site in enumerate(self.predictor.sites)}
        columns = [self.predictor.formats.index(name) for name in formats]
        losses = self.predictor.losses[[place[s.name] for s in sites]][:, columns]
        losses = losses[:, :, np.array(self.predictor.known)]
        menu = build_menu(
            sites, formats, losses, self.target,
            itemsize=self.job.itemsize, fixed=self._fixed(sites),
        )  # fmt: skip
        return read_evidence(
            self.predictor, menu, weights=self.weights, latency=self.latency, exact=self.exact
        )

    def _fixed(self, sites: Sequence[Site]) -> dict[str, str]:
        """Formats that the recipe's rules ask for, which no plan overrules."""
        if not self.job.recipe.rules:
            return {}
        ruled = self.job.recipe.ruled(self.job.sites)
        planned = {site.name for site in sites}
        return {name: fmt for name, fmt in ruled.items() if name in planned}

    def _bits(self, evidence: Evidence, spend: int, policy: str) -> np.ndarray:
        return POLICIES[policy](evidence, evidence.menu.bits, spend)

    def _sized(self, evidence: Evidence, budget: Budget, policy: str) -> np.ndarray:
        """Solve, see what the whole artifact takes, and give the weights what is over."""
        assert budget.size is not None
        menu = evidence.menu
        rows = np.arange(len(menu.items))
        cheapest = np.where(menu.allowed, menu.nbytes, np.iinfo(np.int64).max).argmin(axis=1)
        rest = self.sizes(menu, cheapest, budget).total - int(menu.nbytes[rows, cheapest].sum())
        if rest + int(menu.nbytes[rows, cheapest].sum()) > budget.size:
            raise too_small(budget, rest + int(menu.nbytes[rows, cheapest].sum()))
        spend, best, least_over = budget.size - rest, cheapest, -1
        for _ in range(SOLVES):
            choice = POLICIES[policy](evidence, menu.nbytes, spend)
            total = self.sizes(menu, choice, budget).total
            if total <= budget.size and total > least_over:
                best, least_over = choice, total
            over = total - budget.size
            if -budget.size // 2000 <= over <= 0:
                break
            spend -= over
            if over < 0 and spend >= int(menu.nbytes.max(axis=1).sum()):
                break
        return best

    def sizes(self, menu: Menu, choice: np.ndarray, budget: Budget) -> Sizes:
        """Sizes of the artifact of one choice per item."""
        sizes = artifact_sizes(
            self._job(menu.plan(choice)), self._formats(menu.plan(choice)), budget.context
        )
        reserve = RESERVE + 60 * len(self.labels)
        reserve += UNKNOWN if self.job.calibration is None else 0
        return replace(sizes, manifest=sizes.manifest + reserve)

    def formats_of(self, plan: Plan) -> dict[str, AnyFormat]:
        """Format of every site of the model under a plan."""
        return self._formats(plan.formats(self.job.sites))

    def _formats(self, plan: Mapping[str, str]) -> dict[str, AnyFormat]:
        formats: dict[str, AnyFormat] = {}
        for site in self.job.sites:
            name = plan.get(site.name)
            formats[site.name] = (
                self.job.formats[site.name] if name is None
                else sized(parse_format(name), self.job.itemsize)
            )  # fmt: skip
        return formats

    def _job(self, plan: Mapping[str, str]) -> Job:
        rules = Plan.of(self.whole(plan)).rules
        return replace(self.job, recipe=replace(self.job.recipe, format="dense", rules=rules))

    def whole(self, plan: Mapping[str, str]) -> dict[str, str]:
        """Format name of every site of the model: the plan's, elsewhere the recipe's."""
        return {
            site.name: plan.get(site.name, self.job.formats[site.name].name)
            for site in self.job.sites
        }

    def _finish(
        self, evidence: Evidence, choice: np.ndarray, budget: Budget, policy: str
    ) -> Planned:
        menu, objective = evidence.menu, evidence.objective
        kl = objective.kl(choice)
        mean = float(kl @ objective.weights)
        error = self.predictor.fit.error
        known = self.predictor.fit.probes > 0 and math.isfinite(error)
        sizes = self.sizes(menu, choice, budget)
        planned = Planned(
            plan=Plan(()), menu=menu, evidence=evidence, choice=choice, sizes=sizes,
            kl=dict(zip(self.labels, kl.tolist(), strict=True)), mean=mean,
            low=mean * math.exp(-error) if known else None,
            high=mean * math.exp(error) if known else None,
            gap=self._gap(evidence, choice, budget) if policy == "bitnest" else None,
        )  # fmt: skip
        source = self.predictor.statistics.header["source"]["sha256"]
        plan = Plan.of(
            self.whole(menu.plan(choice)),
            model=self.job.checkpoint.path.resolve().name,
            source=source,
            target=self.target.name,
            policy=policy,
            asked=budget.to_json(),
            expected=expected(planned),
        )
        return Planned(**{**vars(planned), "plan": plan})

    def _gap(self, evidence: Evidence, choice: np.ndarray, budget: Budget) -> float:
        """How much less a plan of the same cost could lose, at the prices of this one: the gap of
        the linear problem whose tangent lies at the plan."""
        from bitnest.quantize.allocation.exact import solve_exact
        from bitnest.quantize.allocation.solver import solve

        menu = evidence.menu
        cost = menu.bits if budget.bits is not None else menu.nbytes
        spent = int(cost[np.arange(len(choice)), choice].sum())
        if budget.bits is not None:
            spent = max(spent, round(budget.bits * int(menu.numel.sum())))
        total = evidence.objective.sums(choice).sum(axis=1)
        problem = evidence.objective.problem(cost, spent, total)
        found = (solve_exact if self.exact else solve)(problem)
        loss = problem.loss_of(choice)
        return max(0.0, (loss - found.bound) / loss) if loss > 0 else 0.0


def label_weights(labels: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray | None:
    """Weights in the labels' order, None for equal ones.

    Raises:
        RecipeError: an unknown label, or no weight above 0.
    """
    if not weights:
        return None
    for name, value in weights.items():
        if name not in labels or not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"no weight {value:g} for a text '{name}'",
                              hint="texts of the statistics: " + ", ".join(labels))  # fmt: skip
    found = np.array([max(weights.get(label, 1.0), 1e-9) for label in labels])
    return found


def check_sites(job: Job, predictor: Predictor) -> None:
    """Refuse statistics of another model, as far as names and shapes tell.

    Raises:
        StatisticsError: a site that was not measured, or has another shape.
    """
    known = {site.name: site for site in predictor.sites}
    for site in job.sites:
        other = known.get(site.name)
        if site.kind in UNNAMED_DENSE and other is None:
            continue
        if other is None or other.shape != site.shape:
            raise StatisticsError(
                f"site '{site.name}' {site.shape} was not measured",
                where=str(predictor.statistics.path),
                hint="are these statistics of another model? bitnest analyze this one",
            )
