"""Decoding nested codes at any of their widths; see `formats/nested.py` for what is stored.

Choosing codes for all widths at once is here too (`choose`), in C where there is a compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from bitnest.formats.nested import NestedFormat
from bitnest.kernels import native
from bitnest.kernels.packing import pack_bits, unpack_bits

Tensors = Mapping[str, torch.Tensor]
STEP = 1 << 20  # weights of stack decoded at a time, so that a block's product stays small


def decode_nested(
    tensors: Tensors, fmt: NestedFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The (out, in) weight at the widest of fmt's widths, computed in float32, rounded once."""
    columns = shape[1]
    if fmt.kind == "stack":
        return _decode_stack(tensors, fmt, shape, dtype)
    codes = join_planes(tensors, fmt, columns)
    if fmt.kind == "any":
        table = tensors[f"table{fmt.widths[-1]}"].float()
        return table.gather(1, codes.long()).to(dtype)
    if fmt.kind == "mwq":
        return _decode_residuals(tensors, fmt, shape, codes).to(dtype)
    if fmt.kind == "nest":
        values = table_of(tensors, fmt)[codes.long()]
    else:
        a, b = tensors[f"affine{fmt.widths[-1]}"].float()
        values = codes.float().add_(0.5).mul_(a).add_(b)
    scales = tensors["scales"].float().repeat_interleave(fmt.group_size(columns), dim=1)
    return values.mul_(scales[:, :columns]).to(dtype)


def join_planes(tensors: Tensors, fmt: NestedFormat, columns: int) -> torch.Tensor:
    """Codes (O, I) uint8 of fmt's widest width."""
    codes: torch.Tensor | None = None
    for width in fmt.widths:
        bits = fmt.plane_bits(width)
        plane = unpack_bits(tensors[f"plane{width}"], bits, columns)
        codes = plane if codes is None else (codes << bits) | plane
    assert codes is not None
    return codes


def split_planes(codes: torch.Tensor, fmt: NestedFormat) -> dict[str, torch.Tensor]:
    """Planes of codes (O, I) uint8 of fmt's widest width: the inverse of `join_planes`."""
    top, planes = fmt.widths[-1], {}
    for width in fmt.widths:
        bits = fmt.plane_bits(width)
        planes[f"plane{width}"] = pack_bits((codes >> (top - width)) & ((1 << bits) - 1), bits)
    return planes


def table_of(tensors: Tensors, fmt: NestedFormat) -> torch.Tensor:
    """nest's table of the widest width, (2^w,) float32: the widest stored one, its cells halved as
    often as bits are missing."""
    stored = max(w for w in fmt.widths if f"table{w}" in tensors)
    table = tensors[f"table{stored}"].float()
    for _ in range(fmt.widths[-1] - stored):
        table = halve(table)
    return table


def halve(table: torch.Tensor) -> torch.Tensor:
    """Two entries for each of an ascending table (n,), n >= 2: halfway to where its cell ends.

    Cells end midway between entries; the outer ones are as wide outwards as inwards.
    """
    half = (table[1:] - table[:-1]) / 4
    down, up = torch.cat([half[:1], half]), torch.cat([half, half[-1:]])
    return torch.stack([table - down, table + up], dim=1).flatten()


def _decode_residuals(
    tensors: Tensors, fmt: NestedFormat, shape: tuple[int, int], codes: torch.Tensor
) -> torch.Tensor:
    """mwq: base integers, then a signed scale per further bit, (O, I) float32."""
    rows, columns = shape
    g, first, top = fmt.group_size(columns), fmt.widths[0], fmt.widths[-1]

    def spread(stored: torch.Tensor) -> torch.Tensor:
        return stored.float().repeat_interleave(g, dim=1)[:, :columns]

    zeros = unpack_bits(tensors["zeros"].T, first, rows).T
    weight = (codes >> (top - first)).float().sub_(spread(zeros)).mul_(spread(tensors["scales"]))
    for bit in range(first + 1, top + 1):
        sign = ((codes >> (top - bit)) & 1).float().mul_(2).sub_(1)
        weight.addcmul_(sign, spread(tensors[f"scales{bit}"]))
    return weight


def _decode_stack(
    tensors: Tensors, fmt: NestedFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """stack: signs times low-rank magnitudes, added up, (O, I); some rows at a time."""
    rows, columns = shape
    weight = torch.empty(shape, dtype=dtype, device=tensors["channels"].device)
    channels = tensors["channels"].float()
    top = fmt.widths[-1]
    step = max(1, STEP // columns)
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        planes = {name: t[own] for name, t in tensors.items() if name.startswith("plane")}
        codes = join_planes(planes, fmt, columns)
        total = torch.zeros(codes.shape, device=weight.device)
        for bit in range(1, top + 1):
            sign = ((codes >> (top - bit)) & 1).float().mul_(2).sub_(1)
            left, right = tensors[f"left{bit}"][own].float(), tensors[f"right{bit}"].float()
            total.addcmul_(sign, left @ right)
        weight[own] = total.div_(channels)
    return weight


def choose(
    targets: torch.Tensor, tables: Sequence[torch.Tensor], share: torch.Tensor
) -> torch.Tensor:
    """Codes of least sum_k share_k (x_k - table_k[first bits of the code])^2: (n,) uint8.

    targets: (widths, n) float32, x at each width. tables: (2^w,) float32 per width, narrowest
    first. share: (widths,). Ties go to the lowest code.
    """
    library = _library()
    if library is None or targets.device.type != "cpu":
        return choose_reference(targets, tables, share)
    widths, count = targets.shape
    targets = targets.contiguous()
    flat = torch.cat([table.float() for table in tables]).contiguous()
    bits = (ctypes.c_int * widths)(*(len(t).bit_length() - 1 for t in tables))
    codes = torch.empty(count, dtype=torch.uint8)
    share = share.float().contiguous()
    library.nested_choose(
        targets.data_ptr(), count, widths, bits, flat.data_ptr(), share.data_ptr(), codes.data_ptr()
    )
    return codes


def choose_reference(
    targets: torch.Tensor, tables: Sequence[torch.Tensor], share: torch.Tensor
) -> torch.Tensor:
    """The same in torch: costs of all codes, added along the tree."""
    total = targets.new_zeros(targets.shape[1], 1)
    for x, table, part in zip(targets, tables, share, strict=True):
        total = total.repeat_interleave(len(table) // total.shape[1], dim=1)
        miss = x[:, None] - table[None].to(x)
        total = total + part.to(x) * (miss * miss)
    return total.argmin(1).to(torch.uint8)


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("nested")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.nested_choose.argtypes = [
            pointer, number, ctypes.c_int, ctypes.POINTER(ctypes.c_int), pointer, pointer, pointer,
        ]  # fmt: skip
        library.nested_choose.restype = None
    return library
