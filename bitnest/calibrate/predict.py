"""predict: the KL that a plan will cost, from statistics alone, with an error bar.

A plan gives every site a candidate format. Its raw loss on dataset d is a sum of sites' losses,

    s_kd = sum over sites of kind k of loss_d(site, format)

to second order, with gradients and inputs independent and sites not interacting. What that leaves
out is fitted to probes, whose KL was measured [ours]:

    KL_d ~ sum_k a_k s_kd + b sqrt(sum_k m_k s_kd)

a_k corrects each kind (attention, expert ...). The square root is what choosing experts adds: the
chance that the k-th and the (k+1)-th change places grows with the size of a perturbation, not with
its square, and what a changed place costs does not depend on it. What every token passes on its way
to a router moves it more than one expert's error does: m_k is 1 for experts, NEARER for others
[ours; fitted to measured plans], 0 for the head. Dense models have no such term.
A head of its own moves no router: it is left out of the root.
The terms are not independent either: what an early layer gets wrong passes through later ones that
are wrong too. With T_d the sum of all losses and x the depth of a site's layer, 0 for the first
block and 1 for the last, a loss counts [ours]

    s_i(f) * (1 + KAPPA T_d)^(GROWTH (1 - x_i))

which is nothing at T = .001 and doubles early errors at T = .1. KAPPA and GROWTH were fitted to 136
measured plans of three models (dense, balanced and skewed MoE) and came out alike on each
(docs/log).

What a site loses per unit of output error is itself measured on few tokens, for experts above all,
and whoever searches for the cheapest plan finds the sites where it came out too low. So experts'
losses are drawn towards those of the same projection in their layer [ours]: with the output error
per token n_i(f) = share_i * tr(dW H dW^T) and the group's mean loss per error,

    s_i(f) <- (1 - DRAWN) s_i(f) + DRAWN n_i(f) * sum_g s / sum_g n

A matrix may be dropped (format `zero`). Where all matrices of an expert are, they lose once what
dropping the last of them loses, since nothing of the others is left to lose.

An expert that is dropped loses its output once, not once for each of its matrices; and what is so
large a change is to second order half of what is measured (WHOLE; ours, two plans of the embedded
model with three and eight dropped experts: predicted .15 and .37, measured .15 and .41).

Fitted by least squares of log KL, with a weak pull of the a_k towards each other (RIDGE), so that
a few probes suffice.

The error bar is the standard deviation of log(measured / predicted) when each probe is predicted
by a fit to the others, and in squares with it the relative standard error of the probes' KL over
the windows they were measured on, which no fit can see: all probes share them.

Without gradients (importance `probes`) a site's loss is its output error, scaled so that
the probe that perturbed only its layer and kind comes out as measured:

    loss_d(site, format) = c_d * n * |dY|^2,  c_d = KL_d / sum over the group of n * |dY|^2

with n the share of tokens that reach the site and |dY|^2 = tr(dW H dW^T).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch

from bitnest.calibrate.block_losses import loss_of, measured_blocks
from bitnest.calibrate.fate_losses import FateLosses
from bitnest.calibrate.input_losses import InputLosses
from bitnest.errors import StatisticsError
from bitnest.formats import FateFormat, parse_format
from bitnest.sites import ENDS, Site
from bitnest.statistics import Statistics

RIDGE = 0.3  # weight of log a_k - mean log a, against residuals of log KL
LEAST = 1e-12  # nats: below it a KL is rounding
NEARER = 5.0  # to a router's choice is what every token passes, than one expert
KAPPA, GROWTH = 13.0, 0.87  # of early errors with everything that is wrong
DROP = "zero"  # the format that drops a matrix
WHOLE = 2.0  # of a dropped expert's loss to second order
DRAWN = 0.35  # of an expert's loss that its group decides


@dataclass(frozen=True)
class Prediction:
    """KL of one plan. kl: label -> nats per token. raw: label -> sum of losses, grown with each
    other, before calibration.
    error: one standard error of log kl, of every label; infinite if no probe was measured."""

    kl: dict[str, float]
    raw: dict[str, float]
    error: float

    @property
    def mean(self) -> float:
        """Mean over labels."""
        return sum(self.kl.values()) / len(self.kl)

    @property
    def interval(self) -> tuple[float, float]:
        """`mean` less and more one standard error (of its logarithm)."""
        return self.mean * math.exp(-self.error), self.mean * math.exp(self.error)


@dataclass(frozen=True)
class Fit:
    """KL_d ~ sum_k scale_k s_kd + flips * sqrt(sum_k m_k s_kd).

    scales: per kind. error: standard deviation of the left-out log ratios, in a Predictor's fit
    with what other windows would have measured. probes: how many it was fitted to; with none,
    scales are 1 and the error is unknown (infinite).
    """

    kinds: tuple[str, ...]
    scales: tuple[float, ...]
    flips: float
    error: float
    probes: int

    def kl(self, sums: np.ndarray) -> np.ndarray:
        """Predicted KL of raw sums (..., kinds)."""
        moved = sums @ moves(self.kinds)
        return np.asarray(sums @ np.array(self.scales) + self.flips * np.sqrt(moved))


@dataclass(frozen=True)
class Point:
    """One probe on one dataset: raw sums per kind, predicted by a fit to the other probes, and
    measured."""

    probe: int
    label: str
    bits: float
    raw: np.ndarray
    predicted: float
    measured: float


class Predictor:
    """Predicts plans from statistics.

    losses: (sites, F, L) float64, raw. fit: calibrated on the statistics' probes.
    """

    def __init__(self, statistics: Statistics) -> None:
        """Read what is needed; no model is run.

        Raises:
            StatisticsError: measured without candidates or importance.
        """
        self.statistics = statistics
        self.sites = statistics.sites
        self.formats = statistics.formats
        self.labels = statistics.labels
        self._number = {site.name: i for i, site in enumerate(self.sites)}
        self.kinds = tuple(dict.fromkeys(site.kind for site in self.sites))
        self._kind = np.array([self.kinds.index(site.kind) for site in self.sites])
        self._bits = candidate_bits(statistics)
        self.losses = site_losses(statistics)
        self._columns = {name: f for f, name in enumerate(self.formats)}

    def predict(
        self, plan: Mapping[str, str], inputs: Mapping[str, str] | None = None
    ) -> Prediction:
        """KL of the plan: site name -> format name; sites left out stay as they are. inputs: site
        name -> what its inputs are rounded to.

        Raises:
            StatisticsError: a site or a format that was not measured.
        """
        gone = {
            n: fate for n, fmt in plan.items() if isinstance(fate := parse_format(fmt), FateFormat)
        }
        coded = dict.fromkeys(fmt for name, fmt in plan.items() if name not in gone)
        self.check_formats(list(coded), "; or leave out --statistics")
        choice = np.full(len(self.sites), -1)
        for name, fmt in plan.items():
            if name not in self._number:
                raise StatisticsError(
                    f"site '{name}' was not measured: are these statistics of another model?",
                    where=str(self.statistics.path),
                    hint=f"bitnest inspect {self.statistics.path}; bitnest analyze this model",
                )
            if name not in gone:
                choice[self._number[name]] = self.column(fmt)
        rounded = self.inputs.chosen(plan, inputs or {})
        sums = self.sums(choice, self.fate_losses(gone), rounded)
        kl = self.fit.kl(sums)
        covered = [d for d, label in enumerate(self.labels) if self.known[d]]
        return Prediction(
            {self.labels[d]: float(kl[d]) for d in covered},
            {self.labels[d]: float(sums[d].sum()) for d in covered},
            self.fit.error,
        )

    def column(self, name: str) -> int:
        """Number of a format. A nested one that was not measured counts as the integers of its
        widest width: codes that serve all widths lose about as much as those made for one
        (docs/performance.md).

        Raises:
            StatisticsError: neither it nor such integers were measured.
        """
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = self._stand_in(name)
        return found

    def check_formats(self, names: Sequence[str], otherwise: str = "") -> None:
        """Refuse formats without a column; see `Statistics.check_formats`.

        Raises:
            StatisticsError: there is one.
        """
        nested = [name for name in names if name not in self.formats and widths_of(name)]
        for name in nested:
            self.column(name)
        self.statistics.check_formats([n for n in names if n not in nested], otherwise)

    def _stand_in(self, name: str) -> int:
        widths = widths_of(name)
        alike = [
            f for f, other in enumerate(self.formats)
            if widths and plain_width(other) == widths[-1]
        ]  # fmt: skip
        if not alike:
            statistics = self.statistics
            wanted = [f"int{widths[-1]}-g128"] if widths else [name]
            raise StatisticsError(
                f"format '{name}' was not measured"
                + (f", nor integers of {widths[-1]} bits" if widths else ""),
                where=str(statistics.path),
                hint=statistics.measuring([*self.formats, *wanted]),
            )
        return alike[0]

    @cached_property
    def inputs(self) -> InputLosses:
        """Losses of rounded inputs."""
        noise = output_errors(self.statistics).sum(axis=1)
        per_error = self.losses.sum(axis=1) / np.where(noise > 0, noise, 1.0)[:, None]
        return InputLosses(self.statistics, per_error, token_shares(self.statistics))

    @cached_property
    def fates(self) -> FateLosses:
        """Losses of experts that are dropped, replaced or merged."""
        return FateLosses(self.statistics, self.losses, relative_errors(self.statistics))

    def fate_losses(self, gone: Mapping[str, FateFormat]) -> dict[int, np.ndarray]:
        """Losses (L,) by number of the site that an expert's or a block's is counted at. gone:
        fates by site."""
        found = {}
        whole = {
            block for block in self.blocks
            if all(gone.get(name) == FateFormat() for name in self.block_sites(block))
        }  # fmt: skip
        for name, fate in gone.items():
            site = self.sites[self._number[name]] if name in self._number else None
            if site is None:
                continue
            if site.layer in whole and site.kind not in ENDS:
                last = self._number[self.block_sites(site.layer)[-1]]
                found[last] = self.blocks[site.layer]
                continue
            if site.expert is None:
                found[self._number[name]] = self.fates.matrix(self._number[name])
            else:
                place = (site.layer, site.expert)
                found[self.fates.last[place]] = self.fates.loss(place, fate)
        return found

    def block_sites(self, block: int) -> list[str]:
        """Names of the sites in a block; what it loses is counted at the last."""
        return [s.name for s in self.sites if s.layer == block and s.kind not in ENDS]

    @cached_property
    def blocks(self) -> dict[int, np.ndarray]:
        """Losses (L,) of blocks that were measured to be left out; see `block_losses`."""
        found = {}
        for block, kl in measured_blocks(self.statistics).items():
            place = self._number[self.block_sites(block)[-1]]
            found[block] = loss_of(kl, partial(self._alone, place))
        return found

    def _alone(self, site: int, loss: np.ndarray) -> np.ndarray:
        """Predicted KL if one site alone has a loss, both (L,)."""
        sums = np.zeros((len(loss), len(self.kinds)))
        sums[:, self._kind[site]] = loss * growth(loss, self.depth[site : site + 1])[0]
        return self.fit.kl(sums)

    def sums(
        self,
        choice: np.ndarray,
        fates: Mapping[int, np.ndarray] | None = None,
        inputs: Mapping[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Losses per label and kind, grown with each other, (L, K), of format numbers per site,
        (S,), -1 for none. fates: see `fate_losses`. inputs: (L,) by site number, added."""
        chosen = choice >= 0
        own = np.zeros((len(self.sites), len(self.labels)))
        own[chosen] = self.losses[np.nonzero(chosen)[0], choice[chosen]]
        drop = self.formats.index(DROP) if DROP in self.formats else len(self.formats)
        count_drops_once(own, self.experts, choice == drop)
        for site, loss in (fates or {}).items():
            own[site] = loss
        for site, loss in (inputs or {}).items():
            own[site] += loss
        totals = np.zeros((len(self.kinds), len(self.labels)))
        np.add.at(totals, self._kind, own * growth(own.sum(axis=0), self.depth))
        return totals.T

    @cached_property
    def experts(self) -> list[list[int]]:
        """Sites of every expert: see `whole_experts`."""
        return whole_experts(self.sites)

    @cached_property
    def depth(self) -> np.ndarray:
        """Depth of every site, (S,): see `depths`."""
        return depths(self.sites)

    @cached_property
    def fit(self) -> Fit:
        """The calibration."""
        fit = fit_points(self.kinds, *self._measured(), moe=self._moe)
        return replace(fit, error=math.hypot(fit.error, self.sampling))

    @property
    def sampling(self) -> float:
        """Relative standard error of the probes' KL over their windows, which is common to them:
        root mean square over probes and labels."""
        relative = [error / kl for *_, kl, error in self._rows]
        return math.sqrt(sum(r * r for r in relative) / max(1, len(relative)))

    @cached_property
    def points(self) -> list[Point]:
        """Every probe on every dataset, predicted by the others."""
        raw, measured, probes = self._measured()
        predicted = left_out(self.kinds, raw, measured, probes, moe=self._moe)
        bits = {i: self._mean_bits(i) for i in dict.fromkeys(probes)}
        labels = [label for _, label, *_ in self._rows]
        return [
            Point(probe, label, bits[probe], raw[i], float(predicted[i]), float(measured[i]))
            for i, (probe, label) in enumerate(zip(probes, labels, strict=True))
        ]

    @cached_property
    def _rows(self) -> list[tuple[int, str, np.ndarray, float, float]]:
        """Probe, label, raw sums, KL and its standard error. Merged parts of one seed measured the
        same plans, which are one probe: its twin would tell what to predict for it."""
        found = []
        first: dict[tuple[int | None, ...], int] = {}
        for place, probe in enumerate(self.statistics.header["probes"]):
            if probe["group"]:
                continue
            i = first.setdefault(tuple(probe["plan"]), place)
            sums = self.sums(_choice(probe["plan"]))
            for item in probe["measured"]:
                label = probe.get("labels", self.labels)[item["label"]]
                if item["kl"] > LEAST:
                    own = sums[self.labels.index(label)]
                    found.append((i, label, own, item["kl"], item["error"]))
        return found

    def _measured(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        rows = self._rows
        raw = np.array([row[2] for row in rows]).reshape(-1, len(self.kinds))
        return raw, np.array([row[3] for row in rows]), [row[0] for row in rows]

    def _mean_bits(self, probe: int) -> float:
        """Of the sites that the probe changes."""
        choice = _choice(self.statistics.header["probes"][probe]["plan"])
        size = np.array([site.numel for site in self.sites], dtype=float) * (choice >= 0)
        return float((self._bits[choice] * size).sum() / size.sum())

    @property
    def _moe(self) -> bool:
        return any(layer["experts"] for layer in self.statistics.layers)

    @cached_property
    def known(self) -> list[bool]:
        """Labels whose importance was measured (`cover` is not)."""
        importance = self.statistics.header["importance"]
        return [count > 0 for count in importance["predictions"]]


def depths(sites: Sequence[Site]) -> np.ndarray:
    """0 for the first block and the embedding, 1 for the last and the head, (S,)."""
    inner = [site.layer for site in sites if site.kind not in ENDS]
    last = max(1, max(inner, default=1))
    ends = {"embedding": 0.0, "head": 1.0}
    return np.array([ends.get(site.kind, min(1.0, site.layer / last)) for site in sites])


def whole_experts(sites: Sequence[Site]) -> list[list[int]]:
    """Places of the sites of every expert that has several."""
    found: dict[tuple[int, str, int], list[int]] = {}
    for i, site in enumerate(sites):
        if site.expert is not None:
            apart = site.param == "weight"  # a module for every matrix
            module = site.module.rpartition(".")[0] if apart else site.module
            found.setdefault((site.layer, module, site.expert), []).append(i)
    return [group for group in found.values() if len(group) > 1]


def count_drops_once(
    own: np.ndarray, experts: Sequence[Sequence[int]], dropped: np.ndarray
) -> None:
    """Of losses (N, L), in place: an expert whose matrices are all dropped, (N,), loses the largest
    of theirs once, times WHOLE."""
    for group in experts:
        items = list(group)
        if dropped[items].all():
            own[items[0]] = WHOLE * own[items].max(axis=0)
            own[items[1:]] = 0.0


def growth(total: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """What losses at `depth` (S,) are multiplied by where all sum to `total` (L,): (S, L)."""
    return np.asarray((1 + KAPPA * total) ** (GROWTH * (1 - depth[:, None])))


def site_losses(statistics: Statistics) -> np.ndarray:
    """Raw predicted KL of every site in every format on every dataset, (S, F, L) float64.

    Raises:
        StatisticsError: measured without candidates or importance.
    """
    importance = statistics.header["importance"]
    if importance is None or not statistics.formats:
        raise StatisticsError(
            "these statistics hold usage only: nothing to predict a loss from",
            where=str(statistics.path),
            hint="bitnest analyze without --importance none, with a --format or two",
        )
    if importance["kind"] == "probes":
        return _losses_by_groups(statistics)
    parts = [
        statistics.read(layer["layer"], "sites.loss")
        for layer in statistics.layers
        if layer["sites"]
    ]
    return drawn(statistics, np.asarray(torch.cat(parts).double().numpy()))


def drawn(statistics: Statistics, losses: np.ndarray, share: float = DRAWN) -> np.ndarray:
    """Losses (S, F, L), those of experts drawn towards their layer's and projection's."""
    return draw(statistics.sites, output_errors(statistics), losses, share)


def draw(
    sites: Sequence[Site], noise: np.ndarray, losses: np.ndarray, share: float = DRAWN
) -> np.ndarray:
    """The same of losses (S, F, L) with output errors `noise` (S, F)."""
    result = losses.copy()
    groups: dict[tuple[int, str], list[int]] = {}
    for i, site in enumerate(sites):
        if site.expert is not None:
            groups.setdefault((site.layer, site.name.rpartition(".")[2]), []).append(i)
    for group in groups.values():
        total = noise[group].sum()
        if total > 0:
            per_error = losses[group].sum(axis=(0, 1)) / total
            result[group] = (1 - share) * losses[group] + share * noise[group, :, None] * per_error
    return result


def output_errors(statistics: Statistics) -> np.ndarray:
    """Output error per token of every site in every format, share * tr(dW H dW^T), (S, F)."""
    layers = [layer for layer in statistics.layers if layer["sites"]]
    output = torch.cat([statistics.read(i["layer"], "sites.output") for i in layers]).double()
    energy = output.numpy() * token_shares(statistics)
    return np.asarray(relative_errors(statistics) * energy[:, None])


def relative_errors(statistics: Statistics) -> np.ndarray:
    """tr(dW H dW^T) over tr(W H W^T) of every site in every format, (S, F)."""
    layers = [layer for layer in statistics.layers if layer["sites"]]
    parts = [statistics.read(layer["layer"], "sites.error") for layer in layers]
    return np.asarray(torch.cat(parts).double().numpy())


def _losses_by_groups(statistics: Statistics) -> np.ndarray:
    """By the probes that perturbed one layer and kind each."""
    noise = output_errors(statistics)
    labels = statistics.labels
    losses = np.zeros((*noise.shape, len(labels)))
    times = np.zeros((len(noise), 1, len(labels)))  # merged parts may have measured one label each
    for probe in statistics.header["probes"]:
        if not probe["group"]:
            continue
        choice = _choice(probe["plan"])
        group = np.nonzero(choice >= 0)[0]
        total = noise[group, choice[group]].sum()
        for item in probe["measured"]:
            d = labels.index(probe.get("labels", labels)[item["label"]])
            times[group, 0, d] += 1
            if total > 0:
                losses[group, :, d] += item["kl"] * noise[group] / total
    return losses / np.maximum(times, 1)


def token_shares(statistics: Statistics) -> np.ndarray:
    """Share of all tokens that reach each site, (S,): 1 but for experts."""
    shares = []
    for layer in statistics.layers:
        counts = {
            item["name"]: statistics.read(layer["layer"], f"experts.{i}.up.tokens").sum(0)
            for i, item in enumerate(layer["experts"])
        }
        for site in layer["sites"]:
            seen = counts.get(site["module"])
            tokens = (
                1.0 if seen is None else int(seen[site["expert"]]) / statistics.header["tokens"]
            )
            shares.append(tokens)
    return np.array(shares)


def candidate_bits(statistics: Statistics) -> np.ndarray:
    """Bits per weight of every candidate with its scales, on a typical matrix, (F,)."""
    from bitnest.formats import parse_format

    shape = _typical([s for s in statistics.sites if s.kind not in ENDS] or statistics.sites)
    return np.array([
        8 * parse_format(name).nbytes(shape) / (shape[0] * shape[1]) for name in statistics.formats
    ])  # fmt: skip


def widths_of(name: str) -> tuple[int, ...]:
    """Of the nested format of that name; none of others."""
    from bitnest.formats import parse_format, widths

    return widths(parse_format(name))


def plain_width(name: str) -> float | None:
    """Code width of a format of integers without a transform or a residual; None of others."""
    from bitnest.formats import BlockFormat, parse_format
    from bitnest.formats.elements import IntElement

    fmt = parse_format(name)
    return (
        fmt.bits if isinstance(fmt, BlockFormat) and isinstance(fmt.element, IntElement) else None
    )


def _typical(sites: Sequence[Site]) -> tuple[int, int]:
    return max((site.shape for site in sites), key=lambda shape: shape[0] * shape[1])


def moves(kinds: Sequence[str]) -> np.ndarray:
    """How much each kind's losses count where routers change their choice, (K,)."""
    return np.array([0.0 if k == "head" else 1.0 if k == "expert" else NEARER for k in kinds])


def _choice(plan: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if number is None else number for number in plan])


def fit_points(
    kinds: Sequence[str],
    raw: np.ndarray,
    measured: np.ndarray,
    probes: Sequence[int],
    *,
    moe: bool,
) -> Fit:
    """Fit to raw sums (n, K) and measured KL (n,); probes: which probe each row is of."""
    if not len(measured):
        return Fit(tuple(kinds), (1.0,) * len(kinds), 0.0, math.inf, 0)
    scales, flips = _solve(kinds, raw, measured, moe)
    others = left_out(kinds, raw, measured, probes, moe=moe)
    error = float(np.sqrt(np.mean(np.log(measured / np.maximum(others, LEAST)) ** 2)))
    return Fit(tuple(kinds), tuple(scales), flips, error, len(set(probes)))


def left_out(
    kinds: Sequence[str],
    raw: np.ndarray,
    measured: np.ndarray,
    probes: Sequence[int],
    *,
    moe: bool,
) -> np.ndarray:
    """Every row's KL, predicted by a fit to the other probes, (n,)."""
    number = np.array(probes)
    predicted = np.zeros(len(measured))
    for probe in set(probes):
        own = number == probe
        if own.all():
            scales, flips = [1.0] * len(kinds), 0.0
        else:
            scales, flips = _solve(kinds, raw[~own], measured[~own], moe)
        fit = Fit(tuple(kinds), tuple(scales), flips, 0.0, 0)
        predicted[own] = fit.kl(raw[own])
    return predicted


def _solve(
    names: Sequence[str], raw: np.ndarray, measured: np.ndarray, moe: bool
) -> tuple[list[float], float]:
    """Least squares of log KL over log a_k and log b, by scipy from a common scale."""
    from scipy.optimize import least_squares

    total = np.maximum(raw.sum(1), LEAST)
    moved = np.maximum(raw @ moves(names), LEAST)
    common = float(np.mean(np.log(measured / total)))
    kinds = raw.shape[1]

    def residuals(x: np.ndarray) -> np.ndarray:
        fitted = raw @ np.exp(x[:kinds])
        if moe:
            fitted = fitted + np.exp(x[kinds]) * np.sqrt(moved)
        pull = RIDGE * (x[:kinds] - x[:kinds].mean())
        return np.concatenate([np.log(np.maximum(fitted, LEAST) / measured), pull])

    start = [common] * kinds + (
        [common + 0.5 * float(np.log(np.median(total))) - 2.0] if moe else []
    )
    found = least_squares(residuals, np.clip(start, -29.0, 29.0), bounds=(-30.0, 30.0))
    return [float(v) for v in np.exp(found.x[:kinds])], float(
        np.exp(found.x[kinds])
    ) if moe else 0.0
