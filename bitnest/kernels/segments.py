"""Split codes on tensors: pack and unpack the 4+2+1 segments that `formats.segments` lays out.

With widths w1 > w2 > ... of the segments and code c of b bits, segment k holds
(c >> (w_{k+1} + w_{k+2} + ...)) mod 2^wk, so unpacking concatenates: c = (c << wk) | segment k.

Left out: bit streams (`packing`), and decoding straight into a product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitnest.formats.segments import segments, split_parts
from bitnest.kernels.packing import pack_bits, unpack_bits


def pack_segments(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Codes (..., I), integers in [0, 2^bits), to int32 words (..., ceil(I*w/32)) per segment."""
    shift = bits
    parts = {}
    for name, width in zip(split_parts(bits), segments(bits), strict=True):
        shift -= width
        parts[name] = pack_bits((codes >> shift) & ((1 << width) - 1), width)
    return parts


def unpack_segments(parts: Mapping[str, torch.Tensor], bits: int, columns: int) -> torch.Tensor:
    """The words of every segment to codes (..., columns) uint8."""
    first, *others = zip(split_parts(bits), segments(bits), strict=True)
    codes = unpack_bits(parts[first[0]], first[1], columns)
    for name, width in others:
        codes = (codes << width) | unpack_bits(parts[name], width, columns)
    return codes
