"""pull: an artifact from a directory or the hub, only those files that reading it at a width needs.

    DIR/NAME                 whole: its size and sha256 are those the manifest states
    DIR/.NAME.part           the first bytes of NAME, continued from there
    DIR/.bitnest.json.part   the source's manifest while a pull is under way; it is the lock, too
    DIR/bitnest.json         appears last, so that a directory half fetched is no artifact

A later pull at more bits adds the planes that are missing, one whole file after another; the
directory can be loaded all the while. A file that is damaged is fetched again. Each file is fetched
once and by one stream; a mirror of a repository with its history is huggingface_hub's business.

It stands beside `slicing`, in the rank of what is made of artifacts: it needs `packed` to know
which widths a format has. A slice is an artifact of its own; a pulled directory is the source's,
under the very same manifest, with some planes not there yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bitnest.artifact import Artifact
from bitnest.errors import ArtifactError
from bitnest.export.places import Directory, Place, find_place
from bitnest.manifest import MANIFEST, parse_manifest, parse_records
from bitnest.packed.widths import loaded_formats, nested_widths
from bitnest.planes import plane_width
from bitnest.progress import Progress, Silent
from bitnest.safetensors_io import CHUNK
from bitnest.workdir import in_the_way, is_empty, sha256_file

Entry = Mapping[str, Any]  # of the manifest's files: bytes, sha256


@dataclass(frozen=True)
class PullResult:
    """What a pull did.

    bits: the width its directory can surely be read at, None if nothing is nested. fetched: bytes
    read from the source. present: bytes of needed files that were there already, in parts or whole.
    files: those fetched. kept: number of those that were there.
    """

    artifact: Artifact
    bits: int | None
    fetched: int
    present: int
    files: tuple[str, ...]
    kept: int


def pull(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    progress: Progress | None = None,
) -> PullResult:
    """Fetch what reading the artifact `source` at `bits` needs into the directory `out`.

    source: a directory, or a hub id `org/name[@revision]`. bits: None fetches all widths. Files
    that `out` has are not fetched again, and a run that was killed goes on where it stopped.

    Raises:
        ArtifactError: no artifact, something else is in `out`, no room, or the source fails.
        RecipeError, FormatError: nothing is nested, or not at so few bits.
    """
    out = Path(out).absolute()
    progress = progress or Silent()
    place = find_place(source)
    if isinstance(place, Directory) and out.exists() and place.path.samefile(out):
        raise ArtifactError(
            "source and output are one directory", where=str(out), hint="choose another -o"
        )
    text = place.manifest()
    manifest = parse_manifest(text, f"{place.text}: {MANIFEST}")
    whole = Artifact(
        Path(place.text), manifest, parse_records(manifest, f"{place.text}: {MANIFEST}")
    )
    loaded_formats(whole, bits)
    widths = [w for w in nested_widths(whole) if bits is None or w <= bits]
    needed: list[tuple[str, Entry]] = [
        (name, entry)
        for name, entry in manifest["files"].items()
        if bits is None or (plane_width(name) or 0) <= bits
    ]
    needed.sort(key=lambda item: plane_width(item[0]) or 0)  # a width is whole before the next
    try:
        known = _check_output(out, manifest, text)
        missing = _missing(out, needed, progress)
        _check_source(place, missing)
        _check_room(out, missing)
        fetched = 0
        parts = [part for name, _ in needed if (part := _part(out, name)).exists()]
        if missing or parts or not known:
            with _begun(out, text):
                fetched = _fetch_all(place, missing, out, progress)
                for part in parts:
                    part.unlink(missing_ok=True)  # of a file that is there
    except OSError as error:
        raise ArtifactError(
            f"cannot write: {error.strerror or error}",
            where=error.filename or str(out),
            hint="free space or choose another -o; the same command continues",
        ) from error
    total = sum(entry["bytes"] for _, entry in needed)
    return PullResult(
        Artifact.open(out), max(widths, default=None), fetched, total - fetched,
        tuple(name for name, _ in missing), len(needed) - len(missing),
    )  # fmt: skip


def _check_output(out: Path, manifest: Mapping[str, Any], text: bytes) -> bool:
    """`out` must be empty, or hold this very artifact, or what was fetched of it. Gives whether its
    manifest is there."""
    if is_empty(out):
        return False
    own, begun = out / MANIFEST, _part(out, MANIFEST)
    if own.is_file():
        try:
            found = parse_manifest(own.read_bytes(), str(own))
        except ArtifactError:
            if _all_known(out, manifest):
                return False
            raise
        if found == manifest:
            return True
        alike = found.get("fingerprint") == manifest.get("fingerprint")
        what = "the artifact there is not the source's: " + (
            "made alike, but cut or changed since" if alike else "another fingerprint"
        )
    elif not begun.is_file():
        raise in_the_way(out)
    elif text.startswith(begun.read_bytes()):  # less than all of it: killed before anything else
        return False
    else:
        what = "an unfinished pull of something else is in the way"
    raise ArtifactError(what, where=str(out), hint="choose another -o, or remove it first")


def _all_known(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of a directory whose manifest is damaged is, byte for byte, one that the
    source has: then nothing is lost by taking the directory for a pull of it."""
    files = [file for file in out.iterdir() if file.name != MANIFEST]
    return bool(files) and all(
        file.is_file()
        and file.name in manifest["files"]
        and sha256_file(file) == manifest["files"][file.name]["sha256"]
        for file in files
    )


