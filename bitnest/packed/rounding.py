"""Inputs of dense layers rounded as those of packed ones are, and looked at.

`each_input` puts a function between what a matrix is given and what it reads, for linear layers and
for every expert's projections. With `Rounder` in it a dense model computes what packed weights with
rounded inputs do, but for the weights' own error: so calibration passes on what inference will see,
and an evaluation tells the error of inputs from that of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bitnest.formats import AnyFormat
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.basis import from_stored, to_stored
from bitnest.kernels.experts import experts_forward
from bitnest.kernels.inputs import round_inputs
from bitnest.sites import Site, is_experts

Between = Callable[[Site, torch.Tensor], torch.Tensor]
"""(site, x (..., in)) -> what the site's matrix reads instead."""


@dataclass(frozen=True)
class Rounder:
    """What a site's inputs are rounded to. fmt, tensors: how its weight is stored, which says the
    basis they are rounded in. static: the static scale, where inputs have one."""

    inputs: InputFormat
    fmt: AnyFormat
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    static: float | None = None

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) in the basis it is rounded in, (rows, in) float32."""
        return to_stored(x.detach().reshape(-1, x.shape[-1]).float(), self.fmt, self.tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) rounded, in its own basis and type."""
        rounded = round_inputs(self.stored(x), self.inputs, self.static)
        return from_stored(rounded, self.fmt, self.tensors).to(x.dtype).view(x.shape)


def rounding(rounders: Mapping[str, Rounder]) -> Between:
    """Rounds the inputs of sites that are named, leaves others."""

    def between(site: Site, x: torch.Tensor) -> torch.Tensor:
        rounder = rounders.get(site.name)
        return x if rounder is None else rounder(x)

    return between


@contextmanager
def each_input(
    modules: Mapping[str, nn.Module], sites: Sequence[Site], between: Between
) -> Iterator[None]:
    """Call `between` on all that the matrices of `sites` read. modules: by their names in the
    model, dense."""
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        by_module.setdefault(site.module, []).append(site)
    undo: list[Callable[[], None]] = []
    try:
        for name, own in by_module.items():
            module = modules[name]
            if is_experts(module):
                undo.append(_experts(module, own, between))
            else:
                hook = module.register_forward_pre_hook(_before(own[0], between))
                undo.append(hook.remove)
        yield
    finally:
        for step in reversed(undo):
            step()


def _before(
    site: Site, between: Between
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (between(site, args[0]), *args[1:])


def _experts(module: Any, sites: Sequence[Site], between: Between) -> Callable[[], None]:
    """Run fused experts through `experts_forward`, matrix by matrix."""
    table: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        assert site.expert is not None
        table.setdefault((site.expert, site.param), []).append(site)

    def matrix(expert: int, param: str) -> torch.Tensor:
        weight: torch.Tensor = getattr(module, param)[expert]
        return weight.T if module.is_transposed else weight

    def product(expert: int, param: str, x: torch.Tensor) -> torch.Tensor:
        own, weight = table.get((expert, param), []), matrix(expert, param)
        if all(site.rows is None for site in own):
            for site in own:
                x = between(site, x)
            return F.linear(x, weight)
        y = x.new_empty(len(x), len(weight))
        for site in own:
            assert site.rows is not None
            rows = slice(*site.rows)
            y[:, rows] = F.linear(between(site, x), weight[rows])
        return y

    before = vars(module).get("forward")
    module.forward = partial(experts_forward, module, matrix, product=product)

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo
