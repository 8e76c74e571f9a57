"""Planes of nested formats: which file holds what, and how its parts lie in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from bitnest.errors import ArtifactError
from bitnest.formats import parse_format, refinement
from bitnest.safetensors_io import Entry, TensorInfo

if TYPE_CHECKING:
    from bitnest.manifest import SiteRecord

PLANE = re.compile(r"\.w([1-8])\.safetensors$")


def plane_file(base: str, width: int | None) -> str:
    """File name of what `width` adds to the packed file `base`; None: that file itself."""
    return base if width is None else base.replace(".safetensors", f".w{width}.safetensors")


def plane_width(name: str) -> int | None:
    """The width that a file of planes is for; None for other files."""
    match = PLANE.search(name)
    return int(match[1]) if match else None


def join_streams(entries: Sequence[Entry]) -> list[Entry]:
    """One tensor per type, `planes` of code words and `tables` of the rest, each the values of the
    parts one after another: names and places of thousands of parts would cost more than tables."""
    streams: list[Entry] = []
    for name in ("planes", "tables"):
        own = [item for item in entries if (item.dtype == torch.int32) == (name == "planes")]
        if own:
            count = sum(math.prod(item.shape) for item in own)
            streams.append(Entry(name, own[0].dtype, (count,), partial(_joined, own)))
    return streams


def _joined(entries: Sequence[Entry]) -> torch.Tensor:
    return torch.cat([item.values().flatten() for item in entries])


def split_streams(
    records: Iterable[SiteRecord], width: int, infos: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The places of the parts that `join_streams` joined, by name; records in their order.

    Raises:
        ArtifactError: the streams have other lengths.
    """
    place = {name: info.start for name, info in infos.items()}
    found: dict[str, TensorInfo] = {}
    for record in records:
        fmt = parse_format(record.format)
        for part, spec in fmt.parts(record.site.shape).items():
            if refinement(fmt, part) != width:
                continue
            name = "planes" if spec.dtype == "I32" else "tables"
            start = place[name]
            place[name] = stop = start + spec.nbytes
            found[f"{record.site.name}.{part}"] = TensorInfo(
                infos[name].file, infos[name].dtype, spec.shape, start, stop
            )
    for name, info in infos.items():
        if place[name] != info.stop:
            raise ArtifactError(
                f"'{name}' has {info.nbytes} bytes, its sites have {place[name] - info.start}",
                where=str(info.file),
                hint="copy the artifact again, or compress again",
            )
    return found
