"""The Triton side of `rotate.py`: rounding as `kernels/inputs.py` defines it, behind a permutation
or a block rotation.

Rounding to the nearest integer, ties to even: (v + 1.5 2^23) - 1.5 2^23 for |v| < 2^22. Divisions
are rounded to nearest, as the reference's; so codes and scales of the same numbers are the same
bits. A small float is rounded on its magnitude, so that -0 keeps its sign.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23
EXPONENT = tl.constexpr(0x7F800000)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number
STORE, TOKEN, GROUPS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def nearest(v):
    """v rounded to an integer, |v| < 2^22."""
    return (v + MAGIC) - MAGIC


@triton.jit
def to_float(v, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """Magnitudes v to the nearest of a small float. LEAST: its smallest normal number."""
    v = tl.minimum(v, LARGEST)
    binade = (v.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    step = tl.maximum(binade, LEAST) * (0.5**MANTISSA)
    return nearest(tl.div_rn(v, step)) * step


@triton.jit
def code_of(
    v, BITS: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr
):
    """Codes of numbers already divided by their scale: of integers (MANTISSA < 0) themselves, of
    small floats their bits, sign first."""
    if MANTISSA < 0:
        code = nearest(tl.minimum(tl.maximum(v, -LARGEST), LARGEST)).to(tl.int8)
    else:
        negative = v.to(tl.int32, bitcast=True) < 0
        r = to_float(tl.abs(v), MANTISSA, LEAST, LARGEST)
        least = tl.full(r.shape, LEAST, tl.float32)
        lowest = least.to(tl.int32, bitcast=True)
        binade = tl.maximum(r.to(tl.int32, bitcast=True) & EXPONENT, lowest)
        units = tl.div_rn(r, binade.to(tl.float32, bitcast=True)) * (2.0**MANTISSA)
        magnitude = units.to(tl.int32) + (((binade - lowest) >> 23) << MANTISSA)
        code = (magnitude | (negative.to(tl.int32) << (BITS - 1))).to(tl.uint8)
    return code


@triton.jit
def scale_of(peak, clip, fixed, LARGEST: tl.constexpr, EMAX: tl.constexpr, SCALE: tl.constexpr):
    """Scales of groups with largest magnitudes `peak`. SCALE: 0 float32, 1 and 2 a power of two
    (ocp, ceil), 3 static (`fixed`), 4 E4M3 under 1 / `fixed`."""
    if SCALE == 0:
        scale = tl.div_rn(peak * clip, tl.full(peak.shape, LARGEST, tl.float32))
        return tl.where(scale < TINY, 1.0, scale)
    if SCALE == 3:
        return tl.zeros_like(peak) + fixed
    if SCALE == 4:
        v = tl.div_rn(peak, tl.full(peak.shape, LARGEST, tl.float32)) * fixed
        v = tl.maximum(to_float(v, 3, 0.015625, 448.0), 0.001953125)
        return tl.div_rn(v, tl.zeros_like(peak) + fixed)
    if SCALE == 1:
        bits = peak.to(tl.int32, bitcast=True)
        exponent = tl.where(peak == 0, -1, (bits >> 23) - 127) - EMAX
    else:
        above = tl.maximum(tl.div_rn(peak, tl.full(peak.shape, LARGEST, tl.float32)), TINY)
        bits = above.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -126), 127)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_groups(
    x, order, codes, scales, columns, start, groups, stride_t, stride_c, clip, fixed,
    GROUP: tl.constexpr, GB: tl.constexpr, GP: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, EMAX: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """GB groups of one token, padded to GP channels each. columns: of this run, from channel
    `start` of the permuted order on; GROUP 0: all of them are one group."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GB + tl.arange(0, GB)
    inner = tl.arange(0, GP)
    if GROUP == 0:
        at = inner[None, :] + group[:, None] * GP
        mask = (at < columns) & (group < groups)[:, None]
    else:
        at = group[:, None] * GROUP + inner[None, :]
        mask = (inner < GROUP)[None, :] & (at < columns)
    channel = start + at
    if order is not None:
        channel = tl.load(order + channel, mask=mask, other=0)
    v = tl.load(x + token * stride_t + channel.to(tl.int64) * stride_c, mask=mask, other=0)
    v = v.to(tl.float32)
    scale = scale_of(tl.max(tl.abs(v), 1), clip, fixed, LARGEST, EMAX, SCALE)
    code = code_of(tl.div_rn(v, scale[:, None]), BITS, MANTISSA, LEAST, LARGEST)
    tl.store(codes + token * columns + at, code, mask=mask)
    tl.store(scales + token * groups + group, scale, mask=group < groups)


