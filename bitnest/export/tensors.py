"""The tensors of one exported weight, made from the artifact's parts as they are written.

With a weight of (O, I), G groups in a row, HALF the model's dtype:

    pack-quantized         weight_packed I32 (O, ceil(I*b/32)), weight_scale HALF (O, G),
                           weight_shape I64 [O, I]; asymmetric: weight_zero_point I32
                           (ceil(O*b/32), G), packed along the rows
    int-quantized          weight I8 (O, I), weight_scale HALF (O, 1)
    float-quantized        weight F8 (O, I), weight_scale HALF (O, 1), [1], or per 128 x 128 block
                           (ceil(O/128), ceil(I/128))
    mxfp8-quantized        weight F8 (O, I), weight_scale U8 (O, I/32)
    mxfp4-pack-quantized   weight_packed U8 (O, I/2), weight_scale U8 (O, I/32)
    nvfp4-pack-quantized   weight_packed U8 (O, I/2), weight_scale F8 (O, I/16),
                           weight_global_scale F32 [1]

Inputs with a static scale add input_scale F32 [1], those of NVFP4 input_global_scale F32 [1], its
reciprocal.

F8 is E4M3, a U8 scale an E8M0 exponent. Nothing is computed: 4- and 8-bit codes in little-endian
words are the same bytes as pairs of nibbles (even column low) and as float8, and E8M0, E4M3 and
global scales are the artifact's. Only 16-bit scales are widened where the model is float32, and
int8 is Q instead of the Q + 128 of packed integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitnest.export.input_scales import stored_scale
from bitnest.export.layouts import Layout, packed_format, packed_layout
from bitnest.manifest import SiteRecord
from bitnest.safetensors_io import Entry, TensorInfo, read_tensor


def entries(
    record: SiteRecord, headers: Mapping[str, TensorInfo], dtype: torch.dtype
) -> list[Entry]:
    """The tensors of one packed site, read when they are written. dtype: the model's."""
    layout, name = packed_layout(record), record.site.name
    found = _weight_entries(record, headers, dtype)
    if layout.input_tensor:
        scale = torch.tensor([stored_scale(record)], dtype=torch.float32)
        found.append(Entry(f"{name}.{layout.input_tensor}", torch.float32, (1,), lambda: scale))
    return found


def _weight_entries(
    record: SiteRecord, headers: Mapping[str, TensorInfo], dtype: torch.dtype
) -> list[Entry]:
    layout, fmt = packed_layout(record), packed_format(record)
    name, shape = record.site.name, record.site.shape
    info = {part: headers[f"{name}.{part}"] for part in fmt.parts(shape)}
    scales = info["scales"]

    def stored(part: str, source: TensorInfo, dtype: torch.dtype) -> Entry:
        return Entry(f"{name}.{part}", dtype, source.shape, lambda: _as(read_tensor(source), dtype))

    if layout.family == "int":
        constant = Entry(f"{name}.weight_shape", torch.int64, (2,), lambda: torch.tensor(shape))
        found = [stored("weight_packed", info["codes"], torch.int32)]
        found += [stored("weight_scale", scales, dtype), constant]
        if "zeros" in info:
            found.append(stored("weight_zero_point", info["zeros"], torch.int32))
        return found
    found = [_codes(name, info["codes"], shape, layout)]
    if fmt.scale == "half":
        size = (1,) if layout.strategy == "tensor" else scales.shape
        scale = Entry(
            f"{name}.weight_scale", dtype, size, lambda: read_tensor(scales).to(dtype).view(size)
        )
        return [*found, scale]
    if layout.family == "nvfp4":
        found.append(stored("weight_scale", scales, torch.float8_e4m3fn))
        return [*found, stored("weight_global_scale", info["global"], torch.float32)]
    return [*found, stored("weight_scale", scales, torch.uint8)]


def _codes(name: str, info: TensorInfo, shape: tuple[int, int], layout: Layout) -> Entry:
    """4- or 8-bit codes: the words' bytes, without the padding of the last word."""
    bits = layout.bits
    rows, size = shape[0], shape[1] * bits // 8

    def values() -> torch.Tensor:
        return read_tensor(info).view(torch.uint8)[:, :size].contiguous()

    if bits == 4:
        return Entry(f"{name}.weight_packed", torch.uint8, (rows, size), values)
    if layout.integer:
        return Entry(
            f"{name}.weight", torch.int8, shape, lambda: (values() ^ 0x80).view(torch.int8)
        )
    kind = torch.float8_e4m3fn
    return Entry(f"{name}.weight", kind, shape, lambda: values().view(kind))


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U8 codes of float8 keep their bits; everything else keeps its value."""
    if dtype == torch.float8_e4m3fn:
        return tensor.view(dtype)
    return tensor.to(dtype)
