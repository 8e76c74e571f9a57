"""Stored tensors of any format, made of random numbers rather than fitted to a matrix."""

from __future__ import annotations

import torch

from bitnest.formats import AnyFormat, BlockFormat, NestedFormat, parse_format
from bitnest.formats.elements import FloatElement, IntElement, TernaryElement
from bitnest.kernels.packing import pack_bits
from bitnest.kernels.segments import pack_segments
from bitnest.kernels.trits import pack_trits

HALVES = (torch.bfloat16, torch.float16)


def random_stored(
    name: str, shape: tuple[int, int], half: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[AnyFormat, dict[str, torch.Tensor]]:
    """A format and the tensors of a weight of that (out, in) shape."""
    fmt, g = parse_format(name), torch.Generator().manual_seed(seed)
    if isinstance(fmt, NestedFormat):
        return fmt, _nested(fmt, shape, half, g)
    assert isinstance(fmt, BlockFormat)
    return fmt, _block(fmt, shape, half, g)


def _integers(high: int, shape: tuple[int, ...], g: torch.Generator, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g).to(torch.uint8)


def _scales(shape: tuple[int, ...], g: torch.Generator, signed: bool = False) -> torch.Tensor:
    found = torch.rand(shape, generator=g) * 0.05 + 0.01
    return found * (1 - 2 * _integers(2, shape, g).float()) if signed else found


def _block(
    fmt: BlockFormat, shape: tuple[int, int], half: torch.dtype, g: torch.Generator
) -> dict[str, torch.Tensor]:
    element, found = fmt.element, {}
    if isinstance(element, TernaryElement):
        found["codes"] = pack_trits(_integers(3, shape, g))
    elif isinstance(element, FloatElement):
        codes = _integers(1 << element.bits, shape, g)
        for special in element.spec.special_codes:
            codes[codes == special] = 1
        found.update(pack_segments(codes, element.bits))
    else:
        found["codes"] = pack_bits(_integers(1 << element.bits, shape, g), element.bits)
    for part, stored in fmt.parts(shape).items():
        size = stored.shape
        if part == "scales" and fmt.scale == "half":
            found[part] = _scales(size, g, signed=isinstance(element, IntElement)).to(half)
        elif part == "scales" and fmt.scale in {"e8m0", "m1"}:
            found[part] = _integers(128, size, g, 118)
        elif part == "scales" and fmt.scale == "e4m3":
            found[part] = _integers(127, size, g, 1)
        elif part == "scales" and fmt.scale == "dq":
            found[part] = torch.randint(-127, 128, size, generator=g).to(torch.int8)
        elif part == "scales" and fmt.scale == "m2":
            shifts = _integers(16, (size[0], fmt.groups(shape[1])), g)
            found[part] = pack_bits(shifts, 4)
        elif part == "scales":
            found[part] = _integers(9, size, g, 1)
        elif part == "super":
            found[part] = _scales(size, g).to(half)
        elif part == "global":
            found[part] = torch.tensor([173.0])
        elif part == "zeros":
            rows, bits = fmt.scale_rows(shape[0]), int(fmt.bits)
            found[part] = pack_bits(_integers(1 << bits, (size[1], rows), g), bits).T.contiguous()
        elif part == "table":
            found[part] = torch.randn(size, generator=g).to(half)
    return found


def _nested(
    fmt: NestedFormat, shape: tuple[int, int], half: torch.dtype, g: torch.Generator
) -> dict[str, torch.Tensor]:
    found = {}
    for part, stored in fmt.parts(shape).items():
        size = stored.shape
        if part.startswith("plane"):
            bits = fmt.plane_bits(int(part[5:]))
            found[part] = pack_bits(_integers(1 << bits, shape, g), bits)
        elif part == "zeros":
            bits = fmt.widths[0]
            found[part] = pack_bits(
                _integers(1 << bits, (size[1], shape[0]), g), bits
            ).T.contiguous()
        elif part.startswith("scales"):
            found[part] = _scales(size, g).to(half)
        elif part.startswith("affine"):
            found[part] = torch.tensor([0.11, -0.9]).to(half)
        else:
            found[part] = torch.randn(size, generator=g).sort(-1).values.to(half)
    return found
