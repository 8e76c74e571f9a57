"""Products with sparse weights: 2:4, n:m and unstructured, survivors of 4, 8 or 16 bits.

    y[t, o] = sum over kept (o, i) of x[t, i] w[o, i]

Only the mask and the survivors are read; 64 columns at a time are spread in registers and
multiplied as if dense. Codes meet inputs in integers, exactly within a cell; 16-bit values meet
float32. Laid out at load: masks as 64-bit words, survivors of 64 columns from a whole byte on (2:4
at 4 bits is as stored), scales in float32. The reference is a product with `kernels/decode.decode`.

Left out: codes of other widths, floats and tables as codes, blocks (`%b16x16`): `why_not` says so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bitnest.formats import AnyFormat, BlockFormat, DenseFormat, SparseFormat
from bitnest.formats.elements import IntElement
from bitnest.kernels.cpu import team
from bitnest.kernels.cpu.linear import code_planes, given_codes, one_run
from bitnest.kernels.decode import zero_points
from bitnest.kernels.inputs import Coded
from bitnest.kernels.packing import pack_bits, unpack_bits
from bitnest.kernels.scales import unpack_scales
from bitnest.kernels.sparse import positions

PIECE, TAIL = 64, 64  # columns that are spread at once; bytes that may be read behind the last
HALVES = {torch.bfloat16: 16, torch.float16: 17}
Tensors = Mapping[str, torch.Tensor]


class _Sparse(ctypes.Structure):
    """`sparse_t` of sparse.h."""

    _fields_ = [
        ("rows", c_int64), ("columns", c_int64), ("pieces", c_int64), ("bits", c_int32),
        ("zero", c_int32), ("group", c_int32), ("groups", c_int32), ("mask", c_void_p),
        ("values", c_void_p), ("starts", c_void_p), ("scales", c_void_p), ("zeros", c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class SparseWeight:
    """A sparse weight as the kernel reads it.

    shape: (O, I). bits: 4 or 8 of codes, 16 for bfloat16, 17 for float16. mask: (O, pieces) int64.
    values: uint8, survivors and TAIL bytes. starts: (O,) int64, bytes. scales: (O, G) float32 of
    codes. zeros: (O, G) uint8 or None: `zero` for all. group: columns. kept: tensors that come back
    as they were stored.
    """

    shape: tuple[int, int]
    fmt: SparseFormat
    bits: int
    mask: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    zero: int
    group: int
    kept: dict[str, torch.Tensor]

    path = "cpu"

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        """x W^T, (T, O) of x (T, I), in x's type. planes: bytes that inputs are cut into where
        weights are codes; None: as their type deserves."""
        wide = x.float().contiguous()
        if self.bits > 8:
            return product_halves(wide, self).to(x.dtype)
        planes = planes or (3 if x.dtype == torch.float32 else 2)
        inputs, _held = code_planes(wide, planes)
        return product_codes(inputs, self).to(x.dtype)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        """x W^T, (T, O) float32, of integer inputs; None where the kernel does not take them."""
        if self.bits > 8 or not one_run(parts, self.shape[1], PIECE):
            return None
        inputs, _held = given_codes(parts[0], self.mask.shape[1] * PIECE)
        return product_codes(inputs, self)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        parts = (self.mask, self.values, self.starts, self.scales, self.zeros)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def struct(self) -> _Sparse:
        """For the C functions; points into this."""
        groups = 1 if self.scales is None else self.scales.shape[1]
        return _Sparse(
            *self.shape, self.mask.shape[1], self.bits, self.zero, self.group, groups,
            *(None if t is None else t.data_ptr()
              for t in (self.mask, self.values, self.starts, self.scales, self.zeros)),
        )  # fmt: skip

    def restore(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        words = -(-self.shape[1] // 32)
        mask = self.mask.view(torch.int32)[:, :words].contiguous()
        keep = unpack_bits(mask, 1, self.shape[1]).bool()
        places, survivors = _places(keep, self.bits), self.fmt.kept(self.shape[1])
        if self.bits > 8:
            dtype = torch.bfloat16 if self.bits == 16 else torch.float16
            values = self.values[:-TAIL].view(dtype)
            return {"mask": mask, "values": values.view(-1, survivors).clone(), **self.kept}
        codes = self.values
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten()
        found = codes[places].view(-1, survivors)
        return {"mask": mask, "codes": pack_bits(found, self.bits), **self.kept}


def why_not(fmt: AnyFormat) -> str | None:
    """Why weights of that format are left to the reference; None: the kernel takes them."""
    if team.library() is None:
        return "no native code here"
    if not isinstance(fmt, SparseFormat):
        return f"{fmt.name} keeps other things than single weights"
    base = fmt.base
    if isinstance(base, DenseFormat):
        return None
    if not isinstance(base.element, IntElement) or base.element.bits not in (4, 8):
        return f"survivors of {base.name}"
    return "groups that no lane of 4 columns fits" if _group(base, 1 << 20) % 4 else None


def lay_out_sparse(tensors: Tensors, fmt: SparseFormat, shape: tuple[int, int]) -> SparseWeight:
    """A weight (O, I) from its stored tensors. `why_not` must have had no reason.

    Raises:
        FormatError: a mask that is not the format's.
    """
    rows, columns = shape
    base, pieces = fmt.base, -(-columns // PIECE)
    place = positions(tensors["mask"], fmt, columns)  # refuses damaged masks
    mask = F.pad(tensors["mask"], (0, 2 * pieces - tensors["mask"].shape[1])).contiguous()
    keep = unpack_bits(tensors["mask"], 1, columns).bool()
    kept = {n: t for n, t in tensors.items() if n not in ("mask", "codes", "values")}
    if isinstance(base, DenseFormat):
        values, size = tensors["values"].contiguous(), place.shape[1] * 2
        data = torch.cat([values.view(torch.uint8).flatten(), torch.zeros(TAIL, dtype=torch.uint8)])
        starts = torch.arange(rows) * size
        bits = HALVES[values.dtype]
        return SparseWeight(
            shape, fmt, bits, mask.view(torch.int64), data, starts, None, None, 0, columns, kept
        )
    bits = int(base.element.bits)
    codes = unpack_bits(tensors["codes"], bits, place.shape[1]).flatten()
    places = _places(keep, bits)
    count = _row_bytes(keep, bits)
    data = torch.zeros(int(count.sum()) * (8 // bits) + TAIL * (8 // bits), dtype=torch.uint8)
    data[places] = codes
    if bits == 4:
        data = data[0::2] | data[1::2] << 4
    groups = base.groups(columns)
    scales = unpack_scales(tensors, base, groups).float().contiguous()
    zeros = zero_points(tensors, base, rows, groups)
    assert zeros is not None
    same = base.element.symmetric
    return SparseWeight(
        shape, fmt, bits, mask.view(torch.int64), data.contiguous(), count.cumsum(0) - count,
        scales, None if same else zeros.to(torch.uint8).contiguous(),
        int(zeros.flatten()[0]) if same else 0, _group(base, columns), kept,
    )  # fmt: skip


def declare(library: ctypes.CDLL) -> None:
    """Say what the C functions take."""
    library.sparse_scratch.argtypes = [c_void_p, c_int64, ctypes.c_int]
    library.sparse_scratch.restype = c_int64
    library.sparse_codes.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]
    library.sparse_codes.restype = None
    library.sparse_halves.argtypes = [
        c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p,
    ]  # fmt: skip
    library.sparse_halves.restype = None


def product_codes(x: Any, weight: SparseWeight) -> torch.Tensor:
    """x W^T, (T, O) float32. x: an `inputs_t` of planes whose block is a multiple of 64 columns."""
    library = team.library()
    assert library is not None, "why_not was not asked"
    assert x.block % PIECE == 0, "blocks of inputs hold whole pieces"
    y = torch.empty(x.tokens, weight.shape[0])
    struct, (address, _scratch) = weight.struct, _scratch_of(library, weight, x.tokens, x.planes)
    if x.tokens:
        library.sparse_codes(
            ctypes.byref(struct), ctypes.byref(x), y.data_ptr(), y.stride(0), address
        )
    return y


def product_halves(x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
    """x W^T, (T, O) float32, of x (T, I) and 16-bit survivors."""
    library = team.library()
    assert library is not None, "why_not was not asked"
    x = x.float() if x.stride(-1) == 1 else x.float().contiguous()
    y = torch.empty(len(x), weight.shape[0])
    struct, (address, _scratch) = weight.struct, _scratch_of(library, weight, len(x), 0)
    if len(x):
        library.sparse_halves(
            ctypes.byref(struct), x.data_ptr(), len(x), x.stride(0), y.data_ptr(), y.stride(0),
            address,
        )  # fmt: skip
    return y


def _scratch_of(
    library: ctypes.CDLL, weight: SparseWeight, tokens: int, planes: int
) -> tuple[int, torch.Tensor]:
    size = library.sparse_scratch(ctypes.byref(weight.struct), tokens, planes)
    scratch = torch.empty(size + 64, dtype=torch.uint8)
    return -(-scratch.data_ptr() // 64) * 64, scratch


def _group(base: BlockFormat, columns: int) -> int:
    return base.group_size(columns)


def _counts(keep: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Survivors before each weight of its piece, and bytes of each piece (O, pieces)."""
    rows, columns = keep.shape
    cells = F.pad(keep, (0, -columns % PIECE)).view(rows, -1, PIECE)
    count = cells.sum(2)
    return cells.cumsum(2) - 1, (count * bits + 7) // 8


def _row_bytes(keep: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes of each row's survivors (O,)."""
    return _counts(keep, bits)[1].sum(1)


def _places(keep: torch.Tensor, bits: int) -> torch.Tensor:
    """Where each survivor goes among codes, in the order of the mask: int64."""
    before, size = _counts(keep, bits)
    start = (size.flatten().cumsum(0).view(size.shape) - size) * (8 // bits) if bits <= 8 else size
    places = (start[..., None] + before).flatten(1)[:, : keep.shape[1]]
    return places[keep]
