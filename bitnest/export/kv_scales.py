"""The KV cache of an export: 8-bit floats with one scale for a layer's keys and one for its values.

    quantization_config.kv_cache_scheme     {num_bits: 8, type: float, strategy: tensor, ...}
    <attention>.k_scale, <attention>.v_scale   float32 (1,): a stored byte times it is the value

as vLLM reads them (0.32.0: model_executor/model_loader/weight_utils.py). Its cache is E4M3 then,
unless --kv-cache-dtype says otherwise. Integers, E5M2 and 16-bit windows have no such scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bitnest.errors import TargetError
from bitnest.formats.kv import KVFormat
from bitnest.manifest import SiteRecord
from bitnest.packed.kv_cache import Scales
from bitnest.safetensors_io import Entry

ENGINE_KV = "fp8_e4m3"
CPU_HEADS = 32  # vLLM's CPU attention in 8-bit floats: head size a multiple of it
SCHEME: dict[str, Any] = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
    "observer": "minmax",
}  # fmt: skip


def engine_reads(kv: KVFormat, config: Mapping[str, Any], engine: str | None) -> str | None:
    """Why `engine` (None: any) has no such cache, None if it has. config: of config.json."""
    if kv.name != ENGINE_KV:
        return f"engines have no KV cache {kv.name}, only {ENGINE_KV}"
    if engine == "transformers":
        return "transformers reads no KV cache scheme"
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    if width is None and heads and config.get("hidden_size"):
        width = config["hidden_size"] // heads
    if engine == "vllm-cpu" and width and width % CPU_HEADS:
        return f"vLLM on a CPU wants heads of a multiple of {CPU_HEADS}, not {width}"
    return None


def scale_entries(scales: Scales, records: Sequence[SiteRecord]) -> list[Entry]:
    """The tensors, in layer order.

    Raises:
        TargetError: the attention module of a layer with scales is not to be told by name.
    """
    modules: dict[int, set[str]] = {}
    for record in records:
        if record.site.kind == "attention":
            own = modules.setdefault(record.site.layer, set())
            own.add(record.site.name.rpartition(".")[0])
    entries = []
    for layer, pair in sorted(scales.items()):
        found = modules.get(layer, set())
        if len(found) != 1:
            raise TargetError(
                f"layer {layer} has {len(found)} attention modules by name: nowhere to put scales",
                where="--kv",
                hint="--kv none",
            )
        (module,) = found
        for part, value in zip(("k_scale", "v_scale"), pair, strict=True):
            name = f"{module}.{part}"
            entries.append(Entry(name, torch.float32, (1,), lambda v=value: torch.tensor([v])))  # type: ignore[misc]
    return entries
