"""Quantising the ends of the model, embedding and head, after its last block, in slices of rows.

    head        H = mean over tokens of h h^T, h what the head reads on the calibration text
    embedding   no H: a lookup reads one row as it is, so every channel counts alike
    tied        one matrix for both uses: the head's H

For the lookup it could be solved against H / mean(diag H) + l I. Measured on a 22 M model with one
of 8192 x 256 in groups of 128, mean KL over three texts in 1/1000 nats, nothing got better:

            rtn     l = 0   0.1     0.3     1       3       10
    int3    108     49.2    49.4    50.4    54.8    63.5    74.3
    int4    27.2    13.1    13.3    13.7    15.5    17.0    20.2

A vocabulary is the longest axis of a model: rows are solved a slice at a time, each against the
same H, so that float32 copies stay within the budget however many there are. Formats whose stored
numbers cover all rows (one table, one global scale, a residual) cannot be cut and are solved whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bitnest.calibrate.collector import Hessian
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_head
from bitnest.errors import RecipeError
from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    BlockSparseFormat,
    DenseFormat,
    LowRankFormat,
    NestedFormat,
    PackedFormat,
    SparseFormat,
    SplitFormat,
    ZeroFormat,
    core_format,
)
from bitnest.formats.block import DQ_ROWS
from bitnest.kernels.rows import row_decodable
from bitnest.quantize.memory import FLOAT, WORKING_COPIES, Budget
from bitnest.quantize.solve import (
    Options,
    Solution,
    narrower_errors,
    needs_statistics,
    solve,
    weighted_error,
)
from bitnest.sites import Site

WHOLE = frozenset({"channels", "order", "global"})  # parts that rows do not index


@dataclass
class Part:
    """Some rows of an end, solved. weight: (n, I) float32, as it was."""

    rows: slice
    weight: torch.Tensor
    solution: Solution


def head_moment(stream: Stream, tokens: torch.Tensor) -> Hessian:
    """Sum of h h^T of what the head reads; the stream must have passed all blocks.

    tokens: (samples, length), the stream's.
    """
    total: Hessian | None = None
    with torch.no_grad(), open_head(stream) as read:
        for i in range(len(tokens)):
            h = read(tokens[i : i + 1], stream.hidden[i : i + 1].to(stream.device))
            if total is None:
                total = Hessian(torch.zeros(h.shape[1], h.shape[1], device=h.device))
            total.add(h)
            stream.forget()
    assert total is not None
    return total


def cuttable(fmt: PackedFormat) -> bool:
    """Whether rows can be solved a slice at a time: no stored number is fitted to all of them."""
    if isinstance(fmt, ZeroFormat):
        return True
    if isinstance(fmt, NestedFormat | BlockSparseFormat | SplitFormat):
        return False
    if isinstance(fmt, BlockFormat):
        return fmt.row_tile is not None and fmt.scale != "e4m3"
    if isinstance(fmt, SparseFormat):
        return isinstance(fmt.base, DenseFormat) or cuttable(fmt.base)
    if isinstance(fmt, LowRankFormat):
        return False
    return fmt.kind != "awq" and cuttable(fmt.base)


def slice_rows(fmt: PackedFormat, shape: tuple[int, int], work: int) -> int:
    """Rows solved at once, so that `work` bytes hold their copies; at least one whole unit.

    A unit is the rows that share stored numbers or words: 64 of a super-scale, 32 zero points.
    """
    if not cuttable(fmt):
        return shape[0]
    unit = DQ_ROWS
    if not isinstance(fmt, ZeroFormat):
        core = core_format(fmt)
        base = core.base if isinstance(core, SparseFormat) else core
        if isinstance(base, BlockFormat):  # nested ones are not cuttable
            unit = math.lcm(DQ_ROWS, (base.rows or 1) * (1 if base.symmetric else 32))
    fit = work // (WORKING_COPIES * FLOAT * shape[1])
    return min(shape[0], max(unit, fit // unit * unit))


def solve_end(
    matrix: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: PackedFormat,
    options: Options,
    rows: int,
) -> Iterator[Part]:
    """Quantise the matrix (V, I), of any float type, `rows` rows at a time.

    hessian: (I, I) float32 on the device to work on, or None.
    """
    if hessian is None and needs_statistics(fmt):
        hessian = torch.eye(matrix.shape[1])
    for start in range(0, len(matrix), rows):
        own = slice(start, min(start + rows, len(matrix)))
        weight = matrix[own].float()
        if hessian is not None:
            weight = weight.to(hessian.device)
        h = None if hessian is None else hessian[None]
        yield Part(own, weight, solve(weight[None], h, fmt, options))


def end_tensors(
    matrix: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: PackedFormat,
    options: Options,
    rows: int,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Stored tensors of an end, and its relative error, of a nested format at every width;
    arguments as `solve_end`'s."""
    slices: list[dict[str, torch.Tensor]] = []
    errors: list[float] = []
    energy = 0.0
    for part in solve_end(matrix, hessian, fmt, options, rows):
        count = part.rows.stop - part.rows.start
        slices.append(part.solution.store(0, slice(0, count)))
        own = (*narrower_errors(part.solution), part.solution.error)
        errors = errors or [0.0] * len(own)
        errors = [a + float(b.double().sum()) for a, b in zip(errors, own, strict=True)]
        h = None if hessian is None else hessian[None]
        energy += float(weighted_error(part.weight[None], h).double().sum())
    return joined(slices), [error / energy if energy > 0 else 0.0 for error in errors]


def joined(slices: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stored tensors of consecutive rows as those of all of them."""
    if len(slices) == 1:
        return slices[0]
    return {
        name: first if name in WHOLE else torch.cat([part[name] for part in slices])
        for name, first in slices[0].items()
    }


def check_ends(sites: list[Site], formats: dict[str, AnyFormat], budget: Budget) -> None:
    """Refuse before work what an end cannot be packed in, or not within the memory.

    Raises:
        RecipeError: see above.
    """
    for site in sites:
        fmt = formats[site.name]
        if site.kind == "embedding" and not row_decodable(fmt):
            raise RecipeError(
                f"an embedding looks up single rows, which {fmt.name} cannot decode",
                where=site.name,
                hint="leave out -dict, or keep the embedding dense",
            )
        if isinstance(fmt, DenseFormat | ZeroFormat):
            continue
        rows = slice_rows(fmt, site.shape, budget.ends)
        need = WORKING_COPIES * FLOAT * site.shape[1] * (rows + site.shape[1])
        if budget.spare is not None and need > budget.spare:
            raise RecipeError(
                f"solving {site.shape[0]} x {site.shape[1]} in {fmt.name} takes {need:,} bytes, "
                f"--memory leaves {budget.spare:,}",
                where=site.name,
                hint="more --memory, or keep it dense"
                + ("" if cuttable(fmt) else "; integers with 16-bit scales are solved in slices"),
            )
