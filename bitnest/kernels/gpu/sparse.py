"""y = x W^T with W sparse: what is stored is loaded, zeros are put in registers, and the product is
a dense one (Flash-LLM, Xia et al. 2023: "load as sparse, compute as dense").

Of a row the mask has a bit for each weight, and the survivors' codes lie without holes
(`formats/sparse.py`). The survivor at channel i is number

    n:m of 2:4      2 floor(i / 4) + set bits below i in its nibble
    any other       starts[o, i // 64] + set bits below i in its 64 channels

so a tile is made of the mask, a gather from codes that neighbours share, and for the second kind
one count per 64 channels, which is made when the weight is loaded (0.25 bits a weight). Codes of
1, 2, 4 and 8 bits, integers or a table of what they stand for, or 16-bit values. Weights are
rounded to x's type once, sums are float32, those of shares of K added in order. Relative error
against float64: 1e-6 in float32, 1e-3 in float16 and 8e-3 in bfloat16 at most.

Left out: sparse tensor cores, which want both operands in 16 or 8 bits; blocks (`base%b...`);
codes that lie in segments (3, 5, 6 and 7 bits). `why` says so of a format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bitnest.errors import FormatError
from bitnest.formats import AnyFormat, DenseFormat, SparseFormat
from bitnest.formats.elements import FloatElement, IntElement, TableElement
from bitnest.kernels.decode import NF4, zero_points
from bitnest.kernels.gpu.registry import Variant
from bitnest.kernels.minifloat import decode as decode_minifloat
from bitnest.kernels.packing import unpack_bits
from bitnest.kernels.scales import unpack_scales
from bitnest.kernels.sparse import positions, spread

Tensors = Mapping[str, torch.Tensor]
SPAN = 64  # channels of a tile
BLOCK_N, WAVES = 64, 4
VALUES, CODES, TABLE = range(3)
HINT = "use the reference: it decodes the weight"


@dataclass(frozen=True)
class SparseWeight:
    """W (O, I) on its device. kept: survivors of a row.

    mask int32 (O, ceil(I / 32)). codes: int32 words of a row, or 16-bit values (O, kept). starts
    int32 or int16 (O, ceil(I / 64)), None for 2:4. scales (O, G) 16-bit or float32, None for
    values; zeros uint8 (O, G), None where `zero` serves all. table: float32 (2^bits,), None for
    integers. group: input channels under one scale.
    """

    shape: tuple[int, int]
    kept: int
    bits: int
    mask: torch.Tensor
    codes: torch.Tensor
    starts: torch.Tensor | None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    table: torch.Tensor | None = None
    zero: float = 0.0
    group: int = 0

    @property
    def kind(self) -> int:
        """What is stored of a survivor."""
        return VALUES if self.scales is None else CODES if self.table is None else TABLE

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, all of which a product reads."""
        parts = (self.mask, self.codes, self.starts, self.scales, self.zeros, self.table)
        return sum(part.nbytes for part in parts if part is not None)


def why(fmt: AnyFormat) -> str | None:
    """Why this file has no kernel for a format; None if it has."""
    if not isinstance(fmt, SparseFormat):
        return f"{fmt.name} is not sparse by weights"
    if isinstance(fmt.base, DenseFormat):
        return None
    element = fmt.base.element
    if not isinstance(element, IntElement | FloatElement | TableElement) or 32 % element.bits:
        return f"{fmt.name}: codes of {fmt.bits} bits are not gathered"
    return None


