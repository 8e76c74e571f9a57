"""What one engine can run of an export: the checks against the table in engines.py.

`check_engine` refuses the first site that the engine cannot run, by name, before anything is
written; `engine_notes` asks every engine and turns refusals into notes. The rules of the files
themselves are in `rules`.

An engine that loads matrices as one (`Engine.fuses`) has more to ask of two float families:

    fp8 blocks   the 128 x 128 grid is laid over the fused matrix: each part but the last has
                 128 n rows, and all have 128 n columns
    nvfp4        one global scale per fused matrix. vLLM divides all parts by the largest stored
                 one, so a part of smaller global scale would come out too small by their ratio

Left out: tensor parallelism. Every rule about divisibility then holds per rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitnest.errors import TargetError
from bitnest.export.engines import ENGINES, Engine
from bitnest.export.layouts import BLOCK, Layout, packed_layout, scheme
from bitnest.export.rules import check_one_scheme, fused_families, packed_sites
from bitnest.manifest import SiteRecord


def check_engine(
    name: str,
    records: Sequence[SiteRecord],
    config: Mapping[str, Any],
    global_scales: Mapping[str, float] | None = None,
    dtype: str = "bfloat16",
) -> list[str]:
    """Refuse what engine `name` cannot run; returns what the user should know.

    config: the model's config.json. global_scales: of NVFP4 sites, by name; None leaves that check
    out. dtype: the model's.

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
    for record in experts[:1]:
        _check_top_k(name, record, config)
    if engine.one_expert_scheme:
        _check_all_experts(name, records)
    if engine.fuses:
        _check_fused(name, packed, global_scales or {})
    return _notes(name, engine, packed, experts, dtype)


def check_site(name: str, record: SiteRecord, config: Mapping[str, Any]) -> None:
    """Refuse one packed site that engine `name` cannot run, whatever the others are.

    Raises:
        TargetError: it cannot.
    """
    _check_site(name, ENGINES[name], record)
    if record.site.kind == "expert":
        _check_top_k(name, record, config)


def _check_top_k(name: str, record: SiteRecord, config: Mapping[str, Any]) -> None:
    least, top_k = ENGINES[name].min_top_k, _experts_per_token(config)
    if top_k < least:
        raise TargetError(
            f"{name} runs packed experts from {least} experts per token on, "
            f"this model uses {top_k}",
            where=record.site.name,
            hint="keep the experts dense: --rule 'kind:expert=dense'",
        )


def engine_notes(
    records: Sequence[SiteRecord],
    config: Mapping[str, Any],
    global_scales: Mapping[str, float] | None = None,
    dtype: str = "bfloat16",
) -> list[str]:
    """What each engine would say to these sites: refusals and notes, for a person to read."""
    notes: list[str] = []
    for name in ENGINES:
        try:
            notes.extend(check_engine(name, records, config, global_scales, dtype))
        except TargetError as error:
            notes.append(f"not for {name}: {error.what} ({error.where})")
    return notes


def _notes(
    name: str,
    engine: Engine,
    packed: Sequence[SiteRecord],
    experts: Sequence[SiteRecord],
    dtype: str,
) -> list[str]:
    layouts = {packed_layout(record) for record in packed}
    families = {layout.family for layout in layouts}
    of_experts = {packed_layout(record).family for record in experts}
    said = [engine.note]
    said += [engine.expert_note] if of_experts & {"int", "int8"} else []
    said += [engine.float_note] if any(not (lay.integer or lay.inputs) for lay in layouts) else []
    said += [engine.input_note] if any(layout.inputs for layout in layouts) else []
    fp8_experts = of_experts & {"fp8", "fp8-block"} and not packed_layout(experts[0]).inputs
    said += [engine.fp8_expert_note] if fp8_experts else []
    said += [_requantised(name, packed)] if engine.fuses else []
    extra = {scheme(layout) for layout in layouts} & {*engine.extra_inputs}
    said += [f"{name} runs {p} only with the package {engine.extra}" for p in sorted(extra)]
    widths = {layout.bits for layout in layouts if layout.family == "int"} & {*engine.extra_bits}
    if widths:
        said.append(f"{name} runs {_widths(widths)} only with the package {engine.extra}")
    if dtype != "bfloat16" and (decoded := families & {*engine.to_bfloat16}):
        said.append(
            f"{name} decodes {', '.join(sorted(decoded))} to bfloat16: "
            f"load this {dtype} model with dtype=torch.bfloat16"
        )
    return [note for note in said if note]


def _requantised(name: str, packed: Sequence[SiteRecord]) -> str:
    """What is to be said of FP8 matrices with a scale each that become one."""
    for family in fused_families(packed):
        layout = packed_layout(family[0])
        if layout.family == "fp8" and layout.strategy == "tensor" and len(family) > 1:
            leaves = "/".join(record.site.name.rpartition(".")[2] for record in family)
            return (
                f"{name} rounds {leaves} anew, to the largest of their scales; "
                "fp8_e4m3-channel keeps the weights as they are"
            )
    return ""


