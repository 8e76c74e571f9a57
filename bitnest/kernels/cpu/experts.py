"""Grouped experts on a CPU: one call for all tokens and all their experts.

    y_t = sum over chosen experts e, ascending:  g_te * down_e(act(gate_e x_t) * up_e x_t)

Experts may differ in width, format and engine. The reference is `kernels/experts.experts_forward`,
whose meaning of indices and of dropped experts this has; the sum's order is its own and the same
for any number of threads.
"""

from __future__ import annotations

import torch

from bitnest.kernels.cpu.runtime import Forward, runtime


def experts_product(
    layer: Forward, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, (tokens, hidden) in `hidden`'s type.

    hidden: (tokens, hidden). top_k_index, top_k_weights: (tokens, k); indices beyond the number of
    experts, and negative ones, mean no expert. `layer.shared` is added to every token where there
    is one. The library must be there (`runtime()`).

    Raises:
        MemoryError: no room for what lies between the projections.
    """
    x = hidden.detach().float().contiguous()
    index = top_k_index.to(torch.int64).contiguous()
    gates = top_k_weights.detach().float().contiguous()
    if x.shape[1] != layer.hidden or index.shape != gates.shape or len(index) != len(x):
        shapes = [tuple(t.shape) for t in (x, index, gates)]
        raise ValueError(f"experts of {layer.hidden} columns given shapes {shapes}")
    y = torch.empty_like(x)
    failed = runtime().experts_call(
        layer.struct, *index.shape, index.data_ptr(), gates.data_ptr(), x.data_ptr(), y.data_ptr()
    )
    if failed:
        raise MemoryError(f"experts of {len(x)} tokens")
    return y.to(hidden.dtype)