def _missing(
    out: Path, needed: Sequence[tuple[str, Entry]], progress: Progress
) -> list[tuple[str, Entry]]:
    """Those of the needed files that are not there with the size and checksum they should have."""

    def size(name: str) -> int | None:
        file = out / name
        return file.stat().st_size if file.is_file() else None

    there = {name for name, entry in needed if size(name) == entry["bytes"]}
    if there:
        progress.phase("checking", sum(e["bytes"] for name, e in needed if name in there))
    missing = []
    for name, entry in needed:
        if name not in there:
            missing.append((name, entry))
            continue
        if sha256_file(out / name) != entry["sha256"]:
            missing.append((name, entry))
        progress.step(entry["bytes"], name)
    return missing


def _check_source(place: Place, missing: Sequence[tuple[str, Entry]]) -> None:
    for name, entry in missing:
        size = place.size(name)
        if size is None or size == entry["bytes"]:
            continue
        wrong = "is missing" if size < 0 else f"has {size:,} bytes, not {entry['bytes']:,}"
        raise ArtifactError(
            f"'{name}' {wrong} at the source",
            where=place.text,
            hint="pull from a copy that has it, or at fewer bits",
        )


def _check_room(out: Path, missing: Sequence[tuple[str, Entry]]) -> None:
    wanted = sum(entry["bytes"] - _held(out, name, entry) for name, entry in missing)
    disk = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if wanted > free:
        raise ArtifactError(
            f"{wanted:,} bytes are to be fetched, and {free:,} are free",
            where=str(disk),
            hint="free space, choose another -o, or pull fewer --bits",
        )


def _held(out: Path, name: str, entry: Entry) -> int:
    """Bytes of a file that an earlier run has fetched."""
    part = _part(out, name)
    size = part.stat().st_size if part.is_file() else 0
    return size if size <= entry["bytes"] else 0


def _part(out: Path, name: str) -> Path:
    return out / f".{name}.part"


@contextmanager
def _begun(out: Path, text: bytes) -> Iterator[None]:
    """Holds `out` against other pulls and says whose files are in it; at the end the manifest gets
    its name. If nothing was fetched at all, nothing stays behind."""
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    part = _part(out, MANIFEST)
    with _locked(part) as stream:
        stream.seek(0)
        if stream.read() != text:
            stream.truncate(0)
            stream.write(text)
            _to_disk(stream)
        try:
            yield
        except BaseException:
            _clear(out, created)
            raise
        part.replace(out / MANIFEST)


def _clear(out: Path, created: Sequence[Path]) -> None:
    """Remove parts without a byte; the directories this run made, too, if no file is left."""
    for part in out.glob(".*.part"):
        if part.stat().st_size == 0:
            part.unlink()
    part = _part(out, MANIFEST)
    if not any(file != part for file in out.iterdir()):
        part.unlink()
        for directory in created:
            with suppress(OSError):  # somebody else uses it by now
                directory.rmdir()


@contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """`file`, open and locked.

    Raises:
        ArtifactError: another process holds it.
    """
    while True:
        with file.open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ArtifactError(
                    "another process is pulling into this directory",
                    where=str(file.parent),
                    hint="wait for it, or choose another -o",
                ) from error
            with suppress(FileNotFoundError):  # else it was renamed before the lock was taken
                if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                    yield stream
                    return


def _fetch_all(
    place: Place, missing: Sequence[tuple[str, Entry]], out: Path, progress: Progress
) -> int:
    """Fetch every missing file; gives the bytes that were read from the source."""
    wanted = sum(entry["bytes"] - _held(out, name, entry) for name, entry in missing)
    progress.phase("fetching", wanted)
    for name, entry in missing:
        _fetch(place, name, entry, out, progress)
    return wanted


def _fetch(place: Place, name: str, entry: Entry, out: Path, progress: Progress) -> None:
    """Fetch one file, on from what is there of it.

    Raises:
        ArtifactError: the source fails (what came stays), or the checksum is wrong (it goes).
    """
    part, total = _part(out, name), entry["bytes"]
    digest = hashlib.sha256()
    with part.open("a+b") as stream:
        if not _held(out, name, entry):
            stream.truncate(0)
        stream.seek(0)
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
        held = stream.tell()
        if held < total:
            with closing(place.read(name, held)) as chunks:
                for chunk in chunks:
                    chunk = chunk[: total - held]
                    stream.write(chunk)
                    digest.update(chunk)
                    held += len(chunk)
                    progress.step(len(chunk), name)
                    if held == total:
                        break
        _to_disk(stream)
    if held < total:
        raise ArtifactError(
            f"'{name}' ends after {held:,} of {total:,} bytes",
            where=place.text,
            hint="the same command continues; if it ends there again, the source is damaged",
        )
    if digest.hexdigest() != entry["sha256"]:
        part.unlink()
        raise ArtifactError(
            f"'{name}' does not match its checksum",
            where=place.text,
            hint="what came of it was removed, the same command fetches it again; if it fails "
            "again, the source is damaged",
        )
    part.replace(out / name)


def _to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
