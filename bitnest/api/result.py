"""What a compression gave: sites, bytes and bits, counted by kind and format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnest.artifact import Artifact
from bitnest.formats import code_bits, parse_format, widths
from bitnest.formats.inputs import joined_name
from bitnest.formats.names import brief_name
from bitnest.kinds import ENDS
from bitnest.manifest import SiteRecord


@dataclass(frozen=True)
class Group:
    """Sites of one kind and format, summed. error: parameter-weighted mean relative error."""

    kind: str
    format: str
    sites: int
    parameters: int
    nbytes: int
    error: float


@dataclass(frozen=True)
class CompressResult:
    """A finished run.

    path: the artifact. groups: its sites by kind and format. dense_bytes: of what is not a site
    or stayed dense. nbytes: of all weights. source_bytes: of the checkpoint. bits: average code
    width over the quantised weights. bits_per_weight: the same with scales and zero points.
    starved: experts whose Hessian leaned on the layer's inputs. calibrated: whether text was read.
    seconds: wall time. predicted: what statistics said beforehand, see `calibrate.expect.Expected`.
    plan: see `Plan.summary`. artifact_bytes: of all files. measured: what a limit was met with, per
    text, and every try; rounds: artifacts that were made for it. forecast: what `preflight`
    said; peak_memory: bytes the process held at most.
    advice: formats that were measured to do better than sparse ones, see `quantize.advice.Advice`.
    """

    path: Path
    groups: tuple[Group, ...]
    dense_bytes: int
    nbytes: int
    source_bytes: int
    bits: float
    bits_per_weight: float
    starved: int
    experts: int
    calibrated: bool
    seconds: float
    predicted: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    artifact_bytes: int = 0
    measured: dict[str, Any] | None = None
    rounds: int = 0
    forecast: dict[str, Any] | None = None
    peak_memory: int | None = None
    advice: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **{k: v for k, v in vars(self).items() if k not in {"path", "groups"}},
            "path": str(self.path),
            "groups": [vars(group) for group in self.groups],
        }


def _source_bytes(source: Mapping[str, Any]) -> int:
    """Of the checkpoint that was given, with what went before anything was compressed."""
    return int(source.get("reduced", {}).get("bytes", source["bytes"]))


def summarise(artifact: Artifact, seconds: float = 0.0) -> CompressResult:
    """Sites and bytes of an artifact, counted by kind and format; nothing is left out. Several
    nested formats count by their widest width."""
    sums: dict[tuple[str, str], list[SiteRecord]] = {}
    nested = {f for f in {r.format for r in artifact.records} if widths(parse_format(f))}
    for record in artifact.records:
        if record.format == "dense" and record.site.kind in ENDS:
            continue  # part of "everything else", as they were before anybody packed them
        name = brief_name(record.format) if len(nested) > 1 else record.format
        name = joined_name(name, record.inputs)
        sums.setdefault((record.site.kind, name), []).append(record)
    groups = tuple(_group(*key, records) for key, records in sorted(sums.items()))
    files = {k: v for k, v in artifact.manifest["files"].items() if k.endswith(".safetensors")}
    packed = [r for r in artifact.packed() if r.format != "dense"]
    weights = sum(r.site.numel for r in packed) or 1
    coded = sum(code_bits(parse_format(r.format), r.site.shape) for r in packed)
    minimum = artifact.manifest["recipe"]["min_tokens"]
    experts = {(r.site.layer, r.site.expert) for r in packed if r.site.expert is not None}
    starved = {
        (r.site.layer, r.site.expert)
        for r in packed
        if r.site.expert is not None
        and r.tokens is not None
        and r.tokens < (minimum or r.site.shape[1])
    }
    nbytes = sum(entry["bytes"] for entry in files.values())
    return CompressResult(
        path=artifact.path,
        groups=groups,
        dense_bytes=nbytes - sum(r.nbytes for r in artifact.packed()),
        nbytes=nbytes,
        source_bytes=_source_bytes(artifact.manifest["source"]),
        bits=coded / weights,
        bits_per_weight=8 * sum(r.nbytes for r in packed) / weights,
        starved=len(starved),
        experts=len(experts),
        calibrated=artifact.manifest.get("calibration") is not None,
        seconds=seconds,
        predicted=_predicted(artifact),
        plan=artifact.manifest.get("plan"),
        artifact_bytes=sum(file.stat().st_size for file in artifact.path.iterdir()),
    )


def _group(kind: str, fmt: str, records: list[SiteRecord]) -> Group:
    parameters = sum(r.site.numel for r in records)
    error = sum(r.error * r.site.numel for r in records) / parameters
    return Group(kind, fmt, len(records), parameters, sum(r.nbytes for r in records), error)


def _predicted(artifact: Artifact) -> dict[str, Any] | None:
    """The KL that is to be expected. Of nested weights the manifest's figure stems from integers in
    their place; the errors they came out with tell more."""
    said: dict[str, Any] | None = artifact.manifest.get("predicted")
    if said is None or "sensitivity" not in artifact.manifest:
        return said
    from bitnest.quantize.allocation.fitting import Fitting

    fitting = Fitting(artifact)
    found = fitting.fit(fitting.largest)
    return {**said, "kl": found.kl, "mean": found.mean, "low": found.low, "high": found.high}
