"""plan, as a function: from statistics and a budget to a plan, and what follows from many of them.

Planning reads the checkpoint's headers and the statistics, no weights: seconds on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.input_planning import asked_inputs, measured_inputs
from bitnest.checkpoint import resolve_model
from bitnest.errors import PlanError, RecipeError, StatisticsError, TargetError
from bitnest.formats import integer
from bitnest.formats.inputs import DENSE
from bitnest.kinds import ENDS
from bitnest.lora import name_with
from bitnest.packed.decoded import open_checkpoint
from bitnest.recipe import Recipe, Rule

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from bitnest.formats import AnyFormat
    from bitnest.formats.inputs import InputFormat
    from bitnest.plan import Plan
    from bitnest.progress import Progress
    from bitnest.quantize.allocation.budget import Budget
    from bitnest.quantize.allocation.frontier import Frontier
    from bitnest.quantize.allocation.inputs import InputDials
    from bitnest.quantize.allocation.nesting import Nesting
    from bitnest.quantize.allocation.planned import Planned
    from bitnest.quantize.allocation.planner import Planner
    from bitnest.quantize.compress import Job
    from bitnest.sites import Site
    from bitnest.statistics import Statistics

DEFAULT_FATES = ("drop", "constant")  # that are measured unless formats are named
AGREEMENT = 0.77  # share of tokens whose top choice changes, over the root of the mean KL in nats
"""Measured on three texts and widths of 2 to 4 bits: .69 to .78 (docs/performance.md)."""


@dataclass(frozen=True)
class Dials:
    """What may be asked of a plan; one of the first four.

    bits: average code width. size: bytes of the artifact. max_kl: nats per token. min_agreement:
    share of tokens with the same most likely next token, 0 to 1. context: tokens of cache that
    `size` has to hold too.

    Raises:
        RecipeError: several, or out of range.
    """

    bits: float | None = None
    size: int | None = None
    max_kl: float | None = None
    min_agreement: float | None = None
    context: int = 0

    def __post_init__(self) -> None:
        given = [
            n for n in ("bits", "size", "max_kl", "min_agreement") if getattr(self, n) is not None
        ]
        if len(given) > 1:
            raise RecipeError(
                "one dial at a time, not "
                + " and ".join("--" + n.replace("_", "-") for n in given),
                hint="--bits, --size, --max-kl or --min-agreement",
            )
        if self.min_agreement is not None and not 0 < self.min_agreement < 1:
            raise RecipeError(
                f"an agreement of {self.min_agreement:g} is no share between 0 and 1",
                hint="--min-agreement 95%",
            )
        if given or self.context:
            self.budget()

    def to_json(self) -> dict[str, Any]:
        """What was given, by the names of the dials."""
        found = {key: value for key, value in vars(self).items() if value is not None}
        return {key: value for key, value in found.items() if key != "context" or value}

    @property
    def given(self) -> bool:
        """Whether any was."""
        return any(v is not None for v in (self.bits, self.size, self.max_kl, self.min_agreement))

    @property
    def measured(self) -> bool:
        """Whether it is met by measurement."""
        return self.max_kl is not None or self.min_agreement is not None

    def budget(self) -> Budget:
        """The budget of a first plan.

        Raises:
            RecipeError: out of range.
        """
        from bitnest.quantize.allocation.budget import Budget

        limit = self.max_kl
        if self.min_agreement is not None:
            limit = ((1 - self.min_agreement) / AGREEMENT) ** 2
        return Budget(self.bits, self.size, limit, self.context, dial=self.to_json())


def plan(
    model: str | Path,
    *,
    lora: Sequence[str] = (),
    statistics: str | Path | None = None,
    bits: float | None = None,
    size: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    context: int = 0,
    target: str = "native",
    policy: str = "bitnest",
    rules: Sequence[str] = (),
    candidates: Sequence[str] = (),
    ends: bool | None = None,
    weights: Mapping[str, float] | None = None,
    latency: Mapping[str, float] | None = None,
    exact: bool = False,
    nested: str | None = None,
    group: int | None = None,
    base_size: int | None = None,
    format: str | None = None,
    inputs: str | Sequence[str] = (),
    input_bits: float | None = None,
    input_time: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **analysis: Any,
) -> Planned:
    """The plan for `model` under a budget; see `Dials` for bits ... context, 4 bits if none.

    lora: adapters, PATH or PATH:scale, that are merged into the model first. statistics: directory
    that `analyze` wrote of this; without it `<model>-statistics` in this directory, measured now if
    it is not there, with `analysis` (data, samples, length, ...). target: the engine that is to
    load the result. policy: `bitnest` or one it is compared with. rules: PATTERN=FORMAT that no
    plan overrules. candidates: formats to choose among, of those measured. ends: plan embedding and
    head too; None: with a size or KL. weights: of the texts. latency: seconds per weight by format,
    for policy mxmoe. exact: prove the optimum. nested: widths, `2-8`, that weights can be read at;
    each gets its narrowest by base_size, the bytes all weights may take when memory is least, and
    its widest by the budget. group: of nested weights. format: one for all weights; several inputs
    are chosen for it. inputs, input_bits, input_time: formats that inputs are rounded to and their
    budget (`quantize/allocation/inputs`); latency has seconds per multiply-accumulate by
    WEIGHTS/INPUTS for it.

    Raises:
        BitnestError: before work starts for whatever can be known then.
    """
    check_policy(policy, candidates)
    nesting = open_nesting(nested, group, base_size, target, candidates)
    dials = Dials(bits, size, max_kl, min_agreement, context)
    pairs = None if input_time is None else latency
    barred = {"--nested": nesting is not None, "--max-kl": dials.measured,
              "--target": target != "native"}  # fmt: skip
    one, wide = asked_inputs(inputs, input_bits, input_time, pairs, barred)
    ruled = any(Rule.parse(rule).inputs not in {None, DENSE} for rule in rules)
    if one is not None or (wide is None and ruled):
        from bitnest.quantize.allocation.inputs import InputDials

        wide = InputDials.of([one or DENSE])
    if format is not None:
        check_fixed(dials, candidates, policy, wide)
        planner = open_planner(
            model, statistics, lora=lora, format=format, rules=rules, candidates=(format,),
            ends=ends, weights=weights, exact=exact, trust_remote_code=trust_remote_code,
            progress=progress, inputs=wide, **analysis,
        )  # fmt: skip
        return planner.fixed()
    if not dials.given:
        dials = Dials(bits=float(nesting.widths[-1]) if nesting else 4.0, context=context)
    planner = open_planner(
        model, statistics, lora=lora, target=target, rules=rules, candidates=candidates, ends=ends,
        weights=weights, latency=latency, exact=exact, trust_remote_code=trust_remote_code,
        progress=progress, budget=dials.budget(), nesting=nesting, inputs=wide, **analysis,
    )  # fmt: skip
    return planner.plan(dials.budget(), policy)


def check_fixed(
    dials: Dials, candidates: Sequence[str], policy: str, inputs: InputDials | None
) -> None:
    """Refuse one format for all weights with anything that would choose others, or nothing to plan.

    Raises:
        RecipeError: see above.
    """
    if dials.given or candidates or policy != "bitnest":
        raise RecipeError("--format already says every weight",
                          hint="leave out the dial, --candidate and --policy")  # fmt: skip
    if inputs is None:
        raise RecipeError(
            "one format for all leaves nothing to plan",
            hint="--inputs int6-g128 --inputs int8-g128 --input-bits 6.4 plans what inputs get",
        )


def open_nesting(
    nested: str | None,
    group: int | None,
    base_size: int | None,
    target: str,
    candidates: Sequence[str],
) -> Nesting | None:
    """What `nested`, `group` and `base_size` ask for together; None: nothing.

    Raises:
        RecipeError, FormatError: no widths, a base size without them, formats besides, an engine
            that reads no planes.
    """
    from bitnest.quantize.allocation.nesting import Nesting

    if nested is None:
        if base_size is not None:
            raise RecipeError("--base-size is for nested weights", hint="--nested 2-8")
        if group is not None:
            raise RecipeError("--group is for nested weights here", hint="--nested 2-8")
        return None
    if candidates:
        raise RecipeError("--nested already says the formats", hint="leave out --candidate")
    if target != "native":
        raise RecipeError(
            f"{target} reads no nested weights",
            hint="leave out --target"
            + (
                "; bitnest export ARTIFACT --bits 4 makes of the artifact what it reads"
                if target != "gguf"
                else ""
            ),
        )
    return Nesting.parse(nested, group, base_size)


def check_policy(policy: str, candidates: Sequence[str] = ()) -> None:
    """Refuse an unknown policy, and candidates that it would say nothing of.

    Raises:
        RecipeError: it is, or fates, which only ours chooses.
    """
    from bitnest.formats import fates_apart
    from bitnest.quantize.allocation.policies import POLICIES

    if policy not in POLICIES:
        raise RecipeError(f"unknown policy '{policy}'", hint="one of " + ", ".join(POLICIES))
    if policy != "bitnest" and (fates := fates_apart(candidates)[1]):
        raise RecipeError(f"policy {policy} lets no expert or block go",
                          where=f"--candidate {fates[0]}",
                          hint="leave out --policy, or that candidate")  # fmt: skip


def open_planner(
    model: str | Path,
    statistics: str | Path | None = None,
    *,
    lora: Sequence[str] = (),
    target: str = "native",
    rules: Sequence[str] = (),
    candidates: Sequence[str] = (),
    ends: bool | None = None,
    weights: Mapping[str, float] | None = None,
    latency: Mapping[str, float] | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    job: Job | None = None,
    budget: Budget | None = None,
    checked: bool = False,
    nesting: Nesting | None = None,
    inputs: InputDials | None = None,
    format: str = "dense",
    **analysis: Any,
) -> Planner:
    """A planner over the statistics of `model`; see `plan`. job: of the model, if there is one.
    budget: refused before anything is measured if it cannot be met. checked: read the weights, and
    refuse statistics of others; without it names and shapes are compared. nesting: formats are what
    it says. inputs: what is asked of inputs. format: of weights that are not planned.

    Raises:
        BitnestError: before work starts for whatever can be known then.
    """
    from bitnest.calibrate.predict import Predictor, widths_of
    from bitnest.export.plan_targets import open_target
    from bitnest.formats import fates_apart
    from bitnest.quantize.allocation.budget import check_budget
    from bitnest.quantize.allocation.planner import Planner
    from bitnest.quantize.compress import prepare
    from bitnest.quantize.ends import check_ends
    from bitnest.quantize.fates import check_candidates
    from bitnest.quantize.memory import Budget as Memory

    if job is None:
        recipe = Recipe(format=format, rules=tuple(Rule.parse(rule) for rule in rules))
        checkpoint = open_checkpoint(model, lora, trust_remote_code=trust_remote_code)
        job = prepare(checkpoint, recipe, trust_remote_code=trust_remote_code)
    goal = open_target(target, job.checkpoint.config, packed_inputs(job))
    experts = any(site.expert is not None for site in job.sites)
    check_candidates(candidates, goal.name, experts=experts)
    wanted = tuple(candidates) or tuple(analysis.pop("formats", ()))
    if checked:
        check_source(job, model, statistics, progress, lora=lora)
    measured = _measured(model, statistics, lora)
    if measured is not None:
        check_merged(job, measured)
    if measured is not None:
        ruled_formats = [
            name for name in fates_apart(_ruled(job))[0] if not widths_of(name)
        ]  # fmt: skip
        asked = (*(_names(candidates) or measured.formats), *ruled_formats)
        anew = f"; or rename {measured.path}, and the model is measured anew with the formats asked"
        measured.check_formats(asked, anew if statistics is None else "")
        measured.check_inputs(measured_inputs(inputs, job.recipe.rules))
    if budget is not None:
        there = None if measured is None else (*measured.formats, *measured.fates)
        known = _names(candidates) or there or wanted or goal.formats
        known = known if nesting is None else nesting.formats
        check_budget(job, goal, known, budget, ends)
    check_ends(
        job.packed_ends, job.formats, Memory.plan(job.skeleton, job.sites, analysis.get("memory"))
    )
    ruled = [f for f in fates_apart([r.weights for r in job.recipe.rules])[0] if f != "dense"]
    wanted = wanted if nesting is None else nesting.measured
    named = tuple(dict.fromkeys((*(wanted or goal.formats), *ruled)))
    named = (*named, *default_fates(job, named, candidates, goal.name, nesting))
    if rounded := measured_inputs(inputs, job.recipe.rules):
        analysis["inputs"] = rounded
    found = ensure_statistics(
        model, statistics, lora=lora, formats=named, progress=progress,
        trust_remote_code=trust_remote_code, **analysis,
    )  # fmt: skip
    per_weight = {name: value for name, value in (latency or {}).items() if "/" not in name}
    return Planner(
        job, Predictor(found), goal, formats=_names(candidates), ends=ends,
        weights=weights, latency=per_weight or None, exact=exact, nesting=nesting, inputs=inputs,
    )  # fmt: skip


def default_fates(
    job: Job,
    formats: Sequence[str],
    candidates: Sequence[str],
    target: str,
    nesting: Nesting | None,
) -> tuple[str, ...]:
    """Fates that are measured with `formats` where nothing was said: those of experts that can go,
    for whoever can load what is left."""
    from bitnest.errors import UnsupportedModel
    from bitnest.expert_axes import expert_axes
    from bitnest.formats import fates_apart

    asked = bool(candidates) or nesting is not None or fates_apart(formats)[1]
    if asked or target != "native" or all(site.expert is None for site in job.sites):
        return ()
    try:
        expert_axes(job.skeleton.model, job.skeleton.prefix)
    except UnsupportedModel as error:
        log.info("experts stay: %s", error)
        return ()
    return DEFAULT_FATES


def check_source(
    job: Job,
    model: str | Path,
    statistics: str | Path | None,
    progress: Progress | None,
    *,
    lora: Sequence[str] = (),
) -> None:
    """Refuse statistics of other weights, before anything is planned with them.

    Raises:
        StatisticsError: their sha256 differs.
    """
    from bitnest.progress import Silent
    from bitnest.statistics import Statistics, is_statistics

    place = default_statistics(model, lora) if statistics is None else Path(statistics)
    if not is_statistics(place):
        return
    check_merged(job, Statistics.open(place))
    watch = progress or Silent()
    watch.phase("checking weights", job.checkpoint.nbytes)
    if job.checkpoint.scan(watch.step) != Statistics.open(place).header["source"]["sha256"]:
        raise StatisticsError(
            "the statistics are of another model: its weights differ",
            where=str(place),
            hint=f"bitnest analyze {model} -o DIR, and --statistics DIR",
        )


def check_merged(job: Job, statistics: Statistics) -> None:
    """Refuse statistics of the model with other adapters in it, which is seen without reading
    weights.

    Raises:
        StatisticsError: adapters or scales differ.
    """

    def adapters(source: Mapping[str, Any]) -> list[tuple[str, float]]:
        return [(item["sha256"], item["scale"]) for item in source.get("merged", [])]

    own, measured = job.checkpoint.origin(), statistics.header["source"]
    if adapters(own) != adapters(measured):
        said = [f"{i['adapter']}:{i['scale']:g}" for i in measured.get("merged", [])]
        raise StatisticsError(
            "the statistics are of another model: of "
            + (f"one with the adapters {', '.join(said)}" if said else "one without adapters"),
            where=str(statistics.path),
            hint="analyze and plan with the same --lora",
        )


def _names(candidates: Sequence[str]) -> tuple[str, ...] | None:
    from bitnest.formats import parse_format

    return tuple(parse_format(name).name for name in candidates) or None


def _ruled(job: Job) -> tuple[str, ...]:
    """Formats that rules ask for at sites that every plan has a say in."""
    from bitnest.kinds import UNNAMED_DENSE
    from bitnest.quantize.allocation.budget import beside, ruled_formats

    return beside(ruled_formats(job, [s for s in job.sites if s.kind not in UNNAMED_DENSE]), ())


def _measured(
    model: str | Path, statistics: str | Path | None, lora: Sequence[str]
) -> Statistics | None:
    """The statistics that are there already, with candidates."""
    from bitnest.statistics import Statistics, is_statistics

    place = default_statistics(model, lora) if statistics is None else Path(statistics)
    found = Statistics.open(place) if is_statistics(place) else None
    return found if found is not None and found.formats else None


def ensure_statistics(
    model: str | Path,
    statistics: str | Path | None,
    *,
    lora: Sequence[str] = (),
    formats: Sequence[str],
    progress: Progress | None = None,
    **analysis: Any,
) -> Any:
    """The statistics in a directory, verified; without one those in `<model>-statistics`, measured
    now if nothing is there.

    Raises:
        BitnestError: damaged, or whatever an analysis may meet.
    """
    from bitnest import api
    from bitnest.statistics import Statistics, is_statistics

    if statistics is None:
        place = default_statistics(model, lora)
        if not is_statistics(place):
            return api.analyze(
                model, place, lora=lora, formats=formats, progress=progress, **analysis
            )
        statistics = place
    elif not is_statistics(Path(statistics)):
        raise StatisticsError(
            "no statistics here",
            where=str(statistics),
            hint=f"bitnest analyze {model} -o {statistics} makes them"
            + (", with the same --lora" if lora else ""),
        )
    found = Statistics.open(statistics)
    found.verify()
    return found


def default_statistics(model: str | Path, lora: Sequence[str] = ()) -> Path:
    """Where statistics of a model are kept if nothing else is said: `<model>-statistics` here, or
    `<model>+<adapter>-statistics`."""
    name = "demo" if str(model) == "demo" else resolve_model(model).resolve().name
    return Path(f"{name_with(name, lora)}-statistics")


def check_plan(model: str | Path, plan: Plan, **options: Any) -> Planned:
    """What a plan file costs and loses now, for one that was edited by hand.

    Raises:
        BitnestError: it does not fit the model, the statistics or its target.
    """
    planner = open_planner(model, target=plan.target, **options)
    planner.add_nested(plan)
    source = planner.predictor.statistics.header["source"]["sha256"]
    if plan.source not in {"", source}:
        raise PlanError(
            f"the plan is of another model ('{plan.model}') than the statistics",
            where=plan.where,
            hint="plan for this model, or empty the plan's 'source'",
        )
    job = replace(planner.job, formats=planner.formats_of(plan))
    check_target(job, plan)
    sites = [s for s in planner.predictor.sites if planner.ends is not False or s.kind not in ENDS]
    check_measured(plan, sites, job.formats, planner.formats)
    return planner.evaluate(plan)


def packed_inputs(job: Job) -> dict[str, InputFormat]:
    """What inputs are rounded to, by site, once the site's weights are packed."""
    packed = dict.fromkeys((site.name for site in job.sites), integer(8))
    return job.recipe.input_formats(job.sites, packed)


