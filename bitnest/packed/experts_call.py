"""A packed experts module's forward pass as one call of the CPU kernels.

    y_t = sum over chosen experts e:  g_te * down_e(act(gate_e x_t) * up_e x_t)

Between the projections numbers are float32, where the loop of `kernels/experts` rounds them to the
model's type. Layouts are those of the packed weights; what points to them is made once and again
after any of them changed.

Left to the loop, as `why_not` says: gradients, adapters, rounded inputs, decoded matrices that are
held, biases, gates and activations of a family's own, formats without one matrix for the kernels,
and in models that are not bfloat16 tables and dense matrices, whose inputs would be rounded to it.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bitnest.kernels.cpu.experts import experts_product
from bitnest.kernels.cpu.library import INTEGER
from bitnest.kernels.cpu.runtime import ACTIVATIONS, Forward, runtime
from bitnest.packed.modules import KERNEL_TYPES, PackedWeight
from bitnest.packed.native_families import NotNative, experts_of

# of a module: the state of its weights it was made for, and the layer or why there is none
_made: WeakKeyDictionary[nn.Module, tuple[int, Forward | str]] = WeakKeyDictionary()
_rounding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # inputs to bfloat16


def experts_call(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor | None:
    """What `experts_forward` gives, in `hidden`'s type; None where `why_not` has a reason."""
    if why_not(module, hidden, top_k_weights):
        return None
    layer = _layer(module)
    assert isinstance(layer, Forward)
    layer.struct.planes = 3 if hidden.dtype == torch.float32 else 2
    return experts_product(layer, hidden, top_k_index, top_k_weights)


def why_not(module: Any, hidden: torch.Tensor, gates: torch.Tensor) -> str:
    """Why the loop has to run; empty: one call does."""
    if hidden.device.type != "cpu" or hidden.dtype not in KERNEL_TYPES or hidden.dim() != 2:
        return f"{hidden.dtype} on {hidden.device.type}"
    if torch.is_grad_enabled() and (hidden.requires_grad or gates.requires_grad):
        return "gradients"
    if module.packed_added is not None:
        return "adapters"
    weights: list[PackedWeight] = list(module.packed)
    if any(weight.keep or weight.rounding for weight in weights):
        return "rounded inputs, or matrices held decoded"
    found = _layer(module)
    if isinstance(found, str):
        return found
    if hidden.dtype != torch.bfloat16 and _rounding[module]:
        return "tables and dense matrices, whose inputs one call rounds to bfloat16"
    return ""


def _layer(module: Any) -> Forward | str:
    state = sum(weight.version for weight in module.packed)
    known = _made.get(module)
    if known is not None and known[0] == state:
        return known[1]
    _made.pop(module, None)
    layer: Forward | str
    try:
        layer = _make(module)
    except NotNative as error:
        layer = str(error)
    structs = [getattr(weight.lay_out(), "struct", None) for weight in module.packed]
    _rounding[module] = any(getattr(s, "engine", INTEGER) != INTEGER for s in structs)
    _made[module] = (sum(weight.version for weight in module.packed), layer)  # now laid out
    return layer


def _make(module: Any) -> Forward:
    if runtime() is None:
        raise NotNative("the CPU kernels could not be built")
    kind: type = type(getattr(module, "act_fn", None))
    activation = _activation(kind)
    if activation is None or not _plain_gate(type(module)):
        raise NotNative("a gate or an activation of its own")
    networks = list(experts_of(module, "the experts"))
    shapes = {network.down.shape[0] for network in networks if network is not None}
    if len(shapes) != 1:
        raise NotNative("no expert is left" if not shapes else "experts of several sizes")
    return Forward(shapes.pop(), activation, networks)


@cache
def _activation(kind: type) -> str | None:
    from transformers.activations import ACT2FN

    return next((name for name in ACTIVATIONS if type(ACT2FN[name]) is kind), None)


def _plain_gate(kind: type) -> bool:
    """Whether the class has transformers' act(gate) * up."""
    from transformers.integrations import moe

    plain = getattr(moe, "_default_apply_gate", None)
    return plain is not None and getattr(kind, "_apply_gate", None) is plain
