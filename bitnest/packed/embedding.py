"""Packed embeddings: a lookup decodes the rows it needs, and a tied head shares the stored tensors.

A packed embedding keeps its class, so that a family that scales what it looks up still does: only
`nn.Embedding.forward` underneath is replaced. Its `weight` is decoded on demand; while the class's
own forward runs, which asks for no more than its type, it is a stand-in without values.

It is an nn.Embedding without a parameter, so its type is kept by an empty buffer that `.to(dtype)`
converts with the rest of the model.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from bitnest.formats import AnyFormat
from bitnest.packed.modules import PackedHead, PackedWeight, mark_initialised
from bitnest.sites import Site

_running = threading.local()  # depth: forwards of packed embeddings under way in this thread


def _depth() -> int:
    return int(vars(_running).get("depth", 0))


class PackedRows(nn.Embedding):
    """nn.Embedding with its matrix packed; see `pack_embedding`, which makes one in place."""

    packed: PackedWeight
    like: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded matrix, in the type it is looked up in; without values before the packed
        files are read and inside the lookup."""
        if not self.packed.loaded or _depth():
            empty = torch.empty(self.packed.shape, dtype=self.like.dtype, device="meta")
            mark_initialised(empty)
            return empty
        return self.packed.decode(self.like.dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _running.depth = _depth() + 1
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _running.depth -= 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of `input` (...), each decoded once: (..., hidden)."""
        wanted, place = input.flatten().unique(return_inverse=True)
        rows = self.packed.rows(wanted, self.like.dtype)
        return rows[place.to(rows.device)].view(*input.shape, -1)


def pack_embedding(module: nn.Module, fmt: AnyFormat, site: Site) -> PackedWeight:
    """Take an embedding's matrix and give it a packed one, still empty.

    Its class's own buffers (a scale) are still to be initialised by transformers' loader.
    """
    assert isinstance(module, nn.Embedding)
    dtype = module.weight.dtype
    del module._parameters["weight"]
    packed = PackedWeight(fmt, site.shape)
    mark_initialised(packed)
    module.packed = packed
    module.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
    cls = type(module)
    bases = (PackedRows,) if cls is nn.Embedding else (cls, PackedRows)
    module.__class__ = type(f"Packed{cls.__name__}", bases, {})
    return packed


def share_with_head(model: Any, name: str, packed: PackedWeight) -> None:
    """Give the head of `model` the embedding's packed matrix, if the two are tied.

    name: dotted path of the embedding. transformers has nothing left to tie between them.
    """
    head = model.get_output_embeddings()
    path = next((p for p, module in model.named_modules() if module is head), None)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if path is None or tied.get(f"{path}.weight") != f"{name}.weight":
        return
    packed.looked_up = True
    model.set_submodule(path, PackedHead(packed, head.bias))
    _forget_tie(model, f"{path}.weight")


def _forget_tie(model: Any, target: str) -> None:
    """Take one parameter off every list of tied ones, of the model and of its parts."""
    for path, module in model.named_modules():
        own = target.removeprefix(f"{path}.") if path else target
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict) and own in keys:
                setattr(module, attribute, {k: v for k, v in keys.items() if k != own})
