"""Stored weights as GPU kernels read them: made once when a weight is loaded, on its device.

    words    int32 (n,)    codes in segments of 8, 4, 2 and 1 bits, shuffled (`words`); widths of a
                           nested weight one after another, so a narrower one is a prefix
    scales   (..., G, R)   the stored numbers of scales, groups first; shifts of m2 in bytes
    shared   super-scales (G, R') or (R,), the global scale (1,)
    zeros    uint8 (G, R)  zero points
    tables   by width: float32 (2^w,) or lines (2,); 16-bit (N, 2^w) for tables per row

What a code stands for is one of KINDS, how a scale is stored one of SCALES. Everything that a
kernel must know when it is compiled is the tuple `GpuWeight.spec` gives. Ternary codes take 2 bits
here instead of 1.6; bytes of zero points and shifts 8 bits instead of 1 to 8: `nbytes` counts them.
`restore` gives the stored tensors back, bit for bit, provided that padding bits were zero.

Left out, with a reason from `why`: wrapped, split, sparse and dense formats (rotate first, add the
residual after, multiply parts: the caller's), entropy-coded ternary codes, stack, floats of five
exponent and no or one mantissa bits, which leave float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bitnest.formats import AnyFormat, BlockFormat, NestedFormat
from bitnest.formats.block import SHIFT_BITS
from bitnest.formats.elements import FloatElement, IntElement, TableElement, TernaryElement
from bitnest.formats.segments import segments, split_parts
from bitnest.kernels.decode import NF4
from bitnest.kernels.gpu.restoring import block_tensors, cut, nested_tensors
from bitnest.kernels.gpu.words import BLOCK, blocks_of, lanes_of, shuffle, unshuffle
from bitnest.kernels.nested import table_of
from bitnest.kernels.packing import unpack_bits
from bitnest.kernels.segments import unpack_segments
from bitnest.kernels.trits import unpack_trits

Tensors = Mapping[str, torch.Tensor]
Spec = tuple[int, tuple[int, ...], int, int, int, int, float, int, int, int, int]

INT, ASYM, LINE, TABLE, ROW_TABLE, FLOAT, RESIDUAL = range(7)
KINDS = ("int", "asym", "line", "table", "row table", "float", "residual")
NONE, HALF, E8M0, E4M3, DQ, M2, DUAL = range(7)
SCALES = {"half": HALF, "e8m0": E8M0, "m1": E8M0, "e4m3": E4M3, "dq": DQ, "m2": M2, "dual": DUAL}
ALL_ROWS = 1 << 30  # rows of a scale that covers them all
SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits


@dataclass(frozen=True)
class GpuWeight:
    """See above. segs: of every width, cumulative prefixes; widest: bits of the widest segment."""

    fmt: BlockFormat | NestedFormat
    shape: tuple[int, int]
    words: torch.Tensor
    segs: dict[int, tuple[int, ...]]
    widest: int
    scales: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits at which it can be read."""
        return tuple(self.segs)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        tensors = (self.words, self.scales, self.shared, self.zeros, *self.tables.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def read_bytes(self, bits: int | None = None) -> int:
        """Bytes that a product at that width moves."""
        segs = self.segs[self.widths[-1] if bits is None else bits]
        size = 16 * self.shape[0] * blocks_of(self.shape[1]) * sum(segs)
        for tensor in (self.scales, self.shared, self.zeros):
            size += 0 if tensor is None else tensor.nbytes
        if self.kind == RESIDUAL and self.scales is not None:  # a scale per bit
            size -= self.scales[0].nbytes * (len(self.scales) - self._layers(segs))
        table = self.tables.get(sum(segs))
        return size + (0 if table is None else table.nbytes)

    @property
    def kind(self) -> int:
        """What codes stand for, an index of KINDS."""
        fmt = self.fmt
        if isinstance(fmt, NestedFormat):
            return {"nest": TABLE, "mat": LINE, "any": ROW_TABLE, "mwq": RESIDUAL}[fmt.kind]
        if isinstance(fmt.element, FloatElement):
            return FLOAT
        if isinstance(fmt.element, TableElement):
            return ROW_TABLE if fmt.learned and fmt.group is None else TABLE
        return INT if fmt.symmetric else ASYM

    @property
    def group(self) -> int:
        """Channels per scale; 0: a row has one scale or none."""
        size = self.fmt.group_size(self.shape[1])
        return 0 if size >= self.shape[1] else size

    def spec(self, bits: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Spec:
        """What kernels are compiled for, in the order of `tile.py`'s names. dtype: of products."""
        width = self.widths[-1] if bits is None else bits
        segs, fmt = self.segs[width], self.fmt
        scale, rows = NONE if self.scales is None else HALF, 1
        zero, exponent, mantissa = 0.0, 0, 0
        if isinstance(fmt, BlockFormat):
            scale = NONE if self.scales is None else SCALES[fmt.scale]
            rows = ALL_ROWS if fmt.rows is None else fmt.rows
            element = fmt.element
            if isinstance(element, IntElement | TernaryElement) and element.symmetric:
                zero = float(element.zero)
            if isinstance(element, FloatElement):
                exponent, mantissa = element.spec.exponent, element.spec.mantissa
        elif fmt.kind == "mat":
            zero = float(1 << (width - 1))
        base = len(self.segs[self.widths[0]]) if self.kind == RESIDUAL else len(segs)
        folds = int(self._folds(scale, dtype))
        lanes = lanes_of(self.widest)
        return (
            self.kind, segs, lanes, scale, self.group, rows, zero, exponent, mantissa, base, folds,
        )  # fmt: skip

    def _folds(self, scale: int, dtype: torch.dtype) -> bool:
        """Whether scale times value fits `dtype` exactly, so that it may enter the product."""
        if scale == DUAL:
            return True
        if scale in {E8M0, M2}:
            return scale == M2 or dtype != torch.float16
        if scale != E4M3 or not isinstance(self.fmt, BlockFormat):
            return False
        element = self.fmt.element
        if isinstance(element, FloatElement):
            bits = element.spec.mantissa + 1
        elif isinstance(element, IntElement):
            bits = element.bits - 1 if element.symmetric else element.bits
        else:
            return False
        return bits + 4 <= SIGNIFICANT[dtype]

    def _layers(self, segs: tuple[int, ...]) -> int:
        assert isinstance(self.fmt, NestedFormat)
        return 1 + sum(segs) - self.fmt.widths[0]

    def restore(self) -> dict[str, torch.Tensor]:
        """The stored tensors."""
        own = self.segs[self.widths[-1]]
        parts = list(zip(unshuffle(self.words, self.shape, own, self.widest), own, strict=True))
        if isinstance(self.fmt, NestedFormat):
            return nested_tensors(self, self.fmt, parts)
        return block_tensors(self, self.fmt, parts)


def why(fmt: AnyFormat, shape: tuple[int, int]) -> str:
    """Why a format has no layout here; empty if it has one."""
    if min(shape) < 1:
        return "an empty matrix"
    if isinstance(fmt, NestedFormat):
        return "stack has factors for every bit" if fmt.kind == "stack" else ""
    if not isinstance(fmt, BlockFormat):
        return f"{type(fmt).__name__}: its parts are multiplied one by one"
    element = fmt.element
    if isinstance(element, TernaryElement) and element.coded:
        return "entropy-coded codes have no addresses"
    if isinstance(element, FloatElement) and element.spec.exponent == 5 and element.bits < 8:
        return f"{element.spec.name} leaves float16"
    return ""


def lay_out(tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]) -> GpuWeight | None:
    """The weight stored as `fmt.parts(shape)` says; None where there is no kernel: see `why`.

    Small floats that hold codes which are not numbers have none either.
    """
    if why(fmt, shape):
        return None
    if isinstance(fmt, NestedFormat):
        return _nested(tensors, fmt, shape)
    assert isinstance(fmt, BlockFormat)
    codes, bits = _block_codes(tensors, fmt, shape)
    if isinstance(fmt.element, FloatElement) and fmt.element.spec.special_codes:
        special = torch.tensor(fmt.element.spec.special_codes, device=codes.device)
        if bool(torch.isin(codes.to(special.dtype), special).any()):
            return None
    own = segments(bits)
    fine = fmt.group is not None and math.gcd(fmt.group, BLOCK) < 32 and shape[1] > fmt.group
    if own == (8,) and fine:  # 32 neighbouring columns of an element would have two scales
        own = (4, 4)
    words = shuffle(cut(codes, bits, own), own[0])
    scales, shared, zeros = _block_scales(tensors, fmt, shape)
    return GpuWeight(
        fmt, shape, words, {bits: own}, own[0], scales, shared, zeros, _table(tensors, fmt, words)
    )


def _block_codes(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """Codes (N, K) uint8 and their bits."""
    element = fmt.element
    if isinstance(element, TernaryElement):
        return unpack_trits(tensors["codes"], shape[1]), 2
    if isinstance(element, FloatElement):
        parts = {name: tensors[name] for name in split_parts(element.bits)}
        return unpack_segments(parts, element.bits, shape[1]), element.bits
    return unpack_bits(tensors["codes"], element.bits, shape[1]), element.bits


def _block_scales(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    scales, shared = tensors.get("scales"), tensors.get("super", tensors.get("global"))
    if scales is not None:
        if fmt.scale == "m2":
            scales = unpack_bits(scales, SHIFT_BITS, fmt.groups(shape[1]))
        scales = scales.T.contiguous()
    if fmt.scale in {"dq", "m2", "dual"} and shared is not None:
        shared = shared.T.contiguous()
    zeros = None
    if "zeros" in tensors:
        rows = fmt.scale_rows(shape[0])
        zeros = unpack_bits(tensors["zeros"].T.contiguous(), int(fmt.bits), rows).contiguous()
    return scales, shared, zeros


def _table(tensors: Tensors, fmt: BlockFormat, like: torch.Tensor) -> dict[int, torch.Tensor]:
    element = fmt.element
    if not isinstance(element, TableElement):
        return {}
    if not element.learned:
        return {4: torch.tensor(NF4, device=like.device)}
    table = tensors["table"]
    return {element.bits: table.contiguous() if fmt.group is None else table.float()}


def _nested(tensors: Tensors, fmt: NestedFormat, shape: tuple[int, int]) -> GpuWeight:
    segs: list[int] = []
    prefixes: dict[int, tuple[int, ...]] = {}
    pieces: list[tuple[torch.Tensor, int]] = []
    for width in fmt.widths:
        bits = fmt.plane_bits(width)
        single = fmt.kind == "mwq" and width != fmt.widths[0]  # every bit has scales of its own
        own = (1,) * bits if single else segments(bits)
        pieces += cut(unpack_bits(tensors[f"plane{width}"], bits, shape[1]), bits, own)
        segs += own
        prefixes[width] = tuple(segs)
    widest, zeros, scales = max(segs), None, tensors.get("scales")
    if widest == 8 and fmt.group is not None and math.gcd(fmt.group, BLOCK) < 32:
        (codes, _), widest = pieces[0], 4
        pieces, prefixes = cut(codes, 8, (4, 4)), {8: (4, 4)}
    if scales is not None:
        scales = scales.T.contiguous()
    if fmt.kind == "mwq":
        bits = fmt.widths[0]
        zeros = unpack_bits(tensors["zeros"].T.contiguous(), bits, shape[0]).contiguous()
        more = [tensors[f"scales{b}"].T for b in range(bits + 1, fmt.widths[-1] + 1)]
        assert scales is not None
        scales = torch.stack([scales, *more]).contiguous()
    tables = {}
    for width in fmt.widths:
        if fmt.kind == "nest":
            tables[width] = table_of(tensors, fmt.at(width)).contiguous()
        elif fmt.kind == "any":
            tables[width] = tensors[f"table{width}"].contiguous()
        elif fmt.kind == "mat":
            tables[width] = tensors[f"affine{width}"].float()
    words = shuffle(pieces, widest)
    return GpuWeight(fmt, shape, words, prefixes, widest, scales, None, zeros, tables)
