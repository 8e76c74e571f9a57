"""Transforms put into the weights on both sides of an edge, so that nothing is left to do online.

With y the producer's channels and W the consumers' columns, row c of source naming the channel:

    scale        y / s             W diag(s[source])            norms, v -> o, up -> down
    permutation  y[order]          W[:, the columns' order]     inside heads; all of an MLP
    rotation     y R per block     W R                          v -> o, blocks inside heads

A norm's gain and bias, or rows and bias of a matrix, give y; in up -> down the gate's rows take the
permutation too. All consumers change together, routers among them, so a router goes on choosing the
same experts.

Every fold runs `prove` and is kept only if the block computes what it did. A scale is not even
tried where `trace` saw that consumers are not proportional to the channel (a clamp, an added
constant, an activation): there random states might never show it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bitnest.kernels.hadamard import rotate
from bitnest.quantize.transforms.edges import Edge, Rows
from bitnest.quantize.transforms.per_matrix import Hadamard
from bitnest.quantize.transforms.proof import Call, Proof, prove, refused

Change = Callable[[torch.Tensor], torch.Tensor]


def fold_scale(block: nn.Module, edge: Edge, scale: torch.Tensor, call: Call) -> Proof:
    """Producer channels over `scale` (C,), consumers' columns times it.

    scale: positive, one per producer channel; `edge.pooled` brings per-column statistics there.
    """
    what = f"scale {edge.label}"
    if not edge.linear:
        return refused(what)
    s = _checked(scale, edge)

    def change() -> None:
        w = s.to(edge.consumers[0].view(block).device)
        if edge.offset is None:
            _change_rows(block, edge.producer, lambda y: y / w)
        else:
            _change_gain(block, edge, lambda y: y / w)
        _change_columns(block, edge, lambda columns: columns * w[edge.source])

    return prove(block, lambda: call(block), change, what)


def fold_permutation(block: nn.Module, edge: Edge, order: torch.Tensor, call: Call) -> Proof:
    """Producer channels, with all that enters them, put into `order` (C,), and the columns alike.

    order: keeps every channel within its span of `edge.span` neighbours.
    """
    what = f"permutation {edge.label}"
    columns = edge.column_order(order.cpu())
    if edge.offset is not None or columns is None:  # a norm's input would have to be permuted too
        return refused(what)

    def change() -> None:
        for rows in (edge.producer, *edge.companions):
            _change_rows(block, rows, lambda y: y[..., order])
        _change_columns(block, edge, lambda w: w[..., columns])

    return prove(block, lambda: call(block), change, what)


def fold_rotation(block: nn.Module, edge: Edge, rotation: Hadamard, call: Call) -> Proof:
    """Producer channels and columns rotated by blocks, which must divide the edge's span."""
    what = f"rotation {edge.label}"
    if edge.offset is not None or not edge.linear or edge.companions or edge.span % rotation.block:
        return refused(what)
    signs = rotation.signs(edge.width)
    column_signs = None if signs is None else signs[edge.source]

    def change() -> None:
        _change_rows(block, edge.producer, lambda y: rotate(y, rotation.block, signs))
        _change_columns(block, edge, lambda w: rotate(w, rotation.block, column_signs))

    return prove(block, lambda: call(block), change, what)


def _checked(scale: torch.Tensor, edge: Edge) -> torch.Tensor:
    if scale.shape != (edge.width,) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{edge.label}: a scale is {edge.width} positive finite numbers")
    return scale.double()


def _change_gain(block: nn.Module, edge: Edge, change: Change) -> None:
    """`change` made to a norm's output channels, through gain and bias."""
    module, offset = block.get_submodule(edge.producer.matrix.module), edge.offset
    assert offset is not None
    for name, parameter in module.named_parameters(recurse=False):
        c = offset if name == "weight" else 0.0
        parameter.data.copy_(change(parameter.data + c) - c)


def _change_rows(block: nn.Module, rows: Rows, change: Change) -> None:
    """`change` made to some output channels of a matrix: to its rows and to their bias."""
    weight, bias = rows.matrix.view(block), rows.matrix.bias(block)
    weight[..., rows.index, :] = change(weight[..., rows.index, :].mT).mT
    if bias is not None:
        bias[..., rows.index] = change(bias[..., rows.index])


def _change_columns(block: nn.Module, edge: Edge, change: Change) -> None:
    for matrix in edge.consumers:
        weight = matrix.view(block)
        weight.copy_(change(weight))
