"""What every reader of a compressed-tensors directory demands, before anything is written.

The rules of the file format and of fused layers. Engines load some matrices as one: q/k/v, gate/up,
and all experts of a layer. Those must share one scheme, dense counting as a scheme too; a mix would
be misread silently or fail while loading. The first site that breaks a rule is named.

Left out: what single engines run (`targets`), and tensor parallelism, under which every rule about
divisibility holds per rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bitnest.errors import TargetError
from bitnest.export.inputs import input_group
from bitnest.export.layouts import layout_kind, layout_of, packed_format, packed_layout
from bitnest.formats.inputs import joined_name
from bitnest.kinds import ENDS
from bitnest.manifest import SiteRecord

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)  # matrices that vLLM loads as one


def packed_sites(records: Iterable[SiteRecord]) -> list[SiteRecord]:
    """Sites of the blocks stored as codes; embedding and head are exported dense."""
    return [record for record in records if layout_kind(record) == "packed"]


def decoded_sites(records: Iterable[SiteRecord]) -> list[SiteRecord]:
    """Ends that the artifact holds packed: the export holds them decoded."""
    return [record for record in records if layout_kind(record) == "decoded"]


def check_layout(records: Sequence[SiteRecord]) -> None:
    """Refuse what the files cannot say, whoever reads them. Call before `targets.check_engine`.

    records: every site of the artifact.

    Raises:
        TargetError: the site and the rule it breaks.
    """
    if not packed_sites(records) and not any(r.format == "zero" for r in records):
        raise TargetError(
            "the artifact has no packed weight in its blocks, there is nothing to export",
            hint="the checkpoint it was made from loads as it is",
        )
    for record in records:
        if record.format == "zero":
            packed_layout(record)  # raises, whatever kind it is of
    for record in records:
        if record.file and record.site.kind not in ENDS:
            check_site_storage(record)
    for family in fused_families(r for r in records if r.site.kind != "expert"):
        names = "/".join(record.site.name.rpartition(".")[2] for record in family)
        check_one_scheme(family, f"{names} are loaded as one matrix", f"give {names} one format")
    _check_experts(records)


def fused_families(records: Iterable[SiteRecord]) -> Iterator[list[SiteRecord]]:
    """Matrices that engines load as one, in the order of their rows; experts' too."""
    by_name = {record.site.name: record for record in records}
    for parts in FUSED:
        for name in by_name:
            parent, _, leaf = name.rpartition(".")
            if leaf == parts[0]:
                yield [by_name[n] for p in parts if (n := f"{parent}.{p}") in by_name]


def check_one_scheme(family: Sequence[SiteRecord], rule: str, hint: str) -> None:
    """Refuse a family that is not stored in one way.

    Raises:
        TargetError: the first site that differs. rule: says why it must not.
    """
    for record in family[1:]:
        if layout_of(record) != layout_of(family[0]):
            raise TargetError(
                f"{rule}, but {family[0].site.name} is {_spelt(family[0])} "
                f"and this is {_spelt(record)}",
                where=record.site.name,
                hint=hint,
            )


def _spelt(record: SiteRecord) -> str:
    return joined_name(record.format, record.inputs)


def check_site_storage(record: SiteRecord) -> None:
    """Refuse a site that the files cannot hold as it is.

    Raises:
        TargetError: the rule it breaks.
    """
    site = record.site
    if site.transposed and site.param == "weight":
        raise TargetError(
            "the layer keeps its weight transposed (Conv1D); engines have no packed kernel for it",
            where=site.name,
            hint="bitnest serve runs this artifact",
        )
    fused = site.rows is None and site.param.startswith("gate_up")
    if site.param != "weight" and (site.transposed or fused):
        raise TargetError(
            "the checkpoint keeps all experts in one tensor ("
            + ("transposed" if site.transposed else "gate and up fused")
            + "); engines load such a family by those names, without packed experts",
            where=site.name,
            hint="bitnest serve runs this artifact; or keep the experts dense",
        )
    if record.format != "dense":  # a dense one is a mix: refused with the layer's other experts
        _check_groups(record)


def _check_groups(record: SiteRecord) -> None:
    layout, columns = packed_layout(record), record.site.shape[1]
    width = input_group(layout.inputs) if layout.inputs else None
    if width is not None and columns % width:
        raise TargetError(
            f"{columns} input channels do not divide into groups of {width}, which their inputs "
            f"({record.inputs}) are rounded in",
            where=record.site.name,
            hint=f"give it another format: --rule '{record.site.name}=fp8-channel/fp8-token'",
        )
    if layout.group is None or columns % layout.group == 0:
        return
    if layout.family == "int":
        fits = next((f"g{g}" for g in (128, 64, 32, 16) if columns % g == 0), "channel")
        hint = f"choose a group that divides, for example {fits}"
    else:
        hint = f"give this site a format without groups: --rule '{record.site.name}=fp8-channel'"
    raise TargetError(
        f"{columns} input channels do not divide into groups of {layout.group}; "
        f"{layout.format} has no short last group",
        where=record.site.name,
        hint=hint,
    )


def _check_experts(records: Sequence[SiteRecord]) -> None:
    layers: dict[int, list[SiteRecord]] = {}
    for record in records:
        if record.site.kind == "expert":
            layers.setdefault(record.site.layer, []).append(record)
    for family in layers.values():
        check_one_scheme(
            family,
            "engines load a layer's experts by one scheme",
            "give all experts of a layer one format; layers may differ",
        )


def formats_of(records: Iterable[SiteRecord]) -> dict[str, int]:
    """Formats of the packed sites and their inputs, with counts."""
    counts: dict[str, int] = {}
    for record in packed_sites(records):
        name = joined_name(packed_format(record).name, record.inputs)
        counts[name] = counts.get(name, 0) + 1
    return counts
