"""y = x W^T with W in few bits: one token to many, any width of a nested weight.

One token and integers: `vector`. Else tiles of `tile.accumulate`, shared out like stream-K
(Osama et al., 2301.03598): with T = tiles * superblocks units of work and P programs, program p
takes units T p / P to T (p + 1) / P, wherever tiles begin. A tile that one program finishes is
written at once. Others leave float32 pieces, piece p + tile of a workspace (unique, as a program
that goes on or a tile that begins both count one up), and a second kernel adds a tile's pieces in
the order of programs: no atomics, the same bits every time. `deterministic=False` adds them
atomically instead, without the second kernel.

CUDA graphs may capture it: sizes depend on shapes alone, and nothing is read back.

Rounded: the result, to x's type; tables' values, to x's type (`tile`). Products of one token with
integers are float32 throughout. Error against float64: that of a float32 sum of K terms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from bitnest.errors import BitnestError
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu import tile as t
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.layout import ASYM, INT, LINE, RESIDUAL, GpuWeight
from bitnest.kernels.gpu.vector import sum_shares, vector_kernel
from bitnest.kernels.gpu.words import blocks_of

VECTOR_KINDS = {INT, ASYM, LINE, RESIDUAL}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def linear(
    x: torch.Tensor,
    weight: GpuWeight,
    bits: int | None = None,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool = True,
    result: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T + bias, (..., N) of x (..., K), both 16-bit or float32.

    bits: the width at which a nested weight is read; None: its widest. deterministic: see above.
    result: type of y; None: x's.

    Raises:
        BitnestError: x of another type, width or device, or a width the weight does not have.
    """
    check(x, weight, bits)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = torch.empty(len(rows), n, dtype=result or x.dtype, device=x.device)
    if len(rows) == 1 and weight.kind in VECTOR_KINDS:
        _vector(rows, weight, bits, bias, y)
    elif len(rows):
        y = _product(rows, weight, bits, bias, y, deterministic)
    return y.view(*x.shape[:-1], n)


def linear_reference(
    x: torch.Tensor,
    weight: GpuWeight,
    bits: int | None = None,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool = True,
    result: torch.dtype | None = None,
) -> torch.Tensor:
    """The same in torch: the decoded float32 matrix, a float32 product, rounded once."""
    check(x, weight, bits)
    fmt: Any = weight.fmt
    tensors = weight.restore()
    if bits is not None and len(weight.widths) > 1:
        fmt = fmt.at(bits)
    dense = decode(tensors, fmt, weight.shape)
    y = F.linear(x.float(), dense, None if bias is None else bias.float())
    return y.to(result or x.dtype)


def check(x: torch.Tensor, weight: GpuWeight, bits: int | None) -> None:
    """Refuse what no kernel takes.

    Raises:
        BitnestError: see `linear`.
    """
    if x.dtype not in FLOATS:
        raise BitnestError(f"inputs of type {x.dtype}", hint="bfloat16, float16 or float32")
    if x.shape[-1] != weight.shape[1]:
        raise BitnestError(f"inputs have {x.shape[-1]} channels, the weight {weight.shape[1]}")
    if x.device != weight.words.device:
        raise BitnestError(f"inputs on {x.device}, the weight on {weight.words.device}")
    if bits is not None and bits not in weight.segs:
        raise BitnestError(f"{weight.fmt.name} has no width {bits}", hint=f"one of {weight.widths}")


def pointers(weight: GpuWeight, bits: int | None) -> tuple[torch.Tensor, ...]:
    """words, scales, shared, zeros and table as kernels take them; words where there is none."""
    table = weight.tables.get(weight.widths[-1] if bits is None else bits)
    found = (weight.scales, weight.shared, weight.zeros, table)
    return (weight.words, *(weight.words if tensor is None else tensor for tensor in found))


