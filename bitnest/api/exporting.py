"""export, as a function: an artifact as it is, or a nested one quantised anew.

Codes of a nested artifact are places in tables or in a rotated basis, not integers that engines
know. So its weights are decoded at the widest width that is there and compressed once more, as a
model would be, into an artifact of int<bits> beside the export, which is exported and removed:

    .<out>.export-nested/lock        held by the process that works there
    .<out>.export-nested/artifact    the artifact of integers (and its own .artifact.partial)

A killed run leaves that directory, and the same command goes on from it; any other end removes it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.api.making import Maker
from bitnest.api.result import Group, summarise
from bitnest.api.texts import calibration_set, sources
from bitnest.artifact import Artifact, is_artifact
from bitnest.errors import ArtifactError, DataError, RecipeError, TargetError
from bitnest.formats import AnyFormat, BlockFormat, DenseFormat, parse_format, widths
from bitnest.formats.kv import KVFormat, read_kv
from bitnest.kinds import ENDS
from bitnest.manifest import SiteRecord
from bitnest.packed.decoded import DecodedCheckpoint
from bitnest.recipe import DEFAULT_GROUP, DEFAULT_LENGTH, DEFAULT_SAMPLES, Recipe, sized
from bitnest.workdir import INPUTS, in_the_way, is_empty, partial_directory, storage_error

if TYPE_CHECKING:
    from bitnest.export.compressed_tensors import ExportResult
    from bitnest.packed.kv_cache import Scales
    from bitnest.progress import Progress
    from bitnest.quantize.compress import Job

CHANNEL = "channel"


def export(
    artifact: str | Path,
    out: str | Path,
    *,
    engine: str | None = None,
    verify: bool = True,
    weights_only: bool = False,
    bits: int | None = None,
    group: int | str | None = None,
    method: str = "gptq",
    data: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    kv: str | None = None,
    memory: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `artifact` as a compressed-tensors directory; see `bitnest.export`.

    engine: vllm-cuda, vllm-cpu or transformers: refuse before work what it cannot run.
    weights_only: leave inputs in 16 bit that the artifact rounds; without it they are rounded in
    the export too, or it is refused. bits: of a
    nested artifact, the width it is quantised anew at, from the widest it has. group: input
    channels per scale then, or `channel`; None means 128. Sites that are not nested keep a format
    that exports, dense ones stay dense. kv: the engine's KV cache, `fp8` or `none`; None means what
    the artifact asks for, where engines have it. Its scales are calibrated on data, without any on
    the artifact's own calibration texts. The rest as in `compress`, and only with bits or kv.

    Raises:
        BitnestError: not an artifact, bits where nothing is nested or none where something is, or
            the engine cannot run it.
        TargetError: the engine has no such KV cache.
        DataError: a text that scales were to be calibrated on is gone.
    """
    from bitnest.export.compressed_tensors import export_compressed_tensors

    source, out = Path(artifact), Path(out).absolute()
    cache, notes = _cache(source, kv, engine)
    if cache is not None and not is_empty(out):
        raise in_the_way(out)

    def scales() -> Scales | None:
        if cache is None:
            return None
        return _kv_scales(
            source, cache, data, samples, length, seed, device, trust_remote_code, progress
        )

    if bits is None and cache is not None:
        if group is not None or method != "gptq":
            raise RecipeError(
                f"{'--method' if group is None else '--group'} says nothing without --bits",
                hint="weights are exported as they are",
            )
    elif bits is None:
        said = {"--group": group is not None, "--method": method != "gptq", "--data": bool(data)}
        if named := [name for name, given in said.items() if given]:
            raise RecipeError(
                f"{named[0]} says nothing without --bits",
                hint="an artifact that is not nested is exported as it is",
            )
    if bits is None:
        done = export_compressed_tensors(
            source, out, engine=engine, verify=verify, kv_scales=scales(),
            weights_only=weights_only,
        )  # fmt: skip
        return replace(done, notes=(*done.notes, *notes))
    name = _format_name(bits, group)
    checkpoint = DecodedCheckpoint.of(_nested(source))
    dropped = _dropped_inputs(checkpoint.artifact, weights_only)
    if not is_empty(out):
        raise in_the_way(out)
    recipe = Recipe(format=name, method=method, seed=seed)
    job = _job(checkpoint, recipe, device, memory, trust_remote_code)
    _check_engine(job, engine)
    maker = Maker(source, out, data, samples, length, False, trust_remote_code, progress)
    job = maker.calibrated(job, None)
    _check_room(job, out, samples, length)
    found = scales()
    with _workshop(out) as place:
        done = _requantise(job, place, out, engine, verify, progress, found)
    return replace(done, notes=(*dropped, *done.notes, *notes))