def check_target(job: Job, plan: Plan) -> None:
    """Refuse a plan that its own target cannot load.

    Raises:
        PlanError, TargetError: an unknown target, or the first site that breaks a rule of it.
    """
    from bitnest.export.plan_targets import open_target
    from bitnest.formats import FateFormat
    from bitnest.quantize.fates import check_engine_fates
    from bitnest.targets import TARGETS

    if plan.target not in TARGETS:
        raise PlanError(f"unknown target '{plan.target}'", where=plan.where,
                        hint="one of " + ", ".join(TARGETS))  # fmt: skip
    target, chosen = open_target(plan.target, job.checkpoint.config, job.inputs), job.formats
    check_engine_fates(job, target.name)
    sites = [site for site in job.sites if site.kind != "router"]
    sites = [site for site in sites if not isinstance(chosen[site.name], FateFormat)]
    hint = "mend the plan's rules, or plan for this target again"
    for site in sites:
        reason = target.allows(site, chosen[site.name])
        if reason:
            place = plan.place(site, chosen[site.name].name)
            raise TargetError(f"{plan.target}, {site.name}: {reason}", where=place, hint=hint)
    for group in target.together(sites):
        odd = [s for s in group if chosen[s.name].name != chosen[group[0].name].name]
        if odd:
            last = max((group[0], odd[0]), key=plan.deciding)  # the exception, most likely
            raise TargetError(
                f"{plan.target} wants one format for {group[0].name} "
                f"({chosen[group[0].name].name}) and {odd[0].name} ({chosen[odd[0].name].name})",
                where=plan.place(last, chosen[last.name].name), hint=hint,
            )  # fmt: skip


