"""Static scales of inputs as engines want them, and artifacts without their rounded inputs.

An engine has one scale for what it loads as one: q/k/v, gate/up, and in a layer's experts all gates
with all ups, and all downs. vLLM 0.32 takes the largest of FP8 scales, and of int8 scales the one
it loads last. So the largest is written for all of them: no number is clipped that was not.
Matrices that read the same tokens in one format have equal scales to begin with; experts, which see
tokens of their own, do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bitnest.errors import ArtifactError
from bitnest.export.inputs import GLOBAL_SCALE
from bitnest.export.layouts import layout_kind, packed_layout
from bitnest.export.rules import FUSED, fused_families, packed_sites
from bitnest.manifest import SiteRecord


def without_inputs(records: Sequence[SiteRecord]) -> tuple[tuple[SiteRecord, ...], list[str]]:
    """The records as weights alone, and what to say of it."""
    rounded = [record for record in records if record.inputs]
    if not rounded:
        return tuple(records), []
    names = ", ".join(sorted({record.inputs for record in rounded}))
    found = tuple(replace(record, inputs="", input_scale=None) for record in records)
    return found, [
        f"weights only, as asked for: inputs of {len(rounded)} matrices are rounded in the "
        f"artifact ({names}) and 16-bit here"
    ]


def shared_scales(records: Sequence[SiteRecord]) -> tuple[tuple[SiteRecord, ...], list[str]]:
    """The records with one static scale in what is loaded as one, and what to say of it.

    Raises:
        ArtifactError: an input that has a static scale, and no usable one is recorded.
        TargetError: a format that the files cannot hold.
    """
    notes, largest = _ends(records), dict[str, float]()
    for family in _families([r for r in packed_sites(records) if packed_layout(r).input_tensor]):
        scales = {record.site.name: _scale(record) for record in family}
        peak, least = max(scales.values()), min(scales.values())
        largest |= dict.fromkeys(scales, peak)
        if peak != least:
            notes.append(
                f"static scales of inputs differ by {peak / least:.3g} times in what engines load "
                f"as one ({', '.join(list(scales)[:3])}{', ...' if len(scales) > 3 else ''}): "
                "the largest is written for all"
            )
    return tuple(
        replace(r, input_scale=largest[r.site.name]) if r.site.name in largest else r
        for r in records
    ), _folded(notes)


def stored_scale(record: SiteRecord) -> float:
    """The number in its tensor: NVFP4's is what scales are divided by."""
    assert record.input_scale is not None
    reciprocal = packed_layout(record).input_tensor == GLOBAL_SCALE
    return 1.0 / record.input_scale if reciprocal else record.input_scale


def _scale(record: SiteRecord) -> float:
    scale = record.input_scale
    if scale is None or not 0 < scale < float("inf"):
        raise ArtifactError(
            f"inputs '{record.inputs}' have a static scale, and the manifest has {scale}",
            where=record.site.name,
            hint="compress again",
        )
    return scale


def _families(records: Sequence[SiteRecord]) -> Iterator[list[SiteRecord]]:
    """Matrices under one scale; every record is in one of them."""
    single = [record for record in records if record.site.kind != "expert"]
    fused = list(fused_families(single))
    yield from fused
    seen = {record.site.name for family in fused for record in family}
    yield from ([record] for record in single if record.site.name not in seen)
    experts: dict[tuple[int, str], list[SiteRecord]] = {}
    for record in records:
        if record.site.kind == "expert":
            leaf = record.site.name.rpartition(".")[2]
            part = next((parts[0] for parts in FUSED if leaf in parts), leaf)
            experts.setdefault((record.site.layer, part), []).append(record)
    yield from experts.values()


def _ends(records: Sequence[SiteRecord]) -> list[str]:
    """Of ends, which engines read dense."""
    return [
        f"{record.site.name} reads rounded inputs ({record.inputs}) in the artifact and 16-bit "
        "ones here: engines read it dense"
        for record in records
        if record.inputs and layout_kind(record) == "decoded"
    ]


def _folded(notes: list[str]) -> list[str]:
    """The first few of them, and how many more there are."""
    most = 3
    more = [f"and {len(notes) - most} more of this kind"] if len(notes) > most else []
    return notes[:most] + more
