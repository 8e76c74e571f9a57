"""Decoding some rows of a stored weight: what a lookup needs, and how a large head is decoded.

Only the rows asked for are gathered from the stored tensors:

    codes, segments, masks, tables per row    row o; of block-sparse ones the blocks it lies in
    scales, zero points                row p = floor(o / r) of R, r rows a block
    dq's super-scales                  row floor(p / 64); of m2 and dual row p
    left of a residual                 row o; right, channels, order and global whole

What is gathered is decoded as any weight is (`kernels/decode.py`), with the scales as float32 and
a scale for every row: block formats give the same numbers bit for bit. Low-rank products may differ
in float32's last bit, which depends on how many rows are multiplied at once.

Left out: entropy-coded ternary codes, whose rows are parsed and not addressed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    BlockSparseFormat,
    DenseFormat,
    LowRankFormat,
    NestedFormat,
    SparseFormat,
    SplitFormat,
    ZeroFormat,
)
from bitnest.formats.block import DQ_ROWS
from bitnest.formats.elements import TernaryElement
from bitnest.formats.wrappers import core_format
from bitnest.kernels.block_sparse import block_mask
from bitnest.kernels.decode import (
    Tensors,
    code_values,
    decode,
    low_rank,
    scaled,
    split_tensors,
    undo_transform,
)
from bitnest.kernels.packing import pack_bits
from bitnest.kernels.scales import unpack_scales

WORD = 0xFFFFFFFF


def row_decodable(fmt: AnyFormat) -> bool:
    """Whether `decode_rows` takes the format."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return True
    core = core_format(fmt)
    if isinstance(core, NestedFormat | SparseFormat | BlockSparseFormat):
        return True
    if isinstance(core, SplitFormat):
        return row_decodable(core.wide) and row_decodable(core.base)
    return not (isinstance(core.element, TernaryElement) and core.element.coded)


