"""refine: meet a limit of KL or agreement by measurement.

A plan's prediction P has an error bar; the limit T is of what is measured, M. So

    plan for P <= T, carry it out, measure; then plan for P <= T * (P / M), and so on

The ratio P / M is the model's own and changes little from one plan to the next, so two or three
rounds do. It ends when T (1 - SLACK) <= M <= T, when the next plan would be one already made, or
after ROUNDS; the smallest artifact that kept the limit is the result, moved to its place by one
rename. What else was made is removed; tries lie in `.<name>.tries`, named by their plan, so that a
killed run finds what it had made.

KL goes with the square of the share of changed top choices, which is how an agreement is turned
into a KL (`planning.AGREEMENT`) before anything was measured, and by the measured ratio afterwards.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.texts import sources
from bitnest.artifact import Artifact, is_artifact
from bitnest.errors import ArtifactError, BitnestError, DataError, RecipeError
from bitnest.plan import Plan
from bitnest.recipe import Rule
from bitnest.workdir import in_the_way, is_empty, partial_directory

if TYPE_CHECKING:
    from bitnest.api.making import Maker
    from bitnest.api.planning import Dials
    from bitnest.api.result import CompressResult
    from bitnest.eval.evaluate import EvalReport
    from bitnest.quantize.allocation.planned import Planned
    from bitnest.quantize.allocation.planner import Planner
    from bitnest.quantize.compress import Job

log = logging.getLogger(__name__)

ROUNDS = 6
WINDOW, WINDOWS = 256, 64  # tokens, or the model's context; windows per text
SLACK = 0.1  # of the limit that may be left unused


@dataclass(frozen=True)
class Attempt:
    """One artifact that was made and measured. predicted: KL. measured: in the limit's unit, KL or
    the share of changed top choices. scores: per text."""

    result: CompressResult
    planned: Planned
    measured: float
    nbytes: int
    scores: dict[str, dict[str, float]]


def refine(
    maker: Maker,
    job: Job,
    planner: Planner,
    dials: Dials,
    texts: Sequence[str],
    statistics: str | Path,
    forecast: dict[str, Any],
) -> CompressResult:
    """The smallest artifact found that keeps the limit, measured on `texts`. forecast: what was
    said of the first plan.

    Raises:
        RecipeError: even the finest formats do not keep it; nothing is left behind.
        ArtifactError: something else is in the way.
    """
    if not is_empty(maker.out):
        return _finished(maker, job, statistics)
    limit = dials.max_kl if dials.max_kl is not None else 1 - (dials.min_agreement or 0.0)
    agreement = dials.max_kl is None
    aim = dials.budget().kl
    assert aim is not None
    place = maker.out.with_name(f".{maker.out.name}.tries")
    made: dict[str, Attempt] = {}
    try:
        for _ in range(ROUNDS):
            planned = _closest(planner, dials, aim)
            if planned.plan.digest in made:
                break
            attempt = _make(
                maker, job, planned, place / planned.plan.digest, texts, statistics, agreement
            )
            made[planned.plan.digest] = attempt
            log.info(
                "%s bytes: predicted KL %.4g, measured %s %.4g, limit %.4g", f"{attempt.nbytes:,}",
                planned.mean, "changed top choices" if agreement else "KL", attempt.measured, limit,
            )  # fmt: skip
            if limit * (1 - SLACK) <= attempt.measured <= limit:
                break
            ratio = limit / max(attempt.measured, 1e-12)
            aim = planned.mean * (ratio**2 if agreement else ratio) * (1 - SLACK / 2)
        found = _choose(maker, made, limit, agreement)
    except BitnestError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    disk = (found.plan or {}).get("expected", {}).get("artifact_bytes", forecast["disk"])
    return replace(found, forecast={**forecast, "disk": disk})


def _finished(maker: Maker, job: Job, statistics: str | Path) -> CompressResult:
    """The result of an earlier run of the same command. What was asked for must be the same, and
    all that the bytes depend on, with the plan that was found then; it is not measured again.

    Raises:
        ArtifactError: what is there is something else.
    """
    if not is_artifact(maker.out):
        raise in_the_way(maker.out)
    manifest = Artifact.open(maker.out).manifest
    if "plan" not in manifest or manifest.get("resolved") != job.asked:
        raise in_the_way(maker.out)
    rules = tuple(Rule(**rule) for rule in manifest["recipe"]["rules"])
    plan = Plan(rules, target=manifest["plan"]["target"])
    return maker.planned(job, plan, [], statistics)


def _closest(planner: Planner, dials: Dials, aim: float) -> Planned:
    """The plan for a predicted KL, or the finest there is."""
    from bitnest.quantize.allocation.budget import Budget

    try:
        return planner.plan(Budget(kl=aim, dial=dials.to_json()))
    except RecipeError:
        return planner.plan(Budget(size=1 << 62, dial=dials.to_json()))


def _make(
    maker: Maker,
    job: Job,
    planned: Planned,
    out: Path,
    texts: Sequence[str],
    statistics: str | Path,
    agreement: bool,
) -> Attempt:
    try:
        result = maker.planned(job, planned.plan, [], statistics, out)
    except ArtifactError:  # of a run with other inputs, killed before it could clean up
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial_directory(out), ignore_errors=True)
        result = maker.planned(job, planned.plan, [], statistics, out)
    report = _evaluate(maker, job, out, texts)
    scores: dict[str, dict[str, float]] = {}
    for score in report.rows[-1].scores:
        assert score.kl is not None
        scores[score.text] = {"kl": score.kl.mean, "agreement": score.kl.same_top}
    values = [1 - s["agreement"] if agreement else s["kl"] for s in scores.values()]
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    return Attempt(result, planned, sum(values) / len(values), nbytes, scores)


def _evaluate(maker: Maker, job: Job, out: Path, texts: Sequence[str]) -> EvalReport:
    """KL and agreement on `texts`; fewer windows where a text is too short for WINDOWS."""
    from bitnest import api

    named = [f"{item.label}={item.source}" for item in sources(texts)] if texts else []
    config = job.skeleton.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or WINDOW
    windows = WINDOWS
    while True:
        try:
            return api.evaluate(
                [out], against=maker.model, against_lora=maker.lora, data=named,
                window=min(WINDOW, context), windows=windows,
                trust_remote_code=maker.trust, progress=maker.progress,
            )  # fmt: skip
        except DataError:
            if windows == 1:
                raise
            windows //= 2


def _choose(
    maker: Maker, made: dict[str, Attempt], limit: float, agreement: bool
) -> CompressResult:
    kept = [attempt for attempt in made.values() if attempt.measured <= limit]
    if not kept:
        best = min(made.values(), key=lambda attempt: attempt.measured)
        reached = f"agreement {1 - best.measured:.2%}" if agreement else f"KL {best.measured:.3g}"
        asked = f"{1 - limit:.2%}" if agreement else f"{limit:g}"
        raise RecipeError(
            f"no plan kept {asked}: the best of {len(made)} measured {reached}",
            hint="finer formats among the candidates, or a milder limit",
        )
    best = min(kept, key=lambda attempt: attempt.nbytes)
    best.result.path.rename(maker.out)
    moved = replace(best.result, path=Artifact.open(maker.out).path)
    return replace(moved, measured=_measured(best, made), rounds=len(made))


def _measured(best: Attempt, made: dict[str, Attempt]) -> dict[str, Any]:
    return {
        "texts": best.scores,
        "predicted": best.planned.mean,
        "tries": [
            {"bytes": a.nbytes, "predicted": a.planned.mean, "measured": a.measured}
            for a in made.values()
        ],
    }