def _check_all_experts(name: str, records: Sequence[SiteRecord]) -> None:
    family = [r for r in records if r.site.kind == "expert" and r.site.param != "weight"]
    rule = f"{name} decodes every layer's experts by one scheme"
    check_one_scheme(family, rule, "give all experts one format")
    if family and family[0].format == "dense":
        raise TargetError(
            f"{name} cannot load dense experts in a model that has packed weights",
            where=family[0].site.name,
            hint="give the experts a packed format",
        )


def _check_fused(
    name: str, packed: Sequence[SiteRecord], global_scales: Mapping[str, float]
) -> None:
    for family in fused_families(packed):
        leaves = "/".join(record.site.name.rpartition(".")[2] for record in family)
        if packed_layout(family[0]).family == "fp8-block":
            for record in family[:-1]:
                if (rows := record.site.shape[0]) % BLOCK:
                    raise TargetError(
                        f"{name} lays one grid of {BLOCK} x {BLOCK} blocks over {leaves}; "
                        f"{rows} rows end within a block",
                        where=record.site.name,
                        hint=f"give {leaves} the format fp8-channel",
                    )
        found = {
            global_scales[r.site.name]: r.site.name for r in family if r.site.name in global_scales
        }
        if len(found) > 1:
            raise TargetError(
                f"{name} decodes {leaves} by the largest of their NVFP4 global scales; they "
                f"differ, and weights would be read up to {max(found) / min(found):.2f} times "
                "too small",
                where=found[min(found)],
                hint=f"compress {leaves} with one global scale, or give them another format "
                "such as mxfp4",
            )


def _check_site(name: str, engine: Engine, record: SiteRecord) -> None:
    layout = packed_layout(record)
    if broken := _input_limits(engine, layout, record):
        raise TargetError(
            f"{name} {broken}",
            where=record.site.name,
            hint="compress for another engine's rules, leave these inputs alone "
            f"(--rule '{record.site.name}={record.format}/dense'), or use bitnest serve",
        )
    if layout.family == "int8":
        broken = ""
    elif layout.family == "int":
        broken = _int_limits(engine, layout, record)
    else:
        broken = _float_limits(engine, layout, record)
    if broken:
        raise TargetError(
            f"{name} {broken}",
            where=record.site.name,
            hint="compress for another engine's rules, keep this site dense "
            f"(--rule '{record.site.name}=dense'), or use bitnest serve",
        )


def _input_limits(engine: Engine, layout: Layout, record: SiteRecord) -> str:
    expert = record.site.kind == "expert"
    runs = engine.expert_inputs if expert else (*engine.inputs, *engine.extra_inputs)
    if not layout.inputs or scheme(layout) in runs:
        return ""
    return (
        f"does not run {record.format} {'experts' if expert else 'weights'} with inputs rounded to "
        f"{record.inputs}"
    )


def _float_limits(engine: Engine, layout: Layout, record: SiteRecord) -> str:
    expert = record.site.kind == "expert"
    runs = engine.expert_floats if expert else engine.floats
    if not layout.inputs and layout.family not in runs:
        return f"does not run {layout.family} {'experts' if expert else 'weights'}"
    if engine.fuses and layout.family == "fp8-block" and record.site.shape[1] % BLOCK:
        return f"runs blocks over multiples of {BLOCK} input channels, not {record.site.shape[1]}"
    return ""


def _int_limits(engine: Engine, layout: Layout, record: SiteRecord) -> str:
    site, bits = record.site, layout.bits
    expert = site.kind == "expert"
    runs = (*(engine.expert_bits if expert else engine.bits), *engine.extra_bits)
    broken = ""
    if bits not in runs:
        broken = f"runs {_widths(runs)} {'experts' if expert else 'weights'}, not {bits}-bit"
    elif expert and not engine.expert_channel and layout.group is None:
        broken = "runs experts with groups only, not with one scale per row"
    elif expert and not engine.expert_asymmetric and not layout.symmetric:
        broken = "runs symmetric experts only"
    elif bits in engine.bits:
        broken = _kernel_limits(engine, layout)
    if not broken and not expert and any(size % engine.multiple for size in site.shape):
        broken = f"runs matrices whose sides divide by {engine.multiple}, not {site.shape}"
    if not broken and engine.whole_words:
        broken = _partial_word(layout, site.shape, expert)
    return broken


def _kernel_limits(engine: Engine, layout: Layout) -> str:
    if not layout.symmetric and not engine.asymmetric_bits:
        return "cannot load packed zero points"
    if not layout.symmetric and layout.bits not in engine.asymmetric_bits:
        widths = _widths(engine.asymmetric_bits)
        return f"runs zero points at {widths} only, not at {layout.bits}-bit"
    if engine.groups and layout.group not in engine.groups:
        sizes = ", ".join("channel" if g is None else str(g) for g in engine.groups)
        return f"runs {layout.bits}-bit groups of {sizes}, not {layout.group}"
    return ""


def _partial_word(layout: Layout, shape: tuple[int, int], expert: bool) -> str:
    rows, columns = shape
    if expert and columns * layout.bits % 32:
        return f"needs an expert's packed rows to fill 32-bit words; {columns} codes do not"
    if not layout.symmetric and rows * layout.bits % 32:
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
