"""Rotations folded block by block: inside heads from v to o, and of the residual stream.

`transforms.residual` rotates a model that is in memory; here one block is at a time. With R the
rotation of the stream, a block that was changed must give y R for h R where it gave y for h, and
the model without its blocks (embedding, last norm, head) must give the logits that it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.stream import Stream
from bitnest.kernels.hadamard import block_sizes
from bitnest.quantize.folding.changes import Replace, Scale, Turn
from bitnest.quantize.folding.places import Changes, axes, turn_changes
from bitnest.quantize.folding.prove import Proposal, Prover, same
from bitnest.quantize.transforms.edges import Edge, Matrix
from bitnest.quantize.transforms.per_matrix import Hadamard
from bitnest.quantize.transforms.probe import Watch
from bitnest.quantize.transforms.proof import in_float64
from bitnest.quantize.transforms.residual import stream_edges
from bitnest.quantize.transforms.trace import norm_edges
from bitnest.skeleton import Skeleton

SEED = 0  # of signs


def head_turn(block: nn.Module, edge: Edge) -> Proposal | None:
    """A rotation inside heads; None for an edge that can have none."""
    if edge.offset is not None or edge.companions:
        return None
    what = f"rotate {edge.label}"
    size = max((s for s in block_sizes(edge.span) if edge.span % s == 0), default=0)
    if not edge.linear or not size:
        return Proposal(what, {})
    return Proposal(what, turn_changes(block, edge, size, SEED))


def stream_rotation(skeleton: Skeleton) -> Hadamard:
    """The widest rotation that there is for the hidden size."""
    width = skeleton.model.get_input_embeddings().weight.shape[1]
    return Hadamard(max(block_sizes(width), default=16), SEED)


def turn_block(
    prover: Prover, norms: Sequence[Edge], adders: Sequence[Matrix], rotation: Hadamard
) -> Changes | None:
    """Changes of a block that rotate the stream through it; None if it is another block then."""
    changes = _read(prover.block, norms, rotation)
    for matrix in adders:
        _put(changes, prover.block, matrix, rotation)
    undo = prover.apply(changes)
    turned = replace(prover.call, hidden=rotation.apply_input(prover.call.hidden))
    good = same(turned(prover.block), rotation.apply_input(prover.before))
    undo()
    return changes if good else None


def turn_ends(
    skeleton: Skeleton, stream: Stream, tokens: torch.Tensor, rotation: Hadamard
) -> Changes | None:
    """Changes of embedding, last norm and head; None if logits are others then."""
    model = skeleton.model
    table = model.get_input_embeddings()
    name, width = skeleton.path_of(table), table.weight.shape[1]
    with _without_blocks(skeleton, stream), in_float64(model):

        def run() -> torch.Tensor:
            logits: torch.Tensor = model(input_ids=tokens.to(stream.device), use_cache=False).logits
            return logits

        watch = Watch(model, run, outside=skeleton.prefix)
        edges = [edge for edge in norm_edges(watch) if edge.width == width]
        changes = _read(model, edges, rotation)
        changes.setdefault(f"{name}.weight", []).append(_turn(-1, width, rotation))
        before = run()
        held = {path: model.get_parameter(path).data for path in changes}
        for path, own in changes.items():
            parameter = model.get_parameter(path)
            for change in own:
                parameter.data = change.apply(parameter.data)
        good = same(run(), before)
        for path, data in held.items():
            model.get_parameter(path).data = data
    return changes if good else None


def block_parts(prover: Prover, width: int) -> tuple[list[Edge], list[Matrix]]:
    """Norms that read the stream with their consumers, and what adds to it."""
    return stream_edges(prover.block, prover.call, width)


def _turn(axis: int, width: int, rotation: Hadamard) -> Turn:
    signs = rotation.signs(width)
    assert signs is not None
    return Turn(axis, rotation.block, signs, torch.arange(width))


def _read(root: nn.Module, norms: Sequence[Edge], rotation: Hadamard) -> Changes:
    """Gains go into the columns that read them, which are turned."""
    changes: Changes = {}
    for edge in norms:
        norm: Any = root.get_submodule(edge.producer.matrix.module)
        assert edge.offset is not None
        gain = norm.weight.data.double().cpu() + edge.offset
        path = f"{edge.producer.matrix.module}.weight"
        changes.setdefault(path, []).append(Replace(torch.full_like(gain, 1 - edge.offset)))
        for matrix in edge.consumers:
            axis = axes(root, matrix)[1]
            changes.setdefault(f"{matrix.module}.{matrix.param}", []).extend(
                [Scale(axis, gain), _turn(axis, edge.width, rotation)]
            )
    return changes


def _put(changes: Changes, root: nn.Module, matrix: Matrix, rotation: Hadamard) -> None:
    axis = axes(root, matrix)[0]
    width = matrix.view(root).shape[-2]
    turn = _turn(axis, width, rotation)
    changes.setdefault(f"{matrix.module}.{matrix.param}", []).append(turn)
    if matrix.bias(root) is not None:
        name = "bias" if matrix.param == "weight" else f"{matrix.param}_bias"
        changes.setdefault(f"{matrix.module}.{name}", []).append(_turn(-1, width, rotation))


@contextmanager
def _without_blocks(skeleton: Skeleton, stream: Stream) -> Iterator[None]:
    """The model with everything but its blocks in memory; blocks hand on what they are given."""
    model = skeleton.model

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if stream.tuple_output else states

    skeleton.fill("", dtype=torch.float32, device=stream.device, skip=skeleton.prefix)
    for block in skeleton.blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in skeleton.blocks:
            del block.forward
        for path, parameter in list(model.named_parameters()):
            if not path.startswith(f"{skeleton.prefix}.") and not parameter.is_meta:
                skeleton.drop_parameter(path)
