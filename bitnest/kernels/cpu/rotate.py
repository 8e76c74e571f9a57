"""Inputs in the basis of a stored weight, rounded to integers, in one pass over them.

    code_inputs(to_stored(x, fmt, tensors), inputs, static)      the reference, two passes and more

Rotations (`kernels/hadamard.py`: signs, blocks of 16 channels or more, whole rows of m 2^j), orders
and divisions by channels, one after the other as the format nests them; scales per token, per group
or static; integers of 2 to 8 bits, clipped or not, and the wider first channels of mixed formats.
Codes and scales of orders and divisions are the reference's to the last bit. A rotation adds in
another order than a matrix product: scales are within 1e-6, codes within one.

Left to the reference: small floats, E8M0 and E4M3 scales, channels kept from a threshold on, blocks
under 16.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch

from bitnest.formats import AnyFormat, LowRankFormat, TransformedFormat
from bitnest.formats.inputs import InputFormat
from bitnest.kernels import basis
from bitnest.kernels.cpu import team
from bitnest.kernels.hadamard import hadamard
from bitnest.kernels.inputs import Coded, code_inputs

log = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]
DIVIDE, ORDER, ROTATE = 1, 2, 3
VECTOR = 16
LARGEST_CORE = 256
_said: set[str] = set()


@dataclass(frozen=True)
class Rounded:
    """Codes of all channels. codes: (T, padded) int8, zeros behind the channels, a multiple of 32.
    scales: (T, S), those of the first run of channels first. sums: (T, padded / 16) int32 of codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor


class _Step(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32), ("core", c_int32), ("block", c_int64), ("data", c_void_p),
        ("matrix", c_void_p),
    ]  # fmt: skip


class _Part(ctypes.Structure):
    _fields_ = [
        ("first", c_int64), ("last", c_int64), ("group", c_int64), ("scale", c_int64),
        ("largest", c_float), ("clip", c_float), ("fixed", c_float), ("reserved", c_int32),
    ]  # fmt: skip


class _Rotate(ctypes.Structure):
    _fields_ = [
        *((n, c_int64) for n in ("tokens", "columns", "stride", "padded", "all_scales")),
        ("steps", c_int32), ("parts", c_int32), ("step", _Step * 4), ("part", _Part * 2),
        *((n, c_void_p) for n in ("x", "codes", "scales", "sums", "scratch")),
    ]  # fmt: skip


def declare(library: ctypes.CDLL) -> None:
    """Say what the C function takes."""
    library.rotate_inputs.argtypes, library.rotate_inputs.restype = [c_void_p], None


def why_not(x: torch.Tensor, fmt: AnyFormat, inputs: InputFormat) -> str | None:
    """Why the reference has to run; None: the kernel can."""
    if team.library() is None:
        return "no native code here"
    if x.device.type != "cpu":
        return "inputs are not on the CPU"
    for part in (inputs, inputs.wide):
        if part is not None and (not part.integer or part.scale != "float"):
            return f"scales or codes of {part.name}"
    if inputs.keep is not None:
        return "channels kept from a threshold on"
    for step in _transforms(fmt):
        if step.kind in ("had", "rhad"):
            block, core = _block(step, x.shape[-1])
            if block // core < VECTOR or core > LARGEST_CORE:
                return f"a Hadamard block of {block}"
    return None


