"""The width of inputs as a choice: a second knapsack beside that of weights.

What inputs are rounded to costs no byte of the artifact, so its budget is another one:

    bits    mean width of inputs over multiply-accumulates: (out, in) times the share of tokens that
            reach a matrix, an expert by its routing share
    time    seconds of all products, of a measured table (seconds per multiply-accumulate of weights
            in one format with inputs in another), as a share of those with every input at the
            widest format asked for; MxMoE's latency [theirs], over inputs alone [ours]

Matrices that read one tensor are one item. Weights are given, planned before; the predicted KL is
that of both, so the same tangents and the same solver find the widths (`objective`): what the
weights lose is its background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnest.calibrate.predict import Predictor, token_shares
from bitnest.errors import RecipeError
from bitnest.formats import CodedFormat, parse_format
from bitnest.formats.inputs import DENSE, joined_name, parse_inputs
from bitnest.kinds import UNNAMED_DENSE
from bitnest.quantize.allocation.menu import Menu
from bitnest.quantize.allocation.objective import Background, Objective, with_weights
from bitnest.sites import Site
from bitnest.statistics import Statistics

DENSE_BITS = 16
SHARES = 1 << 16  # a token that reaches every matrix
TIMES = 1 << 52  # of the slowest choices together, in units of cost


@dataclass(frozen=True)
class InputDials:
    """What is asked of inputs. formats: to choose among, `dense` leaves them alone; one is given to
    all. bits, time: see above, one of them where there are several formats. latency: seconds per
    multiply-accumulate by WEIGHTS/INPUTS.

    Raises:
        RecipeError, FormatError: formats without a budget, a budget without formats, out of range.
    """

    formats: tuple[str, ...]
    bits: float | None = None
    time: float | None = None
    latency: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in self.formats:
            if name != DENSE:
                parse_inputs(name)
        given = [value for value in (self.bits, self.time) if value is not None]
        several = len(self.formats) > 1
        if len(given) > 1:
            raise RecipeError("--input-bits and --input-time at once", hint="one of them")
        if given and not several:
            raise RecipeError("a budget for inputs, and nothing to choose among",
                              hint="--inputs int6-g128 --inputs int8-g128")  # fmt: skip
        if several and not given:
            raise RecipeError(
                f"several formats of inputs and no budget: {', '.join(self.formats)}",
                hint="--input-bits 6.4 is their mean width over multiply-accumulates; or "
                "--input-time 0.8 --latency FILE",
            )
        if self.bits is not None and not 0 < self.bits <= DENSE_BITS:
            raise RecipeError(f"--input-bits {self.bits:g}: inputs have 16 at most",
                              hint="--input-bits 6.4")  # fmt: skip
        if self.time is not None and not 0 < self.time <= 1:
            raise RecipeError(
                f"--input-time {self.time:g} is no share above 0, 1 at most",
                hint="--input-time 0.8: of the time with every input at its widest",
            )
        if self.time is not None and self.latency is None:
            raise RecipeError(
                "--input-time without measured latencies",
                hint="python -m benchmarks.input_latency -o FILE, and --latency FILE",
            )

    @classmethod
    def of(
        cls,
        inputs: Sequence[str],
        bits: float | None = None,
        time: float | None = None,
        latency: Mapping[str, float] | None = None,
    ) -> InputDials | None:
        """Of options as given; None if nothing was."""
        names = [n if n == DENSE else parse_inputs(n).name for n in inputs]
        if not names and bits is None and time is None:
            return None
        return cls(tuple(dict.fromkeys(names)), bits, time, None if time is None else latency)

    @property
    def planned(self) -> bool:
        """Whether there is a choice."""
        return len(self.formats) > 1

    def to_json(self) -> dict[str, Any]:
        """What was given, as plans keep it."""
        return {"inputs": list(self.formats), **self.budget()}

    def budget(self) -> dict[str, float]:
        """The budget, as plans and recipes keep it."""
        found = {"input_bits": self.bits, "input_time": self.time}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class InputMenu:
    """Items that choose what their inputs are rounded to. menu: its numel are multiply-accumulates,
    SHARES for one that every token does, its bits and bytes those times widths. cost: (N, P), in
    the unit of the budget. budget: None where nothing was left to choose."""

    menu: Menu
    objective: Objective
    cost: np.ndarray
    budget: int | None
    unit: str

    def solve(self, *, exact: bool = False) -> np.ndarray:
        """The choice of least predicted KL under the budget.

        Raises:
            RecipeError: the cheapest inputs are over it.
        """
        if self.budget is None:
            return np.asarray(np.where(self.menu.allowed, self.cost, -1).argmax(axis=1))
        least = self.menu.least(self.cost)
        if least > self.budget:
            share = least / max(1, self.menu.numel.sum())
            raise RecipeError(
                f"the narrowest inputs take {share:.4g} bits on average, more than was asked"
                if self.unit == "bit"
                else f"the fastest inputs take {least / max(1, self.widest):.3g} of the time at "
                "their widest, more than was asked",
                hint="a larger --input-bits or --input-time, or narrower --inputs",
            )
        return self.objective.minimise(self.cost, self.budget, exact=exact).choice

    @property
    def widest(self) -> int:
        """What every input at its widest costs."""
        return widest_cost(self.menu, self.cost)


@dataclass(frozen=True)
class PlannedInputs:
    """Inputs as they were chosen. kl: per label, predicted, weights and inputs together. alone:
    mean KL that they add to that of weights."""

    grounds: InputMenu
    choice: np.ndarray
    kl: np.ndarray
    mean: float
    alone: float

    @property
    def bits(self) -> float:
        """Mean width over multiply-accumulates, of those matrices that may round their inputs."""
        return self.grounds.menu.average_bits(self.choice)

    @property
    def time(self) -> float | None:
        """Share of the time at the widest, where times were given."""
        if self.grounds.unit == "bit":
            return None
        rows = np.arange(len(self.choice))
        return float(self.grounds.cost[rows, self.choice].sum() / max(1, self.grounds.widest))

    @property
    def formats(self) -> dict[str, str]:
        """What inputs are rounded to, by site; `dense` for nothing."""
        return self.grounds.menu.plan(self.choice)

    def joined(self, weights: Mapping[str, str]) -> dict[str, str]:
        """Names of both by site. weights: of every site."""
        own = self.formats
        return {n: joined_name(fmt, own[n]) if n in own else fmt for n, fmt in weights.items()}

    def figures(self) -> dict[str, Any]:
        """As the plan file keeps them."""
        found: dict[str, Any] = {"input_bits": round(self.bits, 4)}
        if self.time is not None:
            found["input_time"] = round(self.time, 4)
        return {**found, "input_kl": float(f"{self.alone:.4g}")}


def planned_inputs(
    grounds: InputMenu, base: Objective, weights: np.ndarray, choice: np.ndarray
) -> PlannedInputs:
    """What a choice costs. base, weights: objective and choice of the weights' plan."""
    kl = grounds.objective.kl(choice)
    mean = float(kl @ grounds.objective.weights)
    return PlannedInputs(grounds, choice, kl, mean, mean - base.mean(weights))


