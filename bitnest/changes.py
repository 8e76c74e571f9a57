"""What one adapter does to one tensor of a checkpoint: M(W) - W, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bitnest.safetensors_io import TensorInfo, read_tensor


@dataclass(frozen=True)
class Factors:
    """A low-rank change of one matrix: left (out, r) times right (r, in), both views cut on demand.

    a, b: where the factors lie. scaling: s. transposed: the matrix lies (in, out). experts: their
    number if the factors hold them all. expert: this matrix's, None if the tensor holds all.
    rows: of the output. swapped: A is on the output side, as old versions of peft trained experts.
    magnitude: DoRA's. read: reads factors; those of a layer's experts are read many times over.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool = False
    experts: int | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None
    swapped: bool = False
    magnitude: TensorInfo | None = None
    read: Callable[[TensorInfo], torch.Tensor] = field(default=read_tensor, compare=False)

    def product(self, expert: int | None) -> torch.Tensor:
        """s B A in float32, (out, in). expert: the place in a tensor of all."""
        left, right = self.pair(expert)
        return left @ right

    def pair(self, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """s B (out, r) and A (r, in) in float32."""
        a, b = self.read(self.a), self.read(self.b)
        if self.experts is not None:
            place = self.expert if self.expert is not None else expert
            assert place is not None
            a = a.view(self.experts, -1, a.shape[1])[place]
            b = b.view(b.shape[0], -1, self.experts)[:, :, place]
        left, right = (a.T.float(), b.T.float()) if self.swapped else (b.float(), a.float())
        if self.rows is not None:
            left = left[self.rows[0] : self.rows[1]]
        return left * self.scaling, right


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor of the checkpoint.

    adapter: its number. scale: c. whole: the tensor it puts there instead. vector: what is added to
    a bias, times its scaling. factors: the low-rank part.
    """

    adapter: int
    scale: float
    whole: TensorInfo | None = None
    vector: tuple[TensorInfo, float] | None = None
    factors: Factors | None = None

    def delta(self, weight: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """M(W) - W for `weight` in float32. expert: its place in a tensor of all."""
        change = torch.zeros_like(weight)
        if self.whole is not None:
            change += self.replacement(expert) - weight
        if self.vector is not None:
            change += read_tensor(self.vector[0]).float() * self.vector[1]
        if self.factors is None:
            return change
        product = self.factors.product(expert)
        change += product.T if self.factors.transposed else product
        if self.factors.magnitude is None:
            return change
        found = weight + change
        rows = found.T if self.factors.transposed else found
        magnitude = read_tensor(self.factors.magnitude).float().view(-1, 1)
        rows = rows * (magnitude / torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        return (rows.T if self.factors.transposed else rows) - weight

    def replacement(self, expert: int | None = None) -> torch.Tensor:
        """The tensor put there, in float32."""
        assert self.whole is not None
        info = self.whole if expert is None else expert_slice(self.whole, expert)
        return read_tensor(info).float()


def expert_slice(info: TensorInfo, expert: int) -> TensorInfo:
    """Where one expert of a tensor (E, ., .) lies."""
    size = info.nbytes // info.shape[0]
    start = info.start + expert * size
    return replace(info, shape=info.shape[1:], start=start, stop=start + size)
