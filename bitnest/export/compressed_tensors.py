"""Export to compressed-tensors files, which vLLM and transformers load.

    config.json                 the source's, with quantization_config (see schemes.py)
    model-*.safetensors         dense tensors byte for byte, then one file per decoder block with
                                <site>.weight_packed or .weight, .weight_scale, ... (tensors.py)
                                and one with embedding and head, decoded, where those are packed,
                                one with scales of the KV cache (kv_scales.py)
    tokenizer and generation files, copied

Everything is checked before anything is written. The directory is written beside its place, read
back and compared with the artifact weight by weight (verify.py), and only then renamed; after an
error nothing of it remains. The compressed-tensors package is not needed.

Inputs that the artifact rounds are rounded by the engine (inputs.py), or the export is refused, or
it was asked for without them.

Left out: packed experts of families whose checkpoints keep them in one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitnest.artifact import Artifact, site_tensors
from bitnest.checkpoint import config_dtype, main_dtype
from bitnest.errors import ArtifactError, TargetError
from bitnest.export.engines import DENSE_STREAM_BITS
from bitnest.export.input_scales import shared_scales, without_inputs
from bitnest.export.kv_scales import SCHEME, scale_entries
from bitnest.export.layouts import packed_format, packed_layout
from bitnest.export.rules import check_layout, decoded_sites, formats_of, packed_sites
from bitnest.export.schemes import quantization_config
from bitnest.export.targets import check_engine, engine_notes
from bitnest.export.tensors import entries
from bitnest.export.verify import verify_export
from bitnest.formats import parse_format
from bitnest.kernels.decode import decode
from bitnest.manifest import MANIFEST, SiteRecord
from bitnest.packed.kv_cache import Scales
from bitnest.reduced import is_ordinary
from bitnest.safetensors_io import Entry, TensorInfo, read_header, read_tensor, write_file

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class Requantised:
    """How an export's weights were made from a nested artifact.

    decoded: bits that its weights were read at. format, method: as in a recipe. errors: mean
    relative error by kind of site, against the decoded weights, as a manifest has it.
    """

    decoded: int
    format: str
    method: str
    errors: dict[str, float]

    def __str__(self) -> str:
        errors = ", ".join(f"{kind} {error:.3g}" for kind, error in sorted(self.errors.items()))
        return (
            f"requantised ({self.method}) from the {self.decoded}-bit width, whose own error is "
            f"added; mean relative error against that width: {errors}"
        )


@dataclass(frozen=True)
class ExportResult:
    """What an export holds.

    path: the directory. nbytes: of all its files. weights: packed matrices. formats: their formats,
    with counts. verified: matrices decoded from the export and found bit-identical to the
    artifact's; 0 if that was not asked for. verifier: what decoded them. notes: what a person
    should know before loading it. requantised: None unless it was made from a nested artifact.
    """

    path: Path
    nbytes: int
    weights: int
    formats: dict[str, int]
    verified: int
    verifier: str
    notes: tuple[str, ...]
    requantised: Requantised | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}

    def __str__(self) -> str:
        formats = ", ".join(f"{name} x{count}" for name, count in sorted(self.formats.items()))
        proof = f"{self.verified} verified by {self.verifier}" if self.verified else "not verified"
        lines = [f"{self.path}: {self.nbytes:,} bytes, {self.weights} packed weights, {proof}"]
        lines.append(f"formats: {formats}")
        if self.requantised is not None:
            lines.append(str(self.requantised))
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def export_compressed_tensors(
    artifact_path: str | Path,
    out: str | Path,
    *,
    engine: str | None = None,
    verify: bool = True,
    kv_scales: Scales | None = None,
    weights_only: bool = False,
) -> ExportResult:
    """Write the artifact in `artifact_path` as a compressed-tensors model directory `out`.

    engine: refuse what this engine (see `engines.ENGINES`) cannot run; None refuses only what the
    files cannot say and turns engines' limits into notes. verify: decode every weight of the
    finished files by other code and compare bit for bit. kv_scales: of a KV cache in 8-bit floats
    (`kv_scales.py`), None for the model's own cache. weights_only: leave inputs in 16 bit that the
    artifact rounds.

    Raises:
        TargetError: a site that the format or the engine cannot take; nothing was written.
        ArtifactError: the artifact is damaged, `out` is in the way, the disk is full or read-only,
            or the files do not decode to the artifact's weights; nothing is left behind.
    """
    artifact, out = Artifact.open(artifact_path), Path(out)
    config = _read_json(artifact.path / CONFIG)
    records, said = without_inputs(artifact.records) if weights_only else (artifact.records, [])
    check_layout(records)
    records, shared = shared_scales(records)
    artifact = replace(artifact, records=records)
    dense = _dense_tensors(artifact)
    dtype = _model_dtype(config, dense)
    scales = _global_scales(artifact)
    notes, scheme = check_export(artifact.records, config, dense, engine, scales)
    notes = [*said, *shared, *notes]
    if kv_scales is not None:
        scheme["kv_cache_scheme"] = dict(SCHEME)
    config["quantization_config"] = scheme
    extra = [] if kv_scales is None else scale_entries(kv_scales, artifact.records)
    _check_scales(artifact, dtype)
    _check_place(artifact, out, dtype)
    if verify:
        artifact.verify()
    with _partial_directory(out) as work:
        _write(artifact, work, config, dense, dtype, extra)
        verified, verifier = verify_export(artifact, work, dtype) if verify else (0, "")
    formats = formats_of(artifact.records)
    layouts = {packed_layout(record) for record in packed_sites(artifact.records)}
    odd = {lay.bits for lay in layouts if lay.family == "int"} & {*DENSE_STREAM_BITS}
    if odd:
        widths = "/".join(map(str, sorted(odd)))
        notes.append(f"{widths}-bit weights need readers with compressed-tensors 0.18 or newer")
    if ends := decoded_sites(artifact.records):
        names = " and ".join(f"{record.site.name} ({record.format})" for record in ends)
        notes.append(f"{names} is packed in the artifact and dense here: engines read it dense")
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    return ExportResult(
        out, nbytes, sum(formats.values()), formats, verified, verifier, tuple(notes)
    )


def check_export(
    records: Sequence[SiteRecord],
    config: Mapping[str, Any],
    dense: Mapping[str, TensorInfo],
    engine: str | None,
    global_scales: Mapping[str, float],
) -> tuple[list[str], dict[str, Any]]:
    """What can be known of an export by the formats of its sites: what a person should know, and
    its `quantization_config`.

    dense: tensors outside the packed files. engine, global_scales: see `targets.check_engine`.

    Raises:
        TargetError: a site that the format or the engine cannot take.
    """
    check_layout(records)
    if not is_ordinary(config):
        raise TargetError(
            "its layers have unequal numbers of experts, or router rows that are none: no engine "
            "loads that",
            where=CONFIG,
            hint="keep as many experts in every layer, or run the artifact with bitnest",
        )
    dtype = str(_model_dtype(config, dense)).partition(".")[2]
    facts = (records, config, global_scales, dtype)
    notes = engine_notes(*facts) if engine is None else check_engine(engine, *facts)
    return notes, quantization_config(records, _dense_linears(dense))


def _write(
    artifact: Artifact,
    work: Path,
    config: dict[str, Any],
    dense: dict[str, TensorInfo],
    dtype: torch.dtype,
    extra: Sequence[Entry] = (),
) -> None:
    packed: dict[str, list[SiteRecord]] = {}
    for record in packed_sites(artifact.records):
        packed.setdefault(record.file, []).append(record)
    dense_files = sorted({info.file for info in dense.values()})
    ends = decoded_sites(artifact.records)
    count = len(dense_files) + len(packed) + bool(ends) + bool(extra)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(count):
        file = work / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        if number < len(dense_files):
            shutil.copyfile(dense_files[number], file)
        elif extra and number == count - 1:
            write_file(file, list(extra))
        elif number == len(dense_files) + len(packed):
            write_file(file, [_decoded(artifact, record, dtype) for record in ends])
        else:
            block = sorted(packed)[number - len(dense_files)]
            headers = read_header(artifact.path / block)
            write_file(file, [e for r in packed[block] for e in entries(r, headers, dtype)])
        for tensor, info in read_header(file).items():
            weight_map[tensor] = file.name
            total += info.nbytes
    _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(work / CONFIG, config)
    for name in _other_files(artifact):
        shutil.copyfile(artifact.path / name, work / name)


def _decoded(artifact: Artifact, record: SiteRecord, dtype: torch.dtype) -> Entry:
    """A packed end as the dense tensor it stands for. dtype: the model's."""
    fmt, shape = parse_format(record.format), record.site.shape

    def values() -> torch.Tensor:
        return decode(site_tensors(record, artifact.headers()), fmt, shape, dtype)

    return Entry(f"{record.site.name}.weight", dtype, shape, values)


