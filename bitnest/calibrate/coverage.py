"""Coverage: tokens per expert against a stated minimum, and what a starved expert falls back to.

An expert that n tokens reach, where m are asked for, leans on its layer by

    l = max(0, 1 - n / m)

(see `quantize.block`): that share of its Hessian is an even sample of the layer's inputs, sent
through this expert whether or not they were routed to it. So it is never without a Hessian, never
NaN and never left in 16 bit; this file says by how much each expert leans.

Tokens are counted window by window in a plain streamed forward pass, which `covering` chooses more
windows by.

Left out: gate weights. Ten tokens that reach an expert with a tenth of their weight count as ten.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.collector import dense_weights
from bitnest.calibrate.stream import Stream
from bitnest.errors import UnsupportedModel
from bitnest.kernels.experts import experts_forward
from bitnest.progress import Progress, Silent
from bitnest.sites import is_experts

__all__ = ["lean", "routed_tokens", "window_counts"]


def routed_tokens(stream: Stream, progress: Progress | None = None) -> dict[str, torch.Tensor]:
    """Tokens of every window that reach every expert: experts module name -> (samples, E) int64.

    stream: just embedded; its hidden states are used up. One block's weights are in memory at a
    time, nothing but counts is kept. The arithmetic is that of `experts_forward`, as in every
    other calibration pass.

    Raises:
        UnsupportedModel: the model has no experts, or gives them something else than all tokens.
    """
    skeleton, progress = stream.skeleton, progress or Silent()
    length = stream.hidden.shape[1]
    last = max(_layers_with_experts(stream))
    found: dict[str, list[torch.Tensor]] = {}
    progress.phase("count routed tokens", last + 1)
    for layer in range(last + 1):  # what comes after the last experts changes no count
        prefix, block = f"{skeleton.prefix}.{layer}", skeleton.blocks[layer]
        experts = {n: m for n, m in block.named_modules(prefix=prefix) if is_experts(m)}
        skeleton.fill(prefix, dtype=stream.dtype, device=stream.device)
        try:
            for name, module in experts.items():
                keep = found.setdefault(name, []).append
                module.forward = partial(_counting_forward, module, length, keep)  # type: ignore[method-assign]
            stream.run(layer, keep=layer < last)
        finally:
            for module in experts.values():
                vars(module).pop("forward", None)
            skeleton.drop(prefix)
        progress.step()
    counts = {name: torch.cat(parts) for name, parts in found.items() if parts}
    for name, table in counts.items():
        if len(table) != len(stream.hidden):
            raise UnsupportedModel(
                f"the experts saw {len(table)} of {len(stream.hidden)} windows", where=name
            )
    return counts


def _layers_with_experts(stream: Stream) -> list[int]:
    blocks = stream.skeleton.blocks
    layers = [i for i, block in enumerate(blocks) if any(map(is_experts, block.modules()))]
    if not layers:
        raise UnsupportedModel(
            "the model has no routed experts, so there is nothing to cover",
            where=type(stream.skeleton.model).__name__,
            hint="leave out the options about experts' tokens; a dense model needs none",
        )
    return layers


def _counting_forward(
    module: Any,
    length: int,
    keep: Callable[[torch.Tensor], None],
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    keep(window_counts(top_k_index, int(module.num_experts), length))
    return experts_forward(module, dense_weights(module), hidden, top_k_index, top_k_weights)


def window_counts(index: torch.Tensor, experts: int, length: int) -> torch.Tensor:
    """Tokens of each window that reach each expert, (windows, experts) int64 on the CPU.

    index: (windows * length, k) chosen experts; a number beyond the experts means none.

    Raises:
        UnsupportedModel: the tokens are not whole windows.
    """
    if index.shape[0] % length:
        raise UnsupportedModel(
            f"experts were given {index.shape[0]} tokens, no multiple of {length}"
        )
    chosen = index.detach().reshape(-1, length * index.shape[1]).cpu().long().clamp_(0, experts)
    counts = torch.zeros(len(chosen), experts + 1, dtype=torch.int64)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))[:, :experts]


def lean(tokens: int, minimum: int) -> float:
    """Share of an expert's Hessian that is its layer's inputs, max(0, 1 - tokens / minimum)."""
    return max(0.0, 1.0 - tokens / minimum)