def check_measured(
    plan: Plan, sites: Sequence[Site], chosen: Mapping[str, AnyFormat], measured: Sequence[str]
) -> None:
    """Refuse a plan with formats that the statistics do not know; for nested ones others stand in
    (`Predictor.column`).

    Raises:
        PlanError: the first site that has one, with the line of its rule.
    """
    from bitnest.calibrate.predict import widths_of
    from bitnest.formats import FateFormat

    for site in sites:
        name = chosen[site.name].name
        if isinstance(chosen[site.name], FateFormat):
            continue
        if name not in {"dense", *measured} and not widths_of(name):
            raise PlanError(
                f"format '{name}' of {site.name} was not measured",
                where=plan.place(site, name),
                hint=f"measured: {', '.join(measured)}; bitnest analyze MODEL --reuse DIR --format "
                f"{name} -o NEW adds it",
            )


def frontier(
    model: str | Path, sizes: Sequence[int] = (), *, points: int = 12, **options: Any
) -> Frontier:
    """Size against predicted KL at `points` sizes between the smallest and the largest useful plan,
    or at `sizes` bytes.

    Raises:
        BitnestError: as `plan`.
    """
    from bitnest.quantize.allocation.frontier import trace

    policies = tuple(options.pop("policies", ("bitnest",)))
    for policy in policies:
        check_policy(policy)
    return trace(open_planner(model, **options), sizes, points, policies)


