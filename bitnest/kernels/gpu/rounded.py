"""Products of rounded inputs with packed weights: integer codes of both sides, integer sums.

    acc[t, o] = sum over a step of  X[t, i] (Q[o, i] - Z[o])         int32, exact
    y[t, o]  += (float32(acc) s[t, cell]) S[o, cell]                 float32

A step is what shares a scale on both sides, at most 128 columns; where each side has one scale for
a whole row (int8-token with int8-channel or dual grains), acc runs over the row and is scaled once.
The int8 product of tensor cores needs 32 columns: steps of 16 run in float16, whose products and
sums of 16 are exact too. Asymmetric codes of 8 bits enter as Q - 128, and (Z - 128) sum of X is
taken off as an integer. W8A8, W6A6, W6A8, W4A8 and dual grains (dgq4: (Q - Z) times its group's
integer, at most 127) differ in what is unpacked alone.

Small floats on both sides need no kernel of their own: values are exact in float16 (or bfloat16
under powers of two), so `linear` with a float32 `result` multiplies them as they are, sums in
float32, and the caller's scales of tokens come after.
Left out: the float8 products of Hopper's tensor cores; shares of K between programs, so a few
tokens leave most of a large GPU idle; inputs in two formats, which `rounded` does one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitnest.errors import BitnestError
from bitnest.kernels.gpu import tile as t
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.layout import ASYM, DUAL, INT, GpuWeight
from bitnest.kernels.gpu.linear import pointers
from bitnest.kernels.gpu.tile import ASYM as ASYM_KIND
from bitnest.kernels.gpu.tile import DUAL as DUAL_SCALE
from bitnest.kernels.gpu.tile import GROUP, KIND, ROWS, SCALE, ZERO
from bitnest.kernels.gpu.words import blocks_of
from bitnest.kernels.inputs import Coded
from bitnest.kernels.products import integer_product, integer_weight


def takes(weight: GpuWeight) -> bool:
    """Whether a weight has integers that a product of integers can take."""
    return weight.kind in {INT, ASYM} and weight.spec()[6] != 0.5  # +-1/2 of one bit are none


def rounded_linear(
    codes: torch.Tensor, scales: torch.Tensor, group: int, weight: GpuWeight
) -> torch.Tensor:
    """x W^T, (M, N) float32, of x = codes (M, K) int8 times scales (M, G) float32.

    group: channels per scale of x, a multiple of 16; K or more: one scale per token.

    Raises:
        BitnestError: types, shapes or a weight that do not fit.
    """
    check(codes, scales, group, weight)
    (m, k), n = codes.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=torch.float32, device=codes.device)
    if m == 0:
        return y
    spec = weight.spec()
    tile = tiles.choose("rounded", sum(spec[1]), m, n, k, tiles.table_name(codes.device))
    rounded_kernel[(triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm))](
        codes.contiguous(), scales.contiguous(), *pointers(weight, None), y, m, n, k, blocks_of(k),
        SPEC=spec, AGROUP=0 if group >= k else group, BN=tile.bn, BM=tile.bm,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def rounded_reference(
    codes: torch.Tensor, scales: torch.Tensor, group: int, weight: GpuWeight
) -> torch.Tensor:
    """The same in torch, cell by cell (`kernels/products.py`)."""
    check(codes, scales, group, weight)
    found = integer_weight(weight.restore(), weight.fmt, weight.shape)
    assert found is not None
    given = Coded(0, codes.float(), scales, min(group, codes.shape[1]), 128.0, True)
    return integer_product([given], found)


def check(codes: torch.Tensor, scales: torch.Tensor, group: int, weight: GpuWeight) -> None:
    """Refuse what no kernel takes.

    Raises:
        BitnestError: see `rounded_linear`.
    """
    if not takes(weight):
        raise BitnestError(f"{weight.fmt.name} has no whole numbers", hint="int2 to int8, dgq4")
    if codes.dtype != torch.int8 or scales.dtype != torch.float32 or codes.dim() != 2:
        raise BitnestError(f"{codes.dtype} codes with {scales.dtype} scales: not int8, float32")
    if codes.shape[1] != weight.shape[1] or codes.device != weight.words.device:
        raise BitnestError(f"codes {tuple(codes.shape)} for a weight {weight.shape}")
    if group % 16 and group < codes.shape[1]:
        raise BitnestError(f"groups of {group} channels", hint="a multiple of 16")
    if scales.shape != (len(codes), -(-codes.shape[1] // min(group, codes.shape[1]))):
        raise BitnestError(f"{tuple(scales.shape)} scales for codes {tuple(codes.shape)}")


@triton.constexpr_function
def step_of(spec, agroup):  # type: ignore[no-untyped-def]
    """Columns that share a scale on both sides, a power of two up to 128."""
    step = 128
    for group in (spec[4], agroup):
        if group % 128:
            step = min(step, group & -group)
    return step


@triton.constexpr_function
def whole_rows(spec, agroup):  # type: ignore[no-untyped-def]
    """Whether one scale of each side covers a whole row."""
    return agroup == 0 and (spec[4] == 0 or spec[3] == DUAL)


@triton.constexpr_function
def centre_of(spec):  # type: ignore[no-untyped-def]
    """What asymmetric codes of 8 bits enter less by; 0 for others."""
    return 128 if spec[0] == ASYM and sum(spec[1]) == 8 else 0


@triton.jit
def integers_of(
    elements, scales, shared, zeros, n, inside, group, N,
    SPEC: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Whole numbers (BN, STEP) int8 and what is still to be taken off per row, (BN,) int32."""
    code = t.codes_of(elements, SPEC, STEP, PART)
    rest = tl.zeros((n.shape[0],), tl.int32)
    if SPEC[KIND] == ASYM_KIND:
        place = t.wide(group) * tl.cdiv(N, SPEC[ROWS]) + n // SPEC[ROWS]
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
        centre: tl.constexpr = centre_of(SPEC)
        if centre > 0:
            code -= centre
            rest = zero - centre
        else:
            code -= zero[:, None]
    else:
        middle: tl.constexpr = SPEC[ZERO]
        code -= tl.full((), middle, tl.float32).to(tl.int32)
    if SPEC[SCALE] == DUAL_SCALE:
        fine = t.fine_scale(scales, shared, n, inside, group, N, SPEC)
        code *= fine.to(tl.int32)[:, None]
    return code.to(tl.int8), rest


