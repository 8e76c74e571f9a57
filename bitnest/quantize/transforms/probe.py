"""What `trace` asks a block: run it with outputs changed, and compare what others then read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bitnest.kernels.experts import up_name
from bitnest.quantize.transforms.edges import Matrix
from bitnest.sites import is_experts

Change = Callable[[torch.Tensor], torch.Tensor]
EXACT = 1e-9  # of the largest value: float64 keeps 1e-15, a coincidence is far above
UNTOUCHED = 1e-12


class Watch:
    """Hooks on the modules of one root: what they read, and changes to what they give.

    matrices: what reads columns (linears, routers, experts by their first matrix), by path. norms:
    modules with one gain per channel. base: what each of these reads in an unchanged run, (tokens,
    width), in the order of their calls. heights: output channels of those that give one tensor.
    """

    def __init__(
        self, root: nn.Module, run: Callable[[], torch.Tensor], outside: str | None = None
    ) -> None:
        """run: calls the root and gives its output. outside: leave out modules under this path."""
        self._run = run
        self._modules = {
            name: module
            for name, module in root.named_modules()
            if outside is None or not f"{name}.".startswith(f"{outside}.")
        }
        self.matrices = dict(self._find_matrices())
        self.norms = {name: m for name, m in self._modules.items() if _is_norm(m)}
        self.norm_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.heights: dict[str, int] = {}
        self._first = True
        self.base = self.read({})
        self._first = False

    def _find_matrices(self) -> Iterator[tuple[str, Matrix]]:
        for name, module in self._modules.items():
            weight = module._parameters.get("weight")
            if is_experts(module):
                yield name, Matrix(name, up_name(module))
            elif weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
                yield name, Matrix(name)

    def read(self, changes: dict[str, Change]) -> dict[str, torch.Tensor]:
        """What every matrix and norm reads if `changes` are made to outputs of modules, by path.

        The root's output is under "". A module that is called several times has its calls' rows
        one after the other.
        """
        seen: dict[str, list[torch.Tensor]] = {}
        handles = []
        for name in (*self.matrices, *self.norms):
            module = self._modules[name]
            reader = partial(self._reader, name, seen)
            handles.append(module.register_forward_pre_hook(reader, with_kwargs=True))
            if self._first:
                handles.append(module.register_forward_hook(partial(self._note_height, name)))
        for name, change in changes.items():
            handles.append(self._modules[name].register_forward_hook(partial(_changed, change)))
        try:
            output = self._run()
        finally:
            for handle in handles:
                handle.remove()
        found = {name: torch.cat(parts) for name, parts in seen.items()}
        return {**found, "": output.flatten(0, -2)}

    def _reader(
        self,
        name: str,
        seen: dict[str, list[torch.Tensor]],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if x is None or not x.is_floating_point():
            return
        seen.setdefault(name, []).append(x.flatten(0, -2).clone())
        if self._first and name in self.norms:
            self.norm_calls[name] = (args, kwargs)

    def _note_height(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.heights[name] = output.shape[-1]


def _changed(change: Change, _module: nn.Module, _args: Any, output: Any) -> Any:
    return change(output) if isinstance(output, torch.Tensor) else output


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not any(module.children())


def scaled(rows: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y with channels `rows` times s."""
    return _on(y, rows, y[..., rows] * s)


def noisy(
    rows: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, y: torch.Tensor
) -> torch.Tensor:
    """y with noise on the channels `rows[mask]`."""
    part = y[..., rows]
    z = torch.randn(part.shape, generator=generator, dtype=torch.float64) * mask
    return _on(y, rows, part + z.to(y.device) * y.std())


def _on(y: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of y with its channels `rows` replaced."""
    y = y.clone()
    y[..., rows] = values
    return y


def shuffled(parts: list[torch.Tensor], order: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y with the channels of each of `parts` in a new order."""
    for rows in parts:
        y = _on(y, rows, y[..., rows[order]])
    return y


def random_factors(count: int, device: torch.device) -> torch.Tensor:
    """Distinct positive factors (count,) from 2^-5 to 2^5, float64."""
    generator = torch.Generator().manual_seed(count)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * 10 - 5
    return torch.exp2(exponents).to(device)


def matched_factors(
    before: torch.Tensor | None, after: torch.Tensor | None, factors: torch.Tensor
) -> torch.Tensor | None:
    """Which factor each column was multiplied by on every token: numbers (I,), or None.

    before, after: (tokens, I). None also if a column is multiplied by anything else, by 1, or is
    zero on every token.
    """
    if before is None or after is None or before.shape != after.shape:
        return None
    ratio = (before * after).sum(0) / before.square().sum(0)
    miss = (after - ratio * before).abs().amax(0)
    ordered, numbers = factors.sort()
    right = torch.searchsorted(ordered, ratio).clamp_max(len(ordered) - 1)
    left = (right - 1).clamp_min(0)
    nearer = (ratio - ordered[left]).abs() < (ratio - ordered[right]).abs()
    found = numbers[torch.where(nearer, left, right)]
    good = (miss <= EXACT * after.abs().amax(0)) & ((factors[found] - ratio).abs() <= EXACT * ratio)
    return found.cpu() if bool(good.all()) else None  # NaN is not good


def changed_columns(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Which columns differ on any token, (I,) bool; None where shapes do."""
    if before.shape != after.shape:
        return None
    return ((after - before).abs().amax(0) > UNTOUCHED * before.abs().amax()).cpu()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are equal up to float64 rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= EXACT * a.abs().max())


def parallel(moved: torch.Tensor, added: torch.Tensor) -> bool:
    """Whether what was added to each token arrived as a multiple of it, not 0. (tokens, width)."""
    if moved.shape != added.shape:
        return False
    size = (moved * added).sum(1, keepdim=True) / added.square().sum(1, keepdim=True)
    miss = (moved - size * added).abs().max()
    return bool(miss <= EXACT * moved.abs().max()) and bool((size.abs() > EXACT).all())


def gain_offset(norm: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> float | None:
    """c of y = (c + weight) * normalised (+ bias), from running the norm; None if it is not so.

    Llama's norms have c = 0, Gemma's c = 1.
    """
    args, kwargs = call
    held = {name: p.data for name, p in norm.named_parameters()}

    def output(gain: float) -> torch.Tensor:
        for name, p in norm.named_parameters():
            p.data = torch.full_like(held[name], gain if name == "weight" else 0.0)
        return norm(*args, **kwargs)

    try:
        zero, one, two = output(0.0), output(1.0), output(2.0)
    finally:
        for name, p in norm.named_parameters():
            p.data = held[name]
    unit = one - zero
    offset = round(float((zero * unit).sum() / unit.square().sum()), 12)
    affine = same(two - one, unit) and same(zero + unit, offset * unit + unit)
    return offset if affine else None
