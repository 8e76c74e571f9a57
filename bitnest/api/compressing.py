"""compress, as a function: from a model and a dial to an artifact.

a format    one format, or one per rule; nothing has to be known of the model
a budget    statistics (measured first if there are none), then a plan, which is carried out
a plan      as a file, or as `plan` gave it
a limit     of KL or agreement: plan, carry out, measure, correct the prediction by what was
            measured, until the artifact keeps the limit and is not needlessly large (`refine`)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.input_planning import asked_inputs
from bitnest.api.planning import (
    Dials,
    check_measured,
    check_policy,
    check_target,
    default_statistics,
    ensure_statistics,
    open_nesting,
    open_planner,
)
from bitnest.api.result import CompressResult, summarise
from bitnest.api.texts import calibration_set, check_length, check_vocabulary, sources
from bitnest.artifact import is_artifact
from bitnest.errors import RecipeError, StatisticsError
from bitnest.folds import Fold, parse_folds
from bitnest.formats import widths
from bitnest.formats.inputs import DENSE, parse_inputs, split_name, weights_of
from bitnest.formats.kv import read_kv
from bitnest.packed.decoded import open_checkpoint
from bitnest.packed.loading import load_tokenizer
from bitnest.plan import digest_of
from bitnest.recipe import (
    DEFAULT_BITS,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    PRUNERS,
    STATIC,
    Recipe,
    Rule,
    default_format,
    parse_width_weight,
    resolved,
)
from bitnest.statistics import Statistics, is_statistics
from bitnest.workdir import in_the_way, is_empty

if TYPE_CHECKING:
    from bitnest.checkpoint import Checkpoint
    from bitnest.plan import Plan
    from bitnest.progress import Progress
    from bitnest.quantize.advice import Advice
    from bitnest.quantize.allocation.nesting import Nesting
    from bitnest.quantize.allocation.planned import Planned
    from bitnest.quantize.allocation.planner import Planner
    from bitnest.quantize.compress import Job
    from bitnest.quantize.folding import Skipped
    from bitnest.quantize.preflight import Preflight

log = logging.getLogger(__name__)


def compress(
    model: str | Path,
    out: str | Path,
    *,
    lora: Sequence[str] = (),
    bits: float | None = None,
    size: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    context: int = 0,
    format: str | None = None,
    group: int | None = None,
    sparsity: str | None = None,
    nested: str | None = None,
    base_size: int | None = None,
    plan: str | Path | Plan | None = None,
    policy: str = "bitnest",
    target: str = "native",
    candidates: Sequence[str] = (),
    ends: bool | None = None,
    exact: bool = False,
    check: Sequence[str] = (),
    method: str = "gptq",
    rules: Sequence[str] = (),
    fold: Sequence[str] = (),
    data: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    weighting: str = "gate",
    damp: float = 0.03,
    min_tokens: int | None = None,
    clip: bool = True,
    width_weights: Sequence[str] = (),
    prune: str = PRUNERS[0],
    inputs: str | Sequence[str] | None = None,
    input_bits: float | None = None,
    input_time: float | None = None,
    latency: Mapping[str, float] | None = None,
    static: str = STATIC[0],
    kv: str | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: str | None = None,
    compute: str = "auto",
    statistics: str | Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Planned | None, Preflight], None] | None = None,
    advise: Callable[[Advice | Skipped], None] | None = None,
) -> CompressResult:
    """Compress `model` (directory, hub id or `demo`) into the artifact directory `out`. A nested
    artifact is read at its widest width, whose own error is added.

    lora: adapters, PATH or PATH:scale, merged in before anything is measured; the artifact is of
    the merged model. bits, size, max_kl, min_agreement, context: see `Dials`; 4 bits if nothing is
    said. format or group: one format for all instead. sparsity: `50%`, `2:4` or `b16x16-50` of that
    format, of 16-bit weights if there is none. nested: widths that the artifact is to be read at,
    `2-8`; with a budget every weight ends at the width that this pays for, and with base_size, the
    bytes that all weights may take when memory is least, begins at the one that this does. plan: a
    plan to carry out instead. policy, target, candidates, ends, exact: see `plan`. check: texts
    that max_kl and min_agreement are measured on. rules: PATTERN=FORMAT, later ones win; no plan
    overrules them. fold: what is put into the weights first, see `bitnest.folds`. data: calibration
    texts, `label=source`; none means those of the statistics, or the embedded text. rtn reads no
    text unless a format is fitted to inputs. samples, length: calibration windows and their tokens.
    weighting, damp, min_tokens, clip, seed: see `Recipe`. width_weights: `3=4`, see there too; so
    are prune and static. inputs: what the inputs of packed matrices are rounded to as the model
    runs (`formats/inputs`); of several every matrix gets one, by input_bits, input_time and latency
    (`quantize/allocation/inputs`). kv: format of the KV cache, or `none`: the artifact asks eval
    and serve for it, and a context is counted in it. memory: bytes the process may use. compute:
    type samples are calibrated in, see `quantize.compress.prepare`. statistics: what `analyze`
    wrote of this model; a budget without one measures `<model>-statistics` first, a plan without
    one looks there for those it was made of. fresh: forget an unfinished run instead of resuming
    it. announce: called with the plan, where one was made, and what it will take, before it is
    carried out. advise: called early on if integers of no more bytes turn out to lose less than a
    sparse format that was asked for, which is in the result, too; and of folds that could not be
    made.

    Raises:
        BitnestError: before work starts for whatever can be known then.
    """
    from bitnest.quantize.compress import prepare
    from bitnest.quantize.preflight import check_memory, peak_resident
    from bitnest.quantize.preflight import preflight as estimate
    from bitnest.quantize.sizing import artifact_sizes

    check_policy(policy, candidates)
    dials = Dials(bits, size, max_kl, min_agreement, context)
    one, wide = asked_inputs(
        inputs, input_bits, input_time, latency,
        {"--plan": plan is not None, "--nested": nested is not None, "--max-kl": dials.measured,
         "--target": target != "native", "--base-size": base_size is not None},
    )  # fmt: skip
    format, inputs = with_inputs(format, one)
    if inputs is not None and wide is not None:
        raise RecipeError(f"--format .../{inputs} already says inputs", hint="leave out --inputs")
    nesting = None
    if nested is not None and (format is not None or plan is not None):
        raise RecipeError("--nested already says every width",
                          hint="leave out --format and --plan")  # fmt: skip
    if nested is not None or base_size is not None:
        nesting = open_nesting(nested, group, base_size, target, candidates)
        group = None
        if not dials.given and base_size is None and nesting is not None:
            format = nesting.uniform  # for all, and statistics for whoever loads it
    if sparsity is not None:
        if dials.given or nesting is not None or plan is not None:
            raise RecipeError("--sparsity is that of one format for all",
                              hint="--format int4-g128 --sparsity 50%; a plan chooses among "
                              "--candidate int4-g128%50 and others")  # fmt: skip
        format, group = default_format(None, format, group, sparsity), None
    _check_ways(dials, format, group, plan)
    extras = {
        "--target": target != "native", "--candidate": bool(candidates), "--exact": exact,
        "--ends": ends is not None, "--policy": policy not in {"bitnest", "uniform"},
    }  # fmt: skip
    _check_extras(dials, format, group, plan, policy, check, extras)
    recipe = Recipe(
        format=f"int{DEFAULT_BITS}-g128", rules=tuple(Rule.parse(rule) for rule in rules),
        method=method, damp=damp, weighting=weighting, min_tokens=min_tokens, clip=clip, seed=seed,
        width_weights=tuple(map(parse_width_weight, width_weights)), prune=prune,
        inputs=parse_inputs(inputs).name if inputs not in {None, "", DENSE} else "", static=static,
        kv="" if (cache := read_kv(kv)) is None else cache.name,
    )  # fmt: skip
    maker = Maker(
        model, Path(out).absolute(), data, samples, length, fresh, trust_remote_code, progress,
        advise, lora,
    )  # fmt: skip
    plain = not any(extras.values())
    uniform = _uniform_format(
        dials, format, group, plan, method, statistics, policy, plain and nesting is None
    )
    folds = parse_folds(fold)
    _check_folds(folds, uniform, statistics, nesting, wide is not None)
    place = Path(statistics or default_statistics(model, lora))
    if plan is None and (uniform is None or wide is not None):
        check_method(model, place, method)
    recipe = replace(recipe, format=uniform or "dense")
    job = prepare(
        folding(open_checkpoint(model, lora, trust_remote_code=trust_remote_code), folds,
                trust_remote_code), recipe,
        trust_remote_code=trust_remote_code, device=device, memory=memory, compute=compute,
    )  # fmt: skip
    if cache is not None:
        from bitnest.packed.kv_cache import check_family

        check_family(job.skeleton.model.config)
    job = with_folding(job, folds)
    measuring: dict[str, Any] = {
        "lora": lora, "data": data, "samples": samples, "length": length, "method": method,
        "weighting": weighting, "damp": damp, "min_tokens": min_tokens, "clip": clip, "seed": seed,
        "memory": memory, "device": device, "compute": compute, "prune": prune,
        "trust_remote_code": trust_remote_code, "progress": progress,
    }  # fmt: skip
    rounded = [recipe.inputs, *(wide.formats if wide is not None else ())]
    if plan is None:
        check_weights(recipe, nesting, job)
    if uniform is not None:
        check_rounded(rounded, job)
    check_static(recipe, [*rounded, *plan_inputs(plan)])
    if uniform is not None or plan is not None:
        check_prune(recipe, [*(f.name for f in job.formats.values()), *plan_formats(plan)])
    given: dict[str, Any] = {
        "texts": data, "samples": samples, "length": length, "check": check, "lora": lora,
        "fold": [str(f) for f in folds],
    }  # fmt: skip
    before: list[Preflight] = []

    def ready(job: Job) -> None:
        sizes = artifact_sizes(job, job.formats)
        count = 0 if job.calibration is None else samples
        before.append(estimate(job, job.formats, sizes, samples=count, length=length,
                               out=maker.out))  # fmt: skip
        check_memory(before[0], memory)
        if announce is not None:
            announce(None, before[0])

    if (uniform is not None and wide is None) or plan is not None:
        if plan is None:
            job = replace(job, asked=resolved(recipe, **given))
            if nesting is not None and method != "rtn":
                check_out(maker.out, place)
                ensure_statistics(
                    model, statistics, formats=nesting.measured, **measuring
                )  # fmt: skip
                statistics = place
            done = maker.carry_out(job, statistics, ready=ready)
        else:
            opened = _opened(plan)
            asked = resolved(recipe, {"plan": digest_of(opened.rules)}, **given)
            done = maker.planned(
                replace(job, asked=asked), opened, rules,
                statistics or plan_statistics(opened, model, lora),
                ready=ready, named=statistics is not None,
            )  # fmt: skip
        return replace(done, forecast=before[0].to_json(), peak_memory=peak_resident())
    check_out(maker.out, place)
    # statistics that are there name the text, whether they were named or found
    job = maker.calibrated(job, place if statistics or is_statistics(place) else None, force=True)
    if dials.measured:
        check_texts(check)
    if not dials.given:
        widest = DEFAULT_BITS if nesting is None else nesting.widths[-1]
        dials = Dials(bits=float(widest), context=context)
    planning = {
        "target": target, "policy": policy, "candidates": list(candidates),
        "ends": dials.bits is None if ends is None else ends, "exact": exact,
        **({} if nesting is None else nesting.to_json()),
    }  # fmt: skip
    dial: dict[str, Any] | None = {"budget": dials.to_json()}
    if uniform is not None:
        dial, planning, candidates = None, {"format": uniform}, (uniform,)
    if wide is not None:
        planning = {**planning, "inputs": list(wide.formats)}
        dial = {"budget": wide.budget() if dial is None else {**dial["budget"], **wide.budget()}}
    asked = resolved(recipe, dial, planning=planning, **given)
    job = replace(job, asked=asked)
    planner = open_planner(
        model, statistics, job=job, target=target, candidates=candidates, ends=ends, exact=exact,
        budget=None if uniform is not None else dials.budget(), checked=True, nesting=nesting,
        inputs=wide, **measuring,
    )  # fmt: skip
    if nesting is None and uniform is None:
        job = replace(job, asked={**asked, "candidates": list(planner.formats)})
    planner.job = job
    planner.predictor.statistics.check_prune(prune, planner.formats)
    check_prune(recipe, [*planner.formats, *(f.name for f in job.formats.values())])
    found = first_plan(planner, dials, policy) if uniform is None else planner.fixed()
    forecast = estimate(job, planner.formats_of(found.plan), found.sizes, samples=samples,
                        length=length, out=maker.out)  # fmt: skip
    check_memory(forecast, memory)
    if announce is not None:
        announce(found, forecast)
    if dials.measured:
        from bitnest.api.refine import refine

        result = refine(maker, job, planner, dials, check or data, place, forecast.to_json())
    else:
        result = maker.planned(job, found.plan, [], place)
    return replace(
        result, forecast=result.forecast or forecast.to_json(), peak_memory=peak_resident()
    )


def with_inputs(format: str | None, inputs: str | None) -> tuple[str | None, str | None]:
    """Weights and inputs of a format that may say both.

    Raises:
        RecipeError: inputs are given twice.
    """
    if format is None or "/" not in format:
        return format, inputs
    weights, said = split_name(format)
    if inputs is not None and said != split_name(f"{DENSE}/{inputs}")[1]:
        raise RecipeError(f"--format {format} already says inputs", hint="leave out --inputs")
    return weights, said


def check_weights(recipe: Recipe, nesting: Nesting | None, job: Job) -> None:
    """Refuse weights of widths that nothing has.

    Raises:
        RecipeError: there is one.
    """
    own = {w for fmt in job.formats.values() for w in widths(fmt)}
    own |= set(nesting.widths) if nesting is not None else set()
    lost = [width for width, _ in recipe.width_weights if own and width not in own]
    if recipe.width_weights and not own:
        raise RecipeError("nothing is nested: widths have no weights",
                          hint="--nested 2-8, or leave out --width-weight")  # fmt: skip
    if lost:
        raise RecipeError(f"no weight is nested at {lost[0]} bits",
                          hint="widths: " + ", ".join(map(str, sorted(own))))  # fmt: skip


def reduced(job: Job, statistics: str | Path | None) -> Job:
    """The job without experts and blocks that are to go. statistics: say what constants are and how
    mergers are weighted.

    Raises:
        RecipeError: they are needed and there are none, or fates that cannot be.
    """
    from bitnest.quantize.fates import needs_means, read_means, reduce_job

    means = None
    if needs_means(job):
        if statistics is None:
            raise RecipeError(
                "constants and mergers are made of what statistics measured",
                hint="bitnest analyze MODEL -o DIR, then --statistics DIR",
            )
        means = read_means(Statistics.open(statistics))
    return reduce_job(job, means)


def check_prune(recipe: Recipe, formats: Sequence[str]) -> None:
    """Refuse to be told how to prune where nothing is pruned.

    Raises:
        RecipeError: no format is sparse.
    """
    if recipe.prune != PRUNERS[0] and not any("%" in name for name in formats):
        raise RecipeError(f"nothing is sparse: --prune {recipe.prune} says nothing",
                          hint="--sparsity 50%, or --format int4-g128%2:4")  # fmt: skip


def check_rounded(inputs: Sequence[str], job: Job) -> None:
    """Refuse inputs beside formats that pack nothing.

    Raises:
        RecipeError: no matrix is packed that could read them.
    """
    from bitnest.quantize.allocation.inputs import may_round

    said = [name for name in inputs if name not in {"", DENSE}]
    formats = {name: fmt.name for name, fmt in job.formats.items()}
    if said and not any(may_round(site, formats) for site in job.sites):
        raise RecipeError(f"only inputs of packed weights are rounded: --inputs {said[0]} says "
                          "nothing", hint=f"--format int8-channel/{said[0]}")  # fmt: skip


def check_static(recipe: Recipe, inputs: Sequence[str]) -> None:
    """Refuse to be told how static scales are chosen where there are none. inputs: that are named
    besides the recipe's rules.

    Raises:
        RecipeError: no format of inputs has a scale to choose.
    """
    if recipe.static == STATIC[0]:
        return
    named = {*inputs, *(rule.inputs for rule in recipe.rules)} - {"", None, DENSE}
    if not any(parse_inputs(str(name)).static for name in named):
        raise RecipeError(f"no inputs have a static scale: --static {recipe.static} says nothing",
                          hint="--inputs int8-static, or leave it out")  # fmt: skip


def plan_inputs(plan: str | Path | Plan | None) -> list[str]:
    """Formats of inputs that a plan names."""
    return [] if plan is None else [rule.inputs or "" for rule in _opened(plan).rules]


def plan_formats(plan: str | Path | Plan | None) -> list[str]:
    """Formats that a plan names."""
    return [] if plan is None else [rule.weights for rule in _opened(plan).rules]


def plan_statistics(plan: Plan, model: str | Path, lora: Sequence[str] = ()) -> Path | None:
    """Where statistics are looked for, if those that the plan was made of are there."""
    place = default_statistics(model, lora)
    if plan.source is None or not is_statistics(place):
        return None
    return place if Statistics.open(place).header["source"]["sha256"] == plan.source else None


def first_plan(planner: Planner, dials: Dials, policy: str) -> Planned:
    """The plan of the dials; for a limit that no plan is predicted to keep, the finest."""
    from bitnest.quantize.allocation.budget import Budget

    try:
        return planner.plan(dials.budget(), policy)
    except RecipeError:
        if not dials.measured:
            raise
        return planner.plan(Budget(size=1 << 62, dial=dials.to_json()))


def check_out(out: Path, statistics: str | Path) -> None:
    """Refuse an output that is there, before anything is measured for it. An artifact may be the
    result of the same command, which is known once there are statistics.

    Raises:
        ArtifactError: something else is there.
    """
    same = is_artifact(out) and is_statistics(Path(statistics))
    if not is_empty(out) and not same:
        raise in_the_way(out)


def check_method(model: str | Path, statistics: Path, method: str) -> None:
    """Refuse to plan by losses of another method than the one that is to be carried out.

    Raises:
        StatisticsError: they are, or the statistics cannot be read.
    """
    if not is_statistics(statistics):
        return
    measured = Statistics.open(statistics).header["method"]
    if measured != method:
        raise StatisticsError(
            f"these statistics were measured with --method {measured}, not {method}",
            where=str(statistics),
            hint=f"--method {measured}; or bitnest analyze {model} --method {method} -o DIR, and "
            "--statistics DIR",
        )


def check_texts(texts: Sequence[str]) -> None:
    """Open texts that are needed late.

    Raises:
        DataError: one is not there, or empty.
    """
    from bitnest.calibrate.sources import load_texts, parse_source

    for text in texts:
        next(iter(load_texts(parse_source(text).source)), None)


def folding(checkpoint: Checkpoint, folds: Sequence[Fold], trust: bool) -> Checkpoint:
    """The checkpoint, as a view that folds can be put into if any are asked for."""
    if not folds:
        return checkpoint
    from bitnest.quantize.folding import FoldedCheckpoint

    return FoldedCheckpoint.of(checkpoint, folds, trust_remote_code=trust)


def with_folding(job: Job, folds: Sequence[Fold]) -> Job:
    """The job with what is to be folded.

    Raises:
        RecipeError: experts or blocks are to go as well.
    """
    from bitnest.formats import FateFormat
    from bitnest.quantize.folding import Folding

    if not folds:
        return job
    if any(isinstance(fmt, FateFormat) for fmt in job.formats.values()):
        raise RecipeError("--fold and experts that are dropped, replaced or merged do not go "
                          "together yet", hint="bitnest prune first, then compress what it "
                          "wrote with --fold")  # fmt: skip
    return replace(job, folding=Folding(tuple(folds)))


def _check_folds(
    folds: Sequence[Fold],
    uniform: str | None,
    statistics: str | Path | None,
    nesting: Nesting | None,
    inputs: bool,
) -> None:
    """Refuse folds beside losses that were measured without them. inputs: whether their widths are
    to be planned.

    Raises:
        RecipeError: a budget, a plan, statistics, or widths that are planned.
    """
    if not folds:
        return
    said = None
    if uniform is None:
        said = "a budget or a plan"
    elif nesting is not None:
        said = "--nested"
    elif inputs:
        said = "--input-bits or --input-time"
    elif statistics is not None:
        said = "--statistics"
    if said is not None:
        raise RecipeError(
            f"--fold does not go with {said} yet: losses are measured on weights that are not "
            "folded",
            hint="one format for all, --format int8-channel --fold smooth=0.5, and --rule for "
            "exceptions",
        )


def _check_ways(dials: Dials, fmt: str | None, group: int | None, plan: object) -> None:
    """Refuse several answers to one question.

    Raises:
        RecipeError: a plan with a dial, a format with either.
    """
    if plan is not None and (dials.given or fmt or group):
        raise RecipeError(
            "the plan already says every format",
            hint="leave out --bits, --size, --max-kl, --format and --group",
        )
    if fmt is not None and (dials.given or group is not None):
        raise RecipeError("--format already says bits and group",
                          hint="leave out --bits and --group, or leave --format out")  # fmt: skip
    if group is not None and dials.given and dials.bits is None:
        raise RecipeError("--group goes with --bits", hint="--bits 4 --group 64")


def _check_extras(
    dials: Dials,
    fmt: str | None,
    group: int | None,
    plan: object,
    policy: str,
    check: Sequence[str],
    extras: Mapping[str, bool],
) -> None:
    """Refuse options that would say nothing.

    Raises:
        RecipeError: what belongs to planning beside a format or a plan, a limit's text without a
            limit, another policy with a limit.
    """
    said = [name for name, given in extras.items() if given]
    if plan is not None and policy != "bitnest":
        said.append("--policy")
    if (fmt or group or plan is not None) and said:
        other = "the plan" if plan is not None else "one format for all"
        raise RecipeError(f"{said[0]} says nothing beside {other}",
                          hint=f"leave out {', '.join(dict.fromkeys(said))}")  # fmt: skip
    if check and not dials.measured:
        raise RecipeError("--check is what a limit is measured on, and there is none",
                          hint="--max-kl 0.02 or --min-agreement 95%")  # fmt: skip
    if dials.measured and policy != "bitnest":
        raise RecipeError(f"policy {policy} has no prediction to steer by",
                          hint="give it --bits or --size")  # fmt: skip


def _uniform_format(
    dials: Dials,
    fmt: str | None,
    group: int | None,
    plan: object,
    method: str,
    statistics: str | Path | None,
    policy: str,
    plain: bool,
) -> str | None:
    """The one format that was asked for, or None if there is to be a plan.

    Rounding to nearest reads no text, so without statistics there is nothing to plan by: a whole
    number of bits is one format then. The same holds for a group, and for policy uniform. plain:
    nothing else was asked of a plan.
    """
    if plan is not None:
        return None
    if fmt is not None:
        return default_format(None, fmt, None)
    blind = method == "rtn" and statistics is None
    even = plain and _whole(dials) and (policy == "uniform" or blind)
    if group is not None or even:
        return default_format(dials.bits, None, group)
    return None


def _whole(dials: Dials) -> bool:
    return not dials.given or (dials.bits is not None and float(dials.bits).is_integer())


def _opened(plan: str | Path | Plan) -> Plan:
    from bitnest.plan import Plan

    return plan if isinstance(plan, Plan) else Plan.read(plan)


class Maker:
    """What one call of `compress` needs for every artifact it makes."""

    def __init__(
        self,
        model: str | Path,
        out: Path,
        data: Sequence[str],
        samples: int,
        length: int,
        fresh: bool,
        trust_remote_code: bool,
        progress: Progress | None,
        advise: Callable[[Advice | Skipped], None] | None = None,
        lora: Sequence[str] = (),
    ) -> None:
        self.advise, self.lora = advise, lora
        self.model, self.out, self.data = model, out, data
        self.samples, self.length, self.fresh = samples, length, fresh
        self.trust, self.progress = trust_remote_code, progress

    def planned(
        self,
        job: Job,
        plan: Plan,
        rules: Sequence[str],
        statistics: str | Path | None,
        out: Path | None = None,
        *,
        ready: Callable[[Job], None] | None = None,
        named: bool = True,
    ) -> CompressResult:
        """Carry out a plan, the rules given by hand on top of it; see `carry_out`."""
        if plan.prune and job.recipe.prune != plan.prune:
            raise RecipeError(
                f"the plan's losses were measured with --prune {plan.prune}, not "
                f"{job.recipe.prune}", where=plan.where, hint=f"--prune {plan.prune}",
            )  # fmt: skip
        own = (*plan.rules, *(Rule.parse(rule) for rule in rules))
        recipe = replace(job.recipe, format="dense", rules=own)
        before = plan.formats(job.sites)  # names the line of a rule that matches nothing
        formats = recipe.formats(job.sites, job.itemsize)
        inputs = recipe.input_formats(job.sites, formats)
        job = replace(job, recipe=recipe, formats=formats, inputs=inputs)
        check_target(job, plan)
        if statistics is not None and named:
            check_measured(plan, job.sites, job.formats, Statistics.open(statistics).formats)
        overruled = any(job.formats[name].name != weights_of(fmt) for name, fmt in before.items())
        said = {name: fmt for name, fmt in plan.inputs(job.sites).items() if fmt != DENSE}
        now = {name: fmt.name for name, fmt in inputs.items()}
        overruled = overruled or any(now.get(name) != fmt for name, fmt in said.items())
        job = replace(job, plan=replace(plan, overruled=overruled))
        return self.carry_out(job, statistics, out, ready=ready, named=named)

    def carry_out(
        self,
        job: Job,
        statistics: str | Path | None,
        out: Path | None = None,
        *,
        ready: Callable[[Job], None] | None = None,
        named: bool = True,
    ) -> CompressResult:
        """Calibrate and make the artifact.

        statistics: say what it will lose, and name the text. ready: called before work starts.
        named: statistics that were found rather than named need not know every format.
        """
        from bitnest.quantize.compress import run, with_expectation
        from bitnest.quantize.folding import Skipped

        if statistics is not None:
            from bitnest.calibrate.expect import expect

            try:
                recipe = job.recipe
                found = expect(
                    statistics, job.formats, recipe.method, recipe.prune, job.inputs
                )  # fmt: skip
                job = with_expectation(job, found)
            except StatisticsError as error:
                if named:
                    raise
                log.info("%s predict nothing: %s", statistics, error)
        job = reduced(job, statistics)
        job = self.calibrated(job, statistics)
        if ready is not None:
            ready(job)
        said: list[Advice] = []

        def advise(advice: Advice | Skipped) -> None:
            if not isinstance(advice, Skipped):
                said.append(advice)  # what was not folded, the manifest says
            if self.advise is not None:
                self.advise(advice)

        artifact, seconds = run(
            job, out or self.out, fresh=self.fresh, progress=self.progress,
            advise=advise if job.plan is None else None,  # a plan had the choice
        )  # fmt: skip
        advice = tuple(item.to_json() for item in said)
        return replace(summarise(artifact, seconds), advice=advice)

    def calibrated(self, job: Job, statistics: str | Path | None, *, force: bool = False) -> Job:
        """The job with its calibration text, if it needs any. force: it will, once it is
        planned."""
        from bitnest.quantize.compress import wants_calibration, with_calibration

        fold = job.folding
        blind = fold is not None and fold.wants_text and fold.text is None
        wanted = job.calibration is None and (force or wants_calibration(job))
        if wanted or blind:
            check_length(job.skeleton.model.config, self.length)
            chosen = sources(self.data)
            if statistics is not None and not self.data:
                from bitnest.calibrate.expect import texts

                chosen = texts(statistics)
            tokenizer = load_tokenizer(job.checkpoint.path, trust_remote_code=self.trust)
            found = calibration_set(tokenizer, chosen, self.samples, self.length, job.recipe.seed)
            check_vocabulary(job.skeleton.model, found, job.checkpoint)
            if wanted:
                job = with_calibration(job, found)
            if fold is not None and blind:
                job = replace(job, folding=replace(fold, text=found))
        if job.expected is not None and job.calibration is not None:
            job.expected.check_text(job.calibration)
        return job
