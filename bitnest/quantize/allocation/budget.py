"""A budget, and whether any plan can meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.errors import RecipeError
from bitnest.formats import FateFormat, fates_apart, parse_format
from bitnest.kinds import ENDS
from bitnest.quantize.allocation.menu import build_menu, check_suited
from bitnest.quantize.compress import Job
from bitnest.quantize.sizing import artifact_sizes
from bitnest.recipe import sized
from bitnest.sites import Site
from bitnest.targets import Target

MARGIN = 4096  # bytes: of a hint, for what the manifest will say besides


@dataclass(frozen=True)
class Budget:
    """What was asked for: one of bits, size (bytes) and kl (nats). context: tokens of a cache that
    a size has to hold as well. dial: what a person asked for, where the budget was made of that.

    Raises:
        RecipeError: none or several, or out of range.
    """

    bits: float | None = None
    size: int | None = None
    kl: float | None = None
    context: int = 0
    dial: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.context and self.size is None:
            raise RecipeError(
                "--context goes with --size", hint="it makes room for the cache beside the weights"
            )
        given = [name for name in ("bits", "size", "kl") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                "one budget at a time: " + (", ".join(given) or "none was given"),
                hint="--bits, --size or --max-kl",
            )
        value = getattr(self, given[0])
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(
                f"a budget of {value:g} {given[0]} is not above 0",
                hint="for example --bits 3.5, --size 12GiB or --max-kl 0.02",
            )
        if self.bits is not None and self.bits > 16:
            raise RecipeError(f"--bits {self.bits:g}: weights have 16 at most",
                              hint="--bits is the average code width, for example 3.5")  # fmt: skip
        if self.context < 0:
            raise RecipeError(f"a context of {self.context} tokens", hint="--context 8192")

    def to_json(self) -> dict[str, Any]:
        """What was given."""
        if self.dial is not None:
            return dict(self.dial)
        found = {k: v for k in ("bits", "size", "kl") if (v := getattr(self, k)) is not None}
        return {**found, **({"context": self.context} if self.context else {})}


def check_budget(
    job: Job, target: Target, formats: Sequence[str], budget: Budget, ends: bool | None
) -> None:
    """Refuse a budget that no plan can meet, before anything is measured.

    Raises:
        RecipeError: even the smallest formats are over it, or the target takes none of them.
    """
    planned = ends if ends is not None else budget.bits is None
    sites = [s for s in job.sites if s.kind != "router" and (planned or s.kind not in ENDS)]
    sites = [s for s in sites if not isinstance(job.formats[s.name], FateFormat)]
    formats, fates = fates_apart(formats)
    fixed = ruled_formats(job, sites)
    check_suited([s for s in sites if s.name not in fixed], formats, target)
    extra = beside(fixed, formats)
    if fates and target.name == "native":
        return  # how small is known with the statistics
    named = (*formats, *extra)
    losses = np.zeros((len(sites), len(named), 1))
    menu = build_menu(sites, named, losses, target, itemsize=job.itemsize, fixed=fixed, extra=extra)
    cost = menu.bits if budget.bits is not None else menu.nbytes
    rows = np.arange(len(menu.items))
    cheapest = np.where(menu.allowed, cost, np.iinfo(np.int64).max).argmin(axis=1)
    least = int(cost[rows, cheapest].sum())
    if budget.bits is not None and least > round(budget.bits * int(menu.numel.sum())):
        raise RecipeError(
            f"--bits {budget.bits:g} is less than the smallest candidates take: "
            f"{least / int(menu.numel.sum()):.3g}",
            hint="candidates: " + ", ".join(menu.usable),
        )
    if budget.size is not None:
        chosen = {**{n: f.name for n, f in job.formats.items()}, **menu.plan(cheapest)}
        parsed = {n: sized(parse_format(f), job.itemsize) for n, f in chosen.items()}
        total = artifact_sizes(job, parsed, budget.context).total
        if total > budget.size:
            raise too_small(budget, total)


def ruled_formats(job: Job, sites: Sequence[Site]) -> dict[str, str]:
    """Format names that the recipe's rules give to some of `sites`, which no plan overrules.

    Raises:
        RecipeError: a rule with a broken pattern.
    """
    if not job.recipe.rules:
        return {}
    ruled = job.recipe.ruled(job.sites)
    own = {site.name for site in sites}
    return {name: parse_format(fmt).name for name, fmt in ruled.items() if name in own}


def beside(fixed: Mapping[str, str], formats: Sequence[str]) -> tuple[str, ...]:
    """Formats of rules that are no candidates."""
    return tuple(dict.fromkeys(f for f in fixed.values() if f not in {*formats, "dense"}))


def too_small(budget: Budget, least: int) -> RecipeError:
    """No plan is as small as was asked."""
    cache = f", the cache of {budget.context:,} tokens in it" if budget.context else ""
    return RecipeError(
        f"no plan fits {budget.size:,} bytes: the smallest takes {least:,}{cache}",
        hint=f"--size {least + MARGIN} or more, or coarser formats by --candidate",
    )
