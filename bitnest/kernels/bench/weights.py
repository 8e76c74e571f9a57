"""Random stored weights, made on the device: what they hold does not change how fast they are read.

Codes are random bits, scales about what makes outputs of order one. Codes that stand for no number
are left out, as no weight has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bitnest.formats import AnyFormat, BlockFormat, SparseFormat
from bitnest.formats.elements import FloatElement
from bitnest.kernels.packing import pack_bits

KINDS = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32}


def random_tensors(
    fmt: AnyFormat, shape: tuple[int, int], device: torch.device, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The parts of `fmt` for a weight (out, in), bfloat16 where they are 16 bits wide."""
    rng = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, part in fmt.parts(shape).items():
        found[name] = _part(fmt, name, part.dtype, part.shape, rng)
    if isinstance(fmt, SparseFormat):
        found["mask"] = _mask(fmt, shape, rng)
    return found


def _part(
    fmt: AnyFormat, name: str, kind: str, size: tuple[int, ...], rng: torch.Generator
) -> torch.Tensor:
    where = rng.device
    if name.startswith(("codes", "plane", "zeros")) and kind == "I32":
        words = torch.randint(-(1 << 31), 1 << 31, size, generator=rng, device=where)
        element = fmt.element if isinstance(fmt, BlockFormat) else None
        if name == "codes" and isinstance(element, FloatElement) and element.spec.special_codes:
            words &= ~0x04040404  # codes that are no numbers have this bit set
        return words.to(torch.int32)
    if name == "scales" and kind == "U8":
        low, high = (112, 122) if getattr(fmt, "scale", "") == "e8m0" else (1, 120)
        return torch.randint(low, high, size, generator=rng, device=where).to(torch.uint8)
    if kind in KINDS:
        return torch.randint(1, 9, size, generator=rng, device=where).to(KINDS[kind])
    if name == "global":
        return torch.full(size, 500.0, device=where)
    if name.startswith("table"):
        return torch.randn(size, generator=rng, device=where).sort(-1).values.bfloat16()
    numbers = torch.rand(size, generator=rng, device=where) * 0.01 + 0.002
    return numbers.to(torch.float32 if kind == "F32" else torch.bfloat16)


def _mask(fmt: SparseFormat, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    noise = torch.rand(shape, generator=rng, device=rng.device)
    keep = torch.zeros(shape, dtype=torch.uint8, device=rng.device)
    if fmt.cell:
        assert shape[1] % fmt.cell == 0
        cells = noise.view(shape[0], -1, fmt.cell).argsort(-1)[..., : fmt.keep]
        keep.view(shape[0], -1, fmt.cell).scatter_(2, cells, 1)
    else:
        keep.scatter_(1, noise.argsort(1)[:, : fmt.kept(shape[1])], 1)
    return pack_bits(keep, 1)


def copies(weight: Any, count: int) -> list[Any]:
    """The weight and others of the same values elsewhere in memory."""
    return [weight, *(_copy(weight) for _ in range(count - 1))]


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(own) for key, own in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(own, torch.Tensor) for own in value):
        return type(value)(_copy(own) for own in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        held = {k: _copy(v) for k, v in own.items() if isinstance(v, torch.Tensor | dict)}
        return dataclasses.replace(value, **held)
    return value
