"""From a budget to a plan: menu, policy, sizes, prediction.

The budget is one of

    bits    average code width over the planned weights. Scales are not counted, so of the formats
            that a weight may have only the smallest of each width compete: no loophole in small
            groups
    size    every byte of the artifact, and with a context the key-value cache. Weights get what the
            rest leaves; the rest depends a little on the plan, so it is solved again until it fits
    kl      predicted mean KL: the smallest artifact that is predicted to keep it

Planning is pure: the same statistics, target and budget give the same plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from bitnest.calibrate.block_losses import measured_blocks
from bitnest.calibrate.expect import Expected
from bitnest.calibrate.fate_losses import Offer
from bitnest.calibrate.predict import Predictor, widths_of
from bitnest.calibrate.slopes import sensitivity
from bitnest.errors import BitnestError, RecipeError, StatisticsError
from bitnest.formats import AnyFormat, FateFormat, fates_apart, parse_format
from bitnest.formats.inputs import DENSE, joined_name, parse_inputs
from bitnest.kinds import ENDS, UNNAMED_DENSE
from bitnest.plan import Plan, digest_of
from bitnest.quantize.allocation.budget import MARGIN, Budget, beside, ruled_formats, too_small
from bitnest.quantize.allocation.evidence import read_evidence
from bitnest.quantize.allocation.inputs import InputDials
from bitnest.quantize.allocation.joint import (
    add_inputs,
    evaluated_inputs,
    ruled_names,
    with_inputs,
    with_ruled,
)
from bitnest.quantize.allocation.menu import (
    FATE,
    Menu,
    build_menu,
    check_suited,
    with_fates,
    without_block,
)
from bitnest.quantize.allocation.nesting import Nesting
from bitnest.quantize.allocation.objective import Background, with_weights
from bitnest.quantize.allocation.planned import Planned, expected
from bitnest.quantize.allocation.policies import POLICIES, Evidence
from bitnest.quantize.allocation.problem import BudgetError
from bitnest.quantize.compress import Job
from bitnest.quantize.fates import Fates, Reducer, check_candidates, read_fates
from bitnest.quantize.sizing import Assumed, Sizes, artifact_sizes
from bitnest.recipe import PRUNERS, resolved, sized
from bitnest.sites import Site
from bitnest.targets import Target

log = logging.getLogger(__name__)

SOLVES = 16  # of a size, until it fits
CLOSE = 4000  # a plan is close enough if it leaves this part of the size
LONGEST = 1.23456e-05  # no figure of the manifest is longer
FIGURES = (
    "bits",
    "bits_per_weight",
    "packed_bytes",
    "artifact_bytes",
    "kl",
    "kl_low",
    "kl_high",
    "gap",
)
INPUT_FIGURES = ("input_bits", "input_time", "input_kl")


class Planner:
    """Plans for one model, its statistics and a target.

    formats: candidates, None for those of the statistics; a site that a rule names gets the rule's
    format, candidate or not. ends: whether embedding and head are
    planned too; None: with a size or KL they are, with bits they stay as they are, which is how
    "3-bit" is meant in the field. weights: of the dataset labels. latency: see `read_evidence`.
    nesting: weights are nested, formats those that it says. inputs: what is asked of inputs.

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
        nesting: Nesting | None = None,
        inputs: InputDials | None = None,
    ) -> None:
        self.nesting, self.inputs = nesting, inputs
        self.job, self.predictor, self.target = job, predictor, target
        self.ends, self.exact, self.latency = ends, exact, latency
        self.labels = [
            d for d, known in zip(predictor.labels, predictor.known, strict=True) if known
        ]
        self.weights = label_weights(self.labels, weights)
        self.known = {site.name: site for site in job.sites}
        check_sites(job, predictor)
        check_candidates(formats or (), target.name, experts=bool(predictor.fates.last))
        coded, kinds = fates_apart(predictor.statistics.fates if formats is None else formats)
        if nesting is None:
            predictor.statistics.check_formats(kinds)
        native = target.name == "native" and nesting is None
        self.kinds = kinds if native else ()
        self.dropping = "drop" in kinds and nesting is None
        self.formats = coded or tuple(predictor.formats)
        if nesting is not None:
            self.formats = nesting.formats
        predictor.check_formats(self.formats)
        if inputs is not None:
            predictor.statistics.check_inputs(inputs.formats)

    def plan(self, budget: Budget, policy: str = "bitnest") -> Planned:
        """The plan of a policy under a budget, of inputs too if something is asked of them.

        Raises:
            RecipeError, BudgetError: the budget cannot be met.
        """
        if self.inputs is None:
            return with_ruled(self, self.plan_weights(budget, policy))
        return with_inputs(self, budget, policy)

    def fixed(self) -> Planned:
        """The plan of the recipe's own formats, with inputs chosen for them."""
        own = {site.name: self.job.formats[site.name].name for site in self.job.sites}
        source = self.predictor.statistics.header["source"]["sha256"]
        plan = Plan.of(
            own, model=self.job.checkpoint.path.resolve().name, source=source,
            target=self.target.name, asked={} if self.inputs is None else self.inputs.to_json(),
        )  # fmt: skip
        found = self.evaluate(plan)
        return found if self.inputs is None else add_inputs(self, found, None)

    def plan_weights(self, budget: Budget, policy: str = "bitnest") -> Planned:
        """The plan of weights alone; see `plan`.

        Raises:
            RecipeError, BudgetError: the budget cannot be met.
        """
        if policy not in POLICIES:
            raise RecipeError(f"unknown policy '{policy}'", hint="one of " + ", ".join(POLICIES))
        if policy != "bitnest" or not (self.kinds or self.dropping):
            return self._planned(self.evidence(budget), budget, policy)
        found: Planned | None = None
        refused: RecipeError | None = None
        best = self.kinds
        merging = tuple(kind for kind in self.kinds if kind != "merge")
        for kinds in dict.fromkeys(((), self.kinds, merging)):  # no worse than without fates
            evidence = self.evidence(budget, kinds=kinds)
            if kinds and not evidence.menu.gone:
                continue
            try:
                other = self._planned(evidence, budget, policy)
            except RecipeError as error:
                refused = error
                continue
            if found is None or _better(other, found, budget):
                found, best = other, kinds
        found = self._without_blocks(found, best, budget)
        if found is None:
            assert refused is not None
            raise refused
        return found

    def _without_blocks(
        self, found: Planned | None, kinds: Sequence[str], budget: Budget
    ) -> Planned | None:
        """`found`, or the plan of the model without one of the measured blocks if it is predicted
        to be better. One that loses more by itself than a whole plan is not solved."""
        for block, alone in self._blocks():
            most = budget.kl if budget.kl is not None else math.inf if found is None else found.mean
            if alone >= most:
                break
            try:
                evidence = self.evidence(budget, kinds=kinds, block=block)
                other = self._planned(evidence, budget, "bitnest")
            except BitnestError as error:  # no plan fits, or the family cannot do without
                log.info("block %d stays: %s", block, error)
                continue
            found = other if found is None or _better(other, found, budget) else found
        return found

    def _blocks(self) -> list[tuple[int, float]]:
        """Blocks that may be left out and mean KL without them, least first. Those that rules speak
        of stay."""
        if not self.dropping:
            return []
        ruled = self.job.recipe.ruled(self.job.sites) if self.job.recipe.rules else {}
        named = {site.layer for site in self.job.sites if site.name in ruled}
        known = np.array(self.predictor.known)
        weights = np.ones(len(self.labels)) if self.weights is None else self.weights
        found = [
            (block, float(np.average(kl[known], weights=weights)))
            for block, kl in measured_blocks(self.predictor.statistics).items()
            if block not in named
        ]
        return sorted(found, key=lambda item: item[1])

    def _planned(self, evidence: Evidence, budget: Budget, policy: str) -> Planned:
        if budget.bits is not None:
            spend = round(budget.bits * int(evidence.menu.numel.sum()))
            try:
                choice = POLICIES[policy](evidence, evidence.menu.bits, spend)
            except BudgetError as error:
                raise error.counting("code bits") from error
            return self._finish(evidence, choice, budget, policy, spend)
        if budget.kl is not None:
            if policy != "bitnest":
                raise RecipeError(f"policy {policy} has no prediction to steer by",
                                  hint="give it --bits or --size")  # fmt: skip
            found = evidence.objective.smallest(evidence.menu.nbytes, budget.kl, exact=self.exact)
            return self._finish(evidence, found.choice, budget, policy, found.cost)
        choice, spend = self._sized(evidence, budget, policy)
        return self._finish(evidence, choice, budget, policy, spend)

    def add_nested(self, plan: Plan) -> None:
        """Let the nested formats of a plan be candidates, which statistics need not know.

        Raises:
            StatisticsError: they know nothing of that width either.
        """
        names = {name for name in plan.formats(self.job.sites).values() if widths_of(name)}
        extra = tuple(sorted(names - set(self.formats)))
        self.predictor.check_formats(extra)
        self.formats = (*self.formats, *extra)

    def evaluate(self, plan: Plan) -> Planned:
        """What a plan that is already there costs and loses. The figures and the digest of the
        result are of its rules as they are now.

        Raises:
            RecipeError: it names no site, or breaks a rule of the target.
        """
        formats = plan.formats(self.job.sites)
        fated = {
            n: fate for n, f in formats.items() if isinstance(fate := parse_format(f), FateFormat)
        }
        if fated:
            other = copy(self)
            other.job = replace(self.job, formats={**self.job.formats, **fated})
            return other._evaluated(plan, formats)
        return self._evaluated(plan, formats)

    def _evaluated(self, plan: Plan, formats: Mapping[str, str]) -> Planned:
        evidence = self.evidence(Budget(size=1), ends=True, suited=False)
        chosen = {s.name: formats[s.name] for item in evidence.menu.items for s in item}
        choice = evidence.menu.choice(chosen)
        found = evaluated_inputs(self, self._finish(evidence, choice, Budget(size=1), ""), plan)
        now = replace(plan, expected=expected(found), digest=digest_of(plan.rules))
        return replace(found, plan=now)

    def evidence(
        self,
        budget: Budget,
        *,
        ends: bool | None = None,
        suited: bool = True,
        kinds: Sequence[str] = (),
        block: int | None = None,
    ) -> Evidence:
        """Menu and grounds for a kind of budget. ends: whether embedding and head are on the menu;
        None: as the planner does. suited: refuse candidates of which the target takes none. kinds:
        fates that experts may have. block: one that is left out.

        Raises:
            RecipeError: they are, or no format is left for a site.
            StatisticsError: a rule asks for a format that was not measured.
        """
        if ends is None:
            ends = self.ends if self.ends is not None else budget.bits is None
        fates = read_fates(self.job.sites, self.job.formats)
        gone = {n for n, fmt in self.job.formats.items() if isinstance(fmt, FateFormat)}
        sites = [s for s in self.predictor.sites if ends or s.kind not in ENDS]
        sites = [s for s in sites if s.name not in gone]
        fixed = ruled_formats(self.job, sites)
        target = self.target
        if suited:
            check_suited([s for s in sites if s.name not in fixed], self.formats, target)
        if self.nesting is not None:
            target = self.nesting.target(target, fixed, self._bases(sites, fixed, budget))
        menu = self._menu(sites, self.formats, fixed, target, apart=block)
        if budget.bits is not None:
            menu = menu.one_per_width()
        if kinds:
            offers = self._offers(kinds, fixed, fates)
            offers = {place: offer for place, offer in offers.items() if place[0] != block}
            menu = with_fates(menu, offers, self.job.itemsize)
        if block is not None:
            loss = self.predictor.blocks[block][np.array(self.predictor.known)]
            menu = without_block(menu, block, loss)
        return read_evidence(
            self.predictor, menu, weights=self.weights, background=self._background(sites),
            latency=self.latency, exact=self.exact,
        )  # fmt: skip

    def _offers(
        self, kinds: Sequence[str], fixed: Mapping[str, str], fates: Fates
    ) -> dict[tuple[int, int], Offer]:
        """The fate of every expert that may go. One of every layer stays, and those that rules
        speak of or that others are merged with."""
        known = self.predictor.fates
        ruled = {block for block, _ in fates.experts} | set(fates.dropped)
        named = {
            (site.layer, site.expert) for site in self.predictor.sites
            if site.expert is not None and site.name in fixed
        }  # fmt: skip
        weight = np.array(self.predictor.known, dtype=float)
        zero = {place: float(loss @ weight) for place, loss in known.zero.items()}
        stay = set(named)
        for block in {block for block, _ in zero}:
            stay.add(max((place for place in zero if place[0] == block), key=zero.__getitem__))
        found: dict[tuple[int, int], Offer] = {}
        for place in sorted(zero, key=zero.__getitem__):
            if place[0] in ruled or place in stay:
                continue
            offers = known.offers(place, kinds)
            for offer in offers:
                partner = (place[0], offer.fate.partner)
                if offer.fate.kind != "merge" or partner not in found:
                    kept = replace(offer, loss=offer.loss[np.array(self.predictor.known)])
                    found[place] = kept
                    if offer.fate.partner is not None:
                        stay.add((place[0], offer.fate.partner))
                    break
        return found

    def _menu(
        self,
        sites: Sequence[Site],
        candidates: Sequence[str],
        fixed: Mapping[str, str],
        target: Target,
        *,
        apart: int | None = None,
    ) -> Menu:
        """The menu of `sites`, with what rules add to the candidates."""
        extra = beside(fixed, candidates)
        self._check_measured(extra)
        place = {site.name: i for i, site in enumerate(self.predictor.sites)}
        formats = (*candidates, *extra)
        columns = [self.predictor.column(name) for name in formats]
        losses = self.predictor.losses[[place[s.name] for s in sites]][:, columns]
        losses = losses[:, :, np.array(self.predictor.known)]
        return build_menu(
            sites, formats, losses, target,
            itemsize=self.job.itemsize, fixed=fixed, extra=extra, apart=apart,
        )  # fmt: skip

    def _bases(
        self, sites: Sequence[Site], fixed: Mapping[str, str], budget: Budget
    ) -> dict[str, int]:
        """Base width of every site that is to be nested; see `nesting`.

        Raises:
            RecipeError: no widths fit the base size.
        """
        assert self.nesting is not None
        free = [site.name for site in sites if site.name not in fixed]
        size = self.nesting.base_size
        if size is None:
            return dict.fromkeys(free, self.nesting.widths[0])
        target = self.nesting.target(self.target, fixed, None)
        menu = self._menu(sites, self.nesting.single, fixed, target)
        objective = with_weights(menu, self.predictor.fit, self.weights, self._background(sites))
        rows = np.arange(len(menu.items))
        cheapest = np.where(menu.allowed, menu.nbytes, np.iinfo(np.int64).max).argmin(axis=1)
        least = menu.least(menu.nbytes)
        sizes = self.sizes(menu, cheapest, budget)
        rest = sizes.packed + sizes.dense - int(menu.nbytes[rows, cheapest].sum())
        if rest + least > size:
            raise RecipeError(
                f"at {self.nesting.widths[0]} bits everywhere the weights take {rest + least:,} "
                f"bytes, more than the base size of {size:,}",
                hint=f"--base-size {rest + least} or more, or a narrower width by --nested",
            )
        if budget.size is not None:  # no more than the whole may take
            other = sizes.total - sizes.packed - sizes.dense + MARGIN
            size = max(rest + least, min(size, budget.size - other))
        choice = objective.minimise(menu.nbytes, size - rest, exact=self.exact).choice
        bits = 0 if budget.bits is None else round(budget.bits * int(menu.numel.sum()))
        if bits and int(menu.bits[rows, choice].sum()) > bits >= menu.least(menu.bits):
            choice = objective.minimise(menu.bits, bits, exact=self.exact).choice
        chosen = menu.plan(choice)
        return {name: widths_of(chosen[name])[0] for name in free}

    def _background(self, planned: Sequence[Site]) -> Background:
        """What sites lose that are not on the menu, but have a format by a rule: ends."""
        names = {site.name for site in planned}
        ruled = self.job.recipe.ruled(self.job.sites) if self.job.recipe.rules else {}
        place = {site.name: i for i, site in enumerate(self.predictor.sites)}
        ends = [s for s in self.job.sites if s.kind in ENDS and s.name not in names]
        ends = [s for s in ends if ruled.get(s.name, "dense") != "dense"]
        self._check_measured([ruled[site.name] for site in ends])
        for site in ends:
            if site.name not in place:
                raise StatisticsError(
                    f"'{site.name}', which a rule gives a format, was not measured",
                    where=str(self.predictor.statistics.path),
                    hint="bitnest analyze it again: these statistics are of an earlier version",
                )
        depth = dict(zip(place, self.predictor.depth, strict=True))
        losses = [
            self.predictor.losses[place[s.name], self.predictor.column(ruled[s.name])] for s in ends
        ]
        gone = {n: f for n, f in self.job.formats.items() if isinstance(f, FateFormat)}
        for number, loss in self.predictor.fate_losses(gone).items():
            ends.append(self.predictor.sites[number])
            losses.append(loss)
        known = np.array(self.predictor.known)
        if not losses:
            return Background.none(int(known.sum()))
        return Background(
            np.stack(losses)[:, known],
            tuple(s.kind for s in ends),
            np.array([depth[s.name] for s in ends]),
        )

    def _check_measured(self, ruled: Sequence[str]) -> None:
        statistics = self.predictor.statistics
        for name in ruled:
            fate = isinstance(parse_format(name), FateFormat)
            if name not in statistics.formats and not widths_of(name) and not fate:
                raise StatisticsError(
                    f"format '{name}', which a rule asks for, was not measured",
                    where=str(statistics.path),
                    hint=f"measured: {', '.join(statistics.formats)}; "
                    + statistics.measuring([*self.formats, *ruled]),
                )

    def _sized(self, evidence: Evidence, budget: Budget, policy: str) -> tuple[np.ndarray, int]:
        """Solve, see what the whole artifact takes, and give the weights what is left; the largest
        plan that fits, and the bytes of weights it was allowed."""
        assert budget.size is not None
        menu = evidence.menu
        rows = np.arange(len(menu.items))
        cheapest = np.where(menu.allowed, menu.nbytes, np.iinfo(np.int64).max).argmin(axis=1)
        for gone in menu.gone:
            cheapest[list(gone.items)] = menu.formats.index(FATE)
        low = int(menu.nbytes[rows, cheapest].sum())
        least = self.sizes(menu, cheapest, budget).total
        if least > budget.size:
            raise too_small(budget, least)
        best, reached = cheapest, least
        high, spend = int(menu.nbytes.max(axis=1).sum()) + 1, budget.size - (least - low)
        for _ in range(SOLVES):
            if not low < spend:
                break
            choice = POLICIES[policy](evidence, menu.nbytes, spend)
            own, total = (
                int(menu.nbytes[rows, choice].sum()), self.sizes(menu, choice, budget).total
            )  # fmt: skip
            over = total - budget.size
            if over > 0:
                high = min(high, own)  # this plan is too large, whatever was allowed for it
                spend = own - over if own - over > low else (low + own) // 2
                continue
            if total >= reached:
                best, reached = choice, total
            low = max(low, spend)
            if -over <= budget.size // CLOSE or own - over <= spend:
                break
            spend = min(own - over, high - 1)
        return best, max(low, int(menu.nbytes[rows, best].sum()))

    def sizes(self, menu: Menu, choice: np.ndarray, budget: Budget) -> Sizes:
        """Sizes of the artifact of one choice per item, its manifest as this plan's will be."""
        return self.sizes_of(menu.plan(choice), budget)

    def sizes_of(
        self,
        formats: Mapping[str, str],
        budget: Budget | None,
        inputs: Mapping[str, str] | None = None,
    ) -> Sizes:
        """The same of format names by site. budget: None for formats that no budget gave. inputs:
        what inputs are rounded to, by site."""
        budget = budget or Budget(size=1)
        job = replace(
            self._job(formats, inputs or {}), plan=self._draft(budget), expected=self._expected
        )
        if self.job.asked is None:  # carried out later, with options that are not known yet
            job = replace(job, asked=self._asked(budget))
        assumed = None if self.job.calibration is not None else self._assumed()
        return artifact_sizes(
            job, self._formats(formats), budget.context, assumed, self._reducer
        )  # fmt: skip

    @cached_property
    def _reducer(self) -> Reducer:
        return Reducer(self.job)

    def _draft(self, budget: Budget) -> Plan:
        """A plan whose summary is as long as it can become."""
        figures = dict.fromkeys(FIGURES, LONGEST)
        if self.inputs is not None:
            figures |= dict.fromkeys(INPUT_FIGURES, LONGEST)
        texts = {"kl_by_text": dict.fromkeys(self.labels, LONGEST)}
        return Plan(
            (), target=self.target.name, policy="frequency", asked=self._spoken(budget),
            expected={**figures, **texts},
        )  # fmt: skip

    def _spoken(self, budget: Budget) -> dict[str, Any]:
        """What was asked for, as the plan keeps it."""
        return {
            **budget.to_json(), **({} if self.nesting is None else self.nesting.to_json()),
            **({} if self.inputs is None else self.inputs.to_json()),
        }  # fmt: skip

    def _asked(self, budget: Budget) -> dict[str, Any]:
        """The resolved recipe of `compress` with this budget and no other option."""
        planning = {
            "target": self.target.name, "policy": "frequency", "candidates": list(self.formats),
            "ends": False, "exact": False,
            **({} if self.nesting is None else self.nesting.to_json()),
            **({} if self.inputs is None else self.inputs.to_json()),
        }  # fmt: skip
        return resolved(self.job.recipe, {"budget": budget.to_json()}, planning=planning)

    @cached_property
    def _expected(self) -> Expected:
        """A prediction that is as long as it can become."""
        kl = dict.fromkeys(self.labels, LONGEST)
        return Expected(
            kl, LONGEST, LONGEST, LONGEST, "0" * 64, "0" * 64, frozenset(),
            sensitivity(self.predictor),
        )  # fmt: skip

    def _assumed(self) -> Assumed:
        """The calibration text, if it is not known yet: that of the statistics."""
        header = self.predictor.statistics.header
        counts = {item["label"]: item["samples"] for item in header["data"] if item["samples"]}
        return Assumed(header["tokens"], sum(counts.values()), header["length"] or 512, counts)

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

    def _job(self, plan: Mapping[str, str], inputs: Mapping[str, str]) -> Job:
        whole = self.whole(plan)
        joined = {name: joined_name(fmt, inputs.get(name, "")) for name, fmt in whole.items()}
        if not inputs:
            joined |= ruled_names(self, whole)
        recipe = replace(self.job.recipe, format="dense", rules=Plan.of(joined).rules)
        if inputs:
            own = {name: parse_inputs(fmt) for name, fmt in inputs.items() if fmt != DENSE}
        elif recipe.inputs or any(rule.inputs for rule in recipe.rules):
            own = recipe.input_formats(self.job.sites, self._formats(plan))
        else:
            own = {}
        return replace(self.job, recipe=recipe, inputs=own)

    def _pruned(self, plan: Mapping[str, str]) -> str:
        """How sparse formats of a plan were measured, empty where that is the usual way."""
        way = str(self.predictor.statistics.header["options"].get("prune", PRUNERS[0]))
        return way if way != PRUNERS[0] and any("%" in name for name in plan.values()) else ""

    def whole(self, plan: Mapping[str, str]) -> dict[str, str]:
        """Format name of every site of the model: the plan's, elsewhere the recipe's."""
        return {
            site.name: plan.get(site.name, self.job.formats[site.name].name)
            for site in self.job.sites
        }

    def _finish(
        self, evidence: Evidence, choice: np.ndarray, budget: Budget, policy: str, spend: int = 0
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
            gap=self._gap(evidence, choice, budget, spend) if policy == "bitnest" else None,
        )  # fmt: skip
        source = self.predictor.statistics.header["source"]["sha256"]
        plan = Plan.of(
            self.whole(menu.plan(choice)),
            model=self.job.checkpoint.path.resolve().name,
            source=source,
            target=self.target.name,
            policy=policy,
            asked=self._spoken(budget),
            expected=expected(planned),
            prune=self._pruned(menu.plan(choice)),
        )
        return replace(planned, plan=plan)

    def _gap(self, evidence: Evidence, choice: np.ndarray, budget: Budget, spend: int) -> float:
        """How much less a plan within `spend` could lose, as far as the linear problem tells whose
        tangent lies at this plan."""
        from bitnest.quantize.allocation.exact import solve_exact
        from bitnest.quantize.allocation.solver import solve

        menu = evidence.menu
        cost = menu.bits if budget.bits is not None else menu.nbytes
        spent = max(spend, int(cost[np.arange(len(choice)), choice].sum()))
        problem = evidence.objective.problem(cost, spent, choice)
        found = (solve_exact if self.exact else solve)(problem)
        loss = problem.loss_of(choice)
        return max(0.0, (loss - found.bound) / loss) if loss > 0 else 0.0


def _better(one: Planned, other: Planned, budget: Budget) -> bool:
    """Whether `one` is predicted to lose less, or with a limit of KL takes less."""
    if budget.kl is not None:
        return one.sizes.total < other.sizes.total
    return one.mean < other.mean


def label_weights(labels: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray | None:
    """Weights in the labels' order, None for equal ones.

    Raises:
        RecipeError: an unknown label, or no weight above 0.
    """
    if not weights:
        return None
    if not any(weights.get(label, 1.0) > 0 for label in labels):
        raise RecipeError("every text has the weight 0", hint="--weight LABEL=1 for one of them")
    for name, value in weights.items():
        if name not in labels or not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"no weight {value:g} for a text '{name}'",
                              hint="texts of the statistics: " + ", ".join(labels))  # fmt: skip
    return np.array([max(weights.get(label, 1.0), 1e-9) for label in labels])


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
