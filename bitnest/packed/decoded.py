"""A nested artifact as the checkpoint it stands for: tensors are decoded when they are asked for.

What reads checkpoints tensor by tensor (the skeleton, calibration, compression) so reads nested
artifacts, one tensor in memory at a time and without a dense copy on disk. A tensor has the name,
the shape and the layout that it has in the original checkpoint:

    a matrix                      <site>.weight, transposed where the layer keeps it so
    experts one by one on disk    the same, <site> being the expert's matrix
    experts fused on disk         <module>.<param> (E, O, I) or (E, I, O), as the model keeps them

An artifact does not record that layout: it follows from names and places of its sites. (Experts lay
one by one on disk if gate and up are sites of their own, rows of one parameter.) `check_sites`
proves it: the sites of the model that is mapped onto these tensors must be the artifact's. Weights
have the type that the model is loaded in; the other tensors are as they were.

Left out: compressing artifacts of one width. Their codes are what was asked for already.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitnest.artifact import Artifact, is_artifact, site_tensors
from bitnest.checkpoint import (
    Checkpoint,
    all_finite,
    config_dtype,
    main_dtype,
    read_config,
    resolve_model,
)
from bitnest.errors import ArtifactError, CheckpointError, FormatError, UnsupportedModel
from bitnest.formats import AnyFormat
from bitnest.kernels.decode import decode
from bitnest.lora import open_adapters
from bitnest.manifest import SiteRecord
from bitnest.merged import MergedCheckpoint
from bitnest.packed.widths import loaded_formats, nested_widths
from bitnest.safetensors_io import NAMES, TensorInfo, read_header
from bitnest.sites import Site


def open_checkpoint(
    model: str | Path, lora: Sequence[str] = (), *, trust_remote_code: bool = False
) -> Checkpoint:
    """The checkpoint in `model` (see `resolve_model`); a nested artifact is one, too.

    lora: adapters, PATH or PATH:scale, to be merged in as it is read.

    Raises:
        CheckpointError, ArtifactError: it cannot be read, or is an artifact of one width.
        RecipeError: a scale that is none. CheckpointError: an adapter of another base.
    """
    path = resolve_model(model)
    adapters = open_adapters(lora)
    artifact = Artifact.open(path) if is_artifact(path) else None
    base = (
        DecodedCheckpoint.of(artifact)
        if artifact is not None and nested_widths(artifact)
        else Checkpoint.open(path)
    )
    if not adapters:
        return base
    return MergedCheckpoint.of(base, adapters, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """A nested artifact, read as a checkpoint.

    artifact: that it reads. bits: width nested weights are decoded at, None: all planes. formats:
    by site, as they are read. sources: decoded tensors, and the sites in each, in the order of
    their experts. kind: type of the decoded tensors. A decoded tensor's place in `tensors` has no
    meaning but its size.
    """

    artifact: Artifact
    bits: int | None
    formats: Mapping[str, AnyFormat]
    sources: Mapping[str, tuple[SiteRecord, ...]]
    kind: torch.dtype

    @classmethod
    def of(cls, artifact: Artifact, *, whole: bool = False) -> DecodedCheckpoint:
        """`artifact` at the widest width whose files are all there.

        whole: any artifact, nested or not, with all its planes, to compare with or to look at.

        Raises:
            RecipeError: nothing in it is nested.
            ArtifactError: there is no such width. CheckpointError: no type is stated.
        """
        bits = None if whole else widest_width(artifact)
        config = read_config(artifact.path)
        config.pop("quantization_config", None)
        dense = {
            name: info
            for file in sorted(artifact.manifest["files"])
            if file.startswith("model-") and file.endswith(".safetensors")
            for name, info in read_header(artifact.path / file).items()
        }
        kind = config_dtype(config) or main_dtype(dense.values())
        if kind is None:
            raise CheckpointError(
                "config.json does not state the model's dtype", where=str(artifact.path)
            )
        sources = _sources(artifact)
        decoded = {name: _info(artifact, name, own, kind) for name, own in sources.items()}
        formats = loaded_formats(artifact, bits)
        return cls(
            artifact.path, config, {**dense, **decoded}, artifact, bits, formats, sources, kind
        )

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # a cached property there
        """The type weights are decoded to."""
        return self.kind

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, decoded if it is a matrix that is packed.

        Raises:
            CheckpointError: it decodes to infinite values.
        """
        if name not in self.sources:
            return super().read(name)
        own = self.sources[name]
        info = self.tensors[name]
        if len(info.shape) == 2:
            tensor = self._decoded(own[0])
        else:
            tensor = torch.empty(info.shape, dtype=self.kind)
            for place, record in enumerate(own):
                tensor[place] = self._decoded(record)
        if not all_finite(tensor):
            raise CheckpointError(
                f"'{name}' decodes to NaN or infinite values",
                where=str(info.file),
                hint="compress the original checkpoint",
            )
        return tensor

    def _decoded(self, record: SiteRecord) -> torch.Tensor:
        """One site's matrix as its checkpoint lays it out."""
        site, fmt = record.site, self.formats[record.site.name]
        matrix = decode(site_tensors(record, self._headers, fmt), fmt, site.shape, self.kind)
        return matrix.T.contiguous() if site.transposed else matrix

    @cached_property
    def _headers(self) -> dict[str, TensorInfo]:
        return self.artifact.headers(self.formats)

    def scan(self, progress: Callable[[int], None] | None = None) -> str:
        """Hold every file that is read against its checksum; the sha256 of those and of the width.

        progress is called with shares of `nbytes`, file by file.

        Raises:
            ArtifactError: a file was changed.
        """
        known: str | None = self.__dict__.get("_scanned")
        if known is not None:
            return known
        files = sorted(self._files())
        entries = {name: self.artifact.manifest["files"][name] for name in files}
        total = sum(entry["bytes"] for entry in entries.values()) or 1
        digest = hashlib.sha256(f"decoded at {self.bits} bits to {self.kind};".encode())
        for name, entry in entries.items():
            self.artifact.verify([name])
            digest.update(f"{name}:{entry['sha256']};".encode())
            if progress is not None:
                progress(entry["bytes"] * self.nbytes // total)
        self.__dict__["_scanned"] = digest.hexdigest()
        return digest.hexdigest()

    def _files(self) -> set[str]:
        """Weight files that are read."""
        found = {info.file.name for name, info in self.tensors.items() if name not in self.sources}
        for record in self.artifact.packed():
            found.update(record.files(self.formats[record.site.name]))
        return found

    def origin(self) -> dict[str, Any]:
        """What the manifest says of a source that is no original: its width, and its own source."""
        return {"decoded": {"bits": self.bits, "source": self.artifact.manifest["source"]}}

    def check_sites(self, found: Sequence[Site]) -> None:
        """Refuse a model whose sites, found in these tensors, are not the artifact's.

        Raises:
            UnsupportedModel: the first that differs.
        """
        by_name = {site.name: site for site in found}
        for record in self.artifact.packed():
            if by_name.get(record.site.name) != record.site:
                raise UnsupportedModel(
                    f"'{record.site.name}' cannot be put back where the checkpoint had it",
                    where=str(self.path),
                    hint="compress the original checkpoint; or use the version of transformers "
                    "that this artifact was made with",
                )


def widest_width(artifact: Artifact) -> int:
    """The widest width at which everything can be read from the files that are there.

    Raises:
        RecipeError: nothing is nested. ArtifactError: there is none.
    """
    if not nested_widths(artifact):
        loaded_formats(artifact, 8)  # says so
    for width in reversed(nested_widths(artifact)):
        try:
            formats = loaded_formats(artifact, width)
        except FormatError:
            continue  # some site begins at more bits
        needed = (f for r in artifact.packed() for f in r.files(formats[r.site.name]))
        if not any(file in artifact.absent for file in needed):
            return width
    wrong = next(iter(artifact.absent.values()), "its sites have no width in common")
    raise ArtifactError(wrong, where=str(artifact.path), hint="copy the artifact again")


def decoding_note(model: str | Path) -> str:
    """One sentence on what compressing a nested artifact does; empty for anything else."""
    path = Path(model)
    if not is_artifact(path):
        return ""
    artifact = Artifact.open(path)
    if not nested_widths(artifact):
        return ""
    bits = widest_width(artifact)
    beyond = " (wider planes are not there, or not whole)" if artifact.absent else ""
    return (
        f"a nested artifact, decoded at {bits} bits{beyond}: the error of that width is added; "
        "start from the original if you have it"
    )


def _sources(artifact: Artifact) -> dict[str, tuple[SiteRecord, ...]]:
    """Decoded tensors by their checkpoint names, each with its sites. Experts without a gate look
    alike whether disk has them fused or not: fused is what the model has, and can be read too."""
    found: dict[str, list[SiteRecord]] = {}
    single = {r.site.module for r in artifact.packed() if r.site.rows is not None}
    for record in artifact.packed():
        site = record.site
        fused = site.param != "weight" and site.module not in single
        name = site.path if fused else f"{site.name}.weight"
        found.setdefault(name, []).append(record)
    return {
        name: tuple(sorted(own, key=lambda r: r.site.expert or 0)) for name, own in found.items()
    }


def _info(
    artifact: Artifact, name: str, own: Sequence[SiteRecord], kind: torch.dtype
) -> TensorInfo:
    site = own[0].site
    matrix = site.shape[::-1] if site.transposed else site.shape
    shape = (len(own), *matrix) if site.param != "weight" and name == site.path else matrix
    nbytes = kind.itemsize * math.prod(shape)
    return TensorInfo(artifact.path / own[0].file, NAMES[kind], shape, 0, nbytes)
