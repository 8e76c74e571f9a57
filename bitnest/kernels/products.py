"""Products of rounded inputs with packed weights, as a kernel on codes computes them.

Where both codes are integers, so is the product of a cell, channels under one scale each side:

    acc[t, o] = sum over i in the cell of  X[t, i] * (Q[o, i] - Z[o])           an exact integer
    y[t, o]   = sum over cells, in order, of  (float32(acc) * s[t]) * S[o]      float32

Kernels must give the same acc to the last bit; the order of the float32 sum is theirs. Dual-grain
weights (dgq4) have cells as wide as the row: (Q - Z) times the integer scale of their group fits 8
bits. Anything else is the float32 product of the numbers that the codes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    SplitFormat,
    TransformedFormat,
)
from bitnest.formats.elements import IntElement
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.basis import from_stored, to_stored
from bitnest.kernels.decode import code_values, per_row, split_tensors, zero_points
from bitnest.kernels.inputs import Coded, code_inputs, spread
from bitnest.kernels.scales import unpack_scales

Tensors = Mapping[str, torch.Tensor]
EXACT = 1 << 24  # integers up to here, and sums that stay below, are exact in float32


@dataclass(frozen=True)
class CodedWeight:
    """Columns of a weight from `start` on, as integers.

    values: (O, n) float32, Q - Z. scales: (O, G) float32, of `group` columns each. largest: no
    value's magnitude exceeds it.
    """

    start: int
    values: torch.Tensor
    scales: torch.Tensor
    group: int
    largest: float

    def decoded(self) -> torch.Tensor:
        """values * scales, (O, n)."""
        return self.values * spread(self.scales, self.group, self.values.shape[1])


def integer_weight(
    tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]
) -> list[CodedWeight] | None:
    """A weight in the basis it is stored in, as integers; None if it has no such codes."""
    if isinstance(fmt, TransformedFormat):
        return integer_weight(tensors, fmt.base, shape)
    if isinstance(fmt, SplitFormat):
        found, start = [], 0
        for own, part, size in split_tensors(tensors, fmt, shape):
            coded = _block(own, part, size, start)
            if coded is None:
                return None
            found.append(coded)
            start += size[1]
        return found
    coded = _block(tensors, fmt, shape, 0) if isinstance(fmt, BlockFormat) else None
    return None if coded is None else [coded]


def integer_product(x: Sequence[Coded], weight: Sequence[CodedWeight]) -> torch.Tensor:
    """x W^T, (T, O) float32, of integer codes; see above."""
    y = x[0].values.new_zeros(len(x[0].values), len(weight[0].values))
    for a in x:
        for w in weight:
            start = max(a.start, w.start)
            stop = min(a.start + a.values.shape[1], w.start + w.values.shape[1])
            if start < stop:
                _add_cells(y, a, w, start, stop)
    return y


def rounded_product(
    x: torch.Tensor,
    inputs: InputFormat,
    static: float | None,
    fmt: AnyFormat,
    tensors: Tensors,
    *,
    codes: Sequence[CodedWeight] | None,
    dense: torch.Tensor | None,
) -> torch.Tensor:
    """x W^T with x (T, I) float32 rounded in the basis that W is stored in: (T, O) float32.

    static: the inputs' static scale. codes: `integer_weight` of W; None: dense, the decoded (O, I)
    float32 matrix, is multiplied with what x is rounded to.
    """
    coded = code_inputs(to_stored(x, fmt, tensors), inputs, static)
    if codes is None or not all(part.integer for part in coded):
        assert dense is not None
        parts = [part.decoded() for part in coded]
        rounded = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return F.linear(from_stored(rounded, fmt, tensors), dense)
    y = integer_product(coded, codes)
    for part in coded:
        if part.kept is not None and len(part.kept[0]):
            whole = torch.cat([w.decoded() for w in codes], dim=1)
            y += F.linear(part.kept[1], whole[:, part.start + part.kept[0]])
    return y


def _block(
    tensors: Tensors, fmt: BlockFormat, shape: tuple[int, int], start: int
) -> CodedWeight | None:
    rows, columns = shape
    element = fmt.element
    if not isinstance(element, IntElement) or (element.bits == 1 and element.symmetric):
        return None
    groups, group = fmt.groups(columns), fmt.group_size(columns)
    values = code_values(tensors, fmt, shape)
    zeros = zero_points(tensors, fmt, rows, groups)
    assert zeros is not None
    values -= spread(zeros, group, columns)
    largest = float((1 << element.bits) - 1 if not element.symmetric else 1 << (element.bits - 1))
    if fmt.scale == "dual":
        values *= spread(tensors["scales"].float(), group, columns)
        return CodedWeight(start, values, tensors["super"].float(), columns, 128.0)
    scales = per_row(unpack_scales(tensors, fmt, groups), fmt, rows)
    return CodedWeight(start, values, scales, group, largest)


def _add_cells(y: torch.Tensor, a: Coded, w: CodedWeight, start: int, stop: int) -> None:
    """Add to y the product of channels start to stop, cell by cell."""
    while start < stop:
        in_a, in_w = start - a.start, start - w.start
        i, j = in_a // a.group, in_w // w.group
        end = min(stop, a.start + (i + 1) * a.group, w.start + (j + 1) * w.group)
        acc = exact_product(
            a.values[:, in_a : end - a.start], w.values[:, in_w : end - w.start],
            a.largest * w.largest,
        )  # fmt: skip
        y += acc.float() * a.scales[:, i, None] * w.scales[:, j]
        start = end


def exact_product(a: torch.Tensor, b: torch.Tensor, largest: float) -> torch.Tensor:
    """a b^T of integers in float32, exact: (T, O) float32, or float64 where sums may exceed 2^24.

    largest: that a product of two of them can be.
    """
    step = max(1, int(EXACT // largest))
    if a.shape[1] <= step:
        return F.linear(a, b)
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], step):
        part = slice(start, start + step)
        total += F.linear(a[:, part], b[:, part])
    return total
