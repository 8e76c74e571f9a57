"""The verbs, as functions: what the command line calls and nothing it does not.

result = bitnest.compress("demo", "demo-int4", bits=4)
model = bitnest.load("demo-int4")
statistics = bitnest.analyze("demo", "demo-statistics", data=["books=a.txt", "code=b.txt"])
report = bitnest.evaluate(["demo-int4"], against="demo", data=["text.txt"])
bitnest.export("demo-int4", "demo-vllm", engine="vllm-cuda")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.compressing import compress
from bitnest.api.exporting import export
from bitnest.api.loading import fit_widths, load
from bitnest.api.merging import MergeResult, merge
from bitnest.api.planning import (
    check_plan,
    compare_policies,
    constraint_cost,
    frontier,
    plan,
    preflight,
)
from bitnest.api.pruning import PruneResult, prune
from bitnest.api.result import CompressResult, Group, summarise
from bitnest.api.texts import (
    calibration_set,
    check_length,
    check_vocabulary,
    check_windows,
    sources,
)
from bitnest.artifact import Artifact, is_artifact
from bitnest.checkpoint import Checkpoint, resolve_model
from bitnest.errors import ArtifactError, RecipeError
from bitnest.export.pulling import pull
from bitnest.export.slicing import slice_artifact
from bitnest.formats import fates_apart
from bitnest.formats.inputs import parse_inputs
from bitnest.packed.decoded import open_checkpoint
from bitnest.packed.loading import load_tokenizer
from bitnest.recipe import DEFAULT_LENGTH, DEFAULT_SAMPLES, PRUNERS, Recipe
from bitnest.statistics import is_statistics

if TYPE_CHECKING:
    from bitnest.eval.evaluate import EvalReport
    from bitnest.progress import Progress
    from bitnest.quantize.compare import Comparison
    from bitnest.statistics import Statistics

__all__ = [
    "CompressResult", "Group", "MergeResult", "PruneResult", "analyze", "check_plan",
    "compare_formats", "compare_policies", "compress", "constraint_cost", "evaluate", "export",
    "fit_widths", "frontier", "inspect", "load", "load_tokenizer", "merge", "merge_statistics",
    "plan", "preflight", "prune", "pull", "slice_artifact", "summarise", "write_report",
]  # fmt: skip

CANDIDATES = tuple(f"int{bits}-g128" for bits in range(2, 9))


def evaluate(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    data: Sequence[str] = (),
    **options: Any,
) -> EvalReport:
    """Perplexity, KL against a base, and size of models side by side; see `bitnest.eval`.

    data: evaluation texts, `label=source`; none means the embedded text.

    Raises:
        BitnestError: a model, a text or a pair of them that cannot be compared.
    """
    from bitnest import demo
    from bitnest.eval.evaluate import evaluate as run

    texts = list(data) or [f"demo={demo.evaluation_text()}"]
    return run(models, against=against, data=texts, **options)


def compare_formats(
    model: str | Path,
    *,
    formats: Sequence[str] = (),
    sites: str | None = None,
    per_kind: int = 64,
    calibrate: bool = True,
    data: Sequence[str] = (),
    samples: int = 32,
    length: int = 256,
    clip: bool = True,
    gptq: bool = False,
    seed: int = 0,
    memory: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """QSNR, H-weighted error and crest factors of every format on the weights of `model`, and
    QSNR and crest factors on what they read.

    formats: names; none means the catalogue's uniform ones. sites: a pattern as in rules. per_kind:
    sites measured of each kind, at most. calibrate: False looks at weights only, without `data`.
    gptq: give the H-weighted error of GPTQ too. The rest as in `compress`.

    Raises:
        BitnestError: before work starts for whatever can be known then.
    """
    from bitnest.quantize.compare import choose_sites, compare, parse_formats
    from bitnest.quantize.compress import prepare, with_calibration

    if gptq and not calibrate:
        raise RecipeError("GPTQ needs inputs, and --no-data has none", hint="leave one out")
    chosen = parse_formats(formats, data=calibrate)
    checkpoint = open_checkpoint(model)
    job = prepare(
        checkpoint,
        Recipe(method="rtn", clip=clip, seed=seed),
        trust_remote_code=trust_remote_code,
        device=device,
        memory=memory,
    )
    measured = choose_sites(job.sites, sites, per_kind)
    if calibrate:
        check_length(job.skeleton.model.config, length)
        tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
        calibration = calibration_set(tokenizer, sources(data), samples, length, seed)
        check_vocabulary(job.skeleton.model, calibration, checkpoint)
        job = with_calibration(job, calibration)
    return compare(
        job,
        chosen,
        measured,
        pattern=sites,
        per_kind=per_kind,
        clip=clip,
        gptq=gptq,
        progress=progress,
    )


def analyze(
    model: str | Path,
    out: str | Path,
    *,
    lora: Sequence[str] = (),
    data: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    pack: str = "join",
    formats: Sequence[str] = CANDIDATES,
    inputs: Sequence[str] = (),
    method: str = "gptq",
    importance: str = "kl",
    fisher_windows: int = 24,
    probes: int = 16,
    probe_windows: int = 16,
    hessian: str = "auto",
    keep_hessians: bool = False,
    weighting: str = "gate",
    damp: float = 0.03,
    min_tokens: int | None = None,
    clip: bool = True,
    prune: str = PRUNERS[0],
    cover: str | None = None,
    cover_limit: int = 64,
    reuse: str | Path | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: str | None = None,
    compute: str = "auto",
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Measure how `model` is used and how sensitive it is, into the directory `out`.

    lora: adapters, PATH or PATH:scale, merged in first; the statistics are of the merged model.
    data: `label=source`, any number; none means the embedded text. formats: candidates whose error
    and loss are measured at every site, with `method`, and `prune` where they are sparse;
    `drop`, `constant`, `copy` and `merge` among them are fates of experts, `drop` of blocks too.
    inputs: candidate formats of what matrices read, whose loss is measured likewise.
    importance, fisher_windows, probes, probe_windows, hessian, keep_hessians: see
    `calibrate.analyze.Analysis`; without importance there is nothing to calibrate, and no probe is
    measured. cover: `data` or `self` adds up to cover_limit windows until every expert has
    min_tokens. reuse: a directory of statistics with Hessians to which only `formats` are added,
    without running the model; options of the measurement are then its own. The rest as in
    `compress`. Besides the statistics, report.json and report.html are written.

    Raises:
        BitnestError: before work starts for whatever can be known then.
    """
    from bitnest.calibrate.analyze import Analysis
    from bitnest.calibrate.analyze import analyze as run
    from bitnest.calibrate.cover import cover as extend
    from bitnest.progress import Silent
    from bitnest.quantize.compare import parse_formats
    from bitnest.quantize.compress import prepare, with_calibration

    formats, fates = fates_apart(formats)
    formats = formats or (CANDIDATES if fates else ())
    candidates = tuple(parse_formats(formats, data=True)) if formats else ()
    analysis = Analysis(
        candidates, importance, fisher_windows, 0 if importance == "none" else probes,
        probe_windows, hessian, keep_hessians, fates,
        tuple(dict.fromkeys(map(parse_inputs, inputs))),
    )  # fmt: skip
    recipe = Recipe(
        method=method, damp=damp, weighting=weighting, min_tokens=min_tokens, clip=clip, seed=seed,
        prune=prune,
    )  # fmt: skip
    checkpoint = open_checkpoint(model, lora, trust_remote_code=trust_remote_code)
    job = prepare(
        checkpoint,
        recipe,
        trust_remote_code=trust_remote_code,
        device=device,
        memory=memory,
        compute=compute,
    )
    if fates and not any(site.expert is not None for site in job.sites):
        other = next((fate for fate in fates if fate != "drop"), None)
        if other is not None:
            raise RecipeError(f"the model has no experts: none can be '{other}'", where=str(model),
                              hint="--format drop measures what blocks would cost")  # fmt: skip
        if len(job.skeleton.blocks) < 3:
            raise RecipeError(
                "the model has no experts to drop, and no block between the first and the last",
                where=str(model), hint="--format zero drops matrices",
            )  # fmt: skip
    target = Path(out).absolute()
    if reuse is not None:
        if fates or inputs:
            raise RecipeError(
                f"--reuse runs no model, and {(*fates, *inputs)[0]} is measured on one",
                hint="bitnest analyze MODEL -o DIR with all that is wanted, anew",
            )
        from bitnest.calibrate.extend import extend as add
        from bitnest.statistics import Statistics

        statistics = add(job, Statistics.open(reuse), candidates, target, fresh=fresh,
                         progress=progress or Silent())  # fmt: skip
        write_report(target)
        return statistics
    check_windows(data, length)
    check_length(job.skeleton.model.config, length)
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    calibration = calibration_set(tokenizer, sources(data), samples, length, seed, pack=pack)
    check_vocabulary(job.skeleton.model, calibration, checkpoint)
    drawn = None
    if cover is not None:
        calibration, drawn = extend(
            job,
            calibration,
            cover,
            tokenizer=tokenizer,
            sources=sources(data),
            limit=cover_limit,
            seed=seed,
            progress=progress or Silent(),
        )
    job = with_calibration(job, calibration)
    statistics = run(job, analysis, target, drawn=drawn, fresh=fresh, progress=progress)
    write_report(target)
    return statistics