def code_stored(
    x: torch.Tensor, fmt: AnyFormat, inputs: InputFormat, static: float | None, tensors: Tensors
) -> list[Coded]:
    """x (T, I) float32 rounded in the basis of a weight stored as `fmt`. tensors: the weight's.

    Runs the reference where `why_not` has a reason, and says so once in the log.
    """
    reason = why_not(x, fmt, inputs)
    if reason is not None:
        if reason not in _said:
            _said.add(reason)
            log.info("inputs are rounded by the reference in torch: %s", reason)
        return code_inputs(basis.to_stored(x, fmt, tensors), inputs, static)
    found, parts, start = round_stored(x, fmt, inputs, static, tensors), [], 0
    for own, first, last, group in _runs(inputs, x.shape[1]):
        count = -(-(last - first) // group)
        values = found.codes[:, first:last].float()
        scales = found.scales[:, start : start + count]
        parts.append(Coded(first, values, scales, group, own.largest, True))
        start += count
    return parts


def round_stored(
    x: torch.Tensor, fmt: AnyFormat, inputs: InputFormat, static: float | None, tensors: Tensors
) -> Rounded:
    """The same as bytes, for products of integers. `why_not` must have had no reason."""
    library = team.library()
    assert library is not None, "why_not was not asked"
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        x = x.float().contiguous()
    c, kept = _Rotate(), [x]
    c.tokens, c.columns = x.shape
    c.stride, c.padded, c.x = x.stride(0), -(-c.columns // 32) * 32, x.data_ptr()
    for step in _transforms(fmt):
        _set_step(c.step[c.steps], step, c.columns, tensors, kept)
        c.steps += 1
    for own, first, last, group in _runs(inputs, c.columns):
        p = c.part[c.parts]
        p.first, p.last, p.group, p.scale = first, last, group, c.all_scales
        p.largest, p.clip = own.largest, own.clip / 100
        p.fixed = static if own.static and static is not None else 0.0
        c.all_scales += -(-(last - first) // group)
        c.parts += 1
    found = Rounded(
        torch.empty(c.tokens, c.padded, dtype=torch.int8), torch.empty(c.tokens, c.all_scales),
        torch.empty(c.tokens, c.padded // 16, dtype=torch.int32),
    )  # fmt: skip
    scratch = torch.empty(library.get_threads(), 2, c.padded)
    c.codes, c.scales, c.sums = (t.data_ptr() for t in (found.codes, found.scales, found.sums))
    c.scratch = scratch.data_ptr()
    if c.tokens and c.columns:
        library.rotate_inputs(ctypes.byref(c))
    return found


def _runs(inputs: InputFormat, columns: int) -> list[tuple[InputFormat, int, int, int]]:
    """Formats with their first and last channel and group."""
    wide = inputs.wide_of(columns)
    runs = [(inputs, wide, columns)]
    if inputs.wide is not None and wide:
        runs.insert(0, (inputs.wide, 0, wide))
    return [
        (own, a, b, b - a if own.group is None else min(own.group, b - a)) for own, a, b in runs
    ]


def _transforms(fmt: AnyFormat) -> list[TransformedFormat]:
    """Outermost first."""
    found = []
    while isinstance(fmt, LowRankFormat | TransformedFormat):
        if isinstance(fmt, TransformedFormat):
            found.append(fmt)
        fmt = fmt.base
    return found


def _block(step: TransformedFormat, columns: int) -> tuple[int, int]:
    """Order of a rotation, and of it what is no power of two, with the Paley matrix's own."""
    from bitnest.kernels.hadamard import core_order, whole_block

    block = step.block or whole_block(columns)
    return block, core_order(block) or 1


def _set_step(
    to: _Step, step: TransformedFormat, columns: int, tensors: Tensors, kept: list[torch.Tensor]
) -> None:
    if step.kind == "awq":
        to.kind, data = DIVIDE, tensors["channels"].float().contiguous()
    elif step.kind == "perm":
        to.kind, data = ORDER, tensors["order"].int().contiguous()
    else:
        to.kind = ROTATE
        to.block, to.core = _block(step, columns)
        if to.core > 1:
            matrix = hadamard(to.core).float().contiguous()
            to.matrix = matrix.data_ptr()
            kept.append(matrix)
        if step.kind != "rhad":
            return
        _, signs = basis._rotation(step, columns)
        assert signs is not None
        data = signs.float().contiguous()
    to.data = data.data_ptr()
    kept.append(data)
