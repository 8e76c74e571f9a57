"""One forward pass through a set of fused experts, with the weights supplied one expert at a time.

    y_t = sum over the top-k experts e of token t:  g_te * down_e(act(gate_up_e(x_t)))

The reference for every faster expert kernel, and the path that calibration and packed models
share: both supply matrices through a callable, so never more than one expert is dense at a time.
Gating, activation, biases and post norms are the model's own, read off the module as transformers'
experts interface defines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Weights = Callable[[int, str], torch.Tensor]
"""(expert, parameter name) -> matrix (out, in)."""


def experts_forward(
    module: Any,
    weights: Weights,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs for every token.

    module: an experts module of transformers. hidden: (tokens, hidden). top_k_index,
    top_k_weights: (tokens, k); indices beyond the number of experts mean no expert.
    """
    output = torch.zeros_like(hidden)
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts)[: module.num_experts].tolist()
    gates = top_k_weights.flatten()[order]
    tokens = order // top_k_index.shape[1]
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        chosen = tokens[start : start + count]
        y = expert_output(module, weights, expert, hidden[chosen])
        y = y * gates[start : start + count, None].to(y.dtype)
        output.index_add_(0, chosen, y.to(output.dtype))
        start += count
    return output


def expert_output(module: Any, weights: Weights, expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert applied to tokens x (n, hidden), before its gate weight."""
    inner = down_input(module, weights(expert, up_name(module)), expert, x)
    y = F.linear(inner, weights(expert, "down_proj"), _bias(module, "down_proj", expert, x))
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def down_input(module: Any, up_weight: torch.Tensor, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert's down projection reads, (n, intermediate), for tokens x (n, hidden)."""
    h = F.linear(x, up_weight, _bias(module, up_name(module), expert, x))
    return module._apply_gate(h) if getattr(module, "has_gate", True) else module.act_fn(h)


def up_name(module: Any) -> str:
    """Name of the module's first projection: gate and up fused, or up alone."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _bias(module: Any, param: str, expert: int, x: torch.Tensor) -> torch.Tensor | None:
    if not getattr(module, "has_bias", False):
        return None
    return getattr(module, f"{param}_bias")[expert].to(x.dtype)
