"""The Triton side of `attention.py`: a split over the context and a merge in fixed order.

Schedule (LeanAttention, Sanovar et al. 2024): the visible tokens of every (sequence, KV head) are
cut into tiles of BLOCK, all T tiles of all heads are put in one line, and program p of P <= T takes
tiles floor(p T / P) to floor((p + 1) T / P). So programs do equal work whatever the lengths, and
all of it is computed on the device from `spans`. A program that reaches the end of a head writes
its partial softmax and goes on with the next one. The pairs (program, head) that occur
form a staircase, so p + head is a slot of their own; the merge reads a head's slots in order of p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitnest.kernels.gpu.attention_tiles import (
    load_codes,
    load_keys,
    load_rows,
    score,
    set_places,
    turn_scores,
)

# lengths grow with every token: their being 1 or a multiple of 16 is no reason to compile anew
CHANGING = ["batch", "heads", "capacity", "recent_capacity", "sliding"]
LEAST = tl.constexpr(-1e30)  # below every score; finite, so that differences are no NaN


@triton.jit
def _fold(scores, mask, m, total, v0, v1, out0, out1, DOT: tl.constexpr):
    """Online softmax over one tile. scores (BQ, BLOCK) in units of log2."""
    scores = tl.where(mask[None, :], scores, float("-inf"))
    new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(m - new)
    total = total * shrink + tl.sum(p, 1)
    p16 = p.to(DOT)
    out0 = out0 * shrink[:, None] + tl.dot(p16, v0.to(DOT), input_precision="ieee")
    out1 = out1 * shrink[:, None] + tl.dot(p16, v1.to(DOT), input_precision="ieee")
    return new, total, out0, out1


@triton.jit
def _tiles(spans, batch, sliding, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of every sequence: first visible token's place, first tile and number of tiles, of stored
    and recent tokens."""
    b = tl.arange(0, BLOCK_B)
    real = b < batch
    start = tl.load(spans + 4 * b, mask=real, other=0)
    stored = tl.load(spans + 4 * b + 1, mask=real, other=0)
    recent = tl.load(spans + 4 * b + 2, mask=real, other=0)
    hidden = tl.load(spans + 4 * b + 3, mask=real, other=0)
    seen = tl.where(sliding > 0, start + stored + recent - sliding, 0)
    first = tl.maximum(hidden, seen) - start
    old = tl.minimum(tl.maximum(first, 0), stored) // BLOCK
    new = tl.minimum(tl.maximum(first - stored, 0), recent) // BLOCK
    old_tiles = (stored + BLOCK - 1) // BLOCK - old
    new_tiles = (recent + BLOCK - 1) // BLOCK - new
    return first, old, old_tiles, new, new_tiles


