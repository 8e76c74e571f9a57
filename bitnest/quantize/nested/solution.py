"""Solving a batch of matrices in a nested format, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitnest.formats.nested import NestedFormat
from bitnest.kernels.nested import decode_nested
from bitnest.quantize.nested.clusters import Clusters, solve_clusters
from bitnest.quantize.nested.matgpt import Uniform, solve_uniform
from bitnest.quantize.nested.residual import Residuals, solve_residuals
from bitnest.quantize.nested.stack import Stack, solve_stack
from bitnest.quantize.nested.tree import Tree, solve_tree

Solved = Tree | Uniform | Residuals | Clusters | Stack


@dataclass
class Nested:
    """B solved matrices. weight: decoded at the widest width, (B, O, I). error: per row, (B, O).
    narrower: the same at the other widths, narrowest first."""

    solved: list[Solved]
    half: torch.dtype
    weight: torch.Tensor
    error: torch.Tensor
    narrower: tuple[torch.Tensor, ...]

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows of matrix b; of all rows where they share numbers."""
        found = self.solved[b]
        if isinstance(found, Tree | Uniform | Stack):
            assert len(range(*rows.indices(len(found.weight)))) == len(found.weight)
            return found.store(self.half)
        return found.store(self.half, rows)


def solve_nested(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: NestedFormat,
    *,
    half: torch.dtype,
    damp: float,
    weights: Mapping[int, float] | None = None,
) -> Nested:
    """Matrices (B, O, I) float32, each against its own H (B, I, I), or none.

    weights: how much each width counts, 1 if not named; nest and mat.
    """
    solved: list[Solved] = []
    for b, w in enumerate(weight):
        h = None if hessian is None else hessian[b]
        if fmt.kind == "nest":
            solved.append(solve_tree(w, h, fmt, half=half, damp=damp, weights=weights))
        elif fmt.kind == "mat":
            solved.append(solve_uniform(w, h, fmt, half=half, damp=damp, weights=weights))
        elif fmt.kind == "mwq":
            solved.append(solve_residuals(w, h, fmt, half=half, damp=damp))
        elif fmt.kind == "stack":
            solved.append(solve_stack(w, h, fmt, half=half, damp=damp))
        else:
            solved.append(solve_clusters(w, h, fmt, half=half))
    decoded = torch.stack([item.weight for item in solved])
    shape = (weight.shape[1], weight.shape[2])
    stored = [item.store(half) for item in solved]

    def error(weights: torch.Tensor) -> torch.Tensor:
        miss = weight - weights
        return miss.square().sum(2) if hessian is None else ((miss @ hessian) * miss).sum(2)

    narrower = [
        error(torch.stack([decode_nested(t, fmt.at(w), shape, torch.float32) for t in stored]))
        for w in fmt.widths[:-1]
    ]
    return Nested(solved, half, decoded, error(decoded), tuple(narrower))
