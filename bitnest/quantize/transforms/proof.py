"""Proof by running: a change of weights is kept only if the module computes what it did before.

    max |after - before| <= 1e-9 max |before|       in float64, on random hidden states

A module in float64 still rounds to float32 inside: norms, softmax and routers cast by name. So
inside `in_float64` every request for a smaller type is answered with float64, and experts run
through `experts_forward`, since the grouped products of torch have no float64.

What passes is written back in the type the weights had, rounded once. What fails is undone: the
very tensors from before are put back.

Left out: a guarantee beyond the states tried. A threshold that random states never reach does not
show; `trace` scales channels over a thousandfold range to find such before a fold is proposed.
Memory: the module in float64, beside the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitnest.calibrate.collector import reference_experts
from bitnest.sites import is_experts

TOLERANCE = 1e-9
_SMALLER = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


@dataclass(frozen=True)
class Proof:
    """Whether a change was exact and therefore kept.

    what: the change, in words. deviation: largest difference over the largest value before.
    """

    what: str
    exact: bool
    deviation: float

    def __str__(self) -> str:
        if self.exact:
            return f"{self.what}: folded (deviation {self.deviation:.1e})"
        return f"{self.what}: not exact here (deviation {self.deviation:.1e}): apply it online"


@dataclass(frozen=True, eq=False)
class Call:
    """How a block is called. hidden: (batch, length, width). named: passed as hidden_states=."""

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    named: bool = False

    def __call__(self, block: nn.Module) -> torch.Tensor:
        """The block's output hidden states."""
        if self.named:
            output = block(*self.args, hidden_states=self.hidden, **self.kwargs)
        else:
            output = block(self.hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def randomised(self, seed: int = 0) -> Call:
        """The same call in float64, with normal hidden states of the same shape."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.hidden.shape, generator=generator, dtype=torch.float64)
        hidden = hidden.to(self.hidden.device)
        return Call(hidden, _widen(self.args), _widen(self.kwargs), self.named)


def refused(what: str) -> Proof:
    """A change that is known not to be exact without running anything."""
    return Proof(what, False, inf)


@torch.no_grad()
def prove(
    module: nn.Module, run: Callable[[], torch.Tensor], change: Callable[[], None], what: str
) -> Proof:
    """Make `change` to the module's weights, in place, and keep it if `run` gives the same."""
    with in_float64(module) as originals:
        before = run()
        change()
        after = run()
        deviation = float((after - before).abs().max() / before.abs().max())
        originals.keep = deviation <= TOLERANCE  # False for NaN too
    return Proof(what, originals.keep, deviation)


@torch.no_grad()
def capture_calls(model: Any, blocks: nn.ModuleList, tokens: torch.Tensor) -> list[Call]:
    """How `model` calls each of its blocks on `tokens` (batch, length), randomised, in float64."""
    calls: dict[int, Call] = {}

    def hook(index: int) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden = args[0] if args else kwargs["hidden_states"]
            calls[index] = Call(hidden, args[1:], rest, not args)

        return record

    handles = [
        block.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        with in_float64(model):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [calls[index].randomised(index) for index in range(len(blocks))]


@dataclass
class Originals:
    """Tensors as they were. keep: round what has changed to its type instead of restoring it."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    keep: bool = False

    def put_back(self) -> None:
        """End the float64 copies."""
        for tensor, old in self.pairs:
            changed = self.keep and not torch.equal(tensor.data, old.double())
            tensor.data = tensor.data.to(old.dtype) if changed else old


@contextmanager
def in_float64(module: nn.Module) -> Iterator[Originals]:
    """Weights are float64 copies and all arithmetic is float64; originals return at the end."""
    stored = [*module.parameters(), *module.buffers()]
    originals = Originals([(t, t.data) for t in stored if t.is_floating_point()])
    try:
        for tensor, old in originals.pairs:
            tensor.data = old.to(torch.float64, copy=True)
        with reference_experts([m for m in module.modules() if is_experts(m)]), _Float64():
            yield originals
    except BaseException:
        originals.keep = False
        raise
    finally:
        originals.put_back()


class _Float64(TorchFunctionMode):
    """Answers every cast to a smaller floating type with float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            func = torch.Tensor.double
        args = tuple(_wide_type(value) for value in args)
        return func(*args, **{key: _wide_type(value) for key, value in (kwargs or {}).items()})


def _wide_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SMALLER else value


def _widen(value: Any) -> Any:
    """Floating tensors in float64, inside tuples, lists and dicts too."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_widen, value))
    if isinstance(value, dict):
        return {key: _widen(item) for key, item in value.items()}
    return value