@triton.jit(do_not_specialize=CHANGING)
def decode_split(
    q, keys, key_scale, key_low, values, value_scale, value_low, recent_keys, recent_values,
    spans, coarse, fine, part_m, part_l, part_out,
    batch, heads, capacity, recent_capacity, sliding, score_scale, key_factor, value_factor,
    QUERIES: tl.constexpr, D: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
    NEIGHBOURS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
    BLOCK: tl.constexpr, BQ: tl.constexpr, BLOCK_B: tl.constexpr, QP: tl.constexpr,
    TP: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Partial softmax of the tiles of one program. QP, TP, EP: padded sizes of a set of rotated
    channels, of the tail and of values."""
    DOT: tl.constexpr = recent_keys.dtype.element_ty
    EVENS: tl.constexpr = (BITS == 4) or NEIGHBOURS
    SET: tl.constexpr = HALF // 2
    TAIL: tl.constexpr = (D - 2 * HALF) // 2
    first, old, old_tiles, new, new_tiles = _tiles(spans, batch, sliding, BLOCK, BLOCK_B)
    b_all = tl.arange(0, BLOCK_B)
    tiles = (old_tiles + new_tiles).to(tl.int64)
    ends = tl.cumsum(tiles, 0)
    total_tiles = tl.sum(tiles, 0) * heads
    program = tl.program_id(0).to(tl.int64)
    share = tl.maximum(tl.minimum(tl.num_programs(0), total_tiles), 1)  # programs with a tile
    t = tl.minimum(program * total_tiles // share, total_tiles)
    stop = tl.minimum((program + 1) * total_tiles // share, total_tiles)
    queries = tl.arange(0, BQ)
    asked = (queries < QUERIES)[:, None]
    a0_at, a1_at = set_places(0, SET, QP, EVENS)
    b0_at, b1_at = set_places(HALF, SET, QP, EVENS)
    t0_at, t1_at = set_places(2 * HALF, TAIL, TP, EVENS)
    v0_at, v1_at = set_places(0, E // 2, EP, BITS == 4)
    in_set, in_tail = tl.arange(0, QP) < SET, tl.arange(0, TP) < TAIL
    while t < stop:
        b = tl.sum(((ends * heads <= t) & (b_all < batch)).to(tl.int32), 0)
        pick = b_all == b
        own = tl.sum(tl.where(pick, tiles, 0), 0)
        inside = t - (tl.sum(tl.where(pick, ends, 0), 0) - own) * heads
        head = inside // own
        local = (inside - head * own).to(tl.int32)
        last = tl.minimum(own, local + stop - t).to(tl.int32)
        t += last - local
        begin = tl.sum(tl.where(pick, first, 0), 0)
        old_first = tl.sum(tl.where(pick, old, 0), 0)
        old_count = tl.sum(tl.where(pick, old_tiles, 0), 0)
        new_first = tl.sum(tl.where(pick, new, 0), 0)
        start = tl.load(spans + 4 * b)
        stored = tl.load(spans + 4 * b + 1)
        recent = tl.load(spans + 4 * b + 2)
        pair = b.to(tl.int64) * heads + head

        q_row = q + pair * (QUERIES * D) + queries[:, None] * D
        m = tl.full((BQ,), LEAST, tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        out0 = tl.zeros((BQ, EP), tl.float32)
        out1 = tl.zeros((BQ, EP), tl.float32)
        if HALF > 0:
            near = asked & in_set[None, :]
            qa0 = tl.load(q_row + a0_at[None, :], mask=near, other=0).to(tl.float32) * score_scale
            qa1 = tl.load(q_row + a1_at[None, :], mask=near, other=0).to(tl.float32) * score_scale
            qb0 = tl.load(q_row + b0_at[None, :], mask=near, other=0).to(tl.float32) * score_scale
            qb1 = tl.load(q_row + b1_at[None, :], mask=near, other=0).to(tl.float32) * score_scale
        if TAIL > 0:
            far = asked & in_tail[None, :]
            qt0 = tl.load(q_row + t0_at[None, :], mask=far, other=0).to(tl.float32) * score_scale
            qt1 = tl.load(q_row + t1_at[None, :], mask=far, other=0).to(tl.float32) * score_scale

        k_codes = keys + pair * capacity * ((D * BITS + 7) // 8)
        if FLOAT == 0:
            group = pair * (capacity // GROUP) * D
            k_scale, k_low = key_scale + group, key_low + group
        else:
            k_scale, k_low = key_scale, key_low
        v_codes = values + pair * capacity * ((E * BITS + 7) // 8)
        for tile in range(old_first + local, old_first + tl.minimum(last, old_count)):
            rows = tile * BLOCK + tl.arange(0, BLOCK)
            fits = rows < stored
            scores = tl.zeros((BQ, BLOCK), tl.float32)
            if HALF > 0:
                a0, a1 = load_keys(
                    k_codes, k_scale, k_low, rows, fits, 0, D, SET, QP, GROUP, BLOCK, BITS, FLOAT,
                    EVENS,
                )  # fmt: skip
                b0, b1 = load_keys(
                    k_codes, k_scale, k_low, rows, fits, HALF, D, SET, QP, GROUP, BLOCK, BITS,
                    FLOAT, EVENS,
                )  # fmt: skip
                p = start + tile * BLOCK
                if NEIGHBOURS:
                    w = tl.arange(0, QP)
                    scores += turn_scores(qa0, qa1, a0, a1, coarse, fine, p, HALF, w, BLOCK, DOT)
                    w = w + SET
                    scores += turn_scores(qb0, qb1, b0, b1, coarse, fine, p, HALF, w, BLOCK, DOT)
                else:
                    scores += turn_scores(
                        qa0, qb0, a0, b0, coarse, fine, p, HALF, a0_at, BLOCK, DOT
                    )
                    scores += turn_scores(
                        qa1, qb1, a1, b1, coarse, fine, p, HALF, a1_at, BLOCK, DOT
                    )
            if TAIL > 0:
                c0, c1 = load_keys(
                    k_codes, k_scale, k_low, rows, fits, 2 * HALF, D, TAIL, TP, GROUP, BLOCK, BITS,
                    FLOAT, EVENS,
                )  # fmt: skip
                scores += score(qt0.to(DOT), c0.to(DOT)) + score(qt1.to(DOT), c1.to(DOT))
            v0, v1 = load_codes(v_codes, rows, fits, 0, E, E // 2, EP, BITS, FLOAT, BITS == 4)
            if FLOAT == 0:
                at = pair * capacity + rows
                step = tl.load(value_scale + at, mask=fits, other=0).to(tl.float32)[:, None]
                base = tl.load(value_low + at, mask=fits, other=0).to(tl.float32)[:, None]
                v0, v1 = v0 * step + base, v1 * step + base
            else:
                v0, v1 = v0 * value_factor, v1 * value_factor
                scores = scores * key_factor
            mask = fits & (rows >= begin)
            m, total, out0, out1 = _fold(scores, mask, m, total, v0, v1, out0, out1, DOT)

        k_rows = recent_keys + pair * recent_capacity * D
        v_rows = recent_values + pair * recent_capacity * E
        lead = tl.maximum(local, old_count) - old_count
        for tile in range(new_first + lead, new_first + last - old_count):
            rows = tile * BLOCK + tl.arange(0, BLOCK)
            fits = rows < recent
            scores = tl.zeros((BQ, BLOCK), tl.float32)
            if HALF > 0:
                scores += score(qa0.to(DOT), load_rows(k_rows, rows, fits, a0_at, SET, D))
                scores += score(qa1.to(DOT), load_rows(k_rows, rows, fits, a1_at, SET, D))
                scores += score(qb0.to(DOT), load_rows(k_rows, rows, fits, b0_at, SET, D))
                scores += score(qb1.to(DOT), load_rows(k_rows, rows, fits, b1_at, SET, D))
            if TAIL > 0:
                scores += score(qt0.to(DOT), load_rows(k_rows, rows, fits, t0_at, TAIL, D))
                scores += score(qt1.to(DOT), load_rows(k_rows, rows, fits, t1_at, TAIL, D))
            v0 = load_rows(v_rows, rows, fits, v0_at, E // 2, E)
            v1 = load_rows(v_rows, rows, fits, v1_at, E // 2, E)
            mask = fits & (rows + stored >= begin)
            m, total, out0, out1 = _fold(scores, mask, m, total, v0, v1, out0, out1, DOT)

        slot = program + pair
        tl.store(part_m + slot * QUERIES + queries, m, mask=queries < QUERIES)
        tl.store(part_l + slot * QUERIES + queries, total, mask=queries < QUERIES)
        to = part_out + slot * (QUERIES * E) + queries[:, None] * E
        ours = asked & (tl.arange(0, EP) < E // 2)[None, :]
        tl.store(to + v0_at[None, :], out0, mask=ours)
        tl.store(to + v1_at[None, :], out1, mask=ours)


@triton.jit(do_not_specialize=["batch", "heads", "programs", "sliding"])
def decode_merge(
    part_m, part_l, part_out, spans, out, batch, heads, programs, sliding,
    QUERIES: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BQ: tl.constexpr,
    BLOCK_B: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head): its partial sums, in the order of the programs that made them."""
    _, _, old_tiles, _, new_tiles = _tiles(spans, batch, sliding, BLOCK, BLOCK_B)
    tiles = (old_tiles + new_tiles).to(tl.int64)
    every = tl.maximum(tl.sum(tiles, 0) * heads, 1)
    share = tl.minimum(programs, every)
    pair = tl.program_id(0).to(tl.int64)
    b, head = pair // heads, pair % heads
    b_all = tl.arange(0, BLOCK_B)
    own = tl.sum(tl.where(b_all == b, tiles, 0), 0)
    first = tl.sum(tl.where(b_all < b, tiles, 0), 0) * heads + head * own
    p_first = ((first + 1) * share - 1) // every
    p_stop = tl.where(own > 0, ((first + own) * share - 1) // every + 1, p_first)
    queries, channels = tl.arange(0, BQ), tl.arange(0, EP)
    asked = queries < QUERIES
    wanted = asked[:, None] & (channels < E)[None, :]
    m = tl.full((BQ,), LEAST, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, EP), tl.float32)
    for p in range(p_first, p_stop):
        slot = p + pair
        own_m = tl.load(part_m + slot * QUERIES + queries, mask=asked, other=LEAST)
        own_l = tl.load(part_l + slot * QUERIES + queries, mask=asked, other=0)
        at = slot * (QUERIES * E) + queries[:, None] * E + channels[None, :]
        part = tl.load(part_out + at, mask=wanted, other=0)
        new = tl.maximum(m, own_m)
        shrink, grow = tl.exp2(m - new), tl.exp2(own_m - new)
        total = total * shrink + own_l * grow
        acc = acc * shrink[:, None] + part * grow[:, None]
        m = new
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = out + pair * (QUERIES * E) + queries[:, None] * E + channels[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=wanted)