def lay_out_sparse(tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]) -> SparseWeight:
    """A weight as `formats/sparse.py` stores it.

    Raises:
        FormatError: a format without a kernel, or a mask that does not keep what it should.
    """
    if (reason := why(fmt)) is not None or not isinstance(fmt, SparseFormat):
        raise FormatError(reason or fmt.name, hint=HINT)
    rows, columns = shape
    mask = tensors["mask"].contiguous()
    positions(mask, fmt, columns)  # refuses a damaged mask
    kept, starts = fmt.kept(columns), None
    if (fmt.keep, fmt.cell) != (2, 4):
        bits = unpack_bits(mask, 1, columns)
        spans = torch.nn.functional.pad(bits, (0, -columns % SPAN)).unflatten(1, (-1, SPAN))
        counts = spans.sum(2, dtype=torch.int32)
        starts = counts.cumsum(1, dtype=torch.int32) - counts
        starts = starts.to(torch.int16 if kept < 1 << 15 else torch.int32).contiguous()
    base = fmt.base
    if isinstance(base, DenseFormat):
        return SparseWeight(shape, kept, 16, mask, tensors["values"].contiguous(), starts)
    groups, element = base.groups(columns), base.element
    scales, zeros, zero, table = unpack_scales(tensors, base, groups), None, 0.0, None
    if base.scale == "half":
        scales = tensors["scales"]
    if isinstance(element, FloatElement):
        every = torch.arange(1 << element.bits, dtype=torch.uint8, device=mask.device)
        table = decode_minifloat(every, element.spec)
    elif isinstance(element, TableElement):
        table = torch.tensor(NF4, device=mask.device)
    elif isinstance(element, IntElement) and element.symmetric:
        zero = float(element.zero)
    else:
        points = zero_points(tensors, base, rows, groups)
        assert points is not None
        zeros = points.to(torch.uint8).contiguous()
    return SparseWeight(
        shape, kept, int(element.bits), mask, tensors["codes"].contiguous(), starts,
        scales.contiguous(), zeros, table, zero, base.group_size(columns),
    )  # fmt: skip


