"""Where the tensors of one expert have its intermediate neurons, and how to put them in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.errors import UnsupportedModel


@dataclass(frozen=True)
class Neurons:
    """Where a tensor of one expert has its intermediate neurons.

    dim: along it. layout: one, halves (gate then up) or pairs (gate and up in turns).
    """

    dim: int
    layout: str = "one"

    def permute(self, tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        """The tensor with its neurons in `order`."""
        index = torch.tensor(order)
        if self.layout == "halves":
            index = torch.cat([index, index + len(order)])
        elif self.layout == "pairs":
            index = torch.stack([2 * index, 2 * index + 1], dim=1).flatten()
        return tensor.index_select(self.dim, index)


def gate_layout(module: Any, where: str) -> str:
    """How an experts module's first projection lays out gate and up, found by trying.

    Raises:
        UnsupportedModel: neither in halves nor in pairs.
    """
    x = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    order = [3, 0, 5, 1, 4, 2]
    for layout in ("halves", "pairs"):
        moved = Neurons(1, layout).permute(x, order)
        if torch.equal(module._apply_gate(moved), module._apply_gate(x)[:, order]):
            return layout
    raise UnsupportedModel(
        "a gate that is neither in halves nor in pairs", where=where,
        hint="merge this family's experts without aligning their neurons",
    )  # fmt: skip
