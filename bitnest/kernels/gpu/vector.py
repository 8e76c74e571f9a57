"""One token times a matrix of integers: y[n] = sum over k of (code[n, k] - zero) scale x[k].

No tensor core and no conversion: a code is masked where it lies in its 32-bit element, and the bits
that remain are read as a float32. Below bit 24 they are a subnormal number (or, with bit 23 set,
the first normal ones, which continue the line),

    float(code << p) = code * 2^(p - 149)        exactly

so one mask and one multiply-add per code are all there is; x is multiplied with the power of two
that is missing, 2^(SHIFT - p), exactly. Codes from bit 24 on are shifted down once per element.
Zero points enter as zero * sum of x. Nothing is rounded but float32 sums. |x| must stay below 2^30
and what is under 2^-60 in magnitude may lose bits. Kernels must not flush subnormal numbers to
zero, which Triton does not (the assembler is tested to hold no .ftz).

Work: a program has BN rows and a share of the superblocks, SPAN of them at once. Shares of a row
are added in a fixed order by `sum_shares`.

Left out: tables and small floats (`linear` runs them through its product).
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnest.kernels.gpu import tile as t
from bitnest.kernels.gpu.tile import (
    ASYM,
    BASE,
    GROUP,
    KIND,
    LANES,
    LINE,
    NONE,
    RESIDUAL,
    ROWS,
    SCALE,
    SEGS,
    ZERO,
)

SHIFT = tl.constexpr(90)
LIFT = tl.constexpr(2.0**59)  # 2^(149 - SHIFT)


@triton.constexpr_function
def shifted(place, bits):  # type: ignore[no-untyped-def]
    """How far an element is shifted down so that its field at `place` ends below bit 24."""
    return 0 if place + bits <= 24 else 8


@triton.constexpr_function
def power(place, bits, extra):  # type: ignore[no-untyped-def]
    """What x is multiplied with for a field at `place` that counts 2^extra times."""
    return 2.0 ** (90 - place + (0 if place + bits <= 24 else 8) + extra)


@triton.constexpr_function
def field_mask(place, bits):  # type: ignore[no-untyped-def]
    """The field's bits after that shift."""
    return ((1 << bits) - 1) << (place - (0 if place + bits <= 24 else 8))


@triton.constexpr_function
def weight_bits(spec, k):  # type: ignore[no-untyped-def]
    """Bits of a code below segment k, of those that are one number."""
    return sum(spec[1][k + 1 : spec[9]])


