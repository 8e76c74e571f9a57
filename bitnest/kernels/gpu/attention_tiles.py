"""Tiles of a quantised KV cache in registers, and their scores against a query that is rotated.

Channels are handled as pairs of sets of COUNT: where codes have 4 bits, or neighbours are rotated,
the even and the odd channels of a range; else its first and second half. A rotation needs two such
ranges, channels 0 to r/2 and r/2 to r, and the tail of unrotated ones is a third.
"""

from __future__ import annotations

import triton
import triton.language as tl

FINE = tl.constexpr(64)  # rows of the fine rotary table


@triton.jit
def set_places(first, COUNT: tl.constexpr, PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels of the two sets of a range."""
    i = tl.arange(0, PAD)
    if INTERLEAVED:
        return first + 2 * i, first + 2 * i + 1
    return first + i, first + COUNT + i


@triton.jit
def from_bits(byte, FLOAT: tl.constexpr):
    """Bytes of an 8-bit float as float32; of e4m3 (FLOAT 1) divided by 2^8."""
    wide = byte.to(tl.uint16)
    if FLOAT == 1:
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    else:
        half = wide << 8
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_codes(
    base, rows, fits, first, WIDTH: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Codes (BLOCK, PAD) of both sets as float32. WIDTH: channels of a stored row."""
    i = tl.arange(0, PAD)
    mask = fits[:, None] & (i < COUNT)[None, :]
    if BITS == 4:
        at = rows[:, None] * ((WIDTH + 1) // 2) + (first // 2 + i)[None, :]
        byte = tl.load(base + at, mask=mask, other=0)
        return (byte & 15).to(tl.float32), (byte >> 4).to(tl.float32)
    even, odd = set_places(first, COUNT, PAD, INTERLEAVED)
    b0 = tl.load(base + rows[:, None] * WIDTH + even[None, :], mask=mask, other=0)
    b1 = tl.load(base + rows[:, None] * WIDTH + odd[None, :], mask=mask, other=0)
    if FLOAT > 0:
        return from_bits(b0, FLOAT), from_bits(b1, FLOAT)
    return b0.to(tl.float32), b1.to(tl.float32)


@triton.jit
def load_keys(
    codes, scale, low, rows, fits, first, D: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Keys (BLOCK, PAD) of both sets, as they were before the rotation, float32."""
    k0, k1 = load_codes(codes, rows, fits, first, D, COUNT, PAD, BITS, FLOAT, INTERLEAVED)
    if FLOAT == 0:
        even, odd = set_places(first, COUNT, PAD, INTERLEAVED)
        real = tl.arange(0, PAD) < COUNT
        if GROUP % BLOCK == 0:  # one group in the tile
            at = tl.min(rows, 0) // GROUP * D
            k0 = k0 * tl.load(scale + at + even, mask=real, other=0).to(tl.float32)[None, :]
            k1 = k1 * tl.load(scale + at + odd, mask=real, other=0).to(tl.float32)[None, :]
            k0 += tl.load(low + at + even, mask=real, other=0).to(tl.float32)[None, :]
            k1 += tl.load(low + at + odd, mask=real, other=0).to(tl.float32)[None, :]
        else:
            mask = fits[:, None] & real[None, :]
            at = (rows // GROUP * D)[:, None]
            k0 = k0 * tl.load(scale + at + even[None, :], mask=mask, other=0).to(tl.float32)
            k1 = k1 * tl.load(scale + at + odd[None, :], mask=mask, other=0).to(tl.float32)
            k0 += tl.load(low + at + even[None, :], mask=mask, other=0).to(tl.float32)
            k1 += tl.load(low + at + odd[None, :], mask=mask, other=0).to(tl.float32)
    return k0, k1


@triton.jit
def load_rows(base, rows, fits, places, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """One set of 16-bit rows (BLOCK, PAD)."""
    mask = fits[:, None] & (tl.arange(0, places.shape[0]) < COUNT)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + places[None, :], mask=mask, other=0)


@triton.jit
def score(q, k):
    """q k^T in the type of both, float32 sums; float32 is not shortened."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _turns(table, row, HALF: tl.constexpr, places):
    """cos and sin (PAD,) of one row of a table (rows, 2, HALF)."""
    real = places < HALF
    cos = tl.load(table + row * (2 * HALF) + places, mask=real, other=1.0)
    sin = tl.load(table + row * (2 * HALF) + HALF + places, mask=real, other=0.0)
    return cos, sin


@triton.jit
def _base_turn(coarse, fine, position, HALF: tl.constexpr, places):
    """cos and sin of a position by the sum of two angles."""
    c, s = _turns(coarse, position // FINE, HALF, places)
    d, t = _turns(fine, position % FINE, HALF, places)
    return c * d - s * t, s * d + c * t


@triton.jit
def turn_scores(
    qa, qb, ka, kb, coarse, fine, position, HALF: tl.constexpr, places, BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Scores of one set of pairs: q R(p + j) k for keys j = 0 ... of the tile.

    R(p + j) k = R(p) R(j) k, so the query is turned back by p, and keys by j alone, for which the
    fine table is loaded; the compiler can keep it, as it is the same for every tile.
    """
    cos, sin = _base_turn(coarse, fine, position, HALF, places)
    q_a = qa * cos[None, :] + qb * sin[None, :]
    q_b = qb * cos[None, :] - qa * sin[None, :]
    j = tl.arange(0, BLOCK)[:, None] * (2 * HALF) + places[None, :]
    real = (places < HALF)[None, :]
    c = tl.load(fine + j, mask=real, other=1.0)
    s = tl.load(fine + j + HALF, mask=real, other=0.0)
    k_a, k_b = ka * c - kb * s, kb * c + ka * s
    return score(q_a.to(DOT), k_a.to(DOT)) + score(q_b.to(DOT), k_b.to(DOT))
