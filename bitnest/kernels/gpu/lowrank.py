"""A low-rank residual added behind the product that it repairs.

    y += (x A^T) B^T,  B[o, k] = left[o, k] left_scales[k],  A[k, i] = right[k, i] right_scales[k]

Two launches: shares of h = x right^T over ranges of K, (S, M, r) float32, the only thing that
reaches memory; then tiles of y, to each of which the sum of shares in order, times
left_scales right_scales and left^T, is added in place. Integers of 8 bits are exact in 16-bit
types, so the factors are not rounded; h is, once, to x's type, and y once more than without a
residual. Relative error of what is added, against float64: 1e-6 in float32, 2e-3 in float16 and
1e-2 in bfloat16 at most, h's rounding.

Left out: adding within the product's own epilogue. Its tiles are made by several programs, each of
which would have to know whether it is the one that adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bitnest.errors import FormatError
from bitnest.kernels.gpu.layout import GpuWeight
from bitnest.kernels.gpu.linear import linear, linear_reference
from bitnest.kernels.gpu.registry import Variant

LEAST_SHARE = 512  # channels that a program sums at least
MOST_SHARES = 32
BLOCK_M, BLOCK_N = 16, 128
BLOCK_K = {2: 128, 4: 64}  # by bytes of a number


@dataclass(frozen=True)
class LowRank:
    """left (O, r) and right (r, I) int8, scales (r,) float32: the products of both factors'."""

    left: torch.Tensor
    right: torch.Tensor
    scales: torch.Tensor


def lay_out_low_rank(tensors: Mapping[str, torch.Tensor]) -> LowRank:
    """The residual of `+lorc`, `+lqer` and `+hlr` as it is stored.

    Raises:
        FormatError: factors that do not fit each other.
    """
    left, right = tensors["left"].contiguous(), tensors["right"].contiguous()
    if left.dtype != torch.int8 or right.dtype != torch.int8 or left.shape[1] != right.shape[0]:
        raise FormatError(f"low-rank factors {tuple(left.shape)} and {tuple(right.shape)}")
    scales = tensors["left_scales"].float() * tensors["right_scales"].float()
    return LowRank(left, right, scales.contiguous())


def add_low_rank_reference(y: torch.Tensor, x: torch.Tensor, factors: LowRank) -> torch.Tensor:
    """y (M, O) += ..., in place, computed in float32 (float64 for float64 inputs)."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = (x.to(work) @ factors.right.to(work).T) * factors.scales.to(work)
    return y.add_((hidden @ factors.left.to(work).T).to(y.dtype))


def add_low_rank(y: torch.Tensor, x: torch.Tensor, factors: LowRank) -> torch.Tensor:
    """y (M, O) += ..., in place; x (M, I), both of one type. y is contiguous.

    Raises:
        FormatError: shapes or types that do not fit.
    """
    (m, k), (n, rank) = x.shape, factors.left.shape
    if y.shape != (m, n) or k != factors.right.shape[1] or y.dtype != x.dtype:
        raise FormatError(
            f"a residual of {n} x {k} for outputs {tuple(y.shape)} {y.dtype} of inputs "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if not y.is_contiguous():
        raise FormatError("outputs that a residual is added to are contiguous")
    if y.numel() == 0 or k == 0 or rank == 0:
        return y
    tiles = triton.cdiv(m, BLOCK_M)
    wanted = max(1, min(MOST_SHARES, triton.cdiv(k, LEAST_SHARE), 4 * MOST_SHARES // tiles))
    block = BLOCK_K[x.element_size()]
    span = triton.cdiv(triton.cdiv(k, wanted), block) * block
    shares = triton.cdiv(k, span)
    padded = max(16, triton.next_power_of_2(rank))
    hidden = torch.empty(shares, m, rank, dtype=torch.float32, device=x.device)
    low_rank_project[(tiles, shares)](
        x, factors.right, hidden, m, k, span, *x.stride(), rank, padded, BLOCK_M, block,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    low_rank_add[(triton.cdiv(n, BLOCK_N), tiles)](
        y, hidden, factors.left, factors.scales, m, n, shares, rank, padded, BLOCK_M, BLOCK_N,
        num_warps=4,
    )  # fmt: skip
    return y


def low_rank_linear(
    x: torch.Tensor,
    weight: GpuWeight,
    factors: LowRank,
    bits: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., I) times the packed weight and its residual: (..., O). See `linear.linear`."""
    y = linear(x, weight, bits, bias)
    add_low_rank(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), factors)
    return y


