"""Finding edges by probing a block: no family names, no module names.

Multiply the output channels of a module by random factors s_j and run the block again. A matrix
whose input is now its old input times s_source[c] in each column c, on every token, reads those
channels and nothing else, in proportion. One run finds norm -> everything after it, v -> o with its
GQA map, up -> down. Factors span 2^-5 to 2^5, so that a clamp on the way shows.

Fused projections (q, k and v in one, gate and up in one) are tried by row patterns: the last w of
each of n equal chunks, n w the consumer's width; the last half of what exceeds the consumer's width
(q, k, v under GQA); halves; every other row.

Rows are companions of an edge if noise on some of them changes just those columns: gate beside up,
or fc_in before an activation. The span is the largest distance over which channels may trade
places; it is the head for v -> o and everything for MLPs.

Experts behind transformers' interface are probed through their own gate function. Everything found
is a proposal: `fold` proves each. Left out: layouts outside the patterns, and experts in
ModuleLists as consumers of a norm (their tokens change with the router's input).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bitnest.kernels.experts import up_name
from bitnest.quantize.transforms.edges import Edge, Matrix, Rows
from bitnest.quantize.transforms.probe import (
    Change,
    Watch,
    changed_columns,
    gain_offset,
    matched_factors,
    noisy,
    random_factors,
    same,
    scaled,
    shuffled,
)
from bitnest.quantize.transforms.proof import Call, in_float64
from bitnest.sites import is_experts

Inputs = dict[str, torch.Tensor]
Found = dict[str, tuple[Rows, torch.Tensor]]
"""Consumer -> rows that it reads in proportion, and which of them each column reads."""


@torch.no_grad()
def find_edges(block: nn.Module, call: Call) -> list[Edge]:
    """Every edge of a block that the probes see. call: from `capture_calls`.

    About ten runs of the block for each of its linear layers, on the call's few tokens. Blocks of
    one structure have the same edges, so one block's can be used for all.
    """
    with in_float64(block):
        watch = Watch(block, lambda: call(block))
        edges = norm_edges(watch) + _linear_edges(watch)
        for name, module in block.named_modules():
            if is_experts(module):
                edges += _expert_edges(block, name, module)
    return edges


def norm_edges(watch: Watch) -> list[Edge]:
    """Norms with the matrices that read them. To be called inside `in_float64`."""
    edges = []
    for name, call in watch.norm_calls.items():
        norm: Any = watch.norms[name]
        identity = torch.arange(norm.weight.numel())
        s = random_factors(len(identity), norm.weight.device)
        seen = watch.read({name: partial(torch.mul, s)})
        consumers = []
        for path, matrix in watch.matrices.items():
            source = matched_factors(watch.base.get(path), seen.get(path), s)
            if source is not None and torch.equal(source, identity):
                consumers.append(matrix)
        offset = gain_offset(norm, call) if consumers else None
        if offset is not None:
            producer = Rows(Matrix(name), identity)
            edges.append(Edge(producer, tuple(consumers), identity, offset=offset))
    return edges


def _linear_edges(watch: Watch) -> list[Edge]:
    """Edges from rows of linear layers to columns of later ones."""
    linear: Found = {}
    local: dict[str, list[Rows]] = {}
    order = [name for name in watch.base if name in watch.matrices]
    for place, name in enumerate(order):
        matrix, height = watch.matrices[name], watch.heights.get(name)
        later = {path: watch.base[path] for path in order[place + 1 :]}
        if height is None or matrix.param != "weight" or not later:
            continue

        respond = partial(_read_changed, watch, name)
        _find_linear(matrix, height, respond, later, linear)
        _find_local(matrix, height, respond, later, local)
    edges = []
    for path in order:
        edge = _edge(linear.get(path), local.get(path, []), watch.matrices[path])
        if edge is not None:
            edges.append(_with_span(edge, watch.base[path], partial(_read_one, watch, path)))
    return edges


def _expert_edges(block: nn.Module, name: str, module: Any) -> list[Edge]:
    """The edge inside fused experts, from up (and gate) to down, seen through the gate function."""
    gate = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
    first = Matrix(name, up_name(module))
    view = first.view(block)
    generator = torch.Generator().manual_seed(1)
    size = torch.exp2(torch.rand(64, 1, generator=generator, dtype=torch.float64) * 8 - 3)
    h = torch.randn(64, view.shape[-2], generator=generator, dtype=torch.float64) * size
    h = h.to(view.device)
    base = {name: gate(h)}
    linear: Found = {}
    local: dict[str, list[Rows]] = {}

    def respond(change: Change) -> Inputs:
        return {name: gate(change(h))}

    _find_linear(first, h.shape[1], respond, base, linear)
    _find_local(first, h.shape[1], respond, base, local)
    edge = _edge(linear.get(name), local.get(name, []), Matrix(name, "down_proj"))
    if edge is None:
        return []
    return [_with_span(edge, base[name], lambda changes: gate(changes[name](h)))]


def _find_linear(
    matrix: Matrix,
    height: int,
    respond: Callable[[Change], Inputs],
    later: Inputs,
    found: Found,
) -> None:
    """Enter into `found` the consumers that read some of a matrix's rows in proportion."""
    for rows in _row_patterns(height, {x.shape[1] for x in later.values()}):
        s = random_factors(len(rows), next(iter(later.values())).device)
        seen = respond(partial(scaled, rows, s))
        hits = 0
        for path, before in later.items():
            source = matched_factors(before, seen.get(path), s)
            if source is not None and path not in found:
                found[path] = (Rows(matrix, rows), source)
                hits += 1
        if hits:
            return