def _vector(
    x: torch.Tensor, weight: GpuWeight, bits: int | None, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    (n, k), spec = weight.shape, weight.spec(bits, x.dtype)
    name = tiles.table_name(x.device)
    tile = tiles.choose("vector", sum(spec[1]), 1, n, k, name)
    blocks, columns = blocks_of(k), triton.cdiv(n, tile.bn)
    spans = triton.cdiv(blocks, tile.span)
    count = max(1, min(spans, tiles.programs(tile, x.device) // columns))
    shares = y if count == 1 else torch.empty(count, n, dtype=torch.float32, device=x.device)
    given = y if bias is None else bias
    vector_kernel[(columns, count)](
        x, *pointers(weight, bits), given, y, shares, n, k, blocks, SPEC=spec, BN=tile.bn,
        SPAN=tile.span, BIAS=bias is not None, SHARES=count > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if count > 1:
        sum_shares[(triton.cdiv(n, 128),)](
            shares, given, y, n, count, BN=128, BIAS=bias is not None, num_warps=4
        )


def _product(
    x: torch.Tensor,
    weight: GpuWeight,
    bits: int | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    deterministic: bool,
) -> torch.Tensor:
    (m, k), n, spec = x.shape, weight.shape[0], weight.spec(bits, x.dtype)
    tile = tiles.choose("product", sum(spec[1]), m, n, k, tiles.table_name(x.device))
    blocks = blocks_of(k)
    across, count, spread = share_out(m, n, blocks, tile, x.device)
    given = y if bias is None else bias
    total = None
    pieces = y
    if spread and deterministic:
        size = (count + across) * tile.bn * tile.bm
        pieces = torch.empty(size, dtype=torch.float32, device=x.device)
    elif spread:
        total = torch.zeros(m, n, dtype=torch.float32, device=x.device)
    target = y if total is None else total
    product_kernel[(count,)](
        x, x.stride(0), *pointers(weight, bits), given, target, pieces, m, n, k, blocks, SPEC=spec,
        BN=tile.bn, BM=tile.bm, BIAS=bias is not None, ATOMIC=total is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if total is not None:
        return (total if bias is None else total + bias).to(y.dtype)
    if spread:
        sum_pieces[(across,)](
            pieces,
            given,
            y,
            m,
            n,
            blocks,
            count,
            BN=tile.bn,
            BM=tile.bm,
            BIAS=bias is not None,
            num_warps=4,
        )
    return y


def share_out(
    m: int, n: int, blocks: int, tile: tiles.Tile, device: torch.device
) -> tuple[int, int, bool]:
    """Tiles, programs, and whether some tile is the work of several programs."""
    across = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    wanted = tiles.programs(tile, device)
    if across >= wanted:  # whole tiles: no pieces, and the last wave is a small part
        return across, across, False
    count = min(across * blocks, wanted)
    return across, count, across * blocks % count != 0 or (across * blocks // count) % blocks != 0


@triton.jit
def product_kernel(
    x, stride, words, scales, shared, zeros, table, bias, out, pieces, M, N, K, blocks,
    SPEC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """One program's share; see above. out (M, N); pieces float32 (count + tiles, BN, BM)."""
    program = tl.program_id(0).to(tl.int64)
    rows = tl.cdiv(N, BN)
    units = (rows * tl.cdiv(M, BM)).to(tl.int64) * blocks
    unit = units * program // tl.num_programs(0)
    end = units * (program + 1) // tl.num_programs(0)
    while unit < end:
        number = unit // blocks
        first = (unit % blocks).to(tl.int32)
        last = tl.minimum(first + end - unit, blocks).to(tl.int32)
        n = (number % rows).to(tl.int32) * BN + tl.arange(0, BN)
        m = (number // rows).to(tl.int32) * BM + tl.arange(0, BM)
        inside, m_inside = n < N, m < M
        acc = t.accumulate(
            tl.zeros((BN, BM), tl.float32), x, m.to(tl.int64) * stride, m_inside, words, scales,
            shared, zeros, table, n, inside, first, last, N, K, blocks, SPEC,
        )  # fmt: skip
        acc *= t.late_scale(scales, shared, n, inside, N, SPEC)[:, None]
        place = m.to(tl.int64)[None, :] * N + n[:, None]
        mask = inside[:, None] & m_inside[None, :]
        if ATOMIC:
            tl.atomic_add(out + place, acc, mask=mask, sem="relaxed")
        elif (first == 0) & (last == blocks):
            if BIAS:
                acc += tl.load(bias + n, mask=inside, other=0).to(tl.float32)[:, None]
            tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
        else:
            piece = pieces + (program + number) * (BN * BM)
            where = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
            tl.store(piece + where, acc)
        unit += last - first


@triton.jit
def sum_pieces(
    pieces, bias, out, M, N, blocks, COUNT, BN: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr
):
    """Add the pieces of one tile, programs in order; tiles without pieces are left alone."""
    number = tl.program_id(0).to(tl.int64)
    rows = tl.cdiv(N, BN)
    units = (rows * tl.cdiv(M, BM)).to(tl.int64) * blocks
    # program p has unit u for the largest p with units p / COUNT < u + 1
    first = ((number * blocks + 1) * COUNT - 1) // units
    last = ((number * blocks + blocks) * COUNT - 1) // units
    if first == last:
        return
    n = (number % rows).to(tl.int32) * BN + tl.arange(0, BN)
    m = (number // rows).to(tl.int32) * BM + tl.arange(0, BM)
    where = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for program in range(first, last + 1):
        acc += tl.load(pieces + (program + number) * (BN * BM) + where)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
