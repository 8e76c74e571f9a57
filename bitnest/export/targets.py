"""What engines can load of a pack-quantized model: the checks, all before anything is written.

`check_layout` holds the rules of the file format and of fused layers, true for every engine;
`check_engine` holds one engine's, from the table in engines.py. Both refuse the first site that
breaks a rule, by name.

Engines load some matrices as one: q/k/v, gate/up, and all experts of a layer. Those must share one
scheme, dense counting as a scheme too; a mix would be misread silently or fail while loading.

Left out: tensor parallelism. Every rule about divisibility then holds per rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitnest.artifact import SiteRecord
from bitnest.errors import TargetError
from bitnest.export.engines import ENGINES, FUSED, Engine
from bitnest.formats import IntFormat, parse_format


def check_layout(records: Sequence[SiteRecord]) -> None:
    """Refuse what pack-quantized cannot say, whoever reads it. Call before `check_engine`.

    records: every site of the artifact.

    Raises:
        TargetError: the site and the rule it breaks.
    """
    if not packed_sites(records):
        raise TargetError(
            "the artifact has no packed weight, there is nothing to export",
            hint="the checkpoint it was made from loads as it is",
        )
    for record in records:
        if record.file:
            _check_storage(record)
    _check_fused(records)
    _check_experts(records)


def check_engine(name: str, records: Sequence[SiteRecord], config: Mapping[str, Any]) -> list[str]:
    """Refuse what engine `name` cannot run; returns what the user should know.

    config: the model's config.json.

    Raises:
        TargetError: an unknown engine, or the first site it cannot run.
    """
    if name not in ENGINES:
        raise TargetError(f"unknown engine '{name}'", hint="one of " + ", ".join(ENGINES))
    engine = ENGINES[name]
    packed = packed_sites(records)
    for record in packed:
        _check_site(name, engine, record)
    experts = [record for record in packed if record.site.kind == "expert"]
    top_k = _experts_per_token(config)
    if experts and top_k < engine.min_top_k:
        raise TargetError(
            f"{name} runs packed experts from {engine.min_top_k} experts per token on, "
            f"this model uses {top_k}",
            where=experts[0].site.name,
            hint="keep the experts dense: --rule 'kind:expert=dense'",
        )
    if engine.one_expert_scheme:
        _check_all_experts(name, records)
    notes = [note for note in (engine.note, engine.expert_note if experts else "") if note]
    widths = sorted({int_format(r).bits for r in packed} & set(engine.extra_bits))
    if widths:
        notes.append(f"{name} runs {_widths(widths)} only with the package {engine.extra}")
    return notes


def engine_notes(records: Sequence[SiteRecord], config: Mapping[str, Any]) -> list[str]:
    """What each engine would say to these sites: refusals and notes, for a person to read."""
    notes: list[str] = []
    for name in ENGINES:
        try:
            notes.extend(check_engine(name, records, config))
        except TargetError as error:
            notes.append(f"not for {name}: {error.what} ({error.where})")
    return notes


def packed_sites(records: Iterable[SiteRecord]) -> list[SiteRecord]:
    """Sites stored in packed files with integer codes."""
    return [record for record in records if record.file and record.format != "dense"]


def int_format(record: SiteRecord) -> IntFormat:
    """The integer format of a packed site.

    Raises:
        TargetError: it is of a family that pack-quantized does not hold.
    """
    fmt = parse_format(record.format)
    if not isinstance(fmt, IntFormat):
        raise TargetError(
            f"format '{record.format}' is not one of plain integers, which pack-quantized holds",
            where=record.site.name,
            hint="compress with an int format, for example --format int4-g128",
        )
    return fmt


def _check_storage(record: SiteRecord) -> None:
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
    if record.format == "dense":
        return  # a mix within its layer: refused with the layer's other experts
    fmt, columns = int_format(record), site.shape[1]
    if columns % fmt.group_size(columns):
        raise TargetError(
            f"{columns} input channels do not divide into groups of {fmt.group}; "
            "pack-quantized has no short last group",
            where=site.name,
            hint="choose a group that divides, for example "
            + next((f"g{g}" for g in (128, 64, 32, 16) if columns % g == 0), "channel"),
        )


def _check_fused(records: Sequence[SiteRecord]) -> None:
    by_name = {record.site.name: record for record in records if record.site.kind != "expert"}
    for parts in FUSED:
        for name in by_name:
            parent, _, leaf = name.rpartition(".")
            if leaf != parts[0]:
                continue
            family = [by_name[n] for p in parts if (n := f"{parent}.{p}") in by_name]
            names = "/".join(parts)
            _check_one_scheme(
                family, f"{names} are loaded as one matrix", f"give {names} one format"
            )


def _check_experts(records: Sequence[SiteRecord]) -> None:
    layers: dict[int, list[SiteRecord]] = {}
    for record in records:
        if record.site.kind == "expert":
            layers.setdefault(record.site.layer, []).append(record)
    for family in layers.values():
        _check_one_scheme(
            family,
            "engines load a layer's experts by one scheme",
            "give all experts of a layer one format; layers may differ",
        )


def _check_all_experts(name: str, records: Sequence[SiteRecord]) -> None:
    family = [r for r in records if r.site.kind == "expert" and r.site.param != "weight"]
    rule = f"{name} decodes every layer's experts by one scheme"
    _check_one_scheme(family, rule, "give all experts one format")
    if family and family[0].format == "dense":
        raise TargetError(
            f"{name} cannot load dense experts in a model that has packed weights",
            where=family[0].site.name,
            hint="give the experts a packed format",
        )


def _check_one_scheme(family: Sequence[SiteRecord], rule: str, hint: str) -> None:
    for record in family[1:]:
        if record.format != family[0].format:
            raise TargetError(
                f"{rule}, but {family[0].site.name} is {family[0].format} "
                f"and this is {record.format}",
                where=record.site.name,
                hint=hint,
            )


def _check_site(name: str, engine: Engine, record: SiteRecord) -> None:
    fmt, site = int_format(record), record.site
    expert = site.kind == "expert"
    runs = (*(engine.expert_bits if expert else engine.bits), *engine.extra_bits)
    broken = ""
    if fmt.bits not in runs:
        broken = f"runs {_widths(runs)} {'experts' if expert else 'weights'}, not {fmt.bits}-bit"
    elif expert and not engine.expert_channel and fmt.group is None:
        broken = "runs experts with groups only, not with one scale per row"
    elif expert and not engine.expert_asymmetric and not fmt.symmetric:
        broken = "runs symmetric experts only"
    elif fmt.bits in engine.bits:
        broken = _kernel_limits(engine, fmt)
    if not broken and not expert and any(size % engine.multiple for size in site.shape):
        broken = f"runs matrices whose sides divide by {engine.multiple}, not {site.shape}"
    if not broken and engine.whole_words:
        broken = _partial_word(fmt, site.shape, expert)
    if broken:
        raise TargetError(
            f"{name} {broken}",
            where=site.name,
            hint="compress for another engine's rules, keep this site dense "
            f"(--rule '{site.name}=dense'), or use bitnest serve",
        )


def _kernel_limits(engine: Engine, fmt: IntFormat) -> str:
    if not fmt.symmetric and not engine.asymmetric_bits:
        return "cannot load packed zero points"
    if not fmt.symmetric and fmt.bits not in engine.asymmetric_bits:
        return f"runs zero points at {_widths(engine.asymmetric_bits)} only, not at {fmt.bits}-bit"
    if engine.groups and fmt.group not in engine.groups:
        sizes = ", ".join("channel" if g is None else str(g) for g in engine.groups)
        return f"runs {fmt.bits}-bit groups of {sizes}, not {fmt.group}"
    return ""


def _partial_word(fmt: IntFormat, shape: tuple[int, int], expert: bool) -> str:
    rows, columns = shape
    if expert and columns * fmt.bits % 32:
        return f"needs an expert's packed rows to fill 32-bit words; {columns} codes do not"
    if not fmt.symmetric and rows * fmt.bits % 32:
        return f"needs packed zero points to fill 32-bit words; {rows} rows do not"
    return ""


def _widths(bits: Iterable[int]) -> str:
    return "/".join(str(b) for b in sorted(bits)) + "-bit"


def _experts_per_token(config: Mapping[str, Any]) -> int:
    inner = config.get("text_config") or config
    for key in (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
    ):
        if isinstance(inner.get(key), int):
            return int(inner[key])
    return 2  # not stated: nothing to refuse by
