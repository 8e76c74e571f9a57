"""Transforms of one matrix and its input: Hadamard blocks, channel scales, channel order.

    Hadamard      W R       x R        R orthogonal, block-diagonal (kernels.hadamard)
    ChannelScale  W diag s  x / s
    Permutation   W[:, o]   x[:, o]

Each keeps x W^T; `invert_weight` undoes `apply_weight`. The result has the type of what it is given
and is rounded once to it, so in 16 bit only permutations and scales that are powers of two lose
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from bitnest.kernels.hadamard import random_signs, rotate, unrotate


class Transform(Protocol):
    """What every transform does. W is (..., O, I), x is (..., I)."""

    def apply_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W in the new basis."""
        ...

    def apply_input(self, x: torch.Tensor) -> torch.Tensor:
        """x in the new basis."""
        ...

    def invert_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W back in the old basis."""
        ...


@dataclass(frozen=True)
class Hadamard:
    """Rotation by blocks of channels; a last part narrower than a block stays as it is.

    block: any order of `kernels.hadamard.hadamard`. seed: of the signs; None for no signs.
    """

    block: int
    seed: int | None = None

    def signs(self, width: int) -> torch.Tensor | None:
        """The signs of `width` channels."""
        return None if self.seed is None else random_signs(width, self.seed)

    def apply_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W R."""
        return rotate(weight, self.block, self.signs(weight.shape[-1]))

    def apply_input(self, x: torch.Tensor) -> torch.Tensor:
        """x R."""
        return rotate(x, self.block, self.signs(x.shape[-1]))

    def invert_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W R^T."""
        return unrotate(weight, self.block, self.signs(weight.shape[-1]))


@dataclass(frozen=True, eq=False)
class ChannelScale:
    """Input channel j of the weight times s_j, of x over s_j. scale: (I,), positive."""

    scale: torch.Tensor

    def __post_init__(self) -> None:
        if not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            raise ValueError("channel scales must be positive and finite")

    def apply_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W diag(s)."""
        return (weight * self._like(weight)).to(weight.dtype)

    def apply_input(self, x: torch.Tensor) -> torch.Tensor:
        """x / s."""
        return (x / self._like(x)).to(x.dtype)

    def invert_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W diag(1 / s)."""
        return (weight / self._like(weight)).to(weight.dtype)

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        # never under float32: the product is rounded to x's type once, not the scale before it
        return self.scale.to(x.device, torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Permutation:
    """Input channel j of the new basis is channel order[j] of the old. order: (I,) int64."""

    order: torch.Tensor

    def __post_init__(self) -> None:
        want = torch.arange(len(self.order), device=self.order.device)
        if not torch.equal(self.order.sort().values, want):
            raise ValueError("an order must name every channel once")

    def apply_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W with its columns in the new order."""
        return weight[..., self.order.to(weight.device)]

    def apply_input(self, x: torch.Tensor) -> torch.Tensor:
        """x with its channels in the new order."""
        return x[..., self.order.to(x.device)]

    def invert_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W with its columns in the old order."""
        return weight[..., self.order.argsort().to(weight.device)]
