"""Carrying out: a job that is known to its last format, calibrated and made into an artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitnest.api.planning import check_measured, check_target
from bitnest.api.result import CompressResult, summarise
from bitnest.api.texts import calibration_set, check_length, check_vocabulary, sources
from bitnest.errors import RecipeError, StatisticsError
from bitnest.folds import Fold
from bitnest.formats.inputs import DENSE, weights_of
from bitnest.packed.loading import load_tokenizer
from bitnest.recipe import Rule
from bitnest.statistics import Statistics

if TYPE_CHECKING:
    from bitnest.checkpoint import Checkpoint
    from bitnest.plan import Plan
    from bitnest.progress import Progress
    from bitnest.quantize.advice import Advice
    from bitnest.quantize.compress import Job
    from bitnest.quantize.folding import Skipped

log = logging.getLogger(__name__)


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


def opened_plan(plan: str | Path | Plan) -> Plan:
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
