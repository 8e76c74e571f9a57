"""Decoding packed weights: the reference every faster kernel is tested against.

    w[o, i] = (value(code[o, i]) - zero[o, i // g]) * scale[o, i // g]

computed in float32 and rounded once to the requested type. Integers have value(code) = code; when
no zeros are stored, zero is 2^(bits-1) for them (1/2 for one bit), 1 for ternary codes and 0 for
floats and tables. The product of two bfloat16 values is exact in float32, so decoding to bfloat16
rounds once: the same number any engine computes that multiplies in bfloat16.

Wrapped formats decode their base in float32, then undo the transform or add the residual.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    TransformedFormat,
    ZeroFormat,
)
from bitnest.formats.elements import FloatElement, IntElement, TableElement, TernaryElement
from bitnest.formats.segments import split_parts
from bitnest.formats.split import WIDE
from bitnest.kernels.block_sparse import block_mask, place_blocks, spread_mask
from bitnest.kernels.hadamard import random_signs, unrotate, whole_block
from bitnest.kernels.minifloat import decode as decode_minifloat
from bitnest.kernels.nested import decode_nested
from bitnest.kernels.packing import unpack_bits
from bitnest.kernels.scales import unpack_scales
from bitnest.kernels.segments import unpack_segments
from bitnest.kernels.sparse import positions, spread
from bitnest.kernels.trits import TritStream, decode_trits, unpack_trits

Tensors = Mapping[str, torch.Tensor]
SIGNS_SEED = 0  # of @rhad's random signs

# QLoRA's 4-bit NormalFloat (Dettmers et al., 2023, appendix E): quantiles of the normal
# distribution that cover both tails evenly, with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def decode(
    tensors: Tensors,
    fmt: AnyFormat,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The (out, in) weight stored as `fmt.parts(shape)` lays it out."""
    if isinstance(fmt, DenseFormat):
        return tensors["weight"].to(dtype)
    if isinstance(fmt, ZeroFormat):
        return torch.zeros(shape, dtype=dtype)
    if isinstance(fmt, BlockFormat):
        return _decode_block(tensors, fmt, shape, dtype)
    if isinstance(fmt, NestedFormat):
        return decode_nested(tensors, fmt, shape, dtype)
    if isinstance(fmt, SparseFormat):
        return _decode_sparse(tensors, fmt, shape, dtype)
    if isinstance(fmt, BlockSparseFormat):
        return _decode_blocks(tensors, fmt, shape, dtype)
    if isinstance(fmt, SplitFormat):
        return torch.cat(
            [decode(own, f, s, dtype) for own, f, s in split_tensors(tensors, fmt, shape)], 1
        )
    weight = decode(tensors, fmt.base, shape)
    if isinstance(fmt, LowRankFormat):
        return weight.add_(low_rank(tensors)).to(dtype)
    return undo_transform(weight, fmt, tensors).to(dtype)


def split_tensors(
    tensors: Tensors, fmt: SplitFormat, shape: tuple[int, int]
) -> list[tuple[dict[str, torch.Tensor], BlockFormat, tuple[int, int]]]:
    """Stored tensors, format and shape of the wider columns, if there are any, and of the rest."""
    first, rest = fmt.shapes(shape)
    wide = {n.removeprefix(WIDE): t for n, t in tensors.items() if n.startswith(WIDE)}
    others = {n: t for n, t in tensors.items() if not n.startswith(WIDE)}
    parts = [(wide, fmt.wide, first), (others, fmt.base, rest)]
    return parts if first[1] else parts[1:]


def undo_transform(weight: torch.Tensor, fmt: TransformedFormat, tensors: Tensors) -> torch.Tensor:
    """The transformed matrix (..., O, I) back in its own basis. tensors: `channels` or `order`."""
    if fmt.kind == "awq":
        return weight / tensors["channels"].to(weight.dtype)
    if fmt.kind == "perm":
        return weight[..., tensors["order"].long().argsort()]
    signs = random_signs(weight.shape[-1], SIGNS_SEED) if fmt.kind == "rhad" else None
    return unrotate(weight, fmt.block or whole_block(weight.shape[-1]), signs)


def low_rank(tensors: Tensors) -> torch.Tensor:
    """The residual B A of a low-rank format, (O, I) float32."""
    left = tensors["left"].float() * tensors["left_scales"].float()
    return left @ (tensors["right"].float() * tensors["right_scales"].float()[:, None])


