"""Edges: where one weight makes the channels that another weight reads.

    norm -> linears, router, experts     gain and bias make channels, columns read them
    v -> o                               one head of v can feed several heads of o (GQA)
    up -> down                           and gate beside up; inside fused experts as well

An edge names rows of a producer and the columns of consumers. Column c of every consumer reads
producer channel source[c], times something that depends on the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitnest.sites import is_linear


@dataclass(frozen=True)
class Matrix:
    """A matrix, or one per expert, inside a block. module: dotted path from the block."""

    module: str
    param: str = "weight"

    def view(self, block: nn.Module) -> torch.Tensor:
        """(..., O, I), a view that can be written to."""
        module: Any = block.get_submodule(self.module)
        weight: torch.Tensor = getattr(module, self.param).data
        stored_in_out = is_linear(module) and not isinstance(module, nn.Linear)
        return weight.mT if stored_in_out or getattr(module, "is_transposed", False) else weight

    def bias(self, block: nn.Module) -> torch.Tensor | None:
        """(..., O), or None."""
        module = block.get_submodule(self.module)
        bias = getattr(module, "bias" if self.param == "weight" else f"{self.param}_bias", None)
        return bias.data if isinstance(bias, torch.Tensor) else None

    def __str__(self) -> str:
        return self.module if self.param == "weight" else f"{self.module}.{self.param}"


@dataclass(frozen=True, eq=False)
class Rows:
    """Output channels of a matrix, or channels of a norm. index: (C,) row numbers."""

    matrix: Matrix
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class Edge:
    """Channels from a producer to the columns of all consumers.

    source: (I,), the producer channel (a place in producer.index) that each column reads.
    companions: rows that enter each channel beside the producer's, such as the gate's; they are
    permuted with it. linear: the consumers' input is proportional to each producer channel.
    offset: for a norm, c in y = (c + weight) * normalised; None for a matrix. span: channels can
    change places within neighbours of this number; 1 where they cannot at all.
    """

    producer: Rows
    consumers: tuple[Matrix, ...]
    source: torch.Tensor
    companions: tuple[Rows, ...] = ()
    linear: bool = True
    offset: float | None = None
    span: int = 1

    @property
    def width(self) -> int:
        """Number of producer channels."""
        return len(self.producer.index)

    @property
    def label(self) -> str:
        """Producer and consumers by path, such as `self_attn.v_proj > self_attn.o_proj`."""
        return f"{self.producer.matrix} > {' '.join(map(str, self.consumers))}"

    def pooled(self, columns: torch.Tensor) -> torch.Tensor:
        """The largest of a statistic over the columns that read each channel. (I,) -> (C,)."""
        out = columns.new_zeros(self.width)
        return out.scatter_reduce(0, self.source.to(columns.device), columns, "amax")

    def column_order(self, order: torch.Tensor) -> torch.Tensor | None:
        """Where columns go when producer channels take `order`; None if it leaves a span.

        Column c is at place c mod span of its own span, and reads the same place of its producer's.
        """
        columns = torch.arange(len(self.source))
        place = columns % self.span
        aligned = torch.equal(self.source % self.span, place)
        inside = torch.equal(order // self.span, torch.arange(self.width) // self.span)
        if not (aligned and inside):
            return None
        return columns - place + order[self.source] % self.span
