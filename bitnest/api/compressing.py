"""compress, as a function: from a model and a dial to an artifact.

a format    one format, or one per rule; nothing has to be known of the model
a budget    statistics (measured first if there are none), then a plan, which is carried out
a plan      as a file, or as `plan` gave it
a limit     of KL or agreement: plan, carry out, measure, correct the prediction by what was
            measured, until the artifact keeps the limit and is not needlessly large (`refine`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.asking import (
    check_extras,
    check_folds,
    check_method,
    check_out,
    check_prune,
    check_rounded,
    check_static,
    check_texts,
    check_ways,
    check_weights,
    uniform_format,
    with_inputs,
)
from bitnest.api.input_planning import asked_inputs
from bitnest.api.making import Maker, folding, opened_plan, with_folding
from bitnest.api.planning import (
    Dials,
    check_policy,
    default_statistics,
    ensure_statistics,
    open_nesting,
    open_planner,
)
from bitnest.api.result import CompressResult
from bitnest.errors import RecipeError
from bitnest.folds import parse_folds
from bitnest.formats.inputs import DENSE, parse_inputs
from bitnest.formats.kv import read_kv
from bitnest.packed.decoded import open_checkpoint
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

if TYPE_CHECKING:
    from bitnest.plan import Plan
    from bitnest.progress import Progress
    from bitnest.quantize.advice import Advice
    from bitnest.quantize.allocation.planned import Planned
    from bitnest.quantize.allocation.planner import Planner
    from bitnest.quantize.compress import Job
    from bitnest.quantize.folding import Skipped
    from bitnest.quantize.preflight import Preflight


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
    check_ways(dials, format, group, plan)
    extras = {
        "--target": target != "native", "--candidate": bool(candidates), "--exact": exact,
        "--ends": ends is not None, "--policy": policy not in {"bitnest", "uniform"},
    }  # fmt: skip
    check_extras(dials, format, group, plan, policy, check, extras)
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
    uniform = uniform_format(
        dials, format, group, plan, method, statistics, policy, plain and nesting is None
    )
    folds = parse_folds(fold)
    check_folds(folds, uniform, statistics, nesting, wide is not None)
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
            opened = opened_plan(plan)
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


def plan_inputs(plan: str | Path | Plan | None) -> list[str]:
    """Formats of inputs that a plan names."""
    return [] if plan is None else [rule.inputs or "" for rule in opened_plan(plan).rules]


def plan_formats(plan: str | Path | Plan | None) -> list[str]:
    """Formats that a plan names."""
    return [] if plan is None else [rule.weights for rule in opened_plan(plan).rules]


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
