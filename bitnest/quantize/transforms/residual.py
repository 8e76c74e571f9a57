"""Rotation of the residual stream of a whole model, folded into its weights (QuaRot's first step).

An RMS norm without gain commutes with a rotation R of its channels: norm(x R) = norm(x) R. So

    1. a tied head gets weights of its own
    2. every norm that reads the stream hands its gain to the matrices after it, W diag(g)
    3. what reads the stream through a norm, routers too:       W R
       what adds to it:                              R^T W,  b R
       the embedding:                                E R

and the logits stay. Who reads and who adds is found by probing, as in `trace`: a matrix adds to the
stream if whatever is put on its output arrives, up to a factor per token, at a later norm of the
stream or at the block's output.

Not exact, and so refused: LayerNorm (it subtracts a mean over channels), a norm between a matrix
and the stream (Gemma 2 and 3, OLMo 2), learned positions added to the embedding. Left out: doing it
block by block; the model has to fit in float64 beside itself. Paper: QuaRot (2404.00456).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitnest.kernels.hadamard import block_sizes
from bitnest.quantize.transforms.edges import Edge, Matrix
from bitnest.quantize.transforms.per_matrix import Hadamard
from bitnest.quantize.transforms.probe import Watch, parallel
from bitnest.quantize.transforms.proof import Call, Proof, capture_calls, in_float64, prove
from bitnest.quantize.transforms.trace import norm_edges
from bitnest.sites import is_experts

Parts = list[tuple[nn.Module, list[Edge], list[Matrix]]]
"""A root, the norms that read the stream in it, and the matrices that add to the stream."""


def rotate_residual(
    model: Any, prefix: str, tokens: torch.Tensor, rotation: Hadamard | None = None
) -> Proof:
    """Rotate the model's residual stream in place if that is exact; otherwise change nothing.

    prefix: path of the ModuleList of decoder blocks. tokens: (batch, length), what the model is run
    on. rotation: by default the widest there is for the hidden size, with the signs of seed 0.
    """
    blocks = model.get_submodule(prefix)
    width = model.get_input_embeddings().weight.shape[1]
    rotation = rotation or Hadamard(max(block_sizes(width), default=16), 0)
    calls = capture_calls(model, blocks, tokens)
    parts = [_block_parts(block, call, width) for block, call in zip(blocks, calls, strict=True)]
    parts.append(_tail_parts(model, prefix, tokens, width))
    retie = _untie(model)

    def change() -> None:
        embedding = model.get_input_embeddings().weight.data
        embedding.copy_(rotation.apply_input(embedding))
        for root, edges, adders in parts:
            for edge in edges:
                _read_rotated(root, edge, rotation)
            for matrix in adders:
                _add_rotated(root, matrix, rotation)

    proof = prove(model, lambda: _logits(model, tokens), change, "rotation of the residual stream")
    if not proof.exact:
        retie()
    return proof


@torch.no_grad()
def _block_parts(
    block: nn.Module, call: Call, width: int
) -> tuple[nn.Module, list[Edge], list[Matrix]]:
    with in_float64(block):
        return (block, *stream_edges(block, call, width))


def stream_edges(block: nn.Module, call: Call, width: int) -> tuple[list[Edge], list[Matrix]]:
    """Norms that read the stream in a block, and the matrices that add to it. To be called inside
    `in_float64`. width: of the stream."""
    watch = Watch(block, lambda: call(block))
    edges = [edge for edge in norm_edges(watch) if edge.width == width]
    targets = [edge.producer.matrix.module for edge in edges] + [""]
    adders = []
    for name, matrix in watch.matrices.items():
        if watch.heights.get(name) == width and _adds(watch, name, targets):
            experts = is_experts(block.get_submodule(name))
            adders.append(Matrix(name, "down_proj") if experts else matrix)
    return edges, adders


def _tail_parts(
    model: Any, prefix: str, tokens: torch.Tensor, width: int
) -> tuple[nn.Module, list[Edge], list[Matrix]]:
    """The last norm and the head."""
    with torch.no_grad(), in_float64(model):
        watch = Watch(model, lambda: _logits(model, tokens), outside=prefix)
        return model, [edge for edge in norm_edges(watch) if edge.width == width], []


def _adds(watch: Watch, name: str, targets: list[str]) -> bool:
    """Whether what is added to a module's output arrives, as it is, at one of `targets`."""
    added: list[torch.Tensor] = []

    def change(y: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
        added.append(noise.flatten(0, -2))
        return y + noise

    seen = watch.read({name: change})
    return any(
        target in seen and parallel(seen[target] - watch.base[target], torch.cat(added))
        for target in targets
    )


def _read_rotated(root: nn.Module, edge: Edge, rotation: Hadamard) -> None:
    norm: Any = root.get_submodule(edge.producer.matrix.module)
    assert edge.offset is not None
    gain = norm.weight.data + edge.offset
    for matrix in edge.consumers:
        weight = matrix.view(root)
        weight.copy_(rotation.apply_weight(weight * gain))
    norm.weight.data.fill_(1 - edge.offset)


def _add_rotated(root: nn.Module, matrix: Matrix, rotation: Hadamard) -> None:
    weight, bias = matrix.view(root), matrix.bias(root)
    weight.copy_(rotation.apply_input(weight.mT).mT)
    if bias is not None:
        bias.copy_(rotation.apply_input(bias))


def _untie(model: Any) -> Callable[[], None]:
    """Give a tied head weights of its own; returns what ties it again."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight
    config = model.config.get_text_config()
    was = getattr(config, "tie_word_embeddings", False)
    if tied is not embedding.weight:
        return lambda: None
    head.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
    config.tie_word_embeddings = False

    def retie() -> None:
        head.weight = tied
        config.tie_word_embeddings = was

    return retie


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits
