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

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.collector import dense_weights
from bitnest.calibrate.stream import Stream
from bitnest.errors import RecipeError, UnsupportedModel
from bitnest.kernels.experts import experts_forward
from bitnest.progress import Progress, Silent
from bitnest.sites import is_experts

__all__ = ["coverage_section", "lean", "routed_tokens", "window_counts"]


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


def coverage_section(
    tokens: Mapping[int, Sequence[int] | torch.Tensor],
    minimum: int | Mapping[int, int],
    *,
    windows: int = 0,
    rounds: int = 0,
) -> dict[str, Any] | None:
    """The `coverage` part of an analysis: every starved expert and what it falls back to.

    tokens: layer -> tokens of each expert (E,), everything its Hessian sees, windows drawn for
    coverage included. minimum: for all layers or each; the largest is what the section states.
    windows, rounds: drawn for coverage. None for a model without experts.

    Raises:
        RecipeError: a minimum below 1.
    """
    if not tokens:
        return None
    minima = dict.fromkeys(tokens, minimum) if isinstance(minimum, int) else dict(minimum)
    if min(minima[layer] for layer in tokens) < 1:
        raise RecipeError(f"an expert needs at least one token, not {min(minima.values())}")
    rows = [
        (layer, expert, int(n), minima[layer])
        for layer in sorted(tokens)
        for expert, n in enumerate(tokens[layer])
    ]
    starved = [
        {"layer": layer, "expert": expert, "tokens": n, "lean": lean(n, m),
         "fallback": _fallback(n, m)}
        for layer, expert, n, m in rows if n < m
    ]  # fmt: skip
    return {
        "minimum": max(minima[layer] for layer in tokens),
        "experts": len(rows),
        "covered": len(rows) - len(starved),
        "starved": starved,
        "drawn": {"windows": windows, "rounds": rounds},
    }


def _fallback(tokens: int, minimum: int) -> str:
    if tokens == 0:
        return "no token reached it: its whole Hessian is the layer's inputs"
    percent = min(99, max(1, round(100 * lean(tokens, minimum))))  # neither all nor nothing
    return f"{percent} % of its Hessian is the layer's inputs"