def _find_local(
    matrix: Matrix,
    height: int,
    respond: Callable[[Change], Inputs],
    later: Inputs,
    found: dict[str, list[Rows]],
) -> None:
    """Enter into `found` the rows of which each touches the one column of its number."""
    for width in sorted({x.shape[1] for x in later.values()}):
        for rows in _equal_patterns(height, width):
            generator = torch.Generator().manual_seed(width)
            mask = torch.rand(width, generator=generator) < 0.5
            seen = respond(partial(noisy, rows, mask, generator))
            for path, before in later.items():
                if before.shape[1] != width or path not in seen:
                    continue
                changed = changed_columns(before, seen[path])
                if changed is not None and torch.equal(changed, mask):
                    found.setdefault(path, []).append(Rows(matrix, rows))


def _row_patterns(height: int, widths: set[int]) -> Iterable[torch.Tensor]:
    """Rows that may hold v or up, the likeliest first."""
    rows = torch.arange(height)
    yield rows
    for width in sorted(widths):
        for chunks in (n for n in range(1, width + 1) if width % n == 0 and height % n == 0):
            part, size = width // chunks, height // chunks
            if part < size:
                yield rows[rows % size >= size - part]
        if height > width and (height - width) % 2 == 0:
            yield rows[-((height - width) // 2) :]
        if height == 2 * width:
            yield from (rows[:width], rows[0::2])  # the last half and odd rows came above


def _equal_patterns(height: int, width: int) -> list[torch.Tensor]:
    rows = torch.arange(height)
    if height == width:
        return [rows]
    if height == 2 * width:
        return [rows[:width], rows[width:], rows[0::2], rows[1::2]]
    return []


def _edge(
    linear: tuple[Rows, torch.Tensor] | None, local: list[Rows], consumer: Matrix
) -> Edge | None:
    if linear is not None:
        producer, source = linear
        known = (producer.matrix, producer.index.tolist())
        others = [r for r in local if (r.matrix, r.index.tolist()) != known]
        return Edge(producer, (consumer,), source, tuple(others))
    if not local:
        return None
    *others, producer = local
    source = torch.arange(len(producer.index))
    return Edge(producer, (consumer,), source, tuple(others), linear=False)


def _with_span(
    edge: Edge, base: torch.Tensor, moved: Callable[[dict[str, Change]], torch.Tensor]
) -> Edge:
    """The edge with the largest span inside which a shuffle of channels shuffles columns alike."""
    for span in (d for d in range(edge.width, 1, -1) if edge.width % d == 0):
        trial = replace(edge, span=span)
        generator = torch.Generator().manual_seed(span)
        starts = range(0, edge.width, span)
        order = torch.cat([start + torch.randperm(span, generator=generator) for start in starts])
        columns = trial.column_order(order)
        if columns is not None and same(base[:, columns], moved(_shuffles(edge, order))):
            return trial
    return edge


def _shuffles(edge: Edge, order: torch.Tensor) -> dict[str, Change]:
    """Changes to outputs, by module, that put all rows of the edge into `order`."""
    indices: dict[str, list[torch.Tensor]] = {}
    for rows in (edge.producer, *edge.companions):
        indices.setdefault(rows.matrix.module, []).append(rows.index)
    return {name: partial(shuffled, parts, order) for name, parts in indices.items()}


def _read_changed(watch: Watch, name: str, change: Change) -> Inputs:
    return watch.read({name: change})


def _read_one(watch: Watch, path: str, changes: dict[str, Change]) -> torch.Tensor:
    return watch.read(changes)[path]
