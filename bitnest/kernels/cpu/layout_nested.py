"""Nested weights: planes apart, most significant first, read at any of their widths.

    kind   kernel                         table or scales of width w         rounded
    nest   TABLE                          its table, bfloat16                2^-9 of a weight
    mat    TABLE                          a (code + 1/2) + b, bfloat16       2^-9 of a weight
    mwq    INTEGER, of w_0 bits and then  zeros and scales; +-1 and scales   nothing
           of one bit a plane, added up
    any, stack: left to the reference

In memory a plane is 2 bits (the first two, where the narrowest width has them) or one bit, whatever
the planes of the format hold: the kernels merge halves (`tables.h`), and a width of w bits reads w
bits of each code. A product of a narrower width takes the same planes, the first ones, and a table
of its own. Further widths are added in place (`change`): planes that are there stay where they are.

Why `any` is not here: its tables are of a row, a lane is a row, and no instruction looks up in
another table in every lane. Why not `stack`: its signs multiply magnitudes of low rank, which have
to be computed first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bitnest.errors import FormatError
from bitnest.formats.nested import NestedFormat
from bitnest.kernels.cpu.arena import allocate, hold
from bitnest.kernels.cpu.layout_integers import in_blocks, move_codes, out_of_blocks
from bitnest.kernels.cpu.layout_tables import hold_table, table_struct
from bitnest.kernels.cpu.library import INTEGER, SCALE_BF16, SCALE_F16, Weight
from bitnest.kernels.cpu.linear import CpuWeight
from bitnest.kernels.inputs import Coded
from bitnest.kernels.nested import table_of
from bitnest.kernels.packing import pack_bits, unpack_bits

Tensors = Mapping[str, torch.Tensor]
KINDS = ("nest", "mat", "mwq")


def why_not(fmt: NestedFormat, shape: tuple[int, int]) -> str:
    """Empty if the kernels run it."""
    if fmt.kind == "any":
        return "a table per row would differ in every lane"
    return "" if fmt.kind in KINDS else "magnitudes of low rank are computed before a product"


def lay_out(tensors: Tensors, fmt: NestedFormat, shape: tuple[int, int]) -> NestedCpuWeight:
    """The weight in the memory of cpu.h, at all widths of fmt."""
    struct = table_struct(shape, fmt.group_size(shape[1]), fmt.groups(shape[1]))
    weight = NestedCpuWeight(struct, {}, shape, _restore, fmt=fmt)
    weight.stored = {}
    for width in fmt.widths:
        _add_width(weight, fmt.at(width), tensors)
    weight.struct = weight.at[fmt.widths[-1]][0]
    return weight


@dataclass
class NestedCpuWeight(CpuWeight):
    """A nested matrix. fmt: at the widest width that is here. at: the structs of each width, whose
    products are added up. stored: small tensors as they were given, for `restore`."""

    fmt: NestedFormat = field(default_factory=lambda: NestedFormat("nest", (4,)))
    at: dict[int, list[Weight]] = field(default_factory=dict)
    stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def product(
        self, x: torch.Tensor, planes: int | None = None, *, bits: int | None = None
    ) -> torch.Tensor:
        """x W^T at a width, the widest unless `bits` says which. planes: see CpuWeight.

        Raises:
            FormatError: a width that is not here.
        """
        structs = self.at[self.fmt.at(bits).widths[-1] if bits else self.fmt.widths[-1]]
        if len(structs) == 1:
            return self.multiply(structs[0], x, planes)
        planes = planes or (3 if x.dtype == torch.float32 else 2)
        total = self.multiply(structs[0], x.float(), planes)
        for struct in structs[1:]:
            total += self.multiply(struct, x.float(), planes)
        return total.to(x.dtype)

    def takes(self, parts: Sequence[Coded]) -> bool:
        """No: rounded inputs meet nested weights in the reference, width by width."""
        return False

    def change(self, fmt: NestedFormat, tensors: Tensors) -> None:
        """Become `fmt`, which has the narrower widths of what is here. tensors: of what it adds.

        Raises:
            FormatError: neither is a prefix of the other.
        """
        both = min(len(fmt.widths), len(self.fmt.widths))
        if fmt.at(fmt.widths[both - 1]) != self.fmt.at(self.fmt.widths[both - 1]):
            raise FormatError(f"{self.fmt.name} cannot become {fmt.name}: other planes")
        for width in fmt.widths[both:]:
            _add_width(self, fmt.at(width), {**self.stored, **tensors})
        for width in self.fmt.widths[both:]:
            del self.at[width]
            for bit in self.fmt.bits_of(width):
                self.held.pop(f"scales{bit}", None)
                self.held.pop(f"bit{bit}", None)
            self.held.pop(f"table{width}", None)
            for name in self.fmt.width_parts(width, self.shape):
                self.stored.pop(name, None)
                self.held.pop(name, None)
        self.fmt, self.struct = fmt, self.at[fmt.widths[-1]][0]


def _add_width(weight: NestedCpuWeight, fmt: NestedFormat, tensors: Tensors) -> None:
    """Planes of fmt's widest width, and structs that read it with the narrower ones."""
    width, shape = fmt.widths[-1], weight.shape
    first = width == fmt.widths[0]
    for name in fmt.width_parts(width, shape):
        if not name.startswith("plane") and name != "zeros" and not name.startswith("scales"):
            weight.stored[name] = tensors[name].clone()
    _add_planes(weight, fmt, tensors[f"plane{width}"])
    if first:
        weight.held["scales"] = in_blocks(tensors["scales"])
    if fmt.kind == "mwq":
        _add_residuals(weight, fmt, tensors)
        return
    struct = _struct(weight, fmt)
    _point(struct, weight, _bits(fmt, width))
    table = hold_table(_table({**weight.stored, **tensors}, fmt))
    weight.held[f"table{width}"] = table
    struct.table = table.data_ptr()
    _point_scales(struct, weight.held["scales"])
    weight.at[width] = [struct]