@triton.jit
def _sylvester(B: tl.constexpr):
    """(B, B) float32: -1 where i and j share an odd number of bits."""
    odd = tl.arange(0, B)[:, None] & tl.arange(0, B)[None, :]
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return 1.0 - 2.0 * odd.to(tl.float32)


@triton.jit
def rotate_blocks(
    x, signs, out, codes, scales, columns, body, groups, stride_t, stride_c, factor, clip, fixed,
    B: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, EMAX: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """R blocks of B channels of one token, rotated and rounded. body: channels that are rotated.

    MODE STORE: rotated numbers to `out`, float32. TOKEN: the R blocks are the whole token, which
    has one scale. GROUPS: GROUP, a power of two, divides R B.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * R + tl.arange(0, R)
    at = block[:, None] * B + tl.arange(0, B)[None, :]
    mask = at < columns
    raw = tl.load(x + token * stride_t + at.to(tl.int64) * stride_c, mask=mask, other=0)
    turned = raw.to(tl.float32)
    if signs is not None:
        turned = turned * tl.load(signs + at, mask=mask, other=1).to(tl.float32)
    matrix = _sylvester(B).to(raw.dtype)
    # entries of +-1 are exact in 16 bits; float32 is multiplied in three parts
    turned = tl.dot(turned.to(raw.dtype), matrix, input_precision="tf32x3") * factor
    v = tl.where(at < body, turned, raw.to(tl.float32))
    v = tl.where(mask, v, 0.0)
    if MODE == STORE:
        tl.store(out + token * columns + at, v, mask=mask)
    elif MODE == TOKEN:
        peak = tl.max(tl.max(tl.abs(v), 1), 0)
        scale = scale_of(tl.full((1,), 0.0, tl.float32) + peak, clip, fixed, LARGEST, EMAX, SCALE)
        code = code_of(tl.div_rn(v, scale[:, None]), BITS, MANTISSA, LEAST, LARGEST)
        tl.store(codes + token * columns + at, code, mask=mask)
        tl.store(scales + token + tl.arange(0, 1), scale)
    else:
        count: tl.constexpr = R * B // GROUP
        cells = tl.reshape(v, (count, GROUP))
        scale = scale_of(tl.max(tl.abs(cells), 1), clip, fixed, LARGEST, EMAX, SCALE)
        code = code_of(tl.div_rn(cells, scale[:, None]), BITS, MANTISSA, LEAST, LARGEST)
        group = tl.program_id(1) * count + tl.arange(0, count)
        to = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(codes + token * columns + to, code, mask=to < columns)
        tl.store(scales + token * groups + group, scale, mask=group < groups)


@triton.jit
def rotate_rest(
    x, matrix, out, rows, factor, P: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr,
    KB: tl.constexpr, MB: tl.constexpr,
):  # fmt: skip
    """out = A^T X / sqrt(n) of one token's numbers X (rows, P), A (rows, rows) int8 of +-1."""
    token = tl.program_id(0).to(tl.int64) * rows * P
    columns = tl.program_id(1) * CP + tl.arange(0, CP)
    m = tl.program_id(2) * MB + tl.arange(0, MB)
    total = tl.zeros((MB, CP), tl.float32)
    for first in range(0, MP, KB):
        k = first + tl.arange(0, KB)
        a = tl.load(
            matrix + k[None, :] * rows + m[:, None],
            mask=(k < rows)[None, :] & (m < rows)[:, None], other=0,
        ).to(tl.float32)  # fmt: skip
        part = tl.load(
            x + token + k[:, None] * P + columns[None, :],
            mask=(k < rows)[:, None] & (columns < P)[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(a, part, total, input_precision="tf32x3")
    mask = (m < rows)[:, None] & (columns < P)[None, :]
    tl.store(out + token + m[:, None] * P + columns[None, :], total * factor, mask=mask)
