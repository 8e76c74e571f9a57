"""Device functions: a tile of stored weights turned to numbers, and multiplied.

A tile has BN rows (output channels) and STEP columns, STEP the largest power of two up to 128 that
every group of channels is a multiple of, so that one scale per row covers it:

    acc[n, m] += sum over k of value(code[n, k]) x[m, k]      tl.dot: 16-bit in, float32 out
    part      ... the same, of one group;  acc += part * scale[n, g]

Integers enter the product as `code - zero`, exactly. Scales are multiplied with float32 sums, but
where scale times value has no more bits than the 16-bit type (powers of two, E4M3 scales of 4-bit
codes, dual grains): these are multiplied into the values, exactly too. What is rounded: values of
tables, to the inputs' type (exact when they were stored in it). Weights are the product's first
operand, so that Hopper takes them from registers and never stores them decoded.

SPEC is `GpuWeight.spec`, known when a kernel is compiled. Pointers: words int32, scales, shared and
table as stored, zeros uint8. N rows, K columns, blocks = ceil(K / 128).
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnest.kernels.gpu import interpreter, layout

interpreter.mend()
ASYM, LINE = tl.constexpr(layout.ASYM), tl.constexpr(layout.LINE)
TABLE, ROW_TABLE = tl.constexpr(layout.TABLE), tl.constexpr(layout.ROW_TABLE)
FLOAT, RESIDUAL = tl.constexpr(layout.FLOAT), tl.constexpr(layout.RESIDUAL)
NONE, HALF, E8M0 = (tl.constexpr(v) for v in (layout.NONE, layout.HALF, layout.E8M0))
E4M3, DQ = tl.constexpr(layout.E4M3), tl.constexpr(layout.DQ)
M2, DUAL = tl.constexpr(layout.M2), tl.constexpr(layout.DUAL)
# places in SPEC
KIND, SEGS, LANES, SCALE, GROUP, ROWS = (tl.constexpr(i) for i in range(6))
ZERO, EXPONENT, MANTISSA, BASE, FOLDS = (tl.constexpr(i) for i in range(6, 11))
BLOCK = tl.constexpr(128)
MAGIC = tl.constexpr(0x4B000000)  # 2^23 as float32: an integer below 2^23 or-ed in adds itself


@triton.constexpr_function
def step_of(spec):  # type: ignore[no-untyped-def]
    """Columns that surely share a scale: 128 where groups are multiples of it or whole rows."""
    group = spec[4]
    return 128 if group % 128 == 0 else group & -group


@triton.constexpr_function
def bits_before(spec, k):  # type: ignore[no-untyped-def]
    """Bits of a code in the segments before segment k."""
    return sum(spec[1][:k])


@triton.jit
def wide(number):
    """An integer as int64: of a kernel, of a loop or known when it is compiled."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def load_segment(words, block, n, inside, N, blocks, SPEC: tl.constexpr, K: tl.constexpr):
    """Segment K's elements (BN, LANES) of one superblock."""
    lanes: tl.constexpr = SPEC[LANES]
    bits: tl.constexpr = SPEC[SEGS][K] * (128 // SPEC[LANES])
    start = words + bits_before(SPEC, K) * 4 * wide(N) * blocks
    if bits == 32:
        source = start
    elif bits == 16:
        source = start.to(tl.pointer_type(tl.int16))
    else:
        source = start.to(tl.pointer_type(tl.uint8))
    source += wide(block) * N * lanes
    place = n[:, None] * lanes + tl.arange(0, lanes)[None, :]
    return tl.load(source + place, mask=inside[:, None], other=0)


@triton.jit
def load_elements(words, block, n, inside, N, blocks, SPEC: tl.constexpr):
    """Every segment's elements of one superblock."""
    found = ()
    for k in tl.static_range(len(SPEC[SEGS])):
        found = found + (load_segment(words, block, n, inside, N, blocks, SPEC, k),)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return found


@triton.jit
def unpack(element, BITS: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr):
    """Codes (BN, STEP) int32 of columns PART * STEP and on, from elements (BN, LANES)."""
    rows: tl.constexpr = element.shape[0]
    lanes: tl.constexpr = element.shape[1]
    count: tl.constexpr = STEP // lanes  # codes of an element
    v = element.to(tl.int32) >> (BITS * count * PART)
    if count >= 32:
        v = tl.join(v, v >> (BITS * 16)).reshape(rows, lanes * (count // 16))
    if count >= 16:
        v = tl.join(v, v >> (BITS * 8)).reshape(rows, lanes * (count // 8))
    if count >= 8:
        v = tl.join(v, v >> (BITS * 4)).reshape(rows, lanes * (count // 4))
    if count >= 4:
        v = tl.join(v, v >> (BITS * 2)).reshape(rows, lanes * (count // 2))
    if count >= 2:
        v = tl.join(v, v >> BITS).reshape(rows, lanes, count)
        v = v.permute(0, 2, 1).reshape(rows, STEP)
    return v & ((1 << BITS) - 1)


@triton.jit
def codes_of(elements, SPEC: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr):
    """Codes (BN, STEP) int32 of the first SPEC[BASE] segments."""
    base: tl.constexpr = SPEC[BASE]
    code = unpack(elements[0], SPEC[SEGS][0], STEP, PART)
    for k in tl.static_range(1, base):
        code = (code << SPEC[SEGS][k]) | unpack(elements[k], SPEC[SEGS][k], STEP, PART)
    return code


@triton.jit
def small_float(code, EXP: tl.constexpr, MAN: tl.constexpr):
    """What codes of a small float stand for, float32: exponent and mantissa moved to float32's
    place, where subnormal ones are subnormal too, times the difference of the biases."""
    magnitude = (code & ((1 << (EXP + MAN)) - 1)) << (23 - MAN)
    sign = (code >> (EXP + MAN)) << 31
    scale: tl.constexpr = 2.0 ** (128 - (1 << (EXP - 1)))
    return (magnitude | sign).to(tl.float32, bitcast=True) * scale


@triton.jit
def fine_scale(scales, shared, n, inside, group, N, SPEC: tl.constexpr):
    """The part of a scale that differs within a row, (BN,) float32; group: which one."""
    rows = tl.cdiv(N, SPEC[ROWS])
    row = n // SPEC[ROWS]
    stored = tl.load(scales + wide(group) * rows + row, mask=inside, other=1)
    if SPEC[SCALE] == E8M0:
        scale = (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SPEC[SCALE] == M2:
        scale = ((127 - stored.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    elif SPEC[SCALE] == E4M3:
        scale = small_float(stored.to(tl.int32), 4, 3)
    elif SPEC[SCALE] == DQ:
        place = wide(group) * tl.cdiv(N, 64) + n // 64
        scale = stored.to(tl.float32) * tl.load(shared + place, mask=inside, other=0).to(tl.float32)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def late_scale(scales, shared, n, inside, N, SPEC: tl.constexpr):
    """The part that a row's sum is multiplied with, (BN,) float32."""
    found = tl.full((n.shape[0],), 1.0, tl.float32)
    if SPEC[KIND] != RESIDUAL:
        if SPEC[GROUP] == 0 and SPEC[SCALE] != NONE:
            found = fine_scale(scales, shared, n, inside, tl.full((), 0, tl.int32), N, SPEC)
        if SPEC[SCALE] == E4M3:
            found = found / tl.load(shared)
        if SPEC[SCALE] == M2 or SPEC[SCALE] == DUAL:
            found = found * tl.load(shared + n, mask=inside, other=0).to(tl.float32)
    return found


@triton.jit
def values_of(
    elements, scales, shared, zeros, table, n, inside, group, N,
    SPEC: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Numbers (BN, STEP) of TYPE that the product reads: exact, but for tables."""
    code = codes_of(elements, SPEC, STEP, PART)
    if SPEC[KIND] == TABLE:
        value = tl.load(table + code)
    elif SPEC[KIND] == ROW_TABLE:
        size: tl.constexpr = 1 << bits_before(SPEC, len(SPEC[SEGS]))
        place = n[:, None].to(tl.int64) * size + code
        value = tl.load(table + place, mask=inside[:, None], other=0)
    elif SPEC[KIND] == FLOAT:
        value = small_float(code, SPEC[EXPONENT], SPEC[MANTISSA])
    else:
        value = (code | MAGIC).to(tl.float32, bitcast=True) - 8388608.0
        if SPEC[KIND] == ASYM or SPEC[KIND] == RESIDUAL:
            where = wide(group) * tl.cdiv(N, SPEC[ROWS]) + n // SPEC[ROWS]
            zero = tl.load(zeros + where, mask=inside, other=0)
            value -= zero.to(tl.float32)[:, None]
        else:
            value -= SPEC[ZERO]
    if SPEC[FOLDS] and SPEC[GROUP] > 0:
        value *= fine_scale(scales, shared, n, inside, group, N, SPEC)[:, None]
    return value.to(TYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a b, float32. Float32 operands are not rounded."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_step(
    acc, elements, x, scales, shared, zeros, table, n, inside, group, groups, N,
    SPEC: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) plus the product of one step's columns with x (STEP, BM)."""
    kind: tl.constexpr = SPEC[KIND]
    grouped: tl.constexpr = SPEC[GROUP] > 0 and SPEC[SCALE] != NONE and not SPEC[FOLDS]
    w = values_of(
        elements, scales, shared, zeros, table, n, inside, group, N, SPEC, STEP, PART, TYPE
    )
    if kind == RESIDUAL:
        part = dot(w, x, tl.zeros_like(acc))
        acc += part * fine_scale(scales, shared, n, inside, group, N, SPEC)[:, None]
        base: tl.constexpr = SPEC[BASE]
        for k in tl.static_range(base, len(SPEC[SEGS])):
            sign = unpack(elements[k], 1, STEP, PART).to(tl.float32) * 2.0 - 1.0
            layer = scales + (k - base + 1) * wide(groups) * N
            part = dot(sign.to(TYPE), x, tl.zeros_like(acc))
            acc += part * fine_scale(layer, shared, n, inside, group, N, SPEC)[:, None]
    elif kind == LINE or grouped:
        part = dot(w, x, tl.zeros_like(acc))
        if kind == LINE:
            a, b = tl.load(table), tl.load(table + 1)
            part = part * a + (a * (SPEC[ZERO] + 0.5) + b) * tl.sum(x.to(tl.float32), 0)[None, :]
        if grouped:
            part *= fine_scale(scales, shared, n, inside, group, N, SPEC)[:, None]
        acc += part
    else:
        acc = dot(w, x, acc)
    return acc


@triton.jit
def accumulate(
    acc, x, m_offsets, m_inside, words, scales, shared, zeros, table, n, inside,
    first, last, N, K, blocks, SPEC: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) plus the product of superblocks first to last with rows x + m_offsets (BM,)."""
    step: tl.constexpr = step_of(SPEC)
    kind: tl.constexpr = x.dtype.element_ty
    groups = tl.cdiv(K, SPEC[GROUP]) if SPEC[GROUP] > 0 else tl.full((), 1, tl.int32)
    for block in range(first, last):
        elements = load_elements(words, block, n, inside, N, blocks, SPEC)
        for part in tl.static_range(128 // step):
            start = block * 128 + part * step
            column = start + tl.arange(0, step)
            columns_inside = (column < K)[:, None] & m_inside[None, :]
            tile = tl.load(x + m_offsets[None, :] + column[:, None], mask=columns_inside, other=0)
            group = tl.minimum(start // SPEC[GROUP], groups - 1) if SPEC[GROUP] > 0 else start * 0
            acc = add_step(
                acc, elements, tile, scales, shared, zeros, table, n, inside, group, groups, N,
                SPEC, step, part, kind,
            )  # fmt: skip
    return acc