def decode_rows(
    tensors: Tensors,
    fmt: AnyFormat,
    shape: tuple[int, int],
    rows: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows (n,) int64 of the (out, in) weight stored as `fmt.parts(shape)` lays it out: (n, in)."""
    if isinstance(fmt, ZeroFormat):
        return torch.zeros(len(rows), shape[1], dtype=dtype, device=rows.device)
    if isinstance(fmt, DenseFormat):
        return tensors["weight"][rows].to(dtype)
    if isinstance(fmt, BlockFormat):
        own, plain = _gathered(tensors, fmt, shape, rows)
        return decode(own, plain, (len(rows), shape[1]), dtype)
    if isinstance(fmt, NestedFormat):
        return decode(_nested_rows(tensors, fmt, rows), fmt, (len(rows), shape[1]), dtype)
    if isinstance(fmt, SparseFormat):
        own, sparse = _sparse_rows(tensors, fmt, shape, rows)
        return decode(own, sparse, (len(rows), shape[1]), dtype)
    if isinstance(fmt, BlockSparseFormat):
        return _block_rows(tensors, fmt, shape, rows, dtype)
    if isinstance(fmt, SplitFormat):
        parts = split_tensors(tensors, fmt, shape)
        return torch.cat([decode_rows(own, f, s, rows, dtype) for own, f, s in parts], dim=1)
    weight = decode_rows(tensors, fmt.base, shape, rows)
    if isinstance(fmt, LowRankFormat):
        return weight.add_(low_rank({**tensors, "left": tensors["left"][rows]})).to(dtype)
    return undo_transform(weight, fmt, tensors).to(dtype)


def decode_into(
    out: torch.Tensor, tensors: Tensors, fmt: AnyFormat, step: int = 1 << 24
) -> torch.Tensor:
    """Fill `out` (O, I), of any float type and on the tensors' device, about `step` weights at a
    time where rows can be decoded."""
    if not row_decodable(fmt):
        return out.copy_(decode(tensors, fmt, (out.shape[0], out.shape[1])))
    count = max(1, step // out.shape[1])
    for start in range(0, out.shape[0], count):
        part = out[start : start + count]
        rows = torch.arange(start, start + len(part), device=out.device)
        part.copy_(decode_rows(tensors, fmt, (out.shape[0], out.shape[1]), rows))
    return out


def _gathered(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], rows: torch.Tensor
) -> tuple[dict[str, torch.Tensor], BlockFormat]:
    """Parts of the rows alone, and the format they are in: float32 scales, one for each row."""
    codes = {name: tensors[name][rows] for name in fmt.element.code_parts(*shape)}
    own, plain = _gathered_scales(tensors, fmt, shape, rows)
    return {**codes, **own}, plain


def _gathered_scales(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], rows: torch.Tensor
) -> tuple[dict[str, torch.Tensor], BlockFormat]:
    """The same without codes."""
    own: dict[str, torch.Tensor] = {}
    if "table" in tensors:
        own["table"] = tensors["table"][rows] if fmt.group is None else tensors["table"]
    if "scales" not in tensors:
        return own, fmt
    place = rows if fmt.rows == 1 else rows // fmt.rows if fmt.rows else torch.zeros_like(rows)
    own["scales"] = _scales(tensors, fmt, fmt.groups(shape[1]), place)
    if "zeros" in tensors:
        bits = int(fmt.bits)
        own["zeros"] = pack_bits(_zeros(tensors["zeros"], bits, place).T, bits).T
    return own, replace(fmt, scale="half", rows=1, rule="", alias="")


def _sparse_rows(
    tensors: Tensors, fmt: SparseFormat, shape: tuple[int, int], rows: torch.Tensor
) -> tuple[dict[str, torch.Tensor], SparseFormat]:
    """The same of a sparse format: its mask is a row's own, too."""
    mask = {"mask": tensors["mask"][rows]}
    if isinstance(fmt.base, DenseFormat):
        return {**mask, "values": tensors["values"][rows]}, fmt
    own, base = _gathered(tensors, fmt.base, shape, rows)
    return {**mask, **own}, replace(fmt, base=base)


def _block_rows(
    tensors: Tensors,
    fmt: BlockSparseFormat,
    shape: tuple[int, int],
    rows: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of a block-sparse weight: of the blocks that stay only those they lie in are decoded."""
    keep = block_mask(tensors["mask"], fmt, shape)
    (r, c), base = fmt.block(shape), fmt.base
    number = (keep.flatten().cumsum(0) - 1).view_as(keep)  # of a block among those that stay
    lines, place = rows // r, rows % r
    own = keep[lines]  # (n, Q)
    wanted, index = number[lines][own].unique(return_inverse=True)
    if isinstance(base, DenseFormat):
        stored = tensors["values"][wanted].to(dtype)
    else:
        codes = {name: tensors[name][wanted] for name in fmt.code_parts(shape)}
        stored = code_values({**tensors, **codes}, base, (len(wanted), r * c))
    line = place[:, None].expand_as(own)[own]
    values = torch.zeros(*own.shape, c, dtype=stored.dtype, device=stored.device)
    values[own] = stored.view(-1, r, c)[index, line]
    values = values.flatten(1)[:, : shape[1]]
    if isinstance(base, DenseFormat):
        return values
    scales, plain = _gathered_scales(tensors, base, shape, rows)
    weight = scaled(values.contiguous(), scales, plain, dtype)
    return weight.mul_(own.repeat_interleave(c, 1)[:, : shape[1]])


def _nested_rows(
    tensors: Tensors, fmt: NestedFormat, rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Parts of the rows alone; what the whole matrix shares as it is."""
    own = {}
    for name, tensor in tensors.items():
        if name == "zeros":
            bits = fmt.widths[0]
            own[name] = pack_bits(_zeros(tensor, bits, rows).T, bits).T
        else:
            whole = tensor.dim() == 1 or name.startswith("right")
            own[name] = tensor if whole else tensor[rows]
    return own


def _scales(tensors: Tensors, fmt: BlockFormat, groups: int, place: torch.Tensor) -> torch.Tensor:
    """Scales (n, G) float32 of the rows `place` of scales."""
    stored = tensors["scales"][place]
    if fmt.scale == "dq":
        return stored.float() * tensors["super"][place // DQ_ROWS].float()
    own = {**tensors, "scales": stored}
    if fmt.scale in {"m2", "dual"}:
        own["super"] = tensors["super"][place]
    return unpack_scales(own, fmt, groups)


def _zeros(words: torch.Tensor, bits: int, place: torch.Tensor) -> torch.Tensor:
    """Zero points (n, G) of the rows `place`, from words (ceil(R bits / 32), G) along the rows."""
    start = place * bits
    word, shift = start // 32, start % 32
    low = words[word].long() & WORD
    high = words[(word + 1).clamp_max(len(words) - 1)].long() & WORD
    both = (low | (high << 32)) >> shift[:, None]
    return both & ((1 << bits) - 1)