def code_values(tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int]) -> torch.Tensor:
    """What the codes stand for, before zero point and scale: (O, I) float32."""
    rows, columns = shape
    element = fmt.element
    if isinstance(element, IntElement):
        return unpack_bits(tensors["codes"], element.bits, columns).float()
    if isinstance(element, FloatElement):
        parts = {name: tensors[name] for name in split_parts(element.bits)}
        return decode_minifloat(unpack_segments(parts, element.bits, columns), element.spec)
    if isinstance(element, TernaryElement):
        if not element.coded:
            return unpack_trits(tensors["codes"], columns).float()
        stream = TritStream(tensors["codes"], tensors["starts"], int(tensors["zeros_share"]))
        return decode_trits(stream, rows, columns).float()
    codes = unpack_bits(tensors["codes"], element.bits, columns).long()
    if not element.learned:
        return torch.tensor(NF4, device=codes.device)[codes]
    table = tensors["table"].float()
    return table[codes] if table.dim() == 1 else table.gather(1, codes)


def _decode_block(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    values = code_values(tensors, fmt, shape)
    if "scales" not in tensors:  # a table per row holds the weights themselves
        return values.to(dtype)
    return scaled(values, tensors, fmt, dtype)


def scaled(
    values: torch.Tensor, tensors: Tensors, fmt: BlockFormat, dtype: torch.dtype
) -> torch.Tensor:
    """(values - zeros) * scales, of values (O, I) float32, which are used up."""
    rows, columns = values.shape
    g, groups = fmt.group_size(columns), fmt.groups(columns)
    scales = per_row(unpack_scales(tensors, fmt, groups), fmt, rows)
    zeros = zero_points(tensors, fmt, rows, groups)
    whole = columns // g * g
    weight = torch.empty((rows, columns), dtype=dtype, device=values.device)
    if whole:
        body, count = values[:, :whole].unflatten(1, (-1, g)), whole // g
        if zeros is not None:
            body = body.sub_(zeros[:, :count, None])
        weight[:, :whole] = body.mul_(scales[:, :count, None]).flatten(1).to(dtype)
    if whole < columns:
        tail = values[:, whole:]
        if zeros is not None:
            tail = tail.sub_(zeros[:, -1:])
        weight[:, whole:] = tail.mul_(scales[:, -1:]).to(dtype)
    return weight


def _decode_sparse(
    tensors: Tensors, fmt: SparseFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    rows, columns = shape
    place = positions(tensors["mask"], fmt, columns)
    base = fmt.base
    if isinstance(base, DenseFormat):
        return spread(tensors["values"], place, columns, dtype)
    values = code_values(tensors, base, (rows, place.shape[1]))
    group, groups = place // base.group_size(columns), base.groups(columns)
    zeros = zero_points(tensors, base, rows, groups)
    if zeros is not None:
        values = values.sub_(zeros.gather(1, group))
    scales = unpack_scales(tensors, base, groups)
    return spread(values.mul_(scales.gather(1, group)), place, columns, dtype)


def _decode_blocks(
    tensors: Tensors, fmt: BlockSparseFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    keep, base = block_mask(tensors["mask"], fmt, shape), fmt.base
    if isinstance(base, DenseFormat):
        return place_blocks(tensors["values"].to(dtype), keep, fmt, shape)
    r, c = fmt.block(shape)
    stored = code_values(tensors, base, (fmt.kept(shape), r * c))
    weight = scaled(place_blocks(stored, keep, fmt, shape), tensors, base, dtype)
    return weight.mul_(spread_mask(keep, fmt, shape))


def zero_points(tensors: Tensors, fmt: BlockFormat, rows: int, groups: int) -> torch.Tensor | None:
    """Zero points (O, G), None where they are all 0."""
    element = fmt.element
    if isinstance(element, FloatElement | TableElement):
        return None
    device = tensors["scales"].device
    if element.symmetric:
        return torch.full((rows, groups), element.zero, device=device)
    stored = unpack_bits(tensors["zeros"].T, int(element.bits), fmt.scale_rows(rows)).T
    return per_row(stored.float(), fmt, rows)


def per_row(stored: torch.Tensor, fmt: BlockFormat, rows: int) -> torch.Tensor:
    """(R, G) to (O, G): blocks of rows share theirs."""
    if fmt.rows == 1:
        return stored
    if fmt.rows is None:
        return stored.expand(rows, -1)
    return stored.repeat_interleave(min(fmt.rows, rows), dim=0)[:rows]
