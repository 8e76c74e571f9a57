"""How transformers opens an artifact: `AutoModelForCausalLM.from_pretrained(ARTIFACT)`.

Before weights are loaded, every packed site's module is replaced by an empty packed one;
transformers then loads the dense tensors; afterwards the packed files are read, one tensor at a
time.

Importing bitnest registers the quantizer without importing transformers: if transformers is loaded
later, a hook on its quantizer registry does it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import ArtifactError
from bitnest.formats import AnyFormat
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.inputs import check_static
from bitnest.manifest import SiteRecord
from bitnest.packed.embedding import pack_embedding, share_with_head
from bitnest.packed.modules import PackedWeight, pack_experts, pack_linear
from bitnest.packed.widths import Source, attach, loaded_formats, wanted_widths
from bitnest.resized import config_experts, resize_experts
from bitnest.skeleton import find_blocks

METHOD = "bitnest"


@register_quantization_config(METHOD)
class BitnestConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json.

    format: the default format's name. format_version: of the artifact's layout. kv: format of the
    KV cache that `eval` and `serve` are to use, empty for 16 bits; `generate` uses it when it is
    given one (`packed.kv_cache.open_cache`). What each site really has is in bitnest.json.
    """

    def __init__(self, format: str = "", format_version: int = 1, kv: str = "", **_: Any) -> None:
        self.quant_method = METHOD
        self.format = format
        self.format_version = format_version
        self.kv = kv


@register_quantizer(METHOD)
class BitnestQuantizer(HfQuantizer):
    """Replaces modules before loading, reads the packed files after."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        if not checkpoint_files:
            raise ArtifactError("an artifact is loaded from its directory, not from a state dict")
        self.artifact = Artifact.open(Path(checkpoint_files[0]).parent)
        self.formats = loaded_formats(self.artifact, wanted_widths())
        if entries := config_experts(model.config):
            resize_experts(model, find_blocks(model), entries)
        self.weights = _replace_modules(model, self.artifact, self.formats)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        headers = self.artifact.headers(self.formats)
        for record, weight in self.weights:
            if record.inputs:
                weight.inputs, weight.static = parse_inputs(record.inputs), record.input_scale
                check_static(weight.inputs, weight.static, record.site.name)
            device = _device_of(model, record.site.module)
            weight.load(site_tensors(record, headers, weight.fmt), device)
            if record.site.kind == "embedding":
                like = model.get_submodule(record.site.module)
                like.like = torch.empty(0, dtype=like.like.dtype, device=device)
        for name, parameter in model.named_parameters():
            # transformers before 5.20 leaves renamed tensors of quantised models in the disk type
            if parameter.dtype != self.dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self.dtypes[name])
        attach(model, Source(self.artifact, self.weights))
        del self.weights, self.dtypes, self.formats
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Packed models are saved by copying their artifact."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _replace_modules(
    model: Any, artifact: Artifact, by_site: Mapping[str, AnyFormat]
) -> list[tuple[SiteRecord, PackedWeight]]:
    by_module: dict[str, list[SiteRecord]] = {}
    for record in artifact.packed():
        by_module.setdefault(record.site.module, []).append(record)
    weights: list[tuple[SiteRecord, PackedWeight]] = []
    for name, records in by_module.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ArtifactError(
                f"the model has no module '{name}'",
                where=str(artifact.path),
                hint="the artifact was made with another version of transformers",
            ) from error
        formats = [by_site[record.site.name] for record in records]
        if records[0].site.kind == "embedding":
            packed = [pack_embedding(module, formats[0], records[0].site)]
            share_with_head(model, name, packed[0])
        elif records[0].site.param == "weight":
            parent, _, leaf = name.rpartition(".")
            packed = [pack_linear(model.get_submodule(parent), leaf, formats[0], records[0].site)]
        else:
            sites = [record.site for record in records]
            packed = pack_experts(module, list(zip(sites, formats, strict=True)))
        weights.extend(zip(records, packed, strict=True))
    return weights


def _device_of(model: Any, module: str) -> torch.device:
    placement: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    for prefix in sorted(placement, key=len, reverse=True):
        if prefix in {"", module} or module.startswith(prefix + "."):
            return torch.device(placement[prefix])
    device: torch.device = model.device
    return device
