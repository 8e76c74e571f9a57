"""Inputs as codes in the basis that a weight is stored in: permuted or rotated, then rounded.

    permuted   codes(x[:, order])            one pass
    rotated    codes(x R)                    one pass for blocks up to 128 and scales of groups of
                                             a power of two, or of tokens up to LARGEST_TOKEN

`formats/inputs.py` has the formats, `kernels/inputs.py` the rounding, `kernels/hadamard.py` R.
Codes and scales of permuted inputs are the reference's on a CPU, bit for bit. Those of rotated ones
follow sums in another order: a scale differs in its last bits, a code by one step at most.

Blocks beyond 128 (`@had`, `@rhad` of a whole width n = m p, p a power of two up to 128) take two
more passes over float32 numbers: x (A (x) H_p) = A^T X H_p. Left out: channels that stay as
they are (`-t`), whose number depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from bitnest.errors import FormatError
from bitnest.formats.elements import FloatElement
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.gpu.registry import Variant
from bitnest.kernels.gpu.rotate_kernels import (
    GROUPS,
    STORE,
    TOKEN,
    quantize_groups,
    rotate_blocks,
    rotate_rest,
)
from bitnest.kernels.hadamard import core_order, hadamard, rotate
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.minifloat import encode

LEAST_BLOCK, LARGEST_BLOCK = 16, 128
LARGEST_TOKEN = {2: 8192, 4: 2048}  # channels that one program holds, by bytes of a number
CHUNK = 2048  # channels of a program, where a token is cut


@dataclass(frozen=True)
class Quantized:
    """Channels of x from `start` on. codes: (T, n) int8 of integers, uint8 bits of small floats,
    sign first. scales: (T, G) float32 of `group` channels each, of all where G is 1."""

    start: int
    codes: torch.Tensor
    scales: torch.Tensor
    group: int


def quantize_reference(
    x: torch.Tensor, fmt: InputFormat, *, order: torch.Tensor | None = None, block: int = 0,
    signs: torch.Tensor | None = None, static: float | None = None,
) -> list[Quantized]:  # fmt: skip
    """The same in plain torch."""
    x = x.float()
    x = x if order is None else x[:, order.long()]
    x = rotate(x, block, signs) if block else x
    found = []
    runs = code_inputs(x, fmt, static)
    for place, coded in enumerate(runs):
        element = fmt.element
        if fmt.wide is not None and len(runs) == 2 and place == 0:
            element = fmt.wide.element
        if isinstance(element, FloatElement):
            codes = encode(coded.values.contiguous(), element.spec)
        else:
            codes = coded.values.to(torch.int8)
        found.append(Quantized(coded.start, codes, coded.scales, coded.group))
    return found


def quantize(
    x: torch.Tensor, fmt: InputFormat, *, order: torch.Tensor | None = None, block: int = 0,
    signs: torch.Tensor | None = None, static: float | None = None,
) -> list[Quantized]:  # fmt: skip
    """Codes of x (T, I), a run for each kind of channels in `fmt`.

    order: (I,) int32, the stored order of channels. block: of the rotation, 0 for none, with
    signs (I,) int8 of +-1 or without. static: the scale of a format that has one.

    Raises:
        FormatError: channels that stay as they are, or a permutation and a rotation at once.
    """
    if fmt.keep is not None or (order is not None and block):
        raise FormatError(
            f"{fmt.name}: no GPU kernel rounds it so",
            hint="-t, and permuting and rotating at once, have the reference alone",
        )
    if fmt.has_static and static is None:
        raise FormatError(f"{fmt.name}: a static scale comes with the artifact")
    wide = fmt.wide_of(x.shape[1]) if fmt.wide is not None else 0
    if block and _is_fused(fmt, x, block):
        return [_rotated(x, fmt, block, signs, static)]
    if block:
        x = rotated_inputs(x, block, signs)
    if fmt.wide is None or wide == 0:
        return [_permuted(x, fmt, order, 0, x.shape[1], static)]
    return [
        _permuted(x, fmt.wide, order, 0, wide, None),
        _permuted(x, fmt, order, wide, x.shape[1] - wide, None),
    ]


def rotated_inputs(x: torch.Tensor, block: int, signs: torch.Tensor | None) -> torch.Tensor:
    """x (T, I) R, float32.

    Raises:
        FormatError: a block above 128 that is not the whole width.
    """
    tokens, columns = x.shape
    out = torch.empty(tokens, columns, dtype=torch.float32, device=x.device)
    if block > LARGEST_BLOCK and block != columns:
        raise FormatError(
            f"blocks of {block} in {columns} channels", hint="128, or the whole width"
        )
    p = min(LARGEST_BLOCK, block // (core_order(block) or block))
    if p < LEAST_BLOCK:  # too small for a matrix product of its own: part of A
        p = 0
    factor = block**-0.5
    if p:
        _rotate_into(x, out, p, signs, factor if p == block else 1.0)
    else:
        out.copy_(x.float() if signs is None else x.float() * signs.float())
    if p == block or tokens == 0:
        return out
    left = _left(block, max(p, 1), x.device)
    rows, width = len(left), max(p, 1)
    mixed = torch.empty_like(out)
    tile = min(64, max(16, triton.next_power_of_2(rows)))
    across = max(16, min(64, width))
    grid = (tokens, triton.cdiv(width, across), triton.cdiv(rows, tile))
    rotate_rest[grid](
        out, left, mixed, rows, factor, width, across, triton.cdiv(rows, 32) * 32, 32, tile,
        num_warps=4,
    )  # fmt: skip
    return mixed


@lru_cache(maxsize=16)
def _left(block: int, p: int, device: torch.device) -> torch.Tensor:
    """A of the rotation A (x) H_p, int8 of +-1. Kept: no graph may capture its way to the GPU."""
    # row 0 of H_p is all ones, so that every p-th entry of every p-th row is A's
    return hadamard(block)[::p, ::p].to(device, torch.int8).contiguous()


def _is_fused(fmt: InputFormat, x: torch.Tensor, block: int) -> bool:
    columns = x.shape[1]
    if fmt.wide is not None or block > LARGEST_BLOCK or block < LEAST_BLOCK:
        return False
    if fmt.group is None or fmt.group >= columns:
        return columns <= LARGEST_TOKEN[x.element_size()]
    return fmt.group & (fmt.group - 1) == 0


def _rotate_into(
    x: torch.Tensor, out: torch.Tensor, block: int, signs: torch.Tensor | None, factor: float
) -> None:
    tokens, columns = x.shape
    rows = CHUNK // block
    grid = (tokens, triton.cdiv(columns, CHUNK))
    if tokens:
        rotate_blocks[grid](
            x, signs, out, None, None, columns, columns // block * block, 1, *x.stride(), factor,
            1.0, 1.0, block, rows, STORE.value, 0, 8, -1, 1.0, 1.0, 0, 0,
            num_warps=_warps(CHUNK * x.element_size()),
        )  # fmt: skip


def _rotated(
    x: torch.Tensor, fmt: InputFormat, block: int, signs: torch.Tensor | None, static: float | None
) -> Quantized:
    tokens, columns = x.shape
    token = fmt.group is None or fmt.group >= columns
    group = columns if token or fmt.group is None else fmt.group
    rows = CHUNK // block
    if token:
        rows = max(16, triton.next_power_of_2(triton.cdiv(columns, block)))
    made = _empty(x, fmt, 0, columns, group)
    grid = (tokens, triton.cdiv(columns, rows * block))
    if tokens and columns:
        rotate_blocks[grid](
            x, signs, None, made.codes, made.scales, columns, columns // block * block,
            made.scales.shape[1], *x.stride(), block**-0.5, fmt.clip / 100, _fixed(fmt, static),
            block, rows, TOKEN.value if token else GROUPS.value, 0 if token else group,
            *_constants(fmt), num_warps=_warps(rows * block * x.element_size()),
        )  # fmt: skip
    return made


def _permuted(
    x: torch.Tensor, fmt: InputFormat, order: torch.Tensor | None, start: int, columns: int,
    static: float | None,
) -> Quantized:  # fmt: skip
    group = columns if fmt.group is None else min(fmt.group, columns)
    made = _empty(x, fmt, start, columns, group)
    if made.codes.numel() == 0:
        return made
    padded = triton.next_power_of_2(group)
    several = max(1, CHUNK // padded)
    count = made.scales.shape[1]
    quantize_groups[(len(x), triton.cdiv(count, several))](
        x, order, made.codes, made.scales, columns, start, count, *x.stride(), fmt.clip / 100,
        _fixed(fmt, static), 0 if count == 1 else group, several if count > 1 else 1, padded,
        *_constants(fmt), num_warps=_warps(padded),
    )  # fmt: skip
    return made


def _empty(x: torch.Tensor, fmt: InputFormat, start: int, columns: int, group: int) -> Quantized:
    kind = torch.int8 if fmt.integer else torch.uint8
    codes = torch.empty(len(x), columns, dtype=kind, device=x.device)
    count = -(-columns // group) if group else 0
    scales = torch.empty(len(x), count, dtype=torch.float32, device=x.device)
    return Quantized(start, codes, scales, group)


def _constants(fmt: InputFormat) -> tuple[int, int, float, float, int, int]:
    """BITS, MANTISSA, LEAST, LARGEST, EMAX and SCALE of the kernels."""
    element = fmt.element
    mantissa, least = -1, 1.0
    if isinstance(element, FloatElement):
        mantissa, least = element.spec.mantissa, element.spec.smallest_normal
    power = 2 if fmt.rule == "ceil" else 1
    scale = 3 if fmt.static else {"float": 0, "e8m0": power, "e4m3": 4}[fmt.scale]
    return fmt.bits, mantissa, least, fmt.largest, math.frexp(fmt.largest)[1] - 1, scale


def _fixed(fmt: InputFormat, static: float | None) -> float:
    if fmt.scale == "e4m3" and static is not None:
        return float(torch.tensor(static, dtype=torch.float32).reciprocal())
    return 1.0 if static is None else static


def _warps(values: int) -> int:
    # products need registers for both operands: there `values` counts bytes
    return 4 if values <= 4096 else 8 if values <= 16384 else 16


def _variants() -> list[Variant]:
    found: list[Variant] = []
    sizes = {"columns": "i32", "groups": "i32", "stride_t": "i64", "stride_c": "i32"}
    numbers = {"clip": "fp32", "fixed": "fp32"}
    to = {"scales": "*fp32", **sizes, **numbers}
    integers = {"BITS": 8, "MANTISSA": -1, "LEAST": 1.0, "LARGEST": 127.0, "EMAX": 6, "SCALE": 0}
    floats = {
        "BITS": 8, "MANTISSA": 3, "LEAST": 0.015625, "LARGEST": 448.0, "EMAX": 8, "SCALE": 0,
    }  # fmt: skip
    for name, element, kind, group in (
        ("int8-token", integers, "*i8", 0), ("int4-g128", {**integers, "LARGEST": 7.0}, "*i8", 128),
        ("fp8-token", floats, "*u8", 0),
    ):  # fmt: skip
        types = {"x": "*bf16", "order": "*i32", "codes": kind, "start": "i32", **to}
        padded = 4096 if group == 0 else group
        sized = {"GROUP": group, "GB": max(1, CHUNK // padded), "GP": padded, **element}
        found.append(Variant(f"permute-{name}-bf16", quantize_groups, types, sized, _warps(padded)))
        for block, half in ((128, "bf16"), (16, "bf16"), (64, "fp32")):
            width = 4096 if block == 16 else LARGEST_TOKEN[4 if half == "fp32" else 2]
            rows = (CHUNK if group else width) // block
            types = {
                "x": f"*{half}", "signs": "*i8", "codes": kind, "body": "i32", "factor": "fp32",
                **to,
            }  # fmt: skip
            mode = TOKEN.value if group == 0 else GROUPS.value
            shape = {"out": None, "B": block, "R": rows, "MODE": mode, "GROUP": group, **element}
            label = f"rotate-{name.replace('-token', '')}-b{block}-{half}"
            warps = _warps(rows * block * (4 if half == "fp32" else 2))
            found.append(Variant(label, rotate_blocks, types, shape, warps))
    types = {"x": "*fp32", "matrix": "*i8", "out": "*fp32", "rows": "i32", "factor": "fp32"}
    sized = {"P": 128, "CP": 64, "MP": 224, "KB": 32, "MB": 64}
    return [*found, Variant("rotate-rest-28672", rotate_rest, types, sized, 4)]


VARIANTS = _variants()