def _cache(source: Path, kv: str | None, engine: str | None) -> tuple[KVFormat | None, list[str]]:
    """The KV cache to export, and what a person should know of one that is not.

    Raises:
        ArtifactError: not an artifact. TargetError: one was named that the engine does not have.
    """
    from bitnest.export.kv_scales import engine_reads

    opened = Artifact.open(source)
    fmt = read_kv(opened.manifest.get("kv") if kv is None else kv)
    if fmt is None:
        return None, []
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    why = engine_reads(fmt, config, engine)
    if why is None:
        return fmt, []
    if kv is not None:
        raise TargetError(why, where="--kv", hint="--kv fp8 or none; bitnest serve has the others")
    return None, [f"the artifact asks for KV cache {fmt.name}: {why}; it stays in 16 bits there"]


def _kv_scales(
    source: Path, kv: KVFormat, data: Sequence[str], samples: int, length: int, seed: int,
    device: str | None, trust_remote_code: bool, progress: Progress | None,
) -> Scales:  # fmt: skip
    """Scales of keys and values of the artifact itself, which runs over its calibration texts.

    Raises:
        DataError: one is gone.
    """
    from bitnest.device import choose_device
    from bitnest.packed.kv_scales import calibrate_scales
    from bitnest.packed.loading import load_model, load_tokenizer

    recorded = Artifact.open(source).manifest.get("resolved", {}).get("data", {}).get("texts", [])
    model = load_model(source, device=choose_device(device), trust_remote_code=trust_remote_code)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    chosen = sources(list(data) or recorded)
    try:
        found = calibration_set(tokenizer, chosen, samples, min(length, limit), seed)
    except DataError as error:
        if not data:
            error.hint = "KV scales are calibrated on the artifact's texts; name others by --data"
        raise
    if progress is not None:
        progress.phase("calibrate KV scales", len(found.tokens))
    step = None if progress is None else progress.step
    return calibrate_scales(model, found.tokens, kv, step=step)


def _dropped_inputs(artifact: Artifact, weights_only: bool) -> list[str]:
    """What to say of rounded inputs, which weights quantised anew do not have.

    Raises:
        TargetError: there are some, and nobody asked for weights alone.
    """
    from bitnest.export.input_scales import without_inputs

    rounded = next((record for record in artifact.records if record.inputs), None)
    if rounded is not None and not weights_only:
        raise TargetError(
            f"--bits quantises weights anew; inputs are rounded here ({rounded.inputs}) and would "
            "not be there",
            where=rounded.site.name,
            hint="--weights-only leaves them in 16 bit; or compress the original to what is wanted",
        )
    return without_inputs(artifact.records)[1]


def _format_name(bits: int, group: int | str | None) -> str:
    """The integer format that was asked for.

    Raises:
        RecipeError, FormatError: compressed-tensors or bitnest has none such.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(
            f"--bits {bits}: compressed-tensors packs integers of 2 to 8 bits", hint="--bits 4"
        )
    if isinstance(group, str) and group != CHANNEL:
        number = group.removeprefix("g")
        if not number.isdecimal():
            raise RecipeError(f"--group {group} is no number", hint="--group 64, or channel")
        group = int(number)
    size = DEFAULT_GROUP if group is None else group
    return parse_format(f"int{bits}-{CHANNEL if group == CHANNEL else f'g{size}'}").name


def _nested(source: Path) -> Artifact:
    """The artifact, if any matrix of its blocks is nested.

    Raises:
        ArtifactError: not an artifact. RecipeError: nothing there is nested.
    """
    opened = Artifact.open(source)
    blocks = (r for r in opened.packed() if r.site.kind not in ENDS)
    if not any(widths(parse_format(record.format)) for record in blocks):
        raise RecipeError(
            "--bits quantises nested weights anew, and nothing here is nested",
            where=str(source),
            hint="leave out --bits: the artifact is exported as it is",
        )
    return opened


def _job(
    checkpoint: DecodedCheckpoint,
    recipe: Recipe,
    device: str | None,
    memory: int | None,
    trust_remote_code: bool,
) -> Job:
    """The compression of the decoded weights: nested sites in the recipe's format."""
    from bitnest.quantize.compress import prepare

    job = prepare(
        checkpoint, recipe, device=device, memory=memory, trust_remote_code=trust_remote_code
    )
    formats = dict.fromkeys((s.name for s in job.sites), sized(parse_format("dense"), job.itemsize))
    for record in checkpoint.artifact.packed():
        if record.site.kind not in ENDS:  # engines read those dense
            formats[record.site.name] = _anew(record, recipe, job.itemsize)
    return replace(job, formats=formats)


def _anew(record: SiteRecord, recipe: Recipe, itemsize: int) -> AnyFormat:
    """The format of one site of the new artifact."""
    from bitnest.export.layouts import layout_for

    fmt = parse_format(record.format)
    keeps = (isinstance(fmt, BlockFormat) and layout_for(fmt) is not None) or (
        record.format in {"dense", "zero"}  # the checks of exports name a dropped site
    )
    return sized(fmt if keeps else parse_format(recipe.format), itemsize)


