"""One forward pass through a set of fused experts, with the weights supplied one expert at a time.

    y_t = sum over the top-k experts e of token t:  g_te * down_e(act(gate_up_e(x_t)))

The reference for every faster expert kernel, and the path that calibration and packed models
share: both supply matrices through a callable, so never more than one expert is dense at a time.
Gating, activation, biases and post norms are the model's own, read off the module as transformers'
experts interface defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Weights = Callable[[int, str], torch.Tensor]
"""(expert, parameter name) -> matrix (out, in)."""


Added = Callable[[int, str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(expert, parameter name, x, y): y = W x (n, out) with what adapters add to it."""

Product = Callable[[int, str, torch.Tensor], torch.Tensor]
"""(expert, parameter name, x): x W^T (n, out), in place of the product with its matrix."""


@dataclass(frozen=True)
class ExpertPass:
    """One expert's part of a forward pass, as it was computed.

    tokens: which of the batch (n,), in order. gates: their weights (n,). x: what it read
    (n, hidden). up: what its first projection gave. inner: what its down projection read. y: its
    output before post norm and gate (n, hidden).
    """

    expert: int
    tokens: torch.Tensor
    gates: torch.Tensor
    x: torch.Tensor
    up: torch.Tensor
    inner: torch.Tensor
    y: torch.Tensor


Watch = Callable[[ExpertPass], None]
"""Called for every expert that has tokens, while the pass goes on."""


def experts_forward(
    module: Any,
    weights: Weights,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    watch: Watch | None = None,
    dropped: Collection[int] = (),
    added: Added | None = None,
    product: Product | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs for every token.

    module: an experts module of transformers. hidden: (tokens, hidden). top_k_index,
    top_k_weights: (tokens, k); indices beyond the number of experts mean no expert. watch: sees
    every expert's inputs and outputs. dropped: experts whose down projection is all zeros: not
    computed where zeros are all that would come out. added: adapters beside the matrices. product:
    multiplies instead of `weights`, which are not asked for then.
    """
    output = torch.zeros_like(hidden)
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts)[: module.num_experts].tolist()
    gates = top_k_weights.flatten()[order]
    tokens = order // top_k_index.shape[1]
    start = 0
    plain = not any(getattr(module, name, False) for name in ("has_bias", "has_post_expert_norm"))
    for expert, count in enumerate(counts):
        if count == 0 or (plain and expert in dropped):
            start += count
            continue
        chosen, own = tokens[start : start + count], gates[start : start + count]
        x = hidden[chosen]
        up, inner, y = _expert(module, weights, expert, x, added, product)
        if watch is not None:
            watch(ExpertPass(expert, chosen, own, x, up, inner, y))
        y = _post_norm(module, y) * own[:, None].to(y.dtype)
        output.index_add_(0, chosen, y.to(output.dtype))
        start += count
    return output


def _expert(
    module: Any,
    weights: Weights,
    expert: int,
    x: torch.Tensor,
    added: Added | None = None,
    product: Product | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert applied to rows x (n, hidden): first projection, down's input, output."""

    def project(param: str, x: torch.Tensor) -> torch.Tensor:
        bias = _bias(module, param, expert, x)
        if added is None and product is None:
            return F.linear(x, weights(expert, param), bias)
        y = product(expert, param, x) if product else F.linear(x, weights(expert, param))
        if added is not None:
            y = added(expert, param, x, y)
        return y if bias is None else y + bias

    up = project(up_name(module), x)
    inner = _activate(module, up)
    return up, inner, project("down_proj", inner)


def _activate(module: Any, up: torch.Tensor) -> torch.Tensor:
    inner: torch.Tensor
    inner = module._apply_gate(up) if getattr(module, "has_gate", True) else module.act_fn(up)
    return inner


def down_input(module: Any, up_weight: torch.Tensor, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert's down projection reads, (n, intermediate), for tokens x (n, hidden)."""
    return _activate(module, F.linear(x, up_weight, _bias(module, up_name(module), expert, x)))


def expert_output(module: Any, weights: Weights, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert gives for tokens x (n, hidden), chosen or not: (n, hidden), before gates."""
    return _post_norm(module, _expert(module, weights, expert, x)[2])


def _post_norm(module: Any, y: torch.Tensor) -> torch.Tensor:
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def up_name(module: Any) -> str:
    """Name of the module's first projection: gate and up fused, or up alone."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _bias(module: Any, param: str, expert: int, x: torch.Tensor) -> torch.Tensor | None:
    if not getattr(module, "has_bias", False):
        return None
    return getattr(module, f"{param}_bias")[expert].to(x.dtype)