def low_rank_linear_reference(
    x: torch.Tensor,
    weight: GpuWeight,
    factors: LowRank,
    bits: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    y = linear_reference(x, weight, bits, bias)
    add_low_rank_reference(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), factors)
    return y


@triton.jit
def low_rank_project(
    x, right, hidden, m_total, k_total, span, stride_m, stride_k, RANK: tl.constexpr,
    RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One share of x right^T: BM rows, `span` channels, a multiple of BK. hidden (S, M, r)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    share = tl.program_id(1)
    r = tl.arange(0, RP)
    x_rows = x + m.to(tl.int64)[:, None] * stride_m
    total = tl.zeros((BM, RP), tl.float32)
    for first in range(share * span, tl.minimum(share * span + span, k_total), BK):
        k = first + tl.arange(0, BK)
        near = k < k_total
        own = tl.load(
            x_rows + k.to(tl.int64)[None, :] * stride_k,
            mask=(m < m_total)[:, None] & near[None, :], other=0,
        )  # fmt: skip
        factor = tl.load(
            right + r[:, None] * k_total + k[None, :],
            mask=(r < RANK)[:, None] & near[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(
            own, tl.trans(factor.to(tl.float32).to(own.dtype)), total, input_precision="ieee"
        )
    to = hidden + (share.to(tl.int64) * m_total + m[:, None]) * RANK + r[None, :]
    tl.store(to, total, mask=(m < m_total)[:, None] & (r < RANK)[None, :])


@triton.jit
def low_rank_add(
    y, hidden, left, scales, m_total, n_total, shares, RANK: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of y (M, N)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    real = (m < m_total)[:, None] & (r < RANK)[None, :]
    at = m.to(tl.int64)[:, None] * RANK + r[None, :]
    total = tl.zeros((BM, RP), tl.float32)
    for _ in range(0, shares):
        total += tl.load(hidden + at, mask=real, other=0)
        at += m_total * RANK
    total = total * tl.load(scales + r, mask=r < RANK, other=0)[None, :]
    kind = y.dtype.element_ty
    factor = tl.load(
        left + n.to(tl.int64)[:, None] * RANK + r[None, :],
        mask=(n < n_total)[:, None] & (r < RANK)[None, :], other=0,
    )  # fmt: skip
    added = tl.dot(total.to(kind), tl.trans(factor.to(tl.float32).to(kind)), input_precision="ieee")
    to = y + m.to(tl.int64)[:, None] * n_total + n[None, :]
    inside = (m < m_total)[:, None] & (n < n_total)[None, :]
    before = tl.load(to, mask=inside, other=0).to(tl.float32)
    tl.store(to, (before + added).to(kind), mask=inside)


def _variants() -> list[Variant]:
    found = []
    for kind in ("bf16", "fp32"):
        for rank in (16, 64):
            if kind == "fp32" and rank == 64:
                continue
            name = kind if rank == 16 else f"r{rank}-{kind}"
            types = {
                "x": f"*{kind}", "right": "*i8", "hidden": "*fp32",
                **dict.fromkeys(("m_total", "k_total", "span", "stride_k"), "i32"),
                "stride_m": "i64",
            }  # fmt: skip
            sizes = {
                "RANK": rank,
                "RP": rank,
                "BM": BLOCK_M,
                "BK": BLOCK_K[4 if kind == "fp32" else 2],
            }
            aligned = ("k_total", "span", "stride_m")
            found.append(
                Variant(f"lowrank-project-{name}", low_rank_project, types, sizes, 4, 3, aligned)
            )
            types = {
                "y": f"*{kind}", "hidden": "*fp32", "left": "*i8", "scales": "*fp32",
                **dict.fromkeys(("m_total", "n_total", "shares"), "i32"),
            }  # fmt: skip
            sizes = {"RANK": rank, "RP": rank, "BM": BLOCK_M, "BN": BLOCK_N}
            found.append(
                Variant(f"lowrank-add-{name}", low_rank_add, types, sizes, 4, 2, ("n_total",))
            )
    return found


VARIANTS = _variants()
