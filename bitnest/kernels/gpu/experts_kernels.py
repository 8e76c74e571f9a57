"""The kernels of `experts`: what they compute is said there.

Pieces of work are numbered (tile, block of BN output channels, share of the superblocks), shares
fastest, so that programs beside each other read one expert. `order`, `starts`, `ends` and `owners`
are `Routing`; `weights` is the table: row 3 * expert + projection, 6 numbers each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnest.kernels.gpu import tile as t

FIELDS = tl.constexpr(6)


@triton.constexpr_function
def part_of(classes, c, part):  # type: ignore[no-untyped-def]
    """Class c's spec (part 0), or the type of its scales (1), super-scales (2) or table (3)."""
    return classes[c][part]


@triton.jit
def typed(address, CODE: tl.constexpr):
    """An address as a pointer to numbers of the type that `experts.TYPES` numbers."""
    if CODE == 0:
        found = address.to(tl.pointer_type(tl.int32))
    elif CODE == 1:
        found = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 2:
        found = address.to(tl.pointer_type(tl.float16))
    elif CODE == 3:
        found = address.to(tl.pointer_type(tl.float32))
    elif CODE == 4:
        found = address.to(tl.pointer_type(tl.uint8))
    else:
        found = address.to(tl.pointer_type(tl.int8))
    return found


@triton.jit
def expert_tile(
    x, m_offsets, m_inside, row, n, inside, first, last, N, K, blocks,
    BN: tl.constexpr, BM: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """x (BM, K) times one expert's rows n: (BN, BM) float32. row: its place in the table."""
    kind = tl.load(row)
    words = tl.multiple_of(tl.load(row + 1), 16).to(tl.pointer_type(tl.int32))
    scales, shared = tl.load(row + 2), tl.load(row + 3)
    zeros = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    table = tl.load(row + 5)
    acc = tl.zeros((BN, BM), tl.float32)
    for c in tl.static_range(len(CLASSES)):
        if kind == c:
            acc = class_tile(
                acc, x, m_offsets, m_inside, words, scales, shared, zeros, table, n, inside,
                first, last, N, K, blocks, CLASSES, c,
            )  # fmt: skip
    return acc


@triton.jit
def class_tile(
    acc, x, m_offsets, m_inside, words, scales, shared, zeros, table, n, inside,
    first, last, N, K, blocks, CLASSES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The same of a weight of class C."""
    spec: tl.constexpr = part_of(CLASSES, C, 0)
    scales = typed(scales, part_of(CLASSES, C, 1))
    shared = typed(shared, part_of(CLASSES, C, 2))
    table = typed(table, part_of(CLASSES, C, 3))
    acc = t.accumulate(
        acc, x, m_offsets, m_inside, words, scales, shared, zeros, table, n, inside, first, last, N,
        K, blocks, spec,
    )  # fmt: skip
    return acc * t.late_scale(scales, shared, n, inside, N, spec)[:, None]


@triton.jit
def slots_of(tile, owners, ends, starts, BM: tl.constexpr):
    """Expert of a tile, and its assignments (BM,) with which of them there are."""
    expert = tl.load(owners + tile)
    before = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    slot = tl.load(starts + expert) + (tile - before) * BM + tl.arange(0, BM)
    return expert, slot, slot < tl.load(starts + expert + 1)


@triton.jit
def gate_up_kernel(
    x, stride, order, starts, ends, owners, weights, inner, parts, slots, k, E, N, K, blocks,
    shares, BN: tl.constexpr, BM: tl.constexpr, CLASSES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """inner (slots, N) = silu(gate x) * up x; or parts float32 (shares, 2, slots, N) of both."""
    across = tl.cdiv(N, BN)
    work = tl.load(ends + E - 1) * across * shares
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        share = piece % shares
        tile = piece // shares // across
        n = piece // shares % across * BN + tl.arange(0, BN)
        expert, slot, m_inside = slots_of(tile, owners, ends, starts, BM)
        token = tl.load(order + slot, mask=m_inside, other=0) // k
        inside = n < N
        first, last = blocks * share // shares, blocks * (share + 1) // shares
        up = tl.zeros((BN, BM), tl.float32)
        gate = up
        for which in range(2):  # one copy of the code for both
            row = weights + (expert * 3 + which) * FIELDS
            gate = up
            up = expert_tile(
                x, token.to(tl.int64) * stride, m_inside, row, n, inside, first, last, N, K,
                blocks, BN, BM, CLASSES,
            )  # fmt: skip
        place = slot.to(tl.int64)[None, :] * N + n[:, None]
        mask = inside[:, None] & m_inside[None, :]
        if SPREAD:
            start = parts + share.to(tl.int64) * 2 * slots * N
            tl.store(start + place, gate, mask=mask)
            tl.store(start + t.wide(slots) * N + place, up, mask=mask)
        else:
            value = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(inner + place, value.to(inner.dtype.element_ty), mask=mask)


@triton.jit
def swiglu(parts, inner, size, shares, SIZE: tl.constexpr):
    """inner (size,) = silu(sum of gate's shares) * sum of up's. parts: (shares, 2, size)."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < size
    gate, up = tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32)
    for share in range(shares):
        start = parts + t.wide(share) * 2 * size
        gate += tl.load(start + i, mask=inside, other=0)
        up += tl.load(start + size + i, mask=inside, other=0)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(inner + i, value.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    inner, order, starts, ends, owners, weights, parts, slots, E, N, K, blocks, shares,
    BN: tl.constexpr, BM: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """parts float32 (shares, slots, N): down of inner (slots, K), by assignment, not yet sorted."""
    across = tl.cdiv(N, BN)
    work = tl.load(ends + E - 1) * across * shares
    for piece in range(tl.program_id(0), work, tl.num_programs(0)):
        share = piece % shares
        tile = piece // shares // across
        n = piece // shares % across * BN + tl.arange(0, BN)
        expert, slot, m_inside = slots_of(tile, owners, ends, starts, BM)
        inside = n < N
        first, last = blocks * share // shares, blocks * (share + 1) // shares
        row = weights + (expert * 3 + 2) * FIELDS
        y = expert_tile(
            inner, slot.to(tl.int64) * K, m_inside, row, n, inside, first, last, N, K, blocks, BN,
            BM, CLASSES,
        )  # fmt: skip
        target = tl.load(order + slot, mask=m_inside, other=0).to(tl.int64)
        place = (share.to(tl.int64) * slots + target)[None, :] * N + n[:, None]
        tl.store(parts + place, y, mask=inside[:, None] & m_inside[None, :])


@triton.jit
def combine_kernel(parts, index, gates, weights, out, slots, k, E, N, shares, SIZE: tl.constexpr):
    """out (T, N): shares added, times gates, assignments in order. One token a program."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = n < N
    y = tl.zeros((SIZE,), tl.float32)
    for j in range(k):
        slot = token * k + j
        expert = tl.load(index + slot)
        there = (expert >= 0) & (expert < E)
        kind = tl.load(weights + (expert * 3 + 2) * FIELDS, mask=there, other=-1)
        mask = inside & (kind >= 0)
        value = tl.zeros((SIZE,), tl.float32)
        for share in range(shares):
            start = parts + (t.wide(share) * slots + slot) * N
            value += tl.load(start + n, mask=mask, other=0)
        y += value * tl.load(gates + slot).to(tl.float32)
    tl.store(out + token * N + n, y.to(out.dtype.element_ty), mask=inside)