def _check_engine(job: Job, engine: str | None) -> None:
    """Refuse what the files or the engine cannot hold, by the formats that are to come.

    Raises:
        TargetError: see `check_export`.
    """
    from bitnest.export.compressed_tensors import check_export
    from bitnest.quantize.compress import dense_names

    records = [
        SiteRecord(site, fmt.name, fmt.nbytes(site.shape), 0.0, None, "" if dense else "packed")
        for site in job.sites
        for fmt in [job.formats[site.name]]
        for dense in [isinstance(fmt, DenseFormat)]
    ]
    dense = {name: job.checkpoint.tensors[name] for name in dense_names(job)}
    try:
        check_export(records, job.checkpoint.config, dense, engine, {})
    except TargetError as error:
        if "--rule" in error.hint:  # an option of compress
            error.hint = "choose another --bits, --group or --for, or use bitnest serve"
        raise


def _check_room(job: Job, out: Path, samples: int, length: int) -> None:
    """Refuse what memory or disk cannot hold: the new artifact, and the export beside it.

    Raises:
        RecipeError: memory. ArtifactError: disk.
    """
    from bitnest.quantize.preflight import check_memory, free_bytes
    from bitnest.quantize.preflight import preflight as estimate
    from bitnest.quantize.sizing import artifact_sizes

    sizes = artifact_sizes(job, job.formats)
    count = 0 if job.calibration is None else samples
    check_memory(estimate(job, job.formats, sizes, samples=count, length=length), job.memory)
    wide = sizes.packed // 2 if job.itemsize == 4 else 0  # scales of a float32 model double
    need, have = 2 * sizes.artifact + wide, free_bytes(out)
    have += sum(f.stat().st_size for f in _place(out).rglob("*") if f.is_file())
    if have < need:
        raise ArtifactError(
            f"the export and the artifact it is made of need {need:,} bytes of disk, "
            f"{have:,} are free",
            where=str(out.parent),
            hint="free space or choose another -o",
        )


def _requantise(
    job: Job, place: Path, out: Path, engine: str | None, verify: bool, progress: Progress | None,
    kv_scales: Scales | None = None,
) -> ExportResult:  # fmt: skip
    """Compress into `place`, export that to `out`."""
    from bitnest.export.compressed_tensors import Requantised, export_compressed_tensors
    from bitnest.quantize.compress import run

    assert isinstance(job.checkpoint, DecodedCheckpoint)
    temporary = place / "artifact"
    if not _resumes(job, temporary, progress):
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(partial_directory(temporary), ignore_errors=True)
    made, _ = run(job, temporary, progress=progress)
    result = export_compressed_tensors(
        made.path, out, engine=engine, verify=verify, kv_scales=kv_scales
    )
    recipe, bits = job.recipe, job.checkpoint.bits
    assert bits is not None  # only `whole` has none
    errors = _errors(summarise(made).groups)
    return replace(
        result, requantised=Requantised(bits, recipe.format, recipe.method, errors),
        notes=(*_width_notes(job.checkpoint, bits, recipe), *result.notes),
    )  # fmt: skip


def _width_notes(checkpoint: DecodedCheckpoint, bits: int, recipe: Recipe) -> list[str]:
    notes = []
    if beyond := sorted(checkpoint.artifact.absent):
        notes.append(f"decoded at {bits} bits: {beyond[0]} is not there, or not whole")
    if parse_format(recipe.format).bits > bits:
        notes.append(f"{recipe.format} is wider than the {bits} bits it was made from")
    return notes


def _errors(groups: Sequence[Group]) -> dict[str, float]:
    """Mean relative error of what is packed, by kind."""
    sums: dict[str, list[float]] = {}
    for group in groups:
        if group.format != "dense":
            own = sums.setdefault(group.kind, [0.0, 0.0])
            own[0] += group.error * group.parameters
            own[1] += group.parameters
    return {kind: error / count for kind, (error, count) in sums.items()}


def _resumes(job: Job, temporary: Path, progress: Progress | None) -> bool:
    """Whether what a killed run left was made from exactly these inputs."""
    from bitnest.progress import Silent
    from bitnest.quantize.compress import draft_manifest

    left: Any = None
    try:
        if is_artifact(temporary):
            left = Artifact.open(temporary).manifest.get("fingerprint")
        else:
            file = partial_directory(temporary) / "state" / INPUTS
            left = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ArtifactError):
        return False
    progress = progress or Silent()
    progress.phase("checking weights", job.checkpoint.nbytes)
    wanted = draft_manifest(job, job.checkpoint.scan(progress.step))["fingerprint"]
    return bool(left == wanted)


def _place(out: Path) -> Path:
    return out.parent / f".{out.name}.export-nested"


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """The directory beside `out` for what is made on the way, removed at the end.

    Raises:
        ArtifactError: another process works in it, or it cannot be written.
    """
    place = _place(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("w")
    except OSError as error:
        raise storage_error(error, out) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(
                "another process is writing this export",
                where=str(out),
                hint="wait for it, or choose another -o",
            ) from error
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
