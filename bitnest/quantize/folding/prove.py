"""Folds of one block, tried one after the other in float64; those that change nothing are kept.

    max |after - before| <= 1e-9 max |before|

as in `transforms.proof`, of the block on random states; what happens inside experts is compared
expert by expert as well, since random states need not reach all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import dense_weights
from bitnest.kernels.experts import expert_output
from bitnest.quantize.folding.changes import Change, apply_all
from bitnest.quantize.folding.places import Changes
from bitnest.quantize.transforms.proof import TOLERANCE, Call, in_float64

ROWS = 8  # random states that are sent through every expert


@dataclass(frozen=True, eq=False)
class Proposal:
    """A fold of one edge. what: its kind and edge, for a record. changes: by parameter of the
    block. experts: path of the experts module that it happens inside of, or none."""

    what: str
    changes: Changes
    experts: str | None = None


Try = Callable[[Proposal], bool]


class Prover:
    """Tries folds on a block that is in float64; inside `proving` only."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block, self.call = block, call
        self.before = call(block)

    def __call__(self, proposal: Proposal) -> bool:
        """Make the changes and keep them, or undo them if the block is another then."""
        module: Any = None
        if proposal.experts is not None:
            module = self.block.get_submodule(proposal.experts)
        inner = None if module is None else _all_experts(module, self.before.shape[-1])
        undo = self.apply(proposal.changes)
        good = same(self.call(self.block), self.before)
        if inner is not None:
            outer = _all_experts(module, self.before.shape[-1])
            good = good and all(same(a, b) for a, b in zip(outer, inner, strict=True))
        if not good:
            undo()
        return good

    def apply(self, changes: Mapping[str, Sequence[Change]]) -> Callable[[], None]:
        """Change parameters; returns what undoes it."""
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        for path, own in changes.items():
            parameter = self.block.get_parameter(path)
            held.append((parameter, parameter.data))
            parameter.data = apply_all(own, parameter.data)

        def undo() -> None:
            for parameter, data in held:
                parameter.data = data

        return undo


class proving:  # reads as a verb
    """Context: the block in float64 with a `Prover` for it. The block itself is never changed."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block, self.call, self._context = block, call, in_float64(block)

    def __enter__(self) -> Prover:
        self._context.__enter__()
        return Prover(self.block, self.call)

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def same(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether two results in float64 are one up to rounding."""
    return bool((after - before).abs().max() <= TOLERANCE * before.abs().max())


def _all_experts(module: Any, width: int) -> list[torch.Tensor]:
    """What every expert gives on random states."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    x = x.to(module.down_proj.device)
    weights = dense_weights(module)
    return [expert_output(module, weights, expert, x) for expert in range(module.num_experts)]