def build_inputs(
    predictor: Predictor,
    weights: Mapping[str, str],
    dials: InputDials,
    base: Objective,
    choice: np.ndarray,
    fixed: Mapping[str, str],
    *,
    apart: bool = False,
) -> InputMenu:
    """The menu of inputs beside planned weights.

    weights: format of every site. base, choice: of the weights' plan. fixed: what rules give to the
    inputs of some sites. apart: every site chooses for itself.

    Raises:
        StatisticsError: a loss that was not measured.
        RecipeError: a pair without a latency.
    """
    known = np.array(predictor.known)
    place = {site.name: i for i, site in enumerate(predictor.sites)}
    sites = [site for site in predictor.sites if may_round(site, weights)]
    names = tuple(
        dict.fromkeys([*dials.formats, *(fixed[s.name] for s in sites if s.name in fixed)])
    )
    groups = shared_groups(predictor.statistics, sites, fixed, apart=apart)
    shares = token_shares(predictor.statistics)
    losses = np.full((len(groups), len(names), int(known.sum())), np.inf)
    bits = np.zeros((len(groups), len(names)), dtype=np.int64)
    work = np.zeros(len(groups), dtype=np.int64)
    seconds = np.zeros((len(groups), len(names)))
    for i, group in enumerate(groups):
        reached = [round(float(shares[place[s.name]]) * SHARES) for s in group]
        work[i] = sum(n * s.numel for n, s in zip(reached, group, strict=True))
        for p, name in enumerate(names):
            bits[i, p] = sum(
                n * s.shape[0] * total_bits(name, s.shape[1])
                for n, s in zip(reached, group, strict=True)
            )
            if name != fixed.get(group[0].name, name) or (
                group[0].name not in fixed and name not in dials.formats
            ):
                continue
            own = [predictor.inputs.loss(s.name, weights[s.name], name) for s in group]
            losses[i, p] = np.sum(own, axis=0)[known]
            if dials.latency is not None:
                seconds[i, p] = sum(
                    n * s.numel * pair_latency(dials.latency, weights[s.name], name)
                    for n, s in zip(reached, group, strict=True)
                )
    kinds = tuple(dict.fromkeys(group[0].kind for group in groups))
    menu = Menu(
        items=tuple(groups), formats=names, kinds=kinds,
        kind=np.array([kinds.index(group[0].kind) for group in groups], dtype=np.int64),
        nbytes=bits, bits=bits, losses=losses, numel=work,
    )  # fmt: skip
    beside = Background(
        np.concatenate([base.own(choice), base.background.losses]),
        tuple(base.fit.kinds[k] for k in base.kind),
        base.depth,
    )
    objective = with_weights(menu, base.fit, base.weights, beside)
    if dials.latency is None:
        limit = None if dials.bits is None else round(dials.bits * int(work.sum()))
        return InputMenu(menu, objective, bits, limit, "bit")
    slowest = seconds.max(axis=1).sum()
    cost = np.round(seconds * (TIMES / slowest)).astype(np.int64) if slowest else bits
    assert dials.time is not None
    budget = math.floor(dials.time * widest_cost(menu, cost))
    return InputMenu(menu, objective, cost, budget, "second")