def sparse_linear_reference(x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
    """The same in plain torch, the product in float32 (float64 for float64 inputs)."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(work) @ expand(weight).to(work).T).to(x.dtype)


def expand(weight: SparseWeight) -> torch.Tensor:
    """W (O, I) float32."""
    columns = weight.shape[1]
    place = unpack_bits(weight.mask, 1, columns).bool().nonzero()[:, 1].view(-1, weight.kept)
    if weight.scales is None:
        return spread(weight.codes, place, columns, torch.float32)
    codes = unpack_bits(weight.codes, weight.bits, weight.kept)
    value = codes.float() if weight.table is None else weight.table[codes.long()]
    group = (place // weight.group).clamp(max=weight.scales.shape[1] - 1)
    zero = weight.zero if weight.zeros is None else weight.zeros.float().gather(1, group)
    return spread(
        (value - zero) * weight.scales.float().gather(1, group), place, columns, torch.float32
    )


def sparse_linear(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., I) W^T + bias, (..., O) of x's type.

    Raises:
        FormatError: x has another width.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise FormatError(f"inputs have {x.shape[-1]} channels, the weight {k}")
    rows = x.reshape(-1, k)
    m = len(rows)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel():
        bm = 16 if m <= 16 else 32 if m <= 32 else 64
        tiles, spans = triton.cdiv(n, BLOCK_N) * triton.cdiv(m, bm), triton.cdiv(k, SPAN)
        shares = max(1, min(spans, _programs(x.device) // tiles))
        length = triton.cdiv(spans, shares)
        shares = max(1, triton.cdiv(spans, length))
        parts = torch.empty(shares, m, n, dtype=torch.float32, device=x.device)
        groups = 1 if weight.scales is None else weight.scales.shape[1]
        sparse_product[(triton.cdiv(n, BLOCK_N), triton.cdiv(m, bm), shares)](
            rows, weight.mask, weight.starts, weight.codes, weight.scales, weight.zeros,
            weight.table, parts, m, n, k, weight.kept, weight.mask.shape[1],
            weight.codes.shape[1], groups, *rows.stride(), length, weight.kind, weight.bits,
            weight.zero, weight.group, weight.starts is None, bm, BLOCK_N, SPAN,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        sum_shares[(triton.cdiv(m * n, 1024),)](parts, bias, y, m * n, n, shares, 1024)
    return y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return WAVES
    return WAVES * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def sparse_product(
    x, mask, starts, codes, scales, zeros, table, parts, m_total, n_total, columns, kept,
    mask_words, row_words, groups, stride_m, stride_k, length, KIND: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile of y over `length` spans of channels: float32 (BM, BN) in parts (S, M, N)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.program_id(2)
    row, inside = n.to(tl.int64)[:, None], (n < n_total)[:, None]
    spans = (columns + SPAN - 1) // SPAN
    total = tl.zeros((BM, BN), tl.float32)
    for span in range(share * length, tl.minimum(share * length + length, spans)):
        k = span * SPAN + tl.arange(0, SPAN)
        near = k < columns
        real = inside & near[None, :]
        word = tl.load(mask + row * mask_words + (k // 32)[None, :], mask=real, other=0)
        bit = (word >> (k % 32)[None, :]) & 1
        if PAIRS:
            below = (word >> (k % 32 // 4 * 4)[None, :]) & ((1 << (k % 4)) - 1)[None, :]
            rank = (below & 1) + ((below >> 1) & 1) + ((below >> 2) & 1)
            place = (k // 4 * 2)[None, :] + rank
        else:
            first = tl.load(starts + row * spans + span, mask=inside, other=0).to(tl.int32)
            place = first + tl.cumsum(bit, 1) - bit
        held = real & (bit == 1)
        if KIND == 0:
            w = tl.load(codes + row * kept + place, mask=held, other=0).to(tl.float32)
        else:
            lane: tl.constexpr = 32 // BITS
            packed = tl.load(codes + row * row_words + place // lane, mask=held, other=0)
            code = (packed >> (place % lane * BITS)) & ((1 << BITS) - 1)
            if KIND == 2:
                w = tl.load(table + code)
            else:
                w = code.to(tl.float32)
            group = row * groups + tl.minimum(k // GROUP, groups - 1)[None, :]
            if zeros is not None:
                w -= tl.load(zeros + group, mask=real, other=0).to(tl.float32)
            else:
                w -= ZERO
            w *= tl.load(scales + group, mask=real, other=0).to(tl.float32)
        w = tl.where(held, w, 0.0)
        own = tl.load(
            x + m.to(tl.int64)[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k,
            mask=(m < m_total)[:, None] & near[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(own, tl.trans(w.to(own.dtype)), total, input_precision="ieee")
    to = parts + (share.to(tl.int64) * m_total + m[:, None]) * n_total + n[None, :]
    tl.store(to, total, mask=(m < m_total)[:, None] & (n < n_total)[None, :])


@triton.jit
def sum_shares(parts, bias, y, size, n_total, shares, BLOCK: tl.constexpr):
    """y = the shares' sum in order, plus bias. parts (S, size), size = M N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    here = at
    for _ in range(0, shares):
        total += tl.load(parts + here, mask=inside, other=0)
        here += size
    if bias is not None:
        total += tl.load(bias + at % n_total, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def _variants() -> list[Variant]:
    found = []
    for name, kind, bits, pairs in (
        ("int4-2:4", CODES, 4, True), ("int4-50", CODES, 4, False), ("dense-2:4", VALUES, 16, True),
        ("dense-50", VALUES, 16, False), ("nf4-50", TABLE, 4, False),
    ):  # fmt: skip
        integers = (
            "m_total", "n_total", "columns", "kept", "mask_words", "row_words", "groups",
            "stride_k", "length",
        )  # fmt: skip
        types = {
            "x": "*bf16", "mask": "*i32", "codes": "*bf16" if kind == VALUES else "*i32",
            "parts": "*fp32", "stride_m": "i64", **dict.fromkeys(integers, "i32"),
        }  # fmt: skip
        sizes: dict[str, object] = {
            "KIND": kind, "BITS": bits, "ZERO": 8.0, "GROUP": 128, "PAIRS": pairs, "BM": 16,
            "BN": BLOCK_N, "SPAN": SPAN, "zeros": None,
        }  # fmt: skip
        for argument, kinds, type_ in (
            ("starts", (not pairs,), "*i16"), ("scales", (kind != VALUES,), "*bf16"),
            ("table", (kind == TABLE,), "*fp32"),
        ):  # fmt: skip
            if all(kinds):
                types[argument] = type_
            else:
                sizes[argument] = None
        for bm in (16, 64):
            label = f"sparse-{name}" + ("" if bm == 16 else f"-m{bm}")
            found.append(Variant(label, sparse_product, types, {**sizes, "BM": bm}, 4, 2))
    types = {"parts": "*fp32", "y": "*bf16", "size": "i64", "n_total": "i32", "shares": "i32"}
    return [
        *found, Variant("sparse-sum", sum_shares, types, {"bias": None, "BLOCK": 1024}, 4, 2)
    ]  # fmt: skip


VARIANTS = _variants()
