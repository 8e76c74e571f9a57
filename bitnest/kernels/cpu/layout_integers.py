"""Integers, ternary codes and small floats that are integers of 8 bits times a power of two.

    element            planes                       codes stand for             zero, factor
    int2..int8         8, 4, 2, 1 of its bits       themselves                  2^(b-1) or stored, 1
    int1               1                            0 and 2                     1, 1/2
    ternary            2                            themselves                  1, 1
    float, to 6 bits   4, 2, 1 of its bits          value / step + largest      largest, step

with step the smallest positive value, for floats of largest / step <= 127 (E2M1: 12, E2M3: 60).
Scales shared by rows are repeated for each, m2's shifts become powers of two of a byte each; all
else is the stored bytes in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch.nn import functional as F

from bitnest.formats import BlockFormat
from bitnest.formats.block import DQ_ROWS, SHIFT_BITS
from bitnest.formats.elements import Element, FloatElement, IntElement, TernaryElement
from bitnest.formats.minifloat import MiniFloat
from bitnest.formats.segments import segments, split_parts
from bitnest.kernels.cpu.arena import allocate, hold
from bitnest.kernels.cpu.library import (
    INTEGER,
    MAX_PLANES,
    SCALE_BF16,
    SCALE_E4M3,
    SCALE_E8M0,
    SCALE_F16,
    SCALE_I8,
    SCALE_U8,
    SUPER_GROUP,
    SUPER_NONE,
    SUPER_ROW,
    TABLE,
    Packed,
    Weight,
    library,
)
from bitnest.kernels.cpu.linear import CpuWeight, pointer
from bitnest.kernels.decode import per_row
from bitnest.kernels.packing import pack_bits, unpack_bits
from bitnest.kernels.scales import E8M0_BIAS
from bitnest.kernels.trits import pack_trits, unpack_trits

Tensors = Mapping[str, torch.Tensor]
ROWS, UNIT, STEP = 16, 32, 16
TABLE_BITS = 6
KINDS = {"e8m0": SCALE_E8M0, "m1": SCALE_E8M0, "m2": SCALE_E8M0, "e4m3": SCALE_E4M3,
         "dq": SCALE_I8, "dual": SCALE_U8}  # fmt: skip


def why_not(fmt: BlockFormat, shape: tuple[int, int]) -> str:
    """Empty if the integer kernels run it."""
    element = fmt.element
    if isinstance(element, IntElement):
        return ""
    if isinstance(element, TernaryElement):
        return "entropy-coded ternary weights are decoded first" if element.coded else ""
    if isinstance(element, FloatElement) and integer_values(element.spec) is not None:
        return ""
    return f"{fmt.name} does not stand for small integers"


@cache
def integer_values(spec: MiniFloat) -> tuple[tuple[int, ...], float] | None:
    """What the codes of a small float stand for as integers, and the step; None if they are not."""
    values = spec.values()
    if not all(map(math.isfinite, values)) or spec.bits > TABLE_BITS:
        return None
    step = min(abs(v) for v in values if v)
    return (tuple(round(v / step) for v in values), step) if max(values) / step <= 127 else None


def lay_out(tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int]) -> CpuWeight:
    """The weight in the memory of cpu.h."""
    rows, columns = shape
    blocks, units = -(-rows // ROWS), -(-columns // UNIT)
    groups = fmt.groups(columns)
    struct = Weight(
        rows=rows, columns=columns, blocks=blocks, units=units, engine=INTEGER,
        group=units * UNIT if groups == 1 else fmt.group_size(columns), groups=groups, factor=1.0,
    )  # fmt: skip
    held = _codes(tensors, fmt, shape, struct)
    held |= _values(fmt.element, struct)
    held |= put_scales(tensors, fmt, shape, struct)
    if not fmt.symmetric:
        stored = unpack_bits(tensors["zeros"].T, int(fmt.bits), fmt.scale_rows(rows)).T
        held["zeros"] = in_blocks(per_row(stored, fmt, rows))
        struct.zeros = pointer(held["zeros"])
    weight = CpuWeight(struct, held, shape, lambda made: _restore(made, fmt))
    weight.notes = {"half": tensors["scales"].dtype if fmt.scale == "half" else None}
    if "super" in tensors:
        weight.notes = {"half": tensors["super"].dtype}
    return weight


def in_blocks(stored: torch.Tensor) -> torch.Tensor:
    """(O, G) to (blocks, G, 16), padded with zeros, in the arena."""
    rows, groups = stored.shape
    blocks = -(-rows // ROWS)
    padded = F.pad(stored, (0, 0, 0, blocks * ROWS - rows))
    return hold(padded.view(blocks, ROWS, groups).transpose(1, 2))


def out_of_blocks(held: torch.Tensor, rows: int) -> torch.Tensor:
    """`in_blocks` back."""
    return held.transpose(1, 2).reshape(-1, held.shape[1])[:rows].contiguous()


def place_planes(struct: Weight, widths: tuple[int, ...]) -> torch.Tensor:
    """Memory for planes that lie together unit by unit, said to the struct."""
    bits = sum(widths)
    memory = allocate(struct.blocks * struct.units * bits * 64)
    offset = 0
    for k, width in enumerate(widths):
        struct.plane_bits[k] = width
        struct.plane_stride[k] = bits * 64
        struct.plane[k] = memory.data_ptr() + offset
        offset += width * 64
    struct.planes, struct.bits = len(widths), bits
    return memory


def move_codes(
    struct: Weight,
    planes: range,
    stream: torch.Tensor,
    bits: int,
    *,
    back: bool = False,
) -> None:
    """Codes of `bits` bits, a bitstream (O, bytes) each row, to these planes of the struct."""
    assert stream.is_contiguous()
    packed = Packed(
        rows=struct.rows, columns=struct.columns, bits=bits, planes=len(planes), back=back,
        row_bytes=stream.shape[1] * stream.element_size(), stream=stream.data_ptr(),
        words=struct.engine == TABLE,
    )  # fmt: skip
    for k, plane in enumerate(planes):
        packed.plane_bits[k] = struct.plane_bits[plane]
        packed.plane_stride[k] = struct.plane_stride[plane]
        packed.plane[k] = struct.plane[plane]
    found = library()
    assert found is not None and len(planes) <= MAX_PLANES
    found.lay_out(packed)


def _codes(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], struct: Weight
) -> dict[str, torch.Tensor]:
    element = fmt.element
    if isinstance(element, TernaryElement):
        memory = place_planes(struct, (2,))
        move_codes(struct, range(1), unpack_trits(tensors["codes"], shape[1]).contiguous(), 8)
        return {"codes": memory}
    bits = int(element.bits)
    memory = place_planes(struct, segments(bits))
    if isinstance(element, IntElement):
        move_codes(struct, range(struct.planes), tensors["codes"].contiguous(), bits)
    else:
        for k, name in enumerate(split_parts(bits)):
            move_codes(struct, range(k, k + 1), tensors[name].contiguous(), struct.plane_bits[k])
    return {"codes": memory}


def _values(element: Element, struct: Weight) -> dict[str, torch.Tensor]:
    """Table, zero point and factor."""
    if isinstance(element, TernaryElement):
        struct.zero = 1
        return {}
    if isinstance(element, FloatElement):
        found = integer_values(element.spec)
        assert found is not None
        integers, struct.factor = found
        struct.zero = max(integers)
        numbers = [value + struct.zero for value in integers]
    elif element.bits == 1:
        struct.zero, struct.factor, numbers = 1, 0.5, [0, 2]
    else:
        assert isinstance(element, IntElement)
        struct.zero = int(element.zero) if element.symmetric else 0
        return {}
    table = hold(torch.tensor(numbers + [0] * (64 - len(numbers)), dtype=torch.uint8))
    struct.table = table.data_ptr()
    return {"table": table}


def put_scales(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], struct: Weight
) -> dict[str, torch.Tensor]:
    rows, stored = shape[0], tensors["scales"]
    struct.super_kind = SUPER_NONE
    if fmt.scale == "half":
        struct.scale_kind = SCALE_F16 if stored.dtype == torch.float16 else SCALE_BF16
    else:
        struct.scale_kind = KINDS[fmt.scale]
    held = {}
    if fmt.scale == "m2":
        stored = (E8M0_BIAS - unpack_bits(stored, SHIFT_BITS, struct.groups).int()).to(torch.uint8)
    elif fmt.scale == "e4m3":
        held["global"] = hold(tensors["global"].float())
        struct.factor /= float(held["global"])
    held["scales"] = in_blocks(per_row(stored, fmt, rows))
    struct.scales = pointer(held["scales"])
    if fmt.scale == "dq":
        shared = tensors["super"].float()
        held["super"] = hold(shared.repeat_interleave(DQ_ROWS // ROWS, 0)[: struct.blocks])
        struct.super_kind = SUPER_GROUP
    elif fmt.scale in {"m2", "dual"}:
        held["super"] = hold(F.pad(tensors["super"].float()[:, 0], (0, -rows % ROWS)))
        struct.super_kind = SUPER_ROW
    if "super" in held:
        struct.super = pointer(held["super"])
    return held


def _restore(weight: CpuWeight, fmt: BlockFormat) -> dict[str, torch.Tensor]:
    """What `lay_out` was given."""
    struct, held, (rows, _) = weight.struct, weight.held, weight.shape
    parts, element = fmt.parts(weight.shape), fmt.element
    found: dict[str, torch.Tensor] = {}
    if isinstance(element, TernaryElement):
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        move_codes(struct, range(1), codes, 8, back=True)
        found["codes"] = pack_trits(codes)
    else:
        names = ("codes",) if isinstance(element, IntElement) else split_parts(int(element.bits))
        for k, name in enumerate(names):
            planes = range(struct.planes) if isinstance(element, IntElement) else range(k, k + 1)
            found[name] = torch.zeros(parts[name].shape, dtype=torch.int32)
            bits = sum(struct.plane_bits[p] for p in planes)
            move_codes(struct, planes, found[name], bits, back=True)
    found |= take_scales(weight, fmt)
    step = rows if fmt.rows is None else fmt.rows
    if "zeros" in held:
        zeros = out_of_blocks(held["zeros"], rows)[::step]
        found["zeros"] = pack_bits(zeros.T, int(fmt.bits)).T.contiguous()
    return found


def take_scales(weight: CpuWeight, fmt: BlockFormat) -> dict[str, torch.Tensor]:
    """`put_scales` back."""
    held, rows = weight.held, weight.shape[0]
    found: dict[str, torch.Tensor] = {}
    step = rows if fmt.rows is None else fmt.rows
    scales = out_of_blocks(held["scales"], rows)[::step].contiguous()
    if fmt.scale == "m2":
        scales = pack_bits(E8M0_BIAS - scales.int(), SHIFT_BITS)
    found["scales"] = scales
    if fmt.scale == "e4m3":
        found["global"] = held["global"].clone()
    if "super" in held:
        half = weight.notes["half"]
        assert isinstance(half, torch.dtype)
        dq = fmt.scale == "dq"
        shared = held["super"][:: DQ_ROWS // ROWS] if dq else held["super"][:rows, None]
        found["super"] = shared.to(half).contiguous()
    return found
