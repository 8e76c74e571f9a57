"""slice: the part of a nested artifact that a width needs, as an artifact of its own.

Nothing is decoded: files are copied, those of planes beyond the width are left out, and the
manifest says so. What it decodes to is bit for bit what the whole artifact gives at that width.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitnest.artifact import Artifact, pulling
from bitnest.errors import ArtifactError
from bitnest.formats import AnyFormat, widths
from bitnest.manifest import MANIFEST, SiteRecord, manifest_text
from bitnest.packed.widths import loaded_formats
from bitnest.planes import plane_width
from bitnest.progress import Progress, Silent
from bitnest.workdir import (
    in_the_way,
    is_empty,
    sha256_file,
    write_text,
)

WHOLE_ONLY = ("predicted",)  # manifest keys that speak of the widest width


def slice_artifact(
    source: str | Path, out: str | Path, bits: int, *, progress: Progress | None = None
) -> Artifact:
    """Write what reading `source` at `bits` needs into the directory `out`.

    Every copied file is held against its checksum. A killed run leaves nothing under `out`.

    Raises:
        RecipeError, FormatError: nothing is nested, or not at so few bits.
        ArtifactError: something is in the way, a file is missing or damaged.
    """
    artifact, out = Artifact.open(source), Path(out).absolute()
    formats = loaded_formats(artifact, bits)
    if not is_empty(out):
        raise in_the_way(out)
    artifact.headers(formats)  # before work: planes that are needed and not there
    kept = {
        name: entry
        for name, entry in artifact.manifest["files"].items()
        if (plane_width(name) or 0) <= bits
    }
    records = [cut_record(record, formats.get(record.site.name)) for record in artifact.records]
    manifest: dict[str, Any] = {
        key: value
        for key, value in artifact.manifest.items()
        if key not in {"files", "sites", "format_version", *WHOLE_ONLY}
    }
    manifest["sliced"] = {"bits": bits}
    progress = progress or Silent()
    progress.phase("copying", sum(entry["bytes"] for entry in kept.values()))
    partial = out.parent / f".{out.name}.slicing"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, entry in kept.items():
            shutil.copyfile(artifact.path / name, partial / name)
            if sha256_file(partial / name) != entry["sha256"]:
                raise ArtifactError(
                    f"'{name}' does not match its checksum",
                    where=str(artifact.path),
                    hint=f"changed or damaged; fetch it again: {pulling(artifact.path)}",
                )
            progress.step(entry["bytes"])
        text = manifest_text(manifest, (record.to_json() for record in records), kept)
        write_text(partial / MANIFEST, text)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ArtifactError(
            f"cannot write: {error.strerror or error}",
            where=str(out),
            hint="free space or choose another -o; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Artifact.open(out)


def cut_record(record: SiteRecord, fmt: AnyFormat | None) -> SiteRecord:
    """The record of a site that is stored as `fmt`, its format cut at a width."""
    if fmt is None or fmt.name == record.format:
        return record
    errors = (*record.narrower, record.error)[: len(widths(fmt))]
    return replace(
        record, format=fmt.name, nbytes=fmt.nbytes(record.site.shape),
        error=errors[-1], narrower=errors[:-1],
    )  # fmt: skip
