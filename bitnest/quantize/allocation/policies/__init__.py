"""Policies: ways to spend a budget. One is ours, the others are what it is compared with.

Each is a pure function (evidence, cost, budget) -> choice; see `common`.
"""

from bitnest.quantize.allocation.policies.baq import baq
from bitnest.quantize.allocation.policies.bitnest import bitnest
from bitnest.quantize.allocation.policies.common import Evidence, Policy
from bitnest.quantize.allocation.policies.frequency import frequency
from bitnest.quantize.allocation.policies.handmade import handmade
from bitnest.quantize.allocation.policies.lpvit import lpvit
from bitnest.quantize.allocation.policies.mcmoe import mcmoe
from bitnest.quantize.allocation.policies.moqa import moqa
from bitnest.quantize.allocation.policies.mxmoe import mxmoe
from bitnest.quantize.allocation.policies.uniform import uniform

POLICIES: dict[str, Policy] = {
    "bitnest": bitnest,
    "uniform": uniform,
    "handmade": handmade,
    "frequency": frequency,
    "moqa": moqa,
    "mcmoe": mcmoe,
    "baq": baq,
    "mxmoe": mxmoe,
    "lpvit": lpvit,
}

__all__ = ["POLICIES", "Evidence", "Policy"]
