"""From folds of edges to changes of parameters, and from those to tensors of the checkpoint.

Inside fused experts every expert has scales and orders of its own: its channels between up and down
are nobody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bitnest.kernels.hadamard import random_signs
from bitnest.quantize.folding.changes import Change, Order, Replace, Scale, Turn, Unmapped
from bitnest.quantize.transforms.edges import Edge, Matrix, Rows
from bitnest.sites import Site, is_experts, is_linear
from bitnest.skeleton import Skeleton

Changes = dict[str, list[Change]]
"""By parameter (dotted from a block, or from the model), what is done to it, in order."""


def axes(block: nn.Module, matrix: Matrix) -> tuple[int, int]:
    """Axes of output and input channels of a matrix as its parameter lies."""
    module: Any = block.get_submodule(matrix.module)
    crossed = is_linear(module) and not isinstance(module, nn.Linear)
    return (-1, -2) if crossed or getattr(module, "is_transposed", False) else (-2, -1)


def inside_experts(block: nn.Module, edge: Edge) -> bool:
    """Whether the edge joins two matrices of each expert."""
    module = edge.producer.matrix.module
    own = all(matrix.module == module for matrix in edge.consumers)
    return own and is_experts(block.get_submodule(module))


def scale_changes(
    block: nn.Module, edge: Edge, s: torch.Tensor, stored: torch.dtype = torch.float32
) -> Changes:
    """Producer channels over s, consumers' columns times it.

    s: (C,) or (E, C), positive. stored: type of a norm's gain in the checkpoint.
    """
    s = s.double().cpu()
    found: Changes = {}
    if edge.offset is None:
        _rows(found, block, edge.producer, Scale, 1 / s)
    else:
        s = _norm_changes(found, block, edge, s, stored)
    for matrix in edge.consumers:
        axis = axes(block, matrix)[1]
        found.setdefault(f"{matrix.module}.{matrix.param}", []).append(
            Scale(axis, s[..., edge.source])
        )
    return found


def order_changes(block: nn.Module, edge: Edge, order: torch.Tensor) -> Changes | None:
    """Channels into `order`, (C,) or (E, C), and the columns alike; None if one leaves its span."""
    each = [edge.column_order(part) for part in (order if order.dim() == 2 else order[None])]
    if any(columns is None for columns in each):
        return None
    found: Changes = {}
    for rows in (edge.producer, *edge.companions):
        height = rows.matrix.view(block).shape[-2]
        index = torch.arange(height).expand(*order.shape[:-1], height).clone()
        index[..., rows.index] = rows.index[order]
        _put_rows(found, block, rows, Order, index)
    columns = torch.stack([part for part in each if part is not None])
    columns = columns if order.dim() == 2 else columns[0]
    for matrix in edge.consumers:
        path = f"{matrix.module}.{matrix.param}"
        found.setdefault(path, []).append(Order(axes(block, matrix)[1], columns))
    return found


def turn_changes(block: nn.Module, edge: Edge, size: int, seed: int) -> Changes:
    """Channels rotated by Hadamard blocks of `size`, and the columns alike."""
    signs = random_signs(edge.width, seed)
    found: Changes = {}
    rows, index = edge.producer, edge.producer.index
    _put_rows(found, block, rows, lambda axis, _: Turn(axis, size, signs, index), index)
    own = signs[edge.source]
    for matrix in edge.consumers:
        found.setdefault(f"{matrix.module}.{matrix.param}", []).append(
            Turn(axes(block, matrix)[1], size, own, torch.arange(len(own)))
        )
    return found


def _norm_changes(
    found: Changes, block: nn.Module, edge: Edge, s: torch.Tensor, stored: torch.dtype
) -> torch.Tensor:
    """A norm's gain over s, in the type it is stored in; returns what that really divided by.

    With y = (c + w) n the gain becomes c + w', w' = (c + w) / s - c rounded, and the columns take
    (c + w) / (c + w'): s itself where c = 0, since s are powers of two.
    """
    name, c = edge.producer.matrix.module, edge.offset
    assert c is not None
    norm: Any = block.get_submodule(name)
    weight = norm.weight.data.double().cpu()
    value = ((c + weight) / s - c).to(stored)
    lost = (c + value.double() == 0) & (c + weight != 0)  # rounded away: left as it was
    value = torch.where(lost, weight.to(stored), value)
    taken = torch.where(c + weight == 0, s, (c + weight) / (c + value.double()))
    found.setdefault(f"{name}.weight", []).append(Replace(value))
    if getattr(norm, "bias", None) is not None:
        found.setdefault(f"{name}.bias", []).append(Scale(-1, 1 / taken))
    return taken


def _rows(found: Changes, block: nn.Module, rows: Rows, make: Any, factor: torch.Tensor) -> None:
    height = rows.matrix.view(block).shape[-2]
    full = torch.ones(*factor.shape[:-1], height, dtype=torch.float64)
    full[..., rows.index] = factor
    _put_rows(found, block, rows, make, full)


def _put_rows(found: Changes, block: nn.Module, rows: Rows, make: Any, full: torch.Tensor) -> None:
    """Change rows of a matrix and its bias. make: (axis, values) -> Change."""
    matrix = rows.matrix
    found.setdefault(f"{matrix.module}.{matrix.param}", []).append(
        make(axes(block, matrix)[0], full)
    )
    if matrix.bias(block) is not None:
        name = "bias" if matrix.param == "weight" else f"{matrix.param}_bias"
        found.setdefault(f"{matrix.module}.{name}", []).append(make(-1, full))


class Places:
    """Where in a checkpoint the parameters of its model lie."""

    def __init__(self, skeleton: Skeleton, sites: Iterable[Site]) -> None:
        self.skeleton = skeleton
        self._experts: dict[str, list[Site]] = {}
        for site in sites:
            if site.expert is not None:
                self._experts.setdefault(site.path, []).append(site)

    def tensors(self, changes: Mapping[str, Sequence[Change]]) -> Changes:
        """By tensor of the checkpoint, what changes of parameters do to it.

        Raises:
            Unmapped: a parameter whose channels lie otherwise on disk.
        """
        found: Changes = {}
        for path, own in changes.items():
            source = self.skeleton.sources.get(path)
            if source is None:
                raise Unmapped
            if source.converter is None:
                found.setdefault(source.names[0], []).extend(own)
                continue
            sites = self._experts.get(path, [])
            names = {f"{site.name}.weight" for site in sites}
            if not sites or names != set(source.names):
                raise Unmapped
            for site in sites:
                parts = [_cut(change, site) for change in own]
                mine = [part for part in parts if part is not None]
                if mine:
                    found.setdefault(f"{site.name}.weight", []).extend(mine)
        return found


def _cut(change: Change, site: Site) -> Change | None:
    outer = change.axis == (-1 if site.transposed else -2)
    rows = slice(*site.rows) if outer and site.rows is not None else None
    return change.cut(site.expert, rows)
