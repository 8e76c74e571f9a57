"""Codes, scales and tables of a GPU layout back in their stored form: the inverse of `layout`."""

from __future__ import annotations

from typing import Protocol

import torch

from bitnest.formats import BlockFormat, NestedFormat
from bitnest.formats.block import SHIFT_BITS
from bitnest.formats.elements import FloatElement, TernaryElement
from bitnest.kernels.packing import pack_bits
from bitnest.kernels.segments import pack_segments
from bitnest.kernels.trits import pack_trits


class Stored(Protocol):
    """What of a `GpuWeight` is read here."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def segs(self) -> dict[int, tuple[int, ...]]: ...
    @property
    def scales(self) -> torch.Tensor | None: ...
    @property
    def shared(self) -> torch.Tensor | None: ...
    @property
    def zeros(self) -> torch.Tensor | None: ...
    @property
    def tables(self) -> dict[int, torch.Tensor]: ...


def cut(codes: torch.Tensor, bits: int, own: tuple[int, ...]) -> list[tuple[torch.Tensor, int]]:
    """Codes of `bits` bits as segments of `own`."""
    found = []
    for width in own:
        bits -= width
        found.append(((codes >> bits) & ((1 << width) - 1), width))
    return found


def joined(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    codes = parts[0][0]
    for segment, width in parts[1:]:
        codes = (codes << width) | segment
    return codes


def block_tensors(
    weight: Stored, fmt: BlockFormat, parts: list[tuple[torch.Tensor, int]]
) -> dict[str, torch.Tensor]:
    codes, element = joined(parts), fmt.element
    if isinstance(element, TernaryElement):
        found = {"codes": pack_trits(codes)}
    elif isinstance(element, FloatElement):
        found = pack_segments(codes, element.bits)
    else:
        found = {"codes": pack_bits(codes, element.bits)}
    if weight.scales is not None:
        scales = weight.scales.T.contiguous()
        found["scales"] = pack_bits(scales, SHIFT_BITS) if fmt.scale == "m2" else scales
    if weight.shared is not None:
        name = "global" if fmt.scale == "e4m3" else "super"
        found[name] = weight.shared if name == "global" else weight.shared.T.contiguous()
    if weight.zeros is not None:
        found["zeros"] = pack_bits(weight.zeros, int(fmt.bits)).T.contiguous()
    if fmt.learned:
        table = next(iter(weight.tables.values()))
        half = table.dtype if weight.scales is None else weight.scales.dtype
        found["table"] = table.to(half)
    return found


def nested_tensors(
    weight: Stored, fmt: NestedFormat, parts: list[tuple[torch.Tensor, int]]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    start = 0
    for width in fmt.widths:
        stop = len(weight.segs[width])
        found[f"plane{width}"] = pack_bits(joined(parts[start:stop]), fmt.plane_bits(width))
        start = stop
    scales = weight.scales
    if fmt.kind == "mwq":
        assert scales is not None and weight.zeros is not None
        found["zeros"] = pack_bits(weight.zeros, fmt.widths[0]).T.contiguous()
        for layer, bit in enumerate(range(fmt.widths[0] + 1, fmt.widths[-1] + 1), start=1):
            found[f"scales{bit}"] = scales[layer].T.contiguous()
        scales = scales[0]
    if scales is not None:
        found["scales"] = scales.T.contiguous()
    stored = fmt.parts(weight.shape)
    half = weight.tables[fmt.widths[0]].dtype if scales is None else scales.dtype
    for width, table in weight.tables.items():
        name = f"affine{width}" if fmt.kind == "mat" else f"table{width}"
        if name in stored:
            found[name] = table.to(half)
    return found