def widest_cost(menu: Menu, cost: np.ndarray) -> int:
    """Of every item's widest choice that it may have."""
    widest = np.where(menu.allowed, menu.bits, -1).argmax(axis=1)
    return int(cost[np.arange(len(cost)), widest].sum())


def may_round(site: Site, weights: Mapping[str, str]) -> bool:
    """Whether the inputs of a site may be rounded, its weight's format being known."""
    if site.kind in UNNAMED_DENSE or site.name not in weights:
        return False
    return isinstance(parse_format(weights[site.name]), CodedFormat)


def shared_groups(
    statistics: Statistics, sites: Sequence[Site], fixed: Mapping[str, str], *, apart: bool = False
) -> list[tuple[Site, ...]]:
    """Sites that read one tensor, as the analysis saw; those that rules speak of by themselves."""
    leaders = {
        (layer["layer"], reader): item["name"]
        for layer in statistics.layers
        for item in layer["inputs"]
        for reader in item["readers"]
    }
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key: Any = (site.layer, leaders.get((site.layer, site.module), site.name))
        if site.expert is not None and site.param != "weight":
            key = (site.layer, site.module, site.expert, site.param == "down_proj")
        if apart or site.name in fixed:
            key = site.name
        groups.setdefault(key, []).append(site)
    return [tuple(group) for group in groups.values()]


def total_bits(name: str, channels: int) -> int:
    """Bits of the codes of one token."""
    if name == DENSE:
        return DENSE_BITS * channels
    return round(parse_inputs(name).mean_bits(channels) * channels)


def pair_latency(table: Mapping[str, float], weights: str, inputs: str) -> float:
    """Seconds per multiply-accumulate of such weights with such inputs.

    Raises:
        RecipeError: nobody measured the pair.
    """
    names = [f"{weights}/{inputs}", *([weights] if inputs == DENSE else [])]
    for name in names:
        if name in table:
            return table[name]
    raise RecipeError(
        f"the table of latencies has no '{names[0]}'",
        hint="measure it (python -m benchmarks.input_latency says what this machine can run), or "
        "leave out its --inputs; the table has " + ", ".join(sorted(table)),
    )
