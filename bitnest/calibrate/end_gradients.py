"""Fisher of the ends: what an error in a logit costs, and in a channel of the looked-up embedding.

    head        f_v = 1/N sum_t p_tv (1 - p_tv)               (V,)
    embedding   f_c = 1/N sum_t g_tc^2                        (hidden,)

p are the model's next-token distributions, N predictions. p_v (1 - p_v) is the diagonal of
diag(p) - p p^T, the Hessian of KL(p || p') with respect to the logits: exact, nothing is drawn.
With importance `loss` it is (p_v - onehot_v)^2. Where a family does something to what the head
gives (soft caps, scales), its derivative comes in squared. g is the gradient that the backward pass
of `fisher` ends with at the first block's input, times the constant that some families multiply
looked-up rows by.

Left out: families that normalise what they look up. The constant is then a mean over channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.stream import Stream

SCALE_TOKENS = 8  # looked up to find what rows are multiplied by


class HeadFisher:
    """Adds up f_v of one window after another; a context manager around the tail's calls.

    rows: f_v summed over tokens, (labels, V) float64; empty before the first call.
    """

    def __init__(self, model: Any, count: int) -> None:
        head = model.get_output_embeddings()
        self.head = head if isinstance(head, nn.Linear) else None
        self.count = count
        self.rows = torch.zeros(count, 0, dtype=torch.float64)
        self._given: list[torch.Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the head gives, call by call."""
        if self.head is None:
            yield
            return

        def keep(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            self._given[:] = [output]

        hook = self.head.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def add(self, label: int, logits: torch.Tensor, spread: torch.Tensor) -> None:
        """A window's logits (n, V), part of the graph, and p (1 - p) or (p - onehot)^2 of them."""
        if self.head is None:
            return
        given = self._given.pop()
        if not torch.equal(given[0, : len(logits)].float(), logits):
            (slope,) = torch.autograd.grad(logits.sum(), given, retain_graph=True)
            spread = spread * slope[0, : len(logits)].float().square()
        if not self.rows.shape[1]:
            self.rows = torch.zeros(self.count, logits.shape[1], dtype=torch.float64)
        self.rows[label] += spread.sum(0, dtype=torch.float64).cpu()


def lookup_rows(
    stream: Stream, grads: torch.Tensor, labels: Sequence[int], count: int
) -> torch.Tensor:
    """f_c summed over tokens, (count, hidden) float64.

    grads: (samples, length, hidden), of the first block's input. labels: one per sample.
    """
    rows = torch.zeros(count, grads.shape[2], dtype=torch.float64)
    for label, own in zip(labels, grads, strict=True):
        rows[label] += own.double().square().sum(0).cpu()
    return rows * embedding_scale(stream) ** 2


def embedding_scale(stream: Stream) -> float:
    """What looked-up rows are multiplied by before the first block: 1 but for some families.

    A few rows are looked up and a random gradient is sent back to them: s = <g W', g> / <g, g>.
    """
    skeleton = stream.skeleton
    table = skeleton.model.get_input_embeddings()
    with stream.outside(), torch.enable_grad():
        whole, padding = table.weight, table.padding_idx
        rows = nn.Parameter(whole.detach()[:SCALE_TOKENS].float())
        table.padding_idx = None
        table._parameters["weight"] = rows
        try:
            states = _first_input(skeleton, torch.arange(len(rows), device=rows.device)[None])
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
            noise = noise.to(states.device, states.dtype)
            (grad,) = torch.autograd.grad(states, rows, noise)
        finally:
            table._parameters["weight"], table.padding_idx = whole, padding
    sent = noise[0].float()
    return float((grad.to(sent.device) * sent).sum() / sent.square().sum())


class _Reached(Exception):
    """The first block was called."""


def _first_input(skeleton: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What the first block is given for `tokens`, part of the graph."""
    states: list[torch.Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    block = skeleton.blocks[0]
    block.forward = stop
    try:
        skeleton.model.base_model(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        del block.forward
    return states[0]
