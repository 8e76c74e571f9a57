"""inputs: a sample of the rows every site reads.

Of n rows those are taken whose frac(i * golden ratio) is among the least SAMPLE. They lie evenly
(gaps of at most three lengths), keep no step with windows of text, whose first tokens are unlike
the others, and need not know n beforehand.

    q, k, v          one sample: modules that read the same tensor share theirs
    experts          of the tokens routed to each; down's of what its own gate and up give
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import Collector, expert_tokens
from bitnest.calibrate.hooks import Hooked
from bitnest.kernels.experts import down_input, up_name
from bitnest.quantize.block import ExpertInputs
from bitnest.quantize.compare.select import GOLDEN

SAMPLE = 256  # rows of every distinct input


def turns(first: int, last: int) -> torch.Tensor:
    """frac(i * golden ratio) of the rows first to last, (last - first,) float64."""
    return torch.arange(first, last, dtype=torch.float64).mul_(GOLDEN).remainder_(1)


def spread_rows(count: int) -> torch.Tensor:
    """Numbers of the rows sampled of `count`, ascending."""
    return turns(0, count).argsort()[:SAMPLE].sort().values


class RowSample:
    """`spread_rows` of rows that arrive bit by bit. rows: (n, I)."""

    def __init__(self) -> None:
        self.seen = 0
        self.rows = torch.empty(0)
        self._turns = torch.empty(0, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Look at rows x (n, I)."""
        own = turns(self.seen, self.seen + len(x))
        self.seen += len(x)
        new = own.argsort()[:SAMPLE].sort().values
        rows = x[new.to(x.device)]
        order = torch.cat([self._turns, own[new]])
        kept = order.argsort()[:SAMPLE].sort().values
        self._turns = order[kept]
        self.rows = (torch.cat([self.rows, rows]) if len(self.rows) else rows)[kept.to(x.device)]


class Sampler(Hooked):
    """Hooks on linear layers, entered after the collector that watches the same ones.

    samples: module name -> RowSample, one object shared by modules that read the same tensor.
    """

    def __init__(self, linears: Iterable[tuple[str, nn.Module]], collector: Collector) -> None:
        super().__init__()
        self.samples: dict[str, RowSample] = {}
        self._linears = list(linears)
        self._collector = collector
        self._leaders: dict[int, str] = {}

    def __enter__(self) -> Sampler:
        for name, module in self._linears:
            self._undo.append(module.register_forward_pre_hook(self._reader(name)).remove)
        return self

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
            # the collector's hook ran first: who shares an H reads the same tensor
            leader = self._leaders.setdefault(id(self._collector.hessians[name]), name)
            sample = self.samples.setdefault(name, self.samples.get(leader) or RowSample())
            if leader == name:
                x = args[0].detach()
                sample.add(x.reshape(-1, x.shape[-1]))

        return read


def expert_rows(inputs: ExpertInputs, expert: int, down: bool) -> torch.Tensor:
    """A sample of what one expert's matrices read, (n, I): the tokens routed to it, or for down
    what its gate and up make of them; n is 0 if there are none."""
    routed = expert_tokens(inputs.index, inputs.gates, expert, "none")[0]
    x = inputs.states[routed[spread_rows(len(routed))]].to(inputs.device)
    if down and len(x):
        x = down_input(inputs.module, inputs.weights(expert, up_name(inputs.module)), expert, x)
    return x
