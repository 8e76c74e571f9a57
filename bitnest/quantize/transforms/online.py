"""A transform applied as the model runs: exact for every family, at the cost of transforming x.

A linear layer gets T_w in its weight and a forward hook that puts T_in before it. Fused experts get
one transform on what gate and up read and one on what down reads, for all experts of the layer
alike. Hooks sit on the layer itself, so whatever else reads the same x, the router above all, goes
on seeing it untransformed.

Left out: transforms that differ from expert to expert, and layers whose weights are packed already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import dense_weights
from bitnest.kernels.experts import experts_forward, up_name
from bitnest.quantize.transforms.edges import Matrix
from bitnest.quantize.transforms.per_matrix import Transform
from bitnest.sites import is_experts

Undo = Callable[[], None]


def attach(module: nn.Module, transform: Transform) -> Undo:
    """Apply `transform` to a linear layer's weight and, from now on, to its input.

    Returns a function that removes the hook and gives the weight back to within one rounding.
    """
    _set(Matrix("", "weight"), module, transform.apply_weight)
    handle = module.register_forward_pre_hook(_before(transform))

    def undo() -> None:
        handle.remove()
        _set(Matrix("", "weight"), module, transform.invert_weight)

    return undo


def attach_experts(
    module: Any, gate_up: Transform | None = None, down: Transform | None = None
) -> Undo:
    """Apply transforms to fused experts: to what gate and up read, and to what down reads.

    With a transform before down the module runs through `experts_forward` from now on: not every
    implementation of transformers calls the module's own gate, where the transform sits. Returns a
    function that undoes it to within one rounding; the last attached has to be undone first.
    """
    if not is_experts(module):
        raise TypeError(f"{type(module).__name__} has not transformers' experts interface")
    undos: list[Undo] = []
    if gate_up is not None:
        first = Matrix("", up_name(module))
        _set(first, module, gate_up.apply_weight)
        handle = module.register_forward_pre_hook(_before(gate_up))
        undos += [handle.remove, lambda: _set(first, module, gate_up.invert_weight)]
    if down is not None:
        second = Matrix("", "down_proj")
        _set(second, module, down.apply_weight)
        undos += [_after_gate(module, down), lambda: _set(second, module, down.invert_weight)]

    def undo() -> None:
        for step in undos:
            step()

    return undo


class _Reference:
    """What a module's class is given to run through `experts_forward`.

    A class rather than an attribute, because other code replaces `forward` on the instance.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = dense_weights(self)
        return experts_forward(self, weights, hidden_states, top_k_index, top_k_weights)


class _Then(nn.Module):
    """An activation followed by a transform, for experts without a gate."""

    def __init__(self, inner: Any, transform: Transform) -> None:
        super().__init__()
        self.inner, self.transform = inner, transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform.apply_input(self.inner(x))


def _after_gate(module: Any, transform: Transform) -> Undo:
    """Transform what the module's gate, or its activation where there is none, returns."""
    cls, name = type(module), "_apply_gate" if getattr(module, "has_gate", True) else "act_fn"
    old, was_own = getattr(module, name), name in vars(module)
    if name == "act_fn":
        module.act_fn = _Then(old, transform)
    else:
        module._apply_gate = lambda h: transform.apply_input(old(h))
    module.__class__ = type(f"Online{cls.__name__}", (_Reference, cls), {})

    def undo() -> None:
        module.__class__ = cls
        if name == "act_fn" or was_own:
            setattr(module, name, old)
        else:
            delattr(module, name)

    return undo


def _before(transform: Transform) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (transform.apply_input(args[0]), *args[1:])


@torch.no_grad()
def _set(matrix: Matrix, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    view = matrix.view(module)
    view.copy_(change(view))
