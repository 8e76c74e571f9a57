"""The `quantization_config` of an export: which module is read by which scheme.

    one scheme      config_groups: {group_0: {targets: ["Linear"], ...}}, the rest under `ignore`
    several         one group per scheme, its modules named by anchored regular expressions, as
                    re:(.*\\.)?layers\\.(0|3)\\.self_attn\\.q_proj$

Every group names its file format. The top level repeats it, or says `mixed-precision` where groups
differ.

A pattern folds the numbers of layers and experts. It starts at the list of layers, because some
engines put the model under another prefix. That its own group alone matches a packed matrix, and
none a dense one, is checked by enumeration.

Engines look up a layer's experts by the name of expert 0, so patterns say any expert number: the
layer's experts share one scheme, as `rules.check_layout` made sure.

Matrices whose inputs are not rounded have a group without `input_activations`, whatever the others
have.

Left out: rounded outputs; for the KV cache see `kv_scales.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from bitnest.errors import TargetError
from bitnest.export.layouts import MIXED, Layout, layout_of, packed_layout
from bitnest.export.rules import packed_sites
from bitnest.manifest import SiteRecord

LAYOUT_VERSION = "0.19.0"  # of compressed-tensors, whose files these are byte for byte
HEAD = "lm_head"  # exists in the model even if tied and so not in the checkpoint


def quantization_config(records: Sequence[SiteRecord], dense: Iterable[str]) -> dict[str, Any]:
    """The config of these sites.

    records: every site of the decoder blocks. dense: names of further linear modules, which stay
    dense (heads, other towers).

    Raises:
        TargetError: module names that patterns cannot tell apart.
    """
    packed = packed_sites(records)
    names = {record.site.name for record in packed}
    rest = [record for record in records if record.site.name not in names]
    outside = sorted({HEAD, *dense} - {record.site.name for record in records})
    layouts = _layouts(packed)
    groups: dict[str, Any] = {}
    for number, layout in enumerate(layouts):
        own = [record for record in packed if packed_layout(record) == layout]
        targets = ["Linear"] if len(layouts) == 1 else _patterns(own, records)
        groups[f"group_{number}"] = _group(layout, targets)
    formats = {layout.format for layout in layouts}
    ignore = [*_ignored(rest, records), *outside]
    config = {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    _check_exact(config, records, outside)
    return config


def scheme_of(config: dict[str, Any], name: str) -> str | None:
    """The group of `quantization_config` that reads linear `name`, None if it is dense.

    Raises:
        TargetError: several groups claim it.
    """
    if any(_matches(name, pattern) for pattern in config["ignore"]):
        return None
    found = [
        group
        for group, scheme in config["config_groups"].items()
        if any(target == "Linear" or _matches(name, target) for target in scheme["targets"])
    ]
    if len(found) > 1:
        raise TargetError(f"module names cannot be told apart: {found} all match", where=name)
    return found[0] if found else None


def _layouts(packed: Sequence[SiteRecord]) -> list[Layout]:
    """The schemes in use, those of experts first, then in the order of the formats' names.

    transformers reads experts by the first group whose patterns contain "experts", which those of
    `shared_experts` do too.
    """
    ordered = sorted(packed, key=lambda r: (r.site.kind != "expert", r.format, r.inputs))
    return list(dict.fromkeys(packed_layout(record) for record in ordered))


def _group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": layout.format,
        "input_activations": layout.input_arguments,
        "output_activations": None,
        "weights": layout.arguments,
    }


def _ignored(rest: Sequence[SiteRecord], records: Sequence[SiteRecord]) -> list[str]:
    """Dense sites by name, dense experts folded; routers also by the name the model gives them."""
    experts = [record for record in rest if record.site.kind == "expert"]
    single = [record.site for record in rest if record.site.kind != "expert"]
    names = dict.fromkeys(name for site in single for name in (site.name, site.module))
    return [*names, *_patterns(experts, records)]


def _patterns(own: Sequence[SiteRecord], records: Sequence[SiteRecord]) -> list[str]:
    """Regular expressions that match the names of `own` and of no other of `records`."""
    everywhere: dict[tuple[str, str], set[int]] = {}
    for record in records:
        everywhere.setdefault(_template(record), set()).add(record.site.layer)
    here: dict[tuple[str, str], set[int]] = {}
    for record in own:
        here.setdefault(_template(record), set()).add(record.site.layer)
    patterns = []
    for (head, tail), layers in here.items():
        if layers == everywhere[head, tail]:
            number = r"\d+"
        else:
            number = "(" + "|".join(str(layer) for layer in sorted(layers)) + ")"
        patterns.append(rf"re:(.*\.)?{head}\.{number}\.{tail}$" if head else f"re:{tail}$")
    return patterns


def _template(record: SiteRecord) -> tuple[str, str]:
    """The name as patterns around the layer's number: the list's own name, the rest of the path."""
    before, number, after = record.site.name.partition(f".{record.site.layer}.")
    if not number:
        return "", re.escape(record.site.name)
    tail = re.escape(after)
    if record.site.expert is not None:
        tail = re.sub(rf"(^|\.){record.site.expert}\\\.", r"\1\\d+\\.", tail, count=1)
    return re.escape(before.rpartition(".")[2]), tail


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern


def _check_exact(
    config: dict[str, Any], records: Sequence[SiteRecord], outside: Sequence[str]
) -> None:
    expected: dict[str, str | None] = dict.fromkeys(outside)
    layouts = _layouts(packed_sites(records))
    for record in records:
        layout = layout_of(record)
        group = None if layout is None else f"group_{layouts.index(layout)}"
        expected[record.site.name] = group
    for name, group in expected.items():
        found = scheme_of(config, name)
        if found != group:
            raise TargetError(
                f"module names cannot be told apart: {found} matches what {group} should",
                where=name,
                hint="give all weights one format",
            )
