"""Proof of an export: every weight is decoded from the written files by other code and compared.

With compressed-tensors installed, its own `decompress` reads the tensors and its own matching finds
their scheme, as transformers would. Without it, `numpy_decoder` does, written from the description
of the layout alone. Either is compared bit for bit with the artifact's weights in the model dtype.

    one rule   compressed-tensors decodes mxfp4, mxfp8 and nvfp4 to bfloat16, whatever the model's
               dtype. It rounds once, from exact or float32 products, so it is compared with the
               artifact's decode to bfloat16

Floats are compared as stored too, by the numpy decoder in any case: the value of every code, every
scale in float32, every NVFP4 global scale. Of rounded inputs, the arguments in the config and the
static scales are held against the artifact's. Tensors are read by the safetensors library, one
weight at a time.

Left out: running the model; `benchmarks/vllm_agreement.py` does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import ArtifactError
from bitnest.export.input_scales import stored_scale
from bitnest.export.layouts import packed_format, packed_layout
from bitnest.export.numpy_decoder import State, decode, read_stored
from bitnest.export.rules import packed_sites
from bitnest.export.schemes import scheme_of
from bitnest.kernels.decode import code_values
from bitnest.kernels.decode import decode as decode_artifact
from bitnest.kernels.scales import unpack_scales
from bitnest.manifest import SiteRecord

Decoder = Callable[[str, State], torch.Tensor]
BFLOAT16_ONLY = ("mxfp4", "mxfp8", "nvfp4")  # families the package decodes to that type


def verify_export(
    artifact: Artifact, export: Path, dtype: torch.dtype, *, package: bool | None = None
) -> tuple[int, str]:
    """Compare every packed weight of `export` with `artifact`'s; how many, and what decoded them.

    dtype: the model's. package: decode by compressed-tensors (True), by numpy (False), by the
    former if it is installed (None).

    Raises:
        ArtifactError: the first weight that is missing or differs.
    """
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    if package is None:
        package = find_spec("compressed_tensors") is not None
    quantization = config["quantization_config"]
    decoder = _package_decoder(quantization) if package else _numpy_decoder(quantization, dtype)
    index = json.loads((export / "model.safetensors.index.json").read_text(encoding="utf-8"))
    headers = artifact.headers()
    count = 0
    for record in packed_sites(artifact.records):
        name, family = record.site.name, packed_layout(record).family
        state = _read_parts(export, index["weight_map"], record)
        tensors = site_tensors(record, headers)
        kind = torch.bfloat16 if package and family in BFLOAT16_ONLY else dtype
        expected = decode_artifact(tensors, packed_format(record), record.site.shape, kind)
        same = _same_bits(decoder(name, state), expected)
        if not packed_layout(record).integer:
            same = same and _same_stored(record, tensors, state, quantization)
        if not same:
            raise ArtifactError(
                "the exported weight does not decode to the artifact's",
                where=f"{name} in {export}",
                hint="this is a bug in the exporter or a damaged disk; the export was removed",
            )
        _check_inputs(record, state, quantization, export)
        count += 1
    how = "compressed-tensors " + metadata.version("compressed-tensors") if package else "numpy"
    return count, how


def _read_parts(export: Path, weight_map: dict[str, str], record: SiteRecord) -> State:
    name, state = record.site.name, {}
    for part in packed_layout(record).parts:
        key = f"{name}.{part}"
        if key not in weight_map:
            raise ArtifactError(f"the export lacks '{part}'", where=f"{name} in {export}")
        with safe_open(export / weight_map[key], framework="pt") as file:
            state[part] = file.get_tensor(key)
    return state


def _package_decoder(config: dict[str, Any]) -> Decoder:
    """compressed-tensors' reading of the files: its config classes, its matching, its decoding."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    parsed = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1, device="meta")

    def decode(name: str, state: State) -> torch.Tensor:
        for scheme in parsed.config_groups.values():
            if is_match(name, linear, scheme.targets, parsed.ignore):
                compressor = BaseCompressor.get_value_from_registry(scheme.format or parsed.format)
                weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
                return weight
        raise ArtifactError("compressed-tensors finds no scheme for a weight", where=name)

    return decode


def _numpy_decoder(config: dict[str, Any], dtype: torch.dtype) -> Decoder:
    """The layout as `numpy_decoder` describes it, rounded once to `dtype`."""

    def decoded(name: str, state: State) -> torch.Tensor:
        return torch.from_numpy(decode(state, _group(config, name))).to(dtype)

    return decoded


def _group(config: dict[str, Any], name: str) -> dict[str, Any]:
    group = scheme_of(config, name)
    if group is None:
        raise ArtifactError("the config has no scheme for a weight", where=name)
    found: dict[str, Any] = config["config_groups"][group]
    return found


def _check_inputs(record: SiteRecord, state: State, config: dict[str, Any], export: Path) -> None:
    """Refuse inputs that the files round in another way than the artifact.

    Raises:
        ArtifactError: they do.
    """
    layout = packed_layout(record)
    same = _group(config, record.site.name)["input_activations"] == layout.input_arguments
    if layout.input_tensor:
        expected = torch.tensor([stored_scale(record)], dtype=torch.float32)
        same = same and _same_bits(state[layout.input_tensor], expected)
    if not same:
        raise ArtifactError(
            "the exported inputs are not rounded as the artifact's",
            where=f"{record.site.name} in {export}",
            hint="this is a bug in the exporter or a damaged disk; the export was removed",
        )


def _same_stored(
    record: SiteRecord, tensors: dict[str, torch.Tensor], state: State, config: dict[str, Any]
) -> bool:
    """Whether codes, scales and global scale are the artifact's, each by itself."""
    fmt, shape = packed_format(record), record.site.shape
    values, scales = map(torch.from_numpy, read_stored(state, _group(config, record.site.name)))
    own = unpack_scales(tensors, fmt, fmt.groups(shape[1]))
    same = _same_bits(values, code_values(tensors, fmt, shape))
    same = same and _same_bits(scales.reshape(own.shape), own)
    if "global" in tensors:
        same = same and _same_bits(state["weight_global_scale"], tensors["global"])
    return same


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
