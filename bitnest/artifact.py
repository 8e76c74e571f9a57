"""The artifact: a directory that transformers opens, with every packed weight accounted for.

    config.json            the source's, with quantization_config: {quant_method: bitnest, ...}
    tokenizer files, generation config, licence: copied
    model-*.safetensors    what stays dense, under its checkpoint names, with the usual index
    packed-*.safetensors   one file per decoder block: <site>.codes, .scales, .zeros; one more for
                           embedding and head if they are packed
    packed-*.w<bits>.safetensors   of nested formats: what reading them at so many bits adds
    bitnest.json           the manifest: source, recipe, every site and its format, checksums

It is written into `.<name>.partial/artifact` beside its final place, block by block; each file
appears under its name only when whole, and a block counts as done once its record does. The
directory is renamed at the very end, so a directory of the final name is complete. Nothing in it
depends on time or place: the same inputs give the same bytes, also after a resume. Layout:
docs/format.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bitnest.errors import ArtifactError
from bitnest.formats import AnyFormat, parse_format, refinement
from bitnest.manifest import (
    FILE_NAME,
    MANIFEST,
    SiteRecord,
    manifest_text,
    parse_records,
    read_manifest,
)
from bitnest.planes import join_streams, plane_file, plane_width, split_streams
from bitnest.safetensors_io import Entry, TensorInfo, read_header, read_tensor, write_file
from bitnest.workdir import (
    Workdir,
    in_the_way,
    is_empty,
    partial_directory,
    sha256_file,
    write_bytes,
    write_text,
)

SHARD_BYTES = 1 << 30
COPIED = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*",
    "generation_config.json", "*.model", "LICENSE*",
    "*.py",  # a model's own code, which runs only for those who allow it
)  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, opened for reading.

    path: the directory. manifest: bitnest.json. records: every site. absent: files of planes that
    are not there, or not whole, with what is wrong: narrower widths can do without them. checked:
    files whose checksums were found right.
    """

    path: Path
    manifest: dict[str, Any]
    records: tuple[SiteRecord, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open the artifact in `path`; its files must exist with the sizes the manifest states, but
        for planes of nested formats, which are asked for when they are read.

        Raises:
            ArtifactError: not an artifact, another version, or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        records = parse_records(manifest, str(path / MANIFEST))
        absent: dict[str, str] = {}
        for name, entry in manifest["files"].items():
            file, expected = path / name, entry["bytes"]
            size = file.stat().st_size if file.exists() else None
            if size == expected:
                continue
            wrong = (
                f"'{name}' has {size} bytes, the manifest says {expected}"
                if size is not None
                else f"'{name}' is missing"
            )
            if plane_width(name) is None:
                raise ArtifactError(
                    wrong,
                    where=str(path),
                    hint=f"fetch it again: {pulling(path)}; or compress again",
                )
            absent[name] = wrong
        return cls(path, manifest, records, absent)

    def packed(self) -> list[SiteRecord]:
        """Sites that are not among the dense tensors."""
        return [record for record in self.records if record.file or record.format == "zero"]

    def headers(self, formats: Mapping[str, AnyFormat] | None = None) -> dict[str, TensorInfo]:
        """Name -> place of every packed tensor. formats: by site, those of nested sites cut at the
        width wanted; files that hold nothing of them are not opened. Files of nested artifacts,
        which come one by one, are held against their checksums the first time.

        Raises:
            ArtifactError: a file of planes that is needed is not there, or not whole.
        """
        wanted: set[str] = set()
        for record in self.packed():
            fmt = parse_format(record.format) if formats is None else formats[record.site.name]
            wanted.update(record.files(fmt))
        found: dict[str, TensorInfo] = {}
        for name in sorted(wanted):
            if name in self.absent and self._still_absent(name):
                raise ArtifactError(
                    self.absent[name],
                    where=str(self.path),
                    hint=f"load below {plane_width(name)} bits (--bits), or fetch what is missing: "
                    + pulling(self.path),
                )
            self._check(name)
            infos, width = read_header(self.path / name), plane_width(name)
            found.update(infos if width is None else self._parts(name, width, infos, list(found)))
        return found

    def _still_absent(self, name: str) -> bool:
        """Whether planes that were missing when this was opened have not come since."""
        file, entry = self.path / name, self.manifest["files"][name]
        return not file.exists() or file.stat().st_size != entry["bytes"]

    @cached_property
    def _nested(self) -> bool:
        return any(map(plane_width, self.manifest["files"]))

    def _check(self, name: str) -> None:
        """Hold a file of a nested artifact against its checksum, once.

        Raises:
            ArtifactError: it was changed.
        """
        if name in self.checked or not self._nested:
            return
        if sha256_file(self.path / name) != self.manifest["files"][name]["sha256"]:
            width = plane_width(name)
            narrower = "" if width is None else f"load below {width} bits (--bits), or "
            raise ArtifactError(
                f"'{name}' does not match its checksum",
                where=str(self.path),
                hint=f"{narrower}fetch it again: {pulling(self.path)}",
            )
        self.checked.add(name)

    def _parts(
        self, name: str, width: int, infos: Mapping[str, TensorInfo], before: Sequence[str]
    ) -> dict[str, TensorInfo]:
        """What a file of planes holds. before: packed tensors in files read already; its sites come
        in the order they have there."""
        place: dict[str, int] = {}
        for i, tensor in enumerate(before):  # of a site in several files, its place in the first
            place.setdefault(tensor.rpartition(".")[0], i)
        own = [r for r in self.records if r.file and plane_file(r.file, width) == name]
        return split_streams(sorted(own, key=lambda r: place[r.site.name]), width, infos)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read every file that is there, or those of `names`, and compare its sha256 with the
        manifest.

        Raises:
            ArtifactError: files were changed, or are not there.
        """
        asked = list(self.manifest["files"] if names is None else names)
        wrong = [
            name
            for name in asked
            if name not in self.absent
            and sha256_file(self.path / name) != self.manifest["files"][name]["sha256"]
        ]
        if wrong:
            said = ", ".join(f"'{name}'" for name in wrong)
            raise ArtifactError(
                f"{said} does not match its checksum"
                if len(wrong) == 1
                else f"{said} do not match their checksums",
                where=str(self.path),
                hint=f"changed or damaged; fetch it again: {pulling(self.path)}",
            )
        self.checked.update(name for name in asked if name not in self.absent)
        gone = [name for name in asked if name in self.absent]
        for name in sorted(gone, key=lambda name: plane_width(name) or 0):
            raise ArtifactError(
                f"{self.absent[name]}; all that is there matches its checksum",
                where=str(self.path),
                hint=f"below {plane_width(name)} bits it is not needed; otherwise fetch it: "
                + pulling(self.path),
            )


def is_artifact(path: Path) -> bool:
    """Whether the directory claims to be a bitnest artifact."""
    return (path / MANIFEST).is_file()


def site_tensors(
    record: SiteRecord,
    headers: Mapping[str, TensorInfo],
    fmt: AnyFormat | None = None,
    only: set[str] | None = None,
) -> dict[str, Any]:
    """The stored tensors of one site, by part name (see `formats`). fmt: its format cut at a width,
    where not all of it is wanted. only: parts wanted of these."""
    fmt = parse_format(record.format) if fmt is None else fmt
    parts = fmt.parts(record.site.shape)  # none of `zero`
    return {
        part: read_tensor(headers[f"{record.site.name}.{part}"])
        for part in parts
        if only is None or part in only
    }


def pulling(path: Path) -> str:
    """The command that mends the artifact in `path`."""
    return f"bitnest pull SOURCE -o {path} (SOURCE: a whole copy, directory or hub id)"


class Writer(Workdir):
    """Writes an artifact so that a kill at any moment loses at most one block.

    The ends are one block more, after the others. files: that are numbered, packed or not; the ends
    count only if they are packed.
    """

    def __init__(
        self, out: Path, fingerprint: dict[str, Any], blocks: int, files: int | None = None
    ) -> None:
        super().__init__(out, fingerprint, blocks)
        self.files = blocks if files is None else files

    def packed_name(self, block: int) -> str:
        """File name of one block's packed weights."""
        return packed_file_name(block, self.files)

    def write_block(
        self, block: int, records: Sequence[SiteRecord], entries: Sequence[Entry]
    ) -> None:
        """Store one finished block: its packed file, then the record that makes it count."""
        base = self.packed_name(block)
        files: dict[str, list[Entry]] = {}
        by_site = {record.site.name: parse_format(record.format) for record in records}
        for item in entries:
            site, _, part = item.name.rpartition(".")
            files.setdefault(plane_file(base, refinement(by_site[site], part)), []).append(item)
        whole = {n: own if n == base else join_streams(own) for n, own in files.items()}
        self.save_block(block, {"sites": [record.to_json() for record in records]}, whole)

    def block_records(self, block: int) -> list[SiteRecord]:
        """What `write_block` stored."""
        return [SiteRecord.from_json(item) for item in self.saved_block(block)["sites"]]

    def finish(
        self, source: Path, config: dict[str, Any], dense: Sequence[Entry], manifest: dict[str, Any]
    ) -> Artifact:
        """Write dense tensors, configuration and manifest, and give the directory its name."""
        files: dict[str, Any] = {}
        sites: list[Any] = []
        for block in range(self.blocks):
            content = self.saved_block(block)
            files.update(content["files"])
            sites.extend(content["sites"])
        files.update(self._write_dense(dense))
        write_text(self.work / "config.json", config_text(config))
        _copy_files(source, self.work)
        for file in sorted(self.work.iterdir()):
            if file.name not in files and file.name != MANIFEST and file.suffix != ".tmp":
                files[file.name] = {
                    "bytes": file.stat().st_size,
                    "sha256": sha256_file(file),
                }
        write_text(self.work / MANIFEST, manifest_text(manifest, sites, files))
        self.publish()
        return Artifact.open(self.out)

    def _write_dense(self, entries: Sequence[Entry]) -> dict[str, Any]:
        parts = list(shards(entries))
        files: dict[str, Any] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(parts):
            name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
            size, digest = write_file(self.work / name, shard)
            files[name] = {"bytes": size, "sha256": digest}
            weight_map.update({item.name: name for item in shard})
        total = sum(item.nbytes for item in entries)
        write_text(self.work / "model.safetensors.index.json", index_text(weight_map, total))
        return files


def packed_file_name(block: int, blocks: int) -> str:
    """File name of the packed weights of one of `blocks` units."""
    return f"packed-{block + 1:05d}-of-{blocks:05d}.safetensors"


def config_text(config: Mapping[str, Any]) -> str:
    """config.json."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def index_text(weight_map: Mapping[str, str], total: int) -> str:
    """The index of dense tensors: name -> file, and their bytes."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=1) + "\n"


def finished_with(out: Path, fingerprint: dict[str, Any]) -> Artifact | None:
    """The artifact already in `out` if it was made from exactly these inputs.

    Raises:
        ArtifactError: something else is there.
    """
    if is_empty(out):
        return None
    if out.is_dir() and is_artifact(out):
        artifact = Artifact.open(out)
        if artifact.manifest.get("fingerprint") == fingerprint:
            shutil.rmtree(partial_directory(out), ignore_errors=True)  # killed right after renaming
            return artifact
    raise in_the_way(out)


def shards(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Dense tensors file by file."""
    shard: list[Entry] = []
    size = 0
    for item in entries:
        if shard and size + item.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.nbytes
    if shard:
        yield shard


def _copy_files(source: Path, target: Path) -> None:
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and FILE_NAME.fullmatch(file.name):
                write_bytes(target / file.name, file.read_bytes())
