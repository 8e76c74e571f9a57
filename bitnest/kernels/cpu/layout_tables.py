"""Weights that look numbers up, and bfloat16 weights.

    element          planes                   table (bfloat16)      rounded
    float            8, 4, 2, 1 of its bits   its values            nothing
    nf4              4                        QLoRA's 16 numbers    2^-9 at most
    lut2..lut4-g*    4, 2, 1 of its bits      the matrix's own      2^-9; nothing if it is bfloat16
    dense            -                        -                     nothing

Every number that a float of 8 bits or fewer stands for, subnormal ones too, is a normal bfloat16
number. Scales stay as they are stored and multiply float32 sums, so the table is the only thing
rounded: 2^-9 of each weight at most. Inputs are cut into bfloat16 parts that hold all of their bits
(1, 2 or 3 for bfloat16, float16 and float32).

Left out: tables per row (`lut4-channel`), whose look-up differs in every lane; dense weights of
float16 and float32, which bfloat16 does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from bitnest.formats import BlockFormat, DenseFormat
from bitnest.formats.elements import FloatElement, TableElement
from bitnest.formats.segments import segments, split_parts
from bitnest.kernels.cpu.arena import allocate, hold
from bitnest.kernels.cpu.layout_integers import (
    ROWS,
    UNIT,
    integer_values,
    move_codes,
    place_planes,
    put_scales,
    take_scales,
)
from bitnest.kernels.cpu.library import DENSE, TABLE, Weight
from bitnest.kernels.cpu.linear import CpuWeight
from bitnest.kernels.decode import NF4

Tensors = Mapping[str, torch.Tensor]


def why_not(fmt: BlockFormat | DenseFormat, shape: tuple[int, int]) -> str:
    """Empty if the table kernels run it."""
    if isinstance(fmt, DenseFormat):
        return "" if fmt.itemsize == 2 else "float32 weights are torch's"
    element = fmt.element
    if isinstance(element, FloatElement):
        known = integer_values(element.spec) is not None
        return f"{fmt.name} stands for small integers" if known else ""
    if not isinstance(element, TableElement):
        return f"{fmt.name} has no table"
    if element.learned and fmt.group is None:
        return "a table per row would differ in every lane"
    return ""


def lay_out(
    tensors: Tensors, fmt: BlockFormat | DenseFormat, shape: tuple[int, int]
) -> CpuWeight | None:
    """The weight in the memory of cpu.h; None for dense numbers that are not bfloat16."""
    if isinstance(fmt, DenseFormat):
        stored = tensors["weight"]
        return lay_dense(stored) if stored.dtype == torch.bfloat16 else None
    struct = table_struct(shape, fmt.group_size(shape[1]), fmt.groups(shape[1]))
    bits = int(fmt.bits)
    held = {"codes": place_planes(struct, segments(bits))}
    if isinstance(fmt.element, FloatElement):
        for k, name in enumerate(split_parts(bits)):
            move_codes(struct, range(k, k + 1), tensors[name].contiguous(), struct.plane_bits[k])
    else:
        move_codes(struct, range(struct.planes), tensors["codes"].contiguous(), bits)
    held["table"] = hold_table(_numbers(tensors, fmt))
    struct.table = held["table"].data_ptr()
    held |= put_scales(tensors, fmt, shape, struct)
    own = {"table": tensors["table"].clone()} if "table" in tensors else {}
    half = tensors["super" if "super" in tensors else "scales"].dtype
    weight = CpuWeight(struct, held, shape, lambda made: _restore(made, fmt) | own)
    weight.notes = {"half": half}
    return weight


def lay_dense(weight: torch.Tensor) -> CpuWeight:
    """A bfloat16 matrix (O, I)."""
    rows, columns = weight.shape
    struct = Weight(
        rows=rows, columns=columns, blocks=-(-rows // ROWS), units=-(-columns // UNIT),
        engine=DENSE, group=-(-columns // UNIT) * UNIT, groups=1, factor=1.0,
    )  # fmt: skip
    tall, wide = struct.blocks * ROWS, struct.units * UNIT
    padded = F.pad(weight, (0, wide - columns, 0, tall - rows))
    dense = hold(padded.view(struct.blocks, ROWS, -1, UNIT // 2, 2).permute(0, 2, 3, 1, 4))
    struct.dense = dense.data_ptr()

    def restore(made: CpuWeight) -> dict[str, torch.Tensor]:
        flat = made.held["dense"].permute(0, 3, 1, 2, 4).reshape(tall, wide)
        return {"weight": flat[:rows, :columns].contiguous()}

    return CpuWeight(struct, {"dense": dense}, (rows, columns), restore)


def table_struct(shape: tuple[int, int], group: int, groups: int) -> Weight:
    """A weight of TABLE without memory."""
    rows, columns = shape
    units = -(-columns // UNIT)
    return Weight(
        rows=rows, columns=columns, blocks=-(-rows // ROWS), units=units, engine=TABLE,
        group=units * UNIT if groups == 1 else group, groups=groups, factor=1.0,
    )  # fmt: skip


def hold_table(numbers: torch.Tensor) -> torch.Tensor:
    """(2^b,) float32 as high, then low bytes of bfloat16; zeros fill the last vector."""
    halves = numbers.to(torch.bfloat16).view(torch.int16).int()
    both = torch.cat([halves >> 8 & 255, halves & 255]).to(torch.uint8)
    return hold(F.pad(both, (0, -len(both) % 64)))


def place_apart(struct: Weight, widths: Sequence[int]) -> list[torch.Tensor]:
    """Memory for planes that lie apart, said to the struct."""
    memory = [allocate(struct.blocks * struct.units * width * 64) for width in widths]
    for k, (width, plane) in enumerate(zip(widths, memory, strict=True)):
        struct.plane_bits[k] = width
        struct.plane_stride[k] = width * 64
        struct.plane[k] = plane.data_ptr()
    struct.planes, struct.bits = len(widths), sum(widths)
    return memory


def _numbers(tensors: Tensors, fmt: BlockFormat) -> torch.Tensor:
    element = fmt.element
    if isinstance(element, FloatElement):
        return torch.tensor(element.spec.values())
    return tensors["table"].float() if fmt.learned else torch.tensor(NF4)


def _restore(weight: CpuWeight, fmt: BlockFormat) -> dict[str, torch.Tensor]:
    struct, bits, found = weight.struct, int(fmt.bits), {}
    parts = fmt.parts(weight.shape)
    floats = isinstance(fmt.element, FloatElement)
    for k, name in enumerate(split_parts(bits) if floats else ("codes",)):
        planes = range(k, k + 1) if floats else range(struct.planes)
        found[name] = torch.zeros(parts[name].shape, dtype=torch.int32)
        move_codes(
            struct, planes, found[name], sum(struct.plane_bits[p] for p in planes), back=True
        )
    return found | take_scales(weight, fmt)
