"""Proof of an export: every weight is decoded from the written files by other code and compared.

With compressed-tensors installed, its own `decompress` reads the tensors and its own matching finds
their scheme, as transformers would. Without it, a second decoder in numpy does, written from the
description of the layout alone and sharing nothing with `kernels/packing.py`:

    code[o, i]  = bits [i*b, (i+1)*b) of row o's little-endian bitstream
    zero[o, j]  = bits [o*b, (o+1)*b) of column j's bitstream, or 2^(b-1) if symmetric
    weight[o,i] = (code - zero) * scale[o, i // g], rounded once to the model dtype

Either is compared bit for bit with the artifact's weights in the model dtype. Tensors are read by
the safetensors library, one weight at a time.

Left out: running the model; `benchmarks/vllm_agreement.py` does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import ArtifactError
from bitnest.export.schemes import scheme_of
from bitnest.export.targets import int_format, packed_sites
from bitnest.kernels.dequantize import decode_int

Decoder = Callable[[str, dict[str, torch.Tensor]], torch.Tensor]
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


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
    decoder = _package_decoder(quantization) if package else _numpy_decoder(quantization)
    index = json.loads((export / "model.safetensors.index.json").read_text(encoding="utf-8"))
    weight_map: dict[str, str] = index["weight_map"]
    headers = artifact.headers()
    count = 0
    for record in packed_sites(artifact.records):
        name = record.site.name
        state = _read_parts(export, weight_map, name)
        found = decoder(name, state)
        tensors = site_tensors(record, headers)
        expected = decode_int(tensors, int_format(record), record.site.shape, dtype)
        if not _same_bits(found, expected):
            raise ArtifactError(
                "the exported weight does not decode to the artifact's",
                where=f"{name} in {export}",
                hint="this is a bug in the exporter or a damaged disk; the export was removed",
            )
        count += 1
    how = "compressed-tensors " + metadata.version("compressed-tensors") if package else "numpy"
    return count, how


def _read_parts(export: Path, weight_map: dict[str, str], name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for part in PARTS:
        key = f"{name}.{part}"
        if key in weight_map:
            with safe_open(export / weight_map[key], framework="pt") as file:
                state[part] = file.get_tensor(key)
    missing = [part for part in PARTS[:3] if part not in state]
    if missing:
        raise ArtifactError(f"the export lacks '{missing[0]}'", where=f"{name} in {export}")
    return state


def _package_decoder(config: dict[str, Any]) -> Decoder:
    """compressed-tensors' reading of the files: its config classes, its matching, its decoding."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    parsed = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1, device="meta")

    def decode(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
        for scheme in parsed.config_groups.values():
            if is_match(name, linear, scheme.targets, parsed.ignore):
                compressor = BaseCompressor.get_value_from_registry(scheme.format or parsed.format)
                weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
                return weight
        raise ArtifactError("compressed-tensors finds no scheme for a weight", where=name)

    return decode


def _numpy_decoder(config: dict[str, Any]) -> Decoder:
    """The layout as described above, from the bytes."""

    def decode(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
        group = scheme_of(config, name)
        if group is None:
            raise ArtifactError("the config has no scheme for a weight", where=name)
        args = config["config_groups"][group]["weights"]
        bits = args["num_bits"]
        rows, columns = (int(x) for x in state["weight_shape"])
        codes = _stream(state["weight_packed"].numpy(), bits, columns)
        scale = state["weight_scale"].to(torch.float32).numpy()
        if args["symmetric"]:
            zero = np.full(scale.shape, 1 << (bits - 1), np.int64)
        else:
            packed = state["weight_zero_point"].numpy()
            zero = _stream(np.ascontiguousarray(packed.T), bits, rows).T
        place = np.arange(columns) // (args["group_size"] or columns)
        weight = (codes - zero[:, place]).astype(np.float32) * scale[:, place]
        return torch.from_numpy(weight).to(state["weight_scale"].dtype)

    return decode


def _stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Words (R, N) int32 to their first `count` values of `bits` bits, (R, count) int64."""
    stored = words.astype("<i4").view(np.uint8)
    stream = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits]
    planes = stream.reshape(len(words), count, bits).astype(np.int64)
    return (planes << np.arange(bits)).sum(-1)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