@triton.jit
def rounded_kernel(
    x, xscales, words, scales, shared, zeros, table, out, M, N, K, blocks,
    SPEC: tl.constexpr, AGROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out (M, N) float32 of x (M, K) int8 and xscales (M, G). table is not read."""
    step: tl.constexpr = step_of(SPEC, AGROUP)
    whole: tl.constexpr = whole_rows(SPEC, AGROUP)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inside, m_inside = n < N, m < M
    groups = tl.full((), 1, tl.int32)
    if SPEC[GROUP] > 0:
        groups = tl.cdiv(K, SPEC[GROUP])
    cells = tl.full((), 1, tl.int32)
    if AGROUP > 0:
        cells = tl.cdiv(K, AGROUP)
    y = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BN, BM), tl.int32)
    rows = m.to(tl.int64)
    for block in range(0, blocks):
        elements = t.load_elements(words, block, n, inside, N, blocks, SPEC)
        for part in tl.static_range(128 // step):
            start = block * 128 + part * step
            column = start + tl.arange(0, step)
            mask = (column < K)[:, None] & m_inside[None, :]
            read = tl.load(x + rows[None, :] * K + column[:, None], mask=mask, other=0)
            group, cell = start * 0, start * 0
            if SPEC[GROUP] > 0:
                group = tl.minimum(start // SPEC[GROUP], groups - 1)
            if AGROUP > 0:
                cell = tl.minimum(start // AGROUP, cells - 1)
            w, rest = integers_of(
                elements, scales, shared, zeros, n, inside, group, N, SPEC, step, part
            )
            if step >= 32:
                acc = tl.dot(w, read, out_dtype=tl.int32)
            else:
                acc = tl.dot(w.to(tl.float16), read.to(tl.float16)).to(tl.int32)
            if centre_of(SPEC) > 0:
                acc -= rest[:, None] * tl.sum(read.to(tl.int32), axis=0)[None, :]
            if whole:
                sums += acc
            else:
                ours = tl.load(xscales + rows * cells + cell, mask=m_inside, other=0)
                found = acc.to(tl.float32) * ours[None, :]
                if SPEC[GROUP] > 0 and SPEC[SCALE] != DUAL_SCALE:
                    found *= t.fine_scale(scales, shared, n, inside, group, N, SPEC)[:, None]
                y += found
    if whole:
        y = sums.to(tl.float32) * tl.load(xscales + rows, mask=m_inside, other=0)[None, :]
    y *= t.late_scale(scales, shared, n, inside, N, SPEC)[:, None]
    place = rows[None, :] * N + n[:, None]
    tl.store(out + place, y, mask=inside[:, None] & m_inside[None, :])