def write_report(statistics: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Write report.json and report.html of a directory of statistics; gives the analysis. verify:
    hold every file against its checksum first.

    Raises:
        StatisticsError: not one, or damaged.
    """
    import json

    from bitnest.calibrate.report import render
    from bitnest.calibrate.summary import summarise as analysis_of
    from bitnest.statistics import Statistics
    from bitnest.workdir import storage_error, write_text

    opened = Statistics.open(statistics)
    if verify:
        opened.verify()
    analysis = analysis_of(opened)
    try:
        write_text(opened.path / "report.json", json.dumps(analysis) + "\n")
        write_text(opened.path / "report.html", render(analysis))
    except OSError as error:
        raise storage_error(error, opened.path) from error
    return analysis


def merge_statistics(parts: Sequence[str | Path], out: str | Path) -> Statistics:
    """Add up statistics of one model measured on several parts of the data, into `out`, with the
    report of their sum: both or nothing.

    Raises:
        StatisticsError: they do not fit together, or one is damaged.
    """
    from bitnest.statistics import Statistics
    from bitnest.statistics.merging import merge

    opened = [Statistics.open(part) for part in parts]
    return merge(opened, Path(out).absolute(), lambda merged: write_report(merged.path))


def inspect(
    model: str | Path, *, verify: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What is in `model`: every site with shape, kind and format, and the rest by name.

    Works on checkpoints, artifacts and statistics without loading weights. verify: read every file
    of an artifact or of statistics and compare its sha256 with the manifest.

    Raises:
        BitnestError: the directory cannot be read or the family cannot be handled.
    """
    path = resolve_model(model)
    if is_statistics(path):
        return _inspect_statistics(path, verify)
    if is_artifact(path):
        artifact = Artifact.open(path)
        sites = [record.to_json() for record in artifact.records]
        kept = {
            k: artifact.manifest[k] for k in ("architecture", "source", "recipe", "calibration")
        }
        later = ("resolved", "predicted", "plan", "kv")
        kept |= {k: artifact.manifest[k] for k in later if k in artifact.manifest}
        content = {"path": str(path), "kind": "artifact", **kept, "sites": sites}
        if verify:
            artifact.verify()
            content["verified"] = len(artifact.manifest["files"])
        return content
    if verify:
        raise ArtifactError(
            "a checkpoint has no checksums to verify",
            where=str(path),
            hint="--verify is for artifacts that bitnest compress made",
        )
    from bitnest.sites import find_sites
    from bitnest.skeleton import Skeleton

    checkpoint = Checkpoint.open(path)
    skeleton = Skeleton.build(checkpoint, trust_remote_code=trust_remote_code)
    found = find_sites(skeleton)
    covered = {name for site in found for name in skeleton.sources[site.path].names}
    return {
        "path": str(path),
        "kind": "checkpoint",
        "architecture": type(skeleton.model).__name__,
        "blocks": len(skeleton.blocks),
        "bytes": checkpoint.nbytes,
        "kinds": dict(Counter(site.kind for site in found)),
        "sites": [vars(site) for site in found],
        "other_tensors": sorted(set(checkpoint.tensors) - covered),
        "unused_tensors": skeleton.leftover,
    }


def _inspect_statistics(path: Path, verify: bool) -> dict[str, Any]:
    from bitnest.statistics import Statistics

    statistics = Statistics.open(path)
    kept = ("architecture", "model", "source", "labels", "data", "length", "formats", "hessian",
            "importance", "inputs", "merged", "seconds")  # fmt: skip
    content = {
        "path": str(path),
        "kind": "statistics",
        **{key: statistics.header[key] for key in kept if key in statistics.header},
        "probes": len(statistics.header["probes"]),
        "sites": [vars(site) for site in statistics.sites],
    }
    if verify:
        statistics.verify()
        content["verified"] = len(statistics.header["files"])
    return content
