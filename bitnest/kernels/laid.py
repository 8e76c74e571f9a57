"""Packed weights laid out for the kernels of the device they are on.

`lay_out` takes a weight's stored tensors and gives it a layout that a kernel eats, or None where
none does; `kernels/paths` says why. A layout multiplies (`product`) and restores the stored tensors
bit for bit (`restore`), so it is kept in their place, not beside them.

Wrapped formats are laid out inside out: inputs are turned to the stored basis before the product
(`basis`), a residual is added behind it, parts of split columns are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from bitnest.formats import (
    AnyFormat,
    LowRankFormat,
    NestedFormat,
    SplitFormat,
    TransformedFormat,
    ZeroFormat,
)
from bitnest.formats.inputs import InputFormat
from bitnest.formats.split import WIDE
from bitnest.formats.wrappers import core_format
from bitnest.kernels.basis import to_stored
from bitnest.kernels.decode import split_tensors
from bitnest.kernels.gpu.paths import missing
from bitnest.kernels.inputs import Coded, code_inputs

if TYPE_CHECKING:
    from bitnest.kernels.gpu.layout import GpuWeight

Tensors = Mapping[str, torch.Tensor]
Stored = dict[str, torch.Tensor]


class Laid(Protocol):
    """A weight in the layout of some kernels; shape (O, I).

    path: which kernels, as `bitnest doctor` names them. nbytes: it takes.
    """

    @property
    def path(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        """x W^T, (T, O) of x (T, I), in x's type. planes: bytes of precision that x deserves, where
        its type has more: 2 for what was 16-bit; None: as its type."""

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        """The product with rounded inputs in the stored basis, (T, O) float32; None: not here."""

    def restore(self) -> Stored:
        """The stored tensors, bit for bit."""


Provider = Callable[[Tensors, AnyFormat, tuple[int, int]], "Laid | None"]


def lay_out(tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]) -> Laid | None:
    """The stored tensors of an (O, I) weight, laid out for the device they are on; None where no
    kernel takes the format."""
    if isinstance(fmt, LowRankFormat):
        own, rest = _apart(tensors, fmt.own_parts(shape))
        base = lay_out(rest, fmt.base, shape)
        return None if base is None else _Residual(base, own)
    if isinstance(fmt, TransformedFormat):
        core = core_format(fmt)
        stored = core.parts(shape)
        rest, own = _apart(tensors, stored)
        base = lay_out(rest, core, shape)
        return None if base is None else _Turned(base, own, fmt)
    if isinstance(fmt, ZeroFormat):
        return None  # there is nothing to multiply
    if isinstance(fmt, SplitFormat):
        parts = [lay_out(*part) for part in split_tensors(tensors, fmt, shape)]
        whole = tuple(part for part in parts if part is not None)
        return _Split(whole, shape) if len(whole) == len(parts) else None
    device = next((t.device.type for t in tensors.values()), "meta")
    return _provider(device)(tensors, fmt, shape)


def rounded(
    laid: Laid, x: torch.Tensor, fmt: AnyFormat, inputs: InputFormat, static: float | None
) -> torch.Tensor | None:
    """x W^T, (T, O) float32, with x (T, I) rounded in the basis of a weight laid out from `fmt`;
    None where no kernel multiplies such codes."""
    if not inputs.integer or isinstance(laid, _Residual | _Split):
        return None
    if laid.path == "cpu":
        from bitnest.kernels.cpu.rotate import code_stored

        own = laid.own if isinstance(laid, _Turned) else {}
        coded = code_stored(x.float(), fmt, inputs, static, own)
    else:
        coded = code_inputs(turn(laid, x.float()), inputs, static)
    kept = any(part.kept is not None and len(part.kept[0]) for part in coded)
    return None if kept else laid.product_coded(coded)


def change(laid: Laid, fmt: AnyFormat, tensors: Tensors) -> Laid | None:
    """A nested weight on the CPU that has become `fmt`, in place: more or fewer of its widths.
    tensors: what these add. None where it cannot; nothing has changed then."""
    if isinstance(laid, _Turned):
        if not isinstance(fmt, TransformedFormat) or _wrappers(fmt) != _wrappers(laid.fmt):
            return None
        base = change(laid.base, core_format(fmt), tensors)
        return None if base is None else _Turned(base, laid.own, fmt)
    if laid.path != "cpu" or not isinstance(fmt, NestedFormat):
        return None
    from bitnest.kernels.cpu.layout_nested import NestedCpuWeight

    if not isinstance(laid, NestedCpuWeight):
        return None
    both = min(len(fmt.widths), len(laid.fmt.widths)) - 1
    if fmt.at(fmt.widths[both]) != laid.fmt.at(laid.fmt.widths[both]):
        return None
    laid.change(fmt, tensors)
    return laid


def _wrappers(fmt: TransformedFormat) -> str:
    return fmt.name.removeprefix(core_format(fmt).name)


def turn(laid: Laid, x: torch.Tensor) -> torch.Tensor:
    """x (..., I) float32 in the basis that the weight is stored in."""
    return to_stored(x, laid.fmt, laid.own) if isinstance(laid, _Turned) else x


def _provider(device: str) -> Provider:
    if device == "cpu":
        from bitnest.kernels.cpu.layout import lay_out as on_cpu

        return on_cpu
    if device == "cuda" and not missing():
        return _on_gpu
    return lambda *_: None


def _on_gpu(tensors: Tensors, fmt: AnyFormat, shape: tuple[int, int]) -> Laid | None:
    from bitnest.kernels.gpu.layout import lay_out as for_triton

    weight = for_triton(tensors, fmt, shape)
    return None if weight is None else _OnGpu(weight)


@dataclass(frozen=True)
class _OnGpu:
    """A weight for the Triton kernels."""

    weight: GpuWeight

    path = "triton"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        from bitnest.kernels.gpu.linear import linear

        return linear(x, self.weight)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        from bitnest.kernels.gpu.rounded import rounded_linear, takes

        part, columns = parts[0], self.shape[1]
        whole = len(parts) == 1 and part.values.shape[1] == columns and part.integer
        if not whole or not takes(self.weight) or (part.group % 16 and part.scales.shape[1] > 1):
            return None
        group = columns if part.scales.shape[1] == 1 else part.group
        return rounded_linear(part.values.to(torch.int8), part.scales, group, self.weight)

    def restore(self) -> Stored:
        return self.weight.restore()


def _apart(tensors: Tensors, names: Container[str]) -> tuple[Stored, Stored]:
    """Tensors of these names, and the others."""
    own = {name: tensor for name, tensor in tensors.items() if name in names}
    return own, {name: tensor for name, tensor in tensors.items() if name not in own}


@dataclass(frozen=True)
class _Wrapped:
    """A weight with something around it. own: the stored tensors of that."""

    base: Laid
    own: Stored

    @property
    def path(self) -> str:
        return self.base.path

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + _nbytes(self.own)

    def restore(self) -> Stored:
        return {**self.base.restore(), **self.own}


@dataclass(frozen=True)
class _Turned(_Wrapped):
    """A weight stored in another basis: inputs are turned to it in float32. own: `channels` and
    `order`, where the transforms have them."""

    fmt: TransformedFormat

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        return self.base.product(turn(self, x.float()), planes or _planes(x)).to(x.dtype)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        return self.base.product_coded(parts)


@dataclass(frozen=True)
class _Residual(_Wrapped):
    """A weight with a low-rank residual B A behind it, which reads x in its own basis."""

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        y = self.base.product(x.float(), planes or _planes(x))
        inner = F.linear(x.float(), self.own["right"].float())
        inner *= self.own["right_scales"].float() * self.own["left_scales"].float()
        return y.addmm_(inner, self.own["left"].float().T).to(x.dtype)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        return None  # the residual is no integer


@dataclass(frozen=True)
class _Split:
    """A weight whose first columns have another format than the rest."""

    parts: tuple[Laid, ...]
    shape: tuple[int, int]

    @property
    def path(self) -> str:
        return self.parts[-1].path

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        y = torch.zeros(len(x), self.shape[0], device=x.device)
        for part, columns in zip(self.parts, self._columns(x), strict=True):
            y += part.product(columns.float(), planes or _planes(x))
        return y.to(x.dtype)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        return None

    def restore(self) -> Stored:
        first, rest = ({}, *(part.restore() for part in self.parts))[-2:]
        return {**{WIDE + name: t for name, t in first.items()}, **rest}

    def _columns(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return x.split([part.shape[1] for part in self.parts], dim=-1)


def _planes(x: torch.Tensor) -> int:
    """Bytes that inputs of x's type are cut into."""
    return 3 if x.dtype == torch.float32 else 2


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