def _dense_tensors(artifact: Artifact) -> dict[str, TensorInfo]:
    """Name -> place of every tensor outside the packed files."""
    found: dict[str, TensorInfo] = {}
    for name in sorted(artifact.manifest["files"]):
        if name.startswith("model-") and name.endswith(".safetensors"):
            found.update(read_header(artifact.path / name))
    return found


def _dense_linears(dense: Mapping[str, TensorInfo]) -> list[str]:
    """Modules with a dense 2-D weight: linears, and embeddings, which ignoring does not change."""
    return [
        name.removesuffix(".weight")
        for name, info in dense.items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]


def _other_files(artifact: Artifact) -> list[str]:
    """Tokenizer, generation config, licence: what is neither weights nor generated."""
    return [
        name
        for name in sorted(artifact.manifest["files"])
        if not name.endswith(".safetensors") and name not in (CONFIG, INDEX, MANIFEST)
    ]


def _model_dtype(config: Mapping[str, Any], dense: Mapping[str, TensorInfo]) -> torch.dtype:
    """The type engines will compute in, and so of the scales."""
    found = config_dtype(config) or main_dtype(dense.values())
    if found is None:
        raise TargetError("config.json does not state the model's dtype", where=CONFIG)
    return found


def _global_scales(artifact: Artifact) -> dict[str, float]:
    """Of every NVFP4 site, by name."""
    headers = artifact.headers()
    return {
        record.site.name: float(read_tensor(headers[f"{record.site.name}.global"]))
        for record in packed_sites(artifact.records)
        if packed_layout(record).family == "nvfp4"
    }


