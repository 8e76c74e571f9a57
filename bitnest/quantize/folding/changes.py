"""What folds do to one tensor: scale, order or turn its channels along an axis, or replace it.

Axes are counted from the end, so one change fits a matrix (O, I) and all experts' (E, O, I). A
vector with a row per expert changes each by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.kernels.hadamard import rotate


class Unmapped(Exception):
    """A change that one tensor of the checkpoint cannot take: its channels lie in several."""


def _along(values: torch.Tensor, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """values (n,) or (E, n), to be broadcast over `axis` of tensor (..., n, ...)."""
    if axis == -2:
        return values[..., None]
    return values[:, None, :] if values.dim() == 2 and tensor.dim() == 3 else values


@dataclass(frozen=True, eq=False)
class Scale:
    """Channels times `factor`, (n,) or (E, n) float64."""

    axis: int
    factor: torch.Tensor

    @property
    def exact(self) -> bool:
        """Whether 16-bit values stay 16-bit values: powers of two only."""
        return bool((torch.frexp(self.factor).mantissa.abs() == 0.5).all())

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, changed, in its type."""
        factor = _along(self.factor.to(tensor.device), tensor, self.axis)
        return tensor * factor.to(tensor.dtype)

    def cut(self, expert: int | None, rows: slice | None) -> Scale | None:
        """Of one expert, and of some places along the axis; None if nothing changes there."""
        factor = _cut(self.factor, expert, rows)
        return None if bool((factor == 1).all()) else Scale(self.axis, factor)

    def parts(self) -> dict[str, torch.Tensor]:
        """Tensors to store."""
        return {"factor": self.factor}


@dataclass(frozen=True, eq=False)
class Order:
    """Place j takes what was at index[j]; index (n,) or (E, n) int64."""

    axis: int
    index: torch.Tensor
    exact = True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, changed, in its type."""
        index = self.index.to(tensor.device)
        if index.dim() == 1:
            return tensor.index_select(self.axis, index)
        return torch.take_along_dim(tensor, _along(index, tensor, self.axis), self.axis)

    def cut(self, expert: int | None, rows: slice | None) -> Order | None:
        """See `Scale.cut`.

        Raises:
            Unmapped: channels would leave the cut.
        """
        index = _cut(self.index, expert, rows)
        if rows is not None:
            index = index - rows.start
        same = torch.arange(index.shape[-1])
        if not torch.equal(index.sort(-1).values, same.expand_as(index)):
            raise Unmapped
        return None if torch.equal(index, same.expand_as(index)) else Order(self.axis, index)

    def parts(self) -> dict[str, torch.Tensor]:
        """Tensors to store."""
        return {"index": self.index.to(torch.int32)}


@dataclass(frozen=True, eq=False)
class Turn:
    """Channels at `places` (m,) rotated by Hadamard blocks with `signs` (m,) int8."""

    axis: int
    block: int
    signs: torch.Tensor
    places: torch.Tensor
    exact = False

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, changed, in its type."""
        places = self.places.to(tensor.device)
        last = tensor.transpose(self.axis, -1) if tensor.dim() > 1 else tensor
        turned = last.clone()
        turned[..., places] = rotate(last[..., places], self.block, self.signs.to(tensor.device))
        return turned.transpose(self.axis, -1) if tensor.dim() > 1 else turned

    def cut(self, expert: int | None, rows: slice | None) -> Turn | None:
        """See `Order.cut`; all places must be inside, or none."""
        if rows is None:
            return self
        inside = (self.places >= rows.start) & (self.places < rows.stop)
        if not bool(inside.any()):
            return None
        if not bool(inside.all()):
            raise Unmapped
        return Turn(self.axis, self.block, self.signs, self.places - rows.start)

    def parts(self) -> dict[str, torch.Tensor]:
        """Tensors to store."""
        return {"signs": self.signs, "places": self.places.to(torch.int32)}


@dataclass(frozen=True, eq=False)
class Replace:
    """A vector, such as a norm's gain, replaced by `value`, which its type holds exactly."""

    value: torch.Tensor
    axis = -1
    exact = True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, changed, in its type."""
        return self.value.to(tensor.device, tensor.dtype)

    def cut(self, expert: int | None, rows: slice | None) -> Replace | None:
        """A vector is never cut."""
        if expert is not None or rows is not None:
            raise Unmapped
        return self

    def parts(self) -> dict[str, torch.Tensor]:
        """Tensors to store."""
        return {"value": self.value}


Change = Scale | Order | Turn | Replace


def apply_all(changes: Sequence[Change], tensor: torch.Tensor) -> torch.Tensor:
    """The changes, one after the other."""
    for change in changes:
        tensor = change.apply(tensor)
    return tensor


def of_expert(change: Change, expert: int) -> Change | None:
    """What a change of all experts' matrices does to one."""
    return change if isinstance(change, Replace) else change.cut(expert, None)


def to_parts(change: Change) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A change as plain values and tensors."""
    plain: dict[str, Any] = {"kind": type(change).__name__, "axis": change.axis}
    if isinstance(change, Turn):
        plain["block"] = change.block
    return plain, change.parts()


def from_parts(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Change:
    """What `to_parts` took apart."""
    kind, axis = plain["kind"], int(plain["axis"])
    if kind == "Scale":
        return Scale(axis, tensors["factor"])
    if kind == "Order":
        return Order(axis, tensors["index"].long())
    if kind == "Turn":
        return Turn(axis, int(plain["block"]), tensors["signs"], tensors["places"].long())
    return Replace(tensors["value"])


def _cut(values: torch.Tensor, expert: int | None, rows: slice | None) -> torch.Tensor:
    if expert is not None and values.dim() == 2:
        values = values[expert]
    return values if rows is None else values[..., rows]