def compare_policies(
    model: str | Path,
    *,
    bits: float | None = None,
    size: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    context: int = 0,
    **options: Any,
) -> list[Planned]:
    """What every policy makes of one budget; those that cannot meet it are left out. A limit of KL
    becomes the size that ours needs for it.

    Raises:
        BitnestError: as `plan`.
    """
    from bitnest.quantize.allocation.budget import Budget
    from bitnest.quantize.allocation.policies import POLICIES
    from bitnest.quantize.allocation.problem import BudgetError

    dials = Dials(bits, size, max_kl, min_agreement, context)
    if not dials.given:
        dials = Dials(bits=4.0, context=context)
    planner = open_planner(model, **options)
    budget = dials.budget()
    if budget.kl is not None:
        budget = Budget(size=planner.plan(budget).sizes.total)
    found = []
    for policy in POLICIES:
        try:
            found.append(planner.plan(budget, policy))
        except BudgetError:
            if policy == "bitnest":
                raise
    return found


def constraint_cost(
    model: str | Path, planned: Planned, *, target: str, **options: Any
) -> dict[str, Any]:
    """What the target's rules cost: the KL that the native runtime would reach at the same size
    with the same candidates, and the difference.

    Raises:
        BitnestError: as `plan`.
    """
    from bitnest.quantize.allocation.budget import Budget

    names = ("statistics", "lora", "ends", "exact", "rules", "candidates", "weights", "data",
             "trust_remote_code", "progress")  # fmt: skip
    kept = {key: value for key, value in options.items() if key in names}
    kept["candidates"] = [name for name in planned.menu.formats if name != "dense"]
    kept["ends"] = any(kind in ENDS for kind in planned.menu.kinds)
    planner = open_planner(model, target="native", **kept)
    context = int(planned.plan.asked.get("context", 0))
    free = planner.plan(Budget(size=planned.sizes.total, context=context))
    from bitnest.export.plan_targets import open_target

    rules = open_target(target, open_checkpoint(model).config).rules
    return {"free": free.mean, "kl": max(0.0, planned.mean - free.mean), "rules": "; ".join(rules)}


def preflight(
    model: str | Path,
    planned: Planned,
    *,
    lora: Sequence[str] = (),
    machine: str | None = None,
    samples: int = 64,
    length: int = 512,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """What carrying out a plan takes and gives; see `quantize.preflight`.

    Raises:
        RecipeError: an unknown machine.
    """
    from bitnest.quantize.compress import prepare
    from bitnest.quantize.preflight import preflight as estimate

    job = prepare(
        open_checkpoint(model, lora, trust_remote_code=trust_remote_code),
        Recipe(format="dense", rules=planned.plan.rules),
        trust_remote_code=trust_remote_code,
    )
    return estimate(
        job, job.formats, planned.sizes, samples=samples, length=length, machine=machine, out=out
    )
