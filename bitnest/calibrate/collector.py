"""The collector: what one block's matrices read while all samples pass through it.

For a linear layer the statistic is H = mean over tokens of x x^T; layers that read the same tensor
(q, k and v; gate and up) share one H, found by watching which tensor each is given. Experts are not
reduced on the way: their inputs and routing are kept, so that Hessians can be formed a few experts
at a time and an expert's down projection can be fitted to what its quantised gate and up really
produce. If the first batch shows that nothing in the block reads after its experts, their outputs
are not computed for the other batches: zeros take their place.

    H_e = sum_t w_t x_t x_t^T / sum_t w_t       over the tokens routed to expert e

with w_t = 1, the gate weight ("gate", MoEQuant's affinity-guided weighting) or its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.hooks import Hooked
from bitnest.kernels.experts import Weights, experts_forward


@dataclass
class Hessian:
    """Running sum of x x^T. total: (I, I) float32. tokens: how many were added."""

    total: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Add rows x (tokens, I)."""
        add_moment(self.total, x.float())
        self.tokens += len(x)

    def mean(self) -> torch.Tensor:
        """H, averaged over tokens."""
        return symmetric(self.total) / max(self.tokens, 1)


def add_moment(total: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """total += x^T diag(weights) x, leaving out the lower left quarter, which `symmetric` fills.

    total: (I, I). x: (n, I), of one type with total. weights: (n,).
    """
    half = x.shape[1] // 2
    left = x if weights is None else x * weights[:, None]
    total[:half].addmm_(left[:, :half].T, x)
    total[half:, half:].addmm_(left[:, half:].T, x[:, half:])


def symmetric(total: torch.Tensor) -> torch.Tensor:
    """The whole of a matrix summed by `add_moment`, in place."""
    half = total.shape[0] // 2
    total[half:, :half] = total[:half, half:].T
    return total


class Routed:
    """Inputs of one layer's experts, batch by batch, in one growing place.

    capacity: tokens to expect. scratch: allocates (tokens, hidden) storage for the states, in
    memory or in a file.
    """

    def __init__(self, capacity: int, scratch: Callable[[tuple[int, ...]], torch.Tensor]) -> None:
        self._capacity, self._scratch = capacity, scratch
        self._states: torch.Tensor | None = None
        self._index: list[torch.Tensor] = []
        self._gates: list[torch.Tensor] = []
        self._filled = 0

    def add(self, states: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> None:
        """Append states (n, hidden) with their routing (n, k)."""
        if self._states is None:
            self._states = self._scratch((self._capacity, states.shape[1]))
        self._states[self._filled : self._filled + len(states)] = states.detach()
        self._filled += len(states)
        self._index.append(index.detach().cpu())
        self._gates.append(gates.detach().cpu())

    def join(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All batches in one: states (tokens, hidden), index and gates (tokens, k)."""
        assert self._states is not None, "the experts were never called"
        return self._states[: self._filled], torch.cat(self._index), torch.cat(self._gates)


class Collector(Hooked):
    """Hooks on one block; use as a context manager around the forward passes.

    hessians: module name -> Hessian, one object shared by modules that read the same tensor.
    routed: experts module name -> Routed, made by the callable given.
    """

    def __init__(
        self,
        linears: Iterable[tuple[str, nn.Module]],
        experts: Iterable[tuple[str, nn.Module]],
        routed: Callable[[], Routed],
    ) -> None:
        super().__init__()
        self.hessians: dict[str, Hessian] = {}
        self.routed: dict[str, Routed] = {}
        self._linears = list(linears)
        self._experts = list(experts)
        self._new_routed = routed
        self._first: dict[tuple[int, int, int], tuple[str, torch.Tensor]] | None = {}
        self._leaders: set[str] = set()
        self._experts_ran = False
        self._read_later = False  # something in the block is called after its experts

    def __enter__(self) -> Collector:
        for name, module in self._linears:
            handle = module.register_forward_pre_hook(self._reader(name))
            self._undo.append(handle.remove)
        for name, module in self._experts:
            self.routed[name] = self._new_routed()
            module.forward = self._recorder(name, module)
            self._undo.append(partial(delattr, module, "forward"))
        return self

    def after_batch(self) -> None:
        """Tell the collector that a batch is through: who shares whose input is known now."""
        self._first = None

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            width = x.shape[-1]
            if self._first is not None:
                self._read_later |= self._experts_ran
                # The first batch's inputs are kept alive, so an address names one tensor only;
                # empty ones (an expert in a ModuleList without tokens) have no address to share.
                key = (x.data_ptr(), x.numel(), width)
                leader = self._first.setdefault(key, (name, x))[0] if x.numel() else name
                if leader != name:
                    self.hessians[name] = self.hessians[leader]
            if name not in self.hessians:  # also one that is called in a later batch only
                self.hessians[name] = Hessian(torch.zeros(width, width, device=x.device))
                self._leaders.add(name)
            if name in self._leaders:
                self.hessians[name].add(x.reshape(-1, width))

        return read

    def _recorder(self, name: str, module: Any) -> Callable[..., torch.Tensor]:
        weights = dense_weights(module)

        def forward(
            hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            self.routed[name].add(hidden, top_k_index, top_k_weights)
            if self._first is None and not self._read_later:
                return torch.zeros_like(hidden)
            self._read_later |= self._experts_ran
            self._experts_ran = True
            return experts_forward(module, weights, hidden, top_k_index, top_k_weights)

        return forward


@contextmanager
def reference_experts(modules: Iterable[Any]) -> Iterator[None]:
    """Run these experts modules through `experts_forward` on their own dense weights.

    The same arithmetic as packed experts, whatever implementation transformers would choose.
    """
    changed = list(modules)
    for module in changed:
        module.forward = partial(experts_forward, module, dense_weights(module))
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def dense_weights(module: Any) -> Weights:
    """The module's own 3-D parameters, seen one (out, in) matrix at a time."""

    def weights(expert: int, param: str) -> torch.Tensor:
        matrix = getattr(module, param)[expert]
        return matrix.T if module.is_transposed else matrix

    return weights


def expert_tokens(
    index: torch.Tensor, gates: torch.Tensor, expert: int, weighting: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens routed to one expert and their weights w_t.

    index, gates: (tokens, k). Returns token numbers (n,) and weights (n,) float32.
    """
    rows, places = torch.nonzero(index == expert, as_tuple=True)
    w = gates[rows, places].float()
    if weighting == "none":
        w = torch.ones_like(w)
    elif weighting == "gate2":
        w = w.square()
    return rows, w
