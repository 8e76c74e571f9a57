"""A plan with its grounds: what it was chosen from, and what it costs and loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.plan import Plan
from bitnest.quantize.allocation.inputs import PlannedInputs
from bitnest.quantize.allocation.menu import Menu
from bitnest.quantize.allocation.policies import Evidence
from bitnest.quantize.sizing import Sizes


@dataclass(frozen=True)
class Planned:
    """A plan with its grounds. choice: (N,). gap: see `Solution`, None for other policies. kl: per
    label; mean; low, high: one standard error of its logarithm less and more, None if no probe was
    measured. inputs: what matrices read rounded; what they lose is in all of these."""

    plan: Plan
    menu: Menu
    evidence: Evidence
    choice: np.ndarray
    sizes: Sizes
    kl: dict[str, float]
    mean: float
    low: float | None
    high: float | None
    gap: float | None = None
    inputs: PlannedInputs | None = None

    @property
    def bits(self) -> float:
        """Average code width over the planned weights, dense ones with their source's width."""
        return self.menu.average_bits(self.choice)

    @property
    def bits_per_weight(self) -> float:
        """The same with scales, tables and zero points."""
        rows = np.arange(len(self.choice))
        return float(8 * self.menu.nbytes[rows, self.choice].sum() / self.menu.numel.sum())

    @property
    def dense(self) -> float:
        """Share of the planned weights that stay dense."""
        kept = np.array([self.menu.formats[c] == "dense" for c in self.choice])
        return float(self.menu.numel[kept].sum() / self.menu.numel.sum())


def expected(planned: Planned) -> dict[str, Any]:
    """The figures that go into the plan file."""
    found: dict[str, Any] = {
        "bits": round(planned.bits, 4),
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "packed_bytes": planned.sizes.packed,
        "artifact_bytes": planned.sizes.artifact,
        "kl": float(f"{planned.mean:.4g}"),
    }
    if planned.low is not None and planned.high is not None:
        found |= {"kl_low": float(f"{planned.low:.4g}"), "kl_high": float(f"{planned.high:.4g}")}
    found["kl_by_text"] = {k: float(f"{v:.4g}") for k, v in planned.kl.items()}
    if planned.inputs is not None:
        found |= planned.inputs.figures()
    if planned.gap is not None:
        found["gap"] = float(f"{planned.gap:.2g}")
    return found