def _check_scales(artifact: Artifact, dtype: torch.dtype) -> None:
    """16-bit scales must survive the model's dtype; other scales go over as they are."""
    headers = artifact.headers()
    for record in packed_sites(artifact.records):
        if packed_format(record).scale != "half":
            continue
        info = headers[f"{record.site.name}.scales"]
        scales = read_tensor(info)
        if scales.dtype == dtype:
            continue
        if not torch.equal(scales.to(dtype).double(), scales.double()):
            raise TargetError(
                f"scales stored as {scales.dtype} are not exact in the model's {dtype}",
                where=record.site.name,
                hint="compress a checkpoint whose config.json states the type it is stored in",
            )


def _check_place(artifact: Artifact, out: Path, dtype: torch.dtype) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(
            "the output is in the way", where=str(out), hint="choose another -o, or remove it first"
        )
    need = sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    need += sum(r.site.numel * dtype.itemsize for r in decoded_sites(artifact.records))
    if dtype == torch.float32:  # scales double
        need += sum(record.nbytes for record in artifact.packed()) // 2
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    have = shutil.disk_usage(place).free
    if have < need:
        raise ArtifactError(
            f"the export needs {need:,} bytes of disk, {have:,} are free",
            where=str(place),
            hint="free space or choose another -o",
        )


@contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end, or vanishes with any error."""
    work = out.parent / f".{out.name}.export-partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():
            shutil.rmtree(work)  # of a killed run
        work.mkdir()
        yield work
        if out.exists():
            out.rmdir()  # empty, checked before
        os.rename(work, out)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise ArtifactError(
            f"cannot write: {error.strerror or error}",
            where=str(out),
            hint="free space or choose another -o; nothing was left behind",
        ) from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {file.name}: {error}",
            where=str(file.parent),
            hint="copy the artifact again, or compress again",
        ) from error
    assert isinstance(content, dict)
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