@triton.jit
def load_span(words, block, n, N, blocks, SPEC: tl.constexpr, K: tl.constexpr):
    """Segment K's elements (BN, SPAN, LANES) as int32. block: (1, SPAN, 1). n: (BN, 1, 1)."""
    lanes: tl.constexpr = SPEC[LANES]
    bits: tl.constexpr = SPEC[SEGS][K] * (128 // SPEC[LANES])
    start = words + t.bits_before(SPEC, K) * 4 * t.wide(N) * blocks
    if bits == 32:
        source = start
    elif bits == 16:
        source = start.to(tl.pointer_type(tl.uint16))
    else:
        source = start.to(tl.pointer_type(tl.uint8))
    place = (t.wide(N) * block + n) * lanes + tl.arange(0, lanes)[None, None, :]
    return tl.load(source + place, mask=(n < N) & (block < blocks), other=0).to(tl.int32)


@triton.jit
def field(element, x, PLACE: tl.constexpr, BITS: tl.constexpr, EXTRA: tl.constexpr):
    """code * x * 2^(SHIFT + EXTRA - 149) of the field at PLACE."""
    down: tl.constexpr = shifted(PLACE, BITS)
    moved = element
    if down > 0:
        moved = (element.to(tl.uint32, bitcast=True) >> down).to(tl.int32, bitcast=True)
    bits = moved & field_mask(PLACE, BITS)
    return bits.to(tl.float32, bitcast=True) * (x * power(PLACE, BITS, EXTRA))


@triton.jit
def scaled(part, scales, shared, n, group, N, SPEC: tl.constexpr):
    """part (BN, SPAN, LANES) times its fine scales; as it is where a row has none that differ."""
    if SPEC[SCALE] != NONE and (SPEC[GROUP] > 0 or SPEC[KIND] == RESIDUAL):
        part *= t.fine_scale(scales, shared, n, n < N, group, N, SPEC)
    return part


@triton.jit
def add_part(
    acc, elements, x, scales, shared, zeros, table, n, block, groups, N, K,
    SPEC: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """acc (BN, SPAN, LANES) plus one step of every superblock."""
    lanes: tl.constexpr = SPEC[LANES]
    count: tl.constexpr = STEP // SPEC[LANES]
    base: tl.constexpr = SPEC[BASE]
    start = block * 128 + PART * STEP
    group = start * 0
    if SPEC[GROUP] > 0:
        group = tl.minimum(start // SPEC[GROUP], groups - 1)
    column = start + tl.arange(0, lanes)[None, None, :]
    part = tl.zeros_like(acc)
    total = tl.zeros(column.shape, tl.float32)
    for j in tl.static_range(count):
        value = tl.load(x + column + j * lanes, mask=column + j * lanes < K, other=0)
        value = value.to(tl.float32)
        total += value
        for k in tl.static_range(base):
            part += field(
                elements[k], value, (PART * count + j) * SPEC[SEGS][k], SPEC[SEGS][k],
                weight_bits(SPEC, k),
            )  # fmt: skip
    part *= LIFT
    if SPEC[KIND] == ASYM or SPEC[KIND] == RESIDUAL:
        place = t.wide(tl.cdiv(N, SPEC[ROWS])) * group + n // SPEC[ROWS]
        part -= tl.load(zeros + place, mask=n < N, other=0).to(tl.float32) * total
    elif SPEC[KIND] == LINE:
        a, b = tl.load(table), tl.load(table + 1)
        part = part * a + (a * 0.5 + b) * total
    else:
        part -= SPEC[ZERO] * total
    acc += scaled(part, scales, shared, n, group, N, SPEC)
    for k in tl.static_range(base, len(SPEC[SEGS])):
        sign = tl.zeros_like(acc)
        for j in tl.static_range(count):
            value = tl.load(x + column + j * lanes, mask=column + j * lanes < K, other=0)
            sign += field(elements[k], value.to(tl.float32), PART * count + j, 1, 1)
        layer = scales + (k - base + 1) * t.wide(groups) * N
        acc += scaled(sign * LIFT - total, layer, shared, n, group, N, SPEC)
    return acc


@triton.jit
def vector_kernel(
    x, words, scales, shared, zeros, table, bias, out, shares, N, K, blocks,
    SPEC: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, BIAS: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """out (N,), or shares float32 (programs of the second axis, N) where SHARES. x (K,)."""
    step: tl.constexpr = t.step_of(SPEC)
    lanes: tl.constexpr = SPEC[LANES]
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    spans = tl.cdiv(blocks, SPAN)
    first = spans * tl.program_id(1) // tl.num_programs(1)
    last = spans * (tl.program_id(1) + 1) // tl.num_programs(1)
    groups = tl.full((), 1, tl.int32)
    if SPEC[GROUP] > 0:
        groups = tl.cdiv(K, SPEC[GROUP])
    acc = tl.zeros((BN, SPAN, lanes), tl.float32)
    for span in range(first, last):
        block = span * SPAN + tl.arange(0, SPAN)[None, :, None]
        elements = ()
        for k in tl.static_range(len(SPEC[SEGS])):
            read = load_span(words, block, n[:, None, None], N, blocks, SPEC, k)
            elements = elements + (read,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
        for part in tl.static_range(128 // step):
            acc = add_part(
                acc, elements, x, scales, shared, zeros, table, n[:, None, None], block, groups,
                N, K, SPEC, step, part,
            )  # fmt: skip
    inside = n < N
    y = tl.sum(tl.sum(acc, axis=2), axis=1) * t.late_scale(scales, shared, n, inside, N, SPEC)
    if SHARES:
        tl.store(shares + tl.program_id(1).to(tl.int64) * N + n, y, mask=inside)
    else:
        if BIAS:
            y += tl.load(bias + n, mask=inside, other=0).to(tl.float32)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_shares(shares, bias, out, N, COUNT, BN: tl.constexpr, BIAS: tl.constexpr):
    """out (N,) = shares (COUNT, N) added in order, plus bias."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    y = tl.zeros((BN,), tl.float32)
    for share in range(COUNT):
        y += tl.load(shares + t.wide(share) * N + n, mask=inside, other=0)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)