def _table(tensors: Tensors, fmt: NestedFormat) -> torch.Tensor:
    """(2^w,) float32 of fmt's widest width."""
    if fmt.kind == "nest":
        return table_of(tensors, fmt)
    a, b = tensors[f"affine{fmt.widths[-1]}"].float()
    return torch.arange(1 << fmt.widths[-1]).float().add_(0.5).mul_(a).add_(b)


def _add_residuals(weight: NestedCpuWeight, fmt: NestedFormat, tensors: Tensors) -> None:
    """mwq: the base, and one struct for each further bit, of +-1 (codes 0 and 2 less 1)."""
    width, held = fmt.widths[-1], weight.held
    if width == fmt.widths[0]:
        base = _struct(weight, fmt)
        _point(base, weight, _bits(fmt, width))
        zeros = unpack_bits(tensors["zeros"].T, width, weight.shape[0]).T
        held["zeros"] = in_blocks(zeros)
        base.zeros = held["zeros"].data_ptr()
        _point_scales(base, held["scales"])
        weight.at[width] = [base]
        return
    signs = hold(torch.tensor([0, 2] + [0] * 62, dtype=torch.uint8))
    held[f"table{width}"] = signs
    structs = list(weight.at[fmt.widths[-2]])
    for bit in fmt.bits_of(width):
        struct = _struct(weight, fmt)
        _point(struct, weight, [bit])
        held[f"scales{bit}"] = in_blocks(tensors[f"scales{bit}"])
        _point_scales(struct, held[f"scales{bit}"])
        struct.table, struct.zero = signs.data_ptr(), 1
        structs.append(struct)
    weight.at[width] = structs


def _struct(weight: NestedCpuWeight, fmt: NestedFormat) -> Weight:
    columns = weight.shape[1]
    struct = table_struct(weight.shape, fmt.group_size(columns), fmt.groups(columns))
    if fmt.kind == "mwq":
        struct.engine = INTEGER
    return struct


def _point_scales(struct: Weight, scales: torch.Tensor) -> None:
    struct.scale_kind = SCALE_F16 if scales.dtype == torch.float16 else SCALE_BF16
    struct.scales = scales.data_ptr()


def _bits(fmt: NestedFormat, width: int) -> list[int]:
    """Names of the planes in memory up to a width: the bit each begins at."""
    two = fmt.widths[0] > 1
    return [1, *range(3 if two else 2, width + 1)]


def _point(struct: Weight, weight: NestedCpuWeight, bits: list[int]) -> None:
    """Let a struct read planes."""
    for k, bit in enumerate(bits):
        plane = weight.held[f"bit{bit}"]
        width = len(plane) // (64 * struct.blocks * struct.units)
        struct.plane[k] = plane.data_ptr()
        struct.plane_bits[k], struct.plane_stride[k] = width, 64 * width
    struct.planes = len(bits)
    struct.bits = sum(struct.plane_bits[k] for k in range(len(bits)))


def _add_planes(weight: NestedCpuWeight, fmt: NestedFormat, stream: torch.Tensor) -> None:
    """The plane of fmt's widest width, in memory of 2 bits or one."""
    width = fmt.widths[-1]
    struct = _struct(weight, fmt)
    names = [bit for bit in _bits(fmt, width) if bit in fmt.bits_of(width)]
    for bit in names:
        size = 2 if bit == 1 and fmt.widths[0] > 1 else 1
        weight.held[f"bit{bit}"] = allocate(struct.blocks * struct.units * size * 64)
    _point(struct, weight, names)
    move_codes(struct, range(struct.planes), stream.contiguous(), struct.bits)


def _restore(made: CpuWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of all widths."""
    assert isinstance(made, NestedCpuWeight)
    fmt, shape = made.fmt, made.shape
    found = {name: tensor.clone() for name, tensor in made.stored.items()}
    for width in fmt.widths:
        own = fmt.at(width)
        struct = _struct(made, own)
        _point(struct, made, [bit for bit in _bits(own, width) if bit in own.bits_of(width)])
        part = own.width_parts(width, shape)[f"plane{width}"]
        found[f"plane{width}"] = torch.zeros(part.shape, dtype=torch.int32)
        move_codes(struct, range(struct.planes), found[f"plane{width}"], struct.bits, back=True)
    for name in [n for n in made.held if n.startswith("scales")]:
        found[name] = out_of_blocks(made.held[name], shape[0])
    if "zeros" in made.held:
        zeros = out_of_blocks(made.held["zeros"], shape[0])
        found["zeros"] = pack_bits(zeros.T, fmt.widths[0]).T.contiguous()
    return found
