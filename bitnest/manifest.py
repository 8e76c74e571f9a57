"""The manifest: bitnest.json, every site with its format and loss, every file with its checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitnest.errors import ArtifactError
from bitnest.formats import AnyFormat, refinement
from bitnest.planes import plane_file
from bitnest.sites import Site

FORMAT_VERSION = 2
MANIFEST = "bitnest.json"
FILE_NAME = re.compile(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*")  # hidden ones are for bookkeeping
SHA256 = re.compile(r"[0-9a-f]{64}")
DIGITS = 6  # of a site's error in the manifest
# what sites of one group do not share; the last OPTIONAL are left out from the first on after which
# there is nothing more to say
OWN = ("expert", "format", "nbytes", "error", "tokens", "sensitivity", "input_scale")
OPTIONAL = 2


@dataclass(frozen=True)
class SiteRecord:
    """One site as stored: its address, format and loss.

    nbytes: bytes of its tensors. error: relative output error on the calibration text (relative
    weight error for rtn). tokens: calibration tokens it saw, None without calibration. file: the
    packed file that holds it; empty when it stays among the dense tensors, or is zero and has none.
    narrower: of a nested format, the error at every width below its widest. sensitivity: nats of
    KL that a unit of error is predicted to cost, by text (manifest key `sensitivity`); in nested
    artifacts made with statistics, else empty. inputs: format that what it reads is rounded to as
    the model runs (`formats/inputs`), empty for none. input_scale: the static scale of these.
    """

    site: Site
    format: str
    nbytes: int
    error: float
    tokens: int | None
    file: str
    narrower: tuple[float, ...] = ()
    sensitivity: tuple[float, ...] = ()
    inputs: str = ""
    input_scale: float | None = None

    @property
    def errors(self) -> tuple[float, ...]:
        """At every width of a nested format, narrowest first; of others the one there is."""
        return (*self.narrower, self.error)

    def files(self, fmt: AnyFormat) -> list[str]:
        """Files that hold its parts; fmt: its format, or that cut at a width."""
        if not self.file:
            return []
        planes = {refinement(fmt, part) for part in fmt.parts(self.site.shape)}
        return [plane_file(self.file, width) for width in sorted(planes, key=lambda w: w or 0)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the site's fields are merged in."""
        record = asdict(self)
        del record["narrower"]
        errors = [rounded(e) for e in self.errors]
        record["error"] = errors if self.narrower else errors[0]
        record["sensitivity"] = [rounded(s) for s in self.sensitivity]
        if not self.inputs:
            del record["inputs"]
        return {**record.pop("site"), **record}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> SiteRecord:
        """The inverse of `to_json`."""
        fields = dict(record)
        own = {k: fields.pop(k) for k in ("format", "nbytes", "error", "tokens", "file")}
        own["sensitivity"] = tuple(fields.pop("sensitivity", None) or ())
        own["inputs"] = fields.pop("inputs", "")
        own["input_scale"] = fields.pop("input_scale", None)
        fields["shape"] = tuple(fields["shape"])
        if isinstance(own["error"], list):
            *narrower, own["error"] = own["error"]
            own["narrower"] = tuple(narrower)
        fields["rows"] = tuple(fields["rows"]) if fields["rows"] else None
        return cls(site=Site(**fields), **own)


def rounded(value: float) -> float:
    """A figure as the manifest has it."""
    return float(f"{value:.{DIGITS}g}")


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise no_manifest(str(path)) from error
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}", where=str(file)) from error
    return parse_manifest(data, str(file))


def no_manifest(where: str) -> ArtifactError:
    """The error for a place that is no artifact."""
    return ArtifactError(
        f"not a bitnest artifact: no {MANIFEST}",
        where=where,
        hint="bitnest compress MODEL -o OUT makes one",
    )


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """The manifest in `data`, which lies at `where`.

    Raises:
        ArtifactError: damaged, of another version, or it lists files outside its directory.
    """
    try:
        manifest = json.loads(data)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            "the manifest is damaged", where=where, hint="copy the artifact again, whole"
        ) from error
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ArtifactError(
            f"artifact format {version}, this bitnest reads {FORMAT_VERSION}",
            where=where,
            hint="upgrade bitnest" if newer else "compress the model again",
        )
    _check_files(manifest, where)
    assert isinstance(manifest, dict)
    return manifest


def _check_files(manifest: dict[str, Any], where: str) -> None:
    """An artifact is flat: a name with a directory in it would be read, sliced or pulled to a place
    that is none of its business."""
    try:
        for name, entry in manifest["files"].items():
            if not FILE_NAME.fullmatch(name) or name.casefold() == MANIFEST:
                raise ArtifactError(
                    f"the manifest lists {name!r}, which is no name of a file beside it",
                    where=where,
                    hint="nothing was read or written; do not trust where this came from",
                )
            if type(entry["bytes"]) is not int or entry["bytes"] < 0:
                raise ValueError(f"bytes of {name}")
            if not SHA256.fullmatch(entry["sha256"]):
                raise ValueError(f"sha256 of {name}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _incomplete(where) from error


def parse_records(manifest: Mapping[str, Any], where: str) -> tuple[SiteRecord, ...]:
    """Every site of a manifest that lies at `where`.

    Raises:
        ArtifactError: something is missing, or a site lies in a file that is not listed.
    """
    try:
        records = tuple(SiteRecord.from_json(item) for item in unfold(manifest["sites"]))
        lost = [r.site.name for r in records if r.file and r.file not in manifest["files"]]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _incomplete(where) from error
    if lost:
        raise _incomplete(where)
    return records


def _incomplete(where: str) -> ArtifactError:
    return ArtifactError(
        "the manifest is incomplete",
        where=where,
        hint="copy the artifact again, or compress again",
    )


def manifest_text(
    manifest: Mapping[str, Any], sites: Iterable[dict[str, Any]], files: Mapping[str, Any]
) -> str:
    """bitnest.json: a line per key, and per site."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}"
        for key, value in {"format_version": FORMAT_VERSION, **manifest, "files": files}.items()
    ]
    return "{\n" + ",\n".join([*lines, _sites_text(fold(sites))]) + "\n}\n"


def _sites_text(groups: Sequence[dict[str, Any]]) -> str:
    texts = []
    for group in groups:
        head = json.dumps({k: v for k, v in group.items() if k != "sites"})
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in group["sites"])
        texts.append(f'{head[:-1]}, "sites": [\n{rows}]}}')
    return '"sites": [\n' + ",\n".join(texts) + "]"


def fold(sites: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Site records by what they share: groups with a list of the values of OWN per site. Names of
    experts have their number replaced by `{expert}`."""
    groups: dict[str, dict[str, Any]] = {}
    for site in sites:
        own = [site.get(key) for key in OWN]
        while len(own) > len(OWN) - OPTIONAL and not own[-1]:
            own.pop()
        shared = {key: value for key, value in site.items() if key not in OWN}
        parts = shared["name"].rsplit(f".{site['expert']}.", 1)
        if len(parts) == 2:
            shared["name"] = ".{expert}.".join(parts)
        groups.setdefault(json.dumps(shared), {**shared, "sites": []})["sites"].append(own)
    return list(groups.values())


def unfold(groups: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The inverse of `fold`; sites come group by group."""
    for group in groups:
        shared = {key: value for key, value in group.items() if key != "sites"}
        for row in group["sites"]:
            own = dict(zip(OWN, [*row, *[None] * (len(OWN) - len(row))], strict=True))
            name = shared["name"].replace("{expert}", str(own["expert"]))
            yield {**shared, "name": name, **own}
