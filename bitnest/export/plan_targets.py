"""The engines' tables as targets of a plan: what a site may have, what must be equal.

    native        bitnest's own runtime: anything, every site for itself
    vllm-cuda     compressed-tensors as vLLM reads it: q/k/v alike, gate/up alike, all experts of a
    vllm-cpu      layer alike; formats, groups and divisibility by `engines`
    transformers  the same files as transformers reads them: all experts of the model alike
    gguf          llama.cpp's blocks of 32, one type for a layer's stacked gates, ups and downs

Embedding and head stay dense for the compressed-tensors engines. Whether a single site may have a
format is asked of the same checks that an export makes (`rules`, `targets`), so a plan for an
engine is one that its export accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from bitnest.errors import TargetError
from bitnest.export.engines import ENGINES
from bitnest.export.rules import FUSED, check_site_storage
from bitnest.export.targets import check_site
from bitnest.formats import AnyFormat, DenseFormat
from bitnest.formats.inputs import InputFormat
from bitnest.formats.zero import ZeroFormat
from bitnest.kernels.rows import row_decodable
from bitnest.kinds import ENDS
from bitnest.manifest import SiteRecord
from bitnest.reduced import is_ordinary
from bitnest.sites import Site
from bitnest.targets import TARGETS, Target

NATIVE = (
    "int1-g128@had64", "int2-g128@had64", "int3-g128@had64", "int4-g128@had64", "int5-g128@had64",
    "int6-g128@had64", "int8-g128@had64",
)  # fmt: skip
INTEGERS = tuple(f"int{bits}-g128" for bits in (2, 3, 4, 5, 6, 8))
CANDIDATES = {
    "vllm-cuda": (*INTEGERS, "mxfp4", "nvfp4", "fp8_e4m3-channel"),
    "vllm-cpu": ("int4-g128", "int4-g32"),
    "transformers": INTEGERS,
}
GGUF = {
    "int4-g32": "Q4_0", "int4-g32-asym": "Q4_1", "int5-g32": "Q5_0", "int5-g32-asym": "Q5_1",
    "int8-g32": "Q8_0", "mxfp4": "MXFP4",
}  # fmt: skip


def open_target(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, InputFormat] | None = None
) -> Target:
    """The target of that name for a model with that config.json. inputs: what inputs of packed
    matrices are rounded to, by site.

    Raises:
        TargetError: no such target, or none that runs such a model or such inputs.
    """
    rounded = {site: fmt.name for site, fmt in (inputs or {}).items()}
    if name == "native":
        return Target("native", NATIVE, _native_allows)
    if name in {"gguf", *ENGINES} and not is_ordinary(config):
        raise TargetError(
            f"layers with unequal numbers of experts: {name} cannot load that",
            hint="keep as many experts in every layer, or plan for native",
        )
    if name == "gguf" and rounded:
        raise TargetError(
            "llama.cpp rounds inputs by rules of its own, which its files cannot say",
            hint="leave out --inputs, or plan for native",
        )
    if name == "gguf":
        return Target(
            "gguf", tuple(GGUF), _gguf_allows, _stacked,
            ("blocks of 32: " + ", ".join(GGUF.values()), "one type for a layer's stacked experts"),
        )  # fmt: skip
    if name not in ENGINES:
        raise TargetError(f"unknown target '{name}'", hint="one of " + ", ".join(TARGETS))
    engine = ENGINES[name]
    rules = ["q/k/v alike, gate/up alike, the experts of a layer alike"] if engine.fuses else []
    if engine.one_expert_scheme:
        rules = ["all experts of the model alike"]
    return Target(
        name, CANDIDATES[name], _engine_allows(name, config, rounded), _engine_groups(name),
        (*rules, "embedding and head dense"),
    )  # fmt: skip


def _native_allows(site: Site, fmt: AnyFormat) -> str:
    """What the packed modules run: anything, but an embedding looks up single rows."""
    if site.kind == "embedding" and not row_decodable(fmt):
        return f"an embedding looks up single rows, which {fmt.name} cannot decode"
    if site.kind in ENDS and isinstance(fmt, ZeroFormat):
        return "a model without its embedding or head says nothing"
    return ""


def _engine_allows(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> Callable[[Site, AnyFormat], str]:
    @cache
    def allows(site: Site, fmt: AnyFormat) -> str:
        if isinstance(fmt, DenseFormat):
            expert = site.kind == "expert" and ENGINES[name].one_expert_scheme
            return f"{name} cannot load dense experts beside packed weights" if expert else ""
        if site.kind in ENDS:
            return f"{name} keeps embedding and head dense"
        record = SiteRecord(
            site, fmt.name, fmt.nbytes(site.shape), 0.0, None, "packed",
            inputs=inputs.get(site.name, ""),
        )  # fmt: skip
        try:
            check_site_storage(record)
            check_site(name, record, config)
        except TargetError as error:
            return error.what
        return ""

    return allows


def _engine_groups(name: str) -> Callable[[Sequence[Site]], list[list[Site]]]:
    def together(sites: Sequence[Site]) -> list[list[Site]]:
        keys = {site.name: _key(site, ENGINES[name].one_expert_scheme) for site in sites}
        return _grouped(sites, keys)

    return together


def _key(site: Site, one_scheme: bool) -> str:
    if site.kind == "expert":
        return "experts" if one_scheme else f"experts of {site.layer}"
    parent, _, leaf = site.name.rpartition(".")
    for parts in FUSED:
        if leaf in parts:
            return f"{parent}.{'+'.join(parts)}"
    return site.name


def _gguf_allows(site: Site, fmt: AnyFormat) -> str:
    if isinstance(fmt, DenseFormat):
        return ""
    if fmt.name not in GGUF:
        return f"llama.cpp has no type for {fmt.name}"
    return "" if site.shape[1] % 32 == 0 else f"{site.shape[1]} channels are no blocks of 32"


def _stacked(sites: Sequence[Site]) -> list[list[Site]]:
    keys = {
        site.name: f"{site.layer}.{site.name.rpartition('.')[2]}"
        if site.kind == "expert"
        else site.name
        for site in sites
    }
    return _grouped(sites, keys)


def _grouped(sites: Sequence[Site], keys: Mapping[str, str]) -> list[list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(keys[site.name], []).append(site)
    return list(groups.values())
