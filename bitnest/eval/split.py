"""Whose error it is: weights alone, inputs alone, the KV cache alone, all together.

    weights   the artifact with inputs and cache left alone
    inputs    the base, its matrices reading what the artifact's read: rounded, in their basis
    kv        the base through the artifact's KV cache

Each is compared with the base, so the parts add up to the whole as far as errors are small and
independent of each other. The base must be the plain checkpoint that the artifact was made from.
Of a folded artifact (`folds.py`) there is no row for inputs: its matrices read smoothed or rotated
ones, which the base does not have; what inputs lose is what all lose beyond weights alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnest.artifact import Artifact, is_artifact, site_tensors
from bitnest.errors import BitnestError, UnsupportedModel
from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.formats.kv import KVFormat
from bitnest.packed.rounding import Rounder, each_input, rounding

OPTION = "--split"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A part of a model's error. said: what a row's name says. inputs: whether inputs are rounded.
    kv: its cache."""

    said: str
    inputs: bool
    kv: KVFormat | None


def base_parts(path: Path, caches: Sequence[KVFormat | None]) -> list[Part]:
    """Parts that are measured on the base. caches: formats the artifact in `path` is measured
    with."""
    inputs = rounds_inputs(path) and not is_folded(path)
    found = [Part("inputs alone", True, None)] if inputs else []
    return found + [Part(f"kv {kv.name} alone", False, kv) for kv in caches if kv is not None]


def has_parts(path: Path, caches: Sequence[KVFormat | None]) -> bool:
    """Whether more than its weights lose something."""
    return rounds_inputs(path) or any(caches)


def rounds_inputs(path: Path) -> bool:
    """Whether it is an artifact that does."""
    return is_artifact(path) and any(record.inputs for record in Artifact.open(path).records)


def is_folded(path: Path) -> bool:
    """Whether the artifact's matrices read something else than the checkpoint's."""
    return "folded" in Artifact.open(path).manifest["source"]


def check_split(base: Path | None, paths: Sequence[Path], caches: Sequence[Sequence[Any]]) -> None:
    """Refuse what has no parts.

    Raises:
        BitnestError: no base, one that is an artifact, or no model with more than one part.
        UnsupportedModel: an artifact without some of the base's experts.
    """
    if base is None or is_artifact(base):
        raise BitnestError(
            f"{OPTION} measures parts of the error on the model that was compressed",
            where="" if base is None else str(base),
            hint="--against the original checkpoint",
        )
    if not any(has_parts(path, own) for path, own in zip(paths, caches, strict=True)):
        raise BitnestError(
            "neither inputs nor a KV cache are rounded: all of the error is the weights'",
            where=str(paths[0]),
            hint=f"leave out {OPTION}; compress --inputs and --kv round more than weights",
        )
    for path in paths:
        if rounds_inputs(path) and is_folded(path):
            log.warning("%s is folded: what it rounds is not in the base, so there is no row for "
                        "its inputs alone", path)  # fmt: skip
        if is_artifact(path) and "reduced" in Artifact.open(path).manifest["source"]:
            raise UnsupportedModel(
                "experts or blocks are gone in it: its inputs are not the base's",
                where=str(path),
                hint=f"leave out {OPTION}",
            )


@contextmanager
def rounded_inputs(base: Any, path: Path) -> Iterator[None]:
    """Run the base with its inputs rounded as those of the artifact in `path` are.

    Raises:
        UnsupportedModel: modules that the base does not have.
    """
    artifact = Artifact.open(path)
    headers = artifact.headers()
    records = [record for record in artifact.packed() if record.inputs]
    rounders = {}
    for record in records:
        fmt = parse_format(record.format)
        only: set[str] = {
            part for part in ("channels", "order") if part in fmt.parts(record.site.shape)
        }
        tensors = {
            name: tensor.to(base.device)
            for name, tensor in site_tensors(record, headers, fmt, only).items()
        }
        rounders[record.site.name] = Rounder(
            parse_inputs(record.inputs), fmt, tensors, record.input_scale
        )
    modules = dict(base.named_modules())
    lost = [record.site.module for record in records if record.site.module not in modules]
    if lost:
        raise UnsupportedModel(
            f"the base has no module '{lost[0]}'",
            where=str(path),
            hint="--against the checkpoint that it was made from",
        )
    with each_input(modules, [record.site for record in records], rounding(rounders)):
        yield
