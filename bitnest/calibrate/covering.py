"""Drawing more windows until every expert has its minimum of tokens.

Windows that were not drawn before are looked through, and one after the other the one is kept that
brings most of what is missing:

    gain(w) = sum_e min(max(0, m_e - n_e), n_e(w))

the greedy rule for submodular cover (Wolsey, 1982: at most 1 + ln(largest gain) times the fewest
windows). Applied to experts it is ours. Windows are counted in doubling rounds, and every round
chooses anew among all windows counted so far, so that a poor one is not kept for having come early.
A nearly dead expert gains a token or two per window; `worth` says what a window must bring at
least. It stops when every expert is covered, when PATIENCE rounds in a row brought nothing to those
that are still starved, or at the end of the pool.

Left out: text written by the model itself (`ebss`; its windows can be such a pool too), and
dropping a chosen window that later ones make superfluous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.chat import Conversation
from bitnest.calibrate.data import CalibrationSet, DataSource, calibration_windows
from bitnest.calibrate.windows import split_samples
from bitnest.errors import DataError, RecipeError
from bitnest.progress import Progress, Silent

__all__ = ["Covered", "Pool", "candidate_windows", "draw_until_covered"]

FIRST_ROUND = 8  # windows counted before the first choice
PATIENCE = 2  # rounds without any use before it gives up

Counts = Mapping[str, torch.Tensor]
"""Experts module name -> tokens routed to each expert, (E,) or (windows, E) int64."""


@dataclass(frozen=True)
class Pool:
    """Windows to choose from, in the order they are looked at.

    tokens: (n, length) int64. labels: of the source of each.
    """

    tokens: torch.Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Covered:
    """Windows chosen for coverage.

    They are biased towards rare experts by construction: they may feed Hessians, but statistics of
    how experts are used must not count them. The caller keeps them apart, under the label `cover`;
    `labels` says which source each came from.

    tokens: (n, length) int64, in the order of choice. rounds: forward passes over part of the pool.
    windows_tried: windows counted. counts: experts module name -> (E,) tokens with the chosen
    windows. still_starved: (experts module name, expert, tokens) of those below the minimum.
    """

    tokens: torch.Tensor
    labels: tuple[str, ...]
    rounds: int
    windows_tried: int
    counts: dict[str, torch.Tensor]
    still_starved: tuple[tuple[str, int, int], ...]


def candidate_windows(
    tokenizer: Any,
    sources: Sequence[DataSource],
    drawn: CalibrationSet,
    *,
    limit: int,
    seed: int,
    load: Callable[[str], Iterable[str | Conversation]] | None = None,
) -> Pool:
    """Up to `limit` windows that `drawn` does not hold, of its length and packing, order by seed.

    The sources share the limit by weight; one that has fewer windows gives what it has, and the
    others no more for it. load: see `calibration_windows`.

    Raises:
        DataError: a source is missing, unreadable or shorter than one window.
    """
    length = drawn.tokens.shape[1]
    read = partial(calibration_windows, tokenizer, length=length, pack=drawn.packing, load=load)
    same = [item.source for item in sources] == [report.source for report in drawn.sources]
    reports = drawn.sources
    if not same:  # how many windows they have is not known yet
        reports = read(
            [replace(s, weight=1) for s in sources], samples=len(sources), seed=seed
        ).sources
    # Windows of a source that are drawn already come again, so as many more are asked for.
    extra = [sum(r.samples for r in drawn.sources if r.source == s.source) for s in sources]
    weights = [item.weight for item in sources]
    shares = split_samples(max(limit, sum(weights)), weights)
    wanted = [min(r.windows, n + m) for r, n, m in zip(reports, shares, extra, strict=True)]
    weighted = [replace(s, weight=n) for s, n in zip(sources, wanted, strict=True)]
    found = read(weighted, samples=sum(wanted), seed=seed)
    seen = {row.numpy().tobytes() for row in drawn.tokens}
    order = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(seed))
    fresh: list[int] = []
    for i in order.tolist():
        key = found.tokens[i].numpy().tobytes()
        if key not in seen:
            seen.add(key)
            fresh.append(i)
    fresh = fresh[:limit]
    return Pool(found.tokens[fresh], tuple(found.labels[i] for i in fresh))


def draw_until_covered(
    route: Callable[[torch.Tensor], Counts],
    pool: Pool,
    counts: Counts,
    minimum: Mapping[str, int],
    *,
    worth: int = 1,
    first: int = FIRST_ROUND,
    progress: Progress | None = None,
) -> Covered:
    """Choose windows of `pool` until every expert has its minimum of tokens, see above.

    route: tokens (n, length) -> experts module name -> (n, E): `routed_tokens` of a new Stream over
    them. counts: (E,) of the windows already drawn. minimum: tokens per expert, by module name.
    worth: missing tokens a window must bring to be kept. first: windows in the first round; with
    each round twice as many are known.

    Raises:
        RecipeError: a minimum, `worth` or `first` below 1.
        DataError: the counts and minima are not of the same modules, or there are none.
    """
    _check(counts, minimum, min(worth, first))
    progress = progress or Silent()
    names = sorted(counts)
    have = torch.cat([counts[name].long() for name in names])
    need = torch.cat([torch.full_like(counts[name], minimum[name]).long() for name in names])
    missing = (need - have).clamp_min_(0)
    known = torch.zeros(0, len(have), dtype=torch.int64)
    chosen: list[int] = []
    rounds, idle, left = 0, 0, missing
    while left.any() and len(known) < len(pool.tokens) and idle < PATIENCE:
        part = pool.tokens[len(known) : max(first, 2 * len(known))]
        progress.phase(f"draw for coverage, round {rounds + 1}", len(part))
        found = route(part)
        new = torch.cat([found[name].long() for name in names], dim=1)
        known, rounds = torch.cat([known, new]), rounds + 1
        progress.step(len(part), f"{int((left > 0).sum())} experts starved")
        idle = 0 if new[:, left > 0].any() else idle + 1
        if not idle:
            chosen, left = _greedy(known, missing, worth)
    have = have + known[chosen].sum(0)
    total = dict(zip(names, have.split([len(counts[name]) for name in names]), strict=True))
    starved = tuple(
        (name, expert, n)
        for name in names
        for expert, n in enumerate(total[name].tolist())
        if n < minimum[name]
    )
    labels = tuple(pool.labels[i] for i in chosen)
    return Covered(pool.tokens[chosen], labels, rounds, len(known), total, starved)


def _check(counts: Counts, minimum: Mapping[str, int], least: int) -> None:
    if not counts:
        raise DataError("no experts were counted", hint="count the windows drawn so far first")
    if missing := sorted(set(counts) ^ set(minimum)):
        raise DataError("counts and minima are of different experts", where=", ".join(missing))
    if min(minimum.values()) < 1 or least < 1:
        raise RecipeError("coverage needs minima, a worth and a first round of at least 1")


def _greedy(
    known: torch.Tensor, missing: torch.Tensor, worth: int
) -> tuple[list[int], torch.Tensor]:
    """Rows of known (n, experts) in order of choice, and what is missing after them."""
    starved = missing > 0
    table, left = known[:, starved], missing[starved].clone()
    chosen: list[int] = []
    while left.any():
        gains = table.minimum(left).sum(1)
        best = int(gains.argmax())
        if gains[best] < worth:
            break
        chosen.append(best)
        left = (left - table[best]).clamp_min_(0)
        table[best] = 0  # no window twice
    rest = torch.zeros_like(missing)
    rest[starved] = left
    return chosen, rest
