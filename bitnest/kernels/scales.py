"""Scales in and out of their stored form; R rows of G scales, as in `formats/block.py`.

    half    s
    e8m0    2^(u - 127), u from 1 to 254            (OCP MX; 255 is NaN and 0 is not used)
    e4m3    E4M3(u) / global                        (NVFP4 as compressed-tensors writes it)
    dq      u * super[r // 64], u in -127..127
    m2      super / 2^k, k in 0..15
    dual    u * super, u in 1..255

All products are float32. `pack_scales` takes scales that a codec has projected on these values, so
it finds the codes by division and rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitnest.formats.block import DQ_ROWS, SHIFT_BITS, BlockFormat
from bitnest.formats.names import E4M3
from bitnest.kernels.minifloat import decode, encode, round_to
from bitnest.kernels.packing import pack_bits, unpack_bits

E8M0_BIAS = 127
LEAST_E4M3, GREATEST_E4M3 = 2.0**-9, 448.0
LEAST_PEAK = 1e-28  # of a matrix, for a finite global scale


def unpack_scales(
    tensors: Mapping[str, torch.Tensor], fmt: BlockFormat, groups: int
) -> torch.Tensor:
    """Scales (R, G) float32 from the parts of a weight that has `groups` scales a row."""
    stored = tensors["scales"]
    if fmt.scale == "half":
        return stored.float()
    if fmt.scale in {"e8m0", "m1"}:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - E8M0_BIAS)
    if fmt.scale == "e4m3":
        return decode(stored, E4M3) / tensors["global"]
    shared = tensors["super"].float()
    if fmt.scale == "dq":
        return stored.float() * shared.repeat_interleave(DQ_ROWS, dim=0)[: len(stored)]
    if fmt.scale == "m2":
        shift = unpack_bits(stored, SHIFT_BITS, groups).int()
        return torch.ldexp(shared.expand(shift.shape), -shift)
    return stored.float() * shared


def pack_scales(
    scales: torch.Tensor, fmt: BlockFormat, half: torch.dtype, shared: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Parts that hold `scales` (R, G) float32. half: the 16-bit type.

    shared: global (1,) of e4m3, super (R, 1) of m2 and dual; found from the scales for dq.
    """
    if fmt.scale == "half":
        return {"scales": scales.to(half)}
    if fmt.scale in {"e8m0", "m1"}:
        exponent = torch.frexp(scales).exponent - 1  # of a power of two
        return {"scales": (exponent + E8M0_BIAS).to(torch.uint8)}
    if fmt.scale == "dq":
        shared = dq_super(scales.T, half).T
        codes = scales / shared.repeat_interleave(DQ_ROWS, dim=0)[: len(scales)]
        return {"scales": codes.round().to(torch.int8), "super": shared.to(half).contiguous()}
    assert shared is not None
    if fmt.scale == "e4m3":
        codes = encode(round_to(scales * shared, E4M3), E4M3)
        return {"scales": codes, "global": shared.reshape(1)}
    if fmt.scale == "m2":
        shift = torch.log2(shared / scales).round().to(torch.int32)
        return {"scales": pack_bits(shift, SHIFT_BITS), "super": shared.to(half)}
    codes = (scales / shared).round().to(torch.uint8)
    return {"scales": codes, "super": shared.to(half)}


def least_super(half: torch.dtype) -> float:
    """The smallest super-scale: one that still has 8 significant bits. 2^-126 or 2^-17."""
    info = torch.finfo(half)
    return info.smallest_normal * min(1.0, 128 * info.eps)


def dq_super(scales: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """Super-scales (..., ceil(O/64)) of scales (..., O): a 127th of the largest, as stored.

    With 8 bits it is within 0.4 % of that, so the largest scale has code 127 or -127, and the same
    super-scales are found again from the scales they make.
    """
    rows = scales.shape[-1]
    padded = torch.nn.functional.pad(scales.abs(), (0, -rows % DQ_ROWS))
    peak = padded.unflatten(-1, (-1, DQ_ROWS)).amax(-1)
    return (peak / 127).to(half).float().clamp_min(least_super(half))


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent within what E8M0 stores, float32."""
    exponent = exponent.clamp(1 - E8M0_BIAS, 254 - E8M0_BIAS).to(torch.int32)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def exponent_above(x: torch.Tensor) -> torch.Tensor:
    """ceil(log2 x), exactly; x positive (0 counts as the smallest)."""
    fraction, exponent = torch.frexp(x.clamp_min(torch.finfo(x.dtype).tiny))
    return exponent - (fraction == 0.5).to(exponent.dtype)


def least_half(half: torch.dtype) -> float:
    """What a 16-bit scale that rounds to zero becomes: 2^-24, or for bfloat16 2^-126.

    float16's smallest normal number, 2^-14, is larger than many a scale. bfloat16's subnormal ones
    are float32's too, which some hardware flushes to zero: they are not used.
    """
    info = torch.finfo(half)
    return info.tiny * info.eps if half == torch.float16 else info.tiny


def as_half(scale: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """The scale as 16 bit say it, float32: saturated, and never zero."""
    limit = torch.finfo(half).max
    rounded = scale.clamp(-limit, limit).to(half).float()
    return torch.where(rounded == 0, least_half(half), rounded)


def as_e4m3(scale: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """The scale as E4M3(s * global) / global says it, never zero. shared: global."""
    return round_to(scale * shared, E4M3).clamp_(LEAST_E4M3, GREATEST_E4M3) / shared
