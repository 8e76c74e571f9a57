"""The menu: items, and for each the formats it may have with exact bytes and measured losses.

An item is a group of sites that the target wants equal, mostly one site. Its bytes, code bits and
losses are the sums of its sites'. Dense costs what the source's values take and loses nothing.
`zero`, where it is among the formats, drops a matrix; all matrices of one expert dropped together
lose one such loss, since nothing of the others is left to lose (`predict.WHOLE`): a bundle. So does
an expert with a fate (`formats/fates`): of those it may have, the one that loses least is on the
menu, in a column of its own that only bundles may take. A menu without a block (`without_block`)
leaves the block's items that column alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bitnest.calibrate.fate_losses import Offer
from bitnest.calibrate.predict import DROP, WHOLE, depths, whole_experts
from bitnest.errors import RecipeError
from bitnest.formats import AnyFormat, FateFormat, code_bits, parse_format
from bitnest.kinds import ENDS
from bitnest.quantize.allocation.problem import Bundle
from bitnest.recipe import sized
from bitnest.sites import Site
from bitnest.targets import Target

FATE = "fate"  # the column of fates


@dataclass(frozen=True)
class Gone:
    """An expert that may go. items: its matrices'. fate: format name. loss: by label, (L,)."""

    items: tuple[int, ...]
    fate: str
    loss: np.ndarray


@dataclass(frozen=True)
class Menu:
    """N items, F formats, L dataset labels.

    items: sites of each. formats: names. kinds: of sites, K. kind: its number per item, (N,).
    nbytes: (N, F) int64, metadata included. bits: (N, F) int64, code bits alone. losses: raw
    predicted KL (N, F, L), infinite where a format is not allowed. numel: weights (N,). gone:
    experts that may go, an item in one at most. dropped: items of a block that is left out.
    """

    items: tuple[tuple[Site, ...], ...]
    formats: tuple[str, ...]
    kinds: tuple[str, ...]
    kind: np.ndarray
    nbytes: np.ndarray
    bits: np.ndarray
    losses: np.ndarray
    numel: np.ndarray
    gone: tuple[Gone, ...] = ()
    dropped: tuple[int, ...] = ()

    @cached_property
    def allowed(self) -> np.ndarray:
        """(N, F) bool."""
        return np.asarray(np.isfinite(self.losses).all(axis=2))

    def one_per_width(self) -> Menu:
        """With, of each item's allowed formats of equal code width, those of least bytes alone.

        Formats that no item is left with are gone; those that none was allowed stay.
        """
        losses = self.losses.copy()
        for i, allowed in enumerate(self.allowed):
            least: dict[int, int] = {}
            for f in np.nonzero(allowed)[0]:
                bits, size = int(self.bits[i, f]), int(self.nbytes[i, f])
                least[bits] = min(size, least.get(bits, size))
            for f in np.nonzero(allowed)[0]:
                if self.nbytes[i, f] > least[int(self.bits[i, f])]:
                    losses[i, f] = np.inf
        left = np.isfinite(losses).all(axis=2).any(axis=0) | ~self.allowed.any(axis=0)
        formats = tuple(name for name, kept in zip(self.formats, left, strict=True) if kept)
        return replace(
            self, formats=formats,
            nbytes=self.nbytes[:, left], bits=self.bits[:, left], losses=losses[:, left],
        )  # fmt: skip

    @property
    def usable(self) -> list[str]:
        """Formats that some item may have."""
        return [self.formats[f] for f in np.nonzero(self.allowed.any(axis=0))[0]]

    @cached_property
    def depth(self) -> np.ndarray:
        """Of every item, (N,): see `calibrate/predict.depths`."""
        return depths([item[0] for item in self.items])

    def least(self, cost: np.ndarray) -> int:
        """What the cheapest choices cost together. cost: (N, F)."""
        own = np.where(self.allowed, cost, np.iinfo(np.int64).max).min(axis=1)
        for gone in self.gone:
            items = list(gone.items)
            own[items] = np.minimum(own[items], cost[items, self.formats.index(FATE)])
        return int(own.sum())

    @cached_property
    def widths(self) -> np.ndarray:
        """Code bits per weight of every format, (F,); of dense those of the source's values."""
        total = self.numel.sum()
        return np.asarray(self.bits.sum(axis=0) / total)

    @cached_property
    def number(self) -> dict[str, int]:
        """Site name -> item."""
        return {site.name: i for i, item in enumerate(self.items) for site in item}

    def plan(self, choice: np.ndarray) -> dict[str, str]:
        """Site name -> format name of one choice per item."""
        names = self.names(choice)
        return {
            site.name: name for item, name in zip(self.items, names, strict=True) for site in item
        }

    def names(self, choice: np.ndarray) -> list[str]:
        """Format names of one choice per item."""
        return [self.names_of(i)[int(c)] for i, c in enumerate(choice)]

    def names_of(self, item: int) -> list[str]:
        """Format names of an item's choices."""
        fate = self._fates.get(item, FATE)
        return [fate if name == FATE else name for name in self.formats]

    @cached_property
    def _fates(self) -> dict[int, str]:
        whole = dict.fromkeys(self.dropped, FateFormat().name)
        return {**whole, **{i: gone.fate for gone in self.gone for i in gone.items}}

    def taken(self, choice: np.ndarray) -> list[Gone]:
        """Experts that go."""
        if not self.gone:
            return []
        away = np.array([name == FATE for name in self.formats])[choice]
        return [gone for gone in self.gone if away[gone.items[0]]]

    def choice(self, plan: Mapping[str, str]) -> np.ndarray:
        """The inverse of `plan`.

        Raises:
            RecipeError: an item whose sites differ, or a format that is not on the menu.
        """
        chosen = np.zeros(len(self.items), dtype=np.int64)
        for i, item in enumerate(self.items):
            names = {plan[site.name] for site in item}
            if len(names) > 1:
                raise RecipeError(
                    f"{item[0].name} and the {len(item) - 1} sites that go with it have "
                    f"different formats: {', '.join(sorted(names))}",
                    hint="give them one format, or plan for another target",
                )
            (name,) = names
            if name not in self.formats or not self.allowed[i, self.formats.index(name)]:
                raise RecipeError(
                    f"{item[0].name} cannot have the format {name}",
                    hint="formats on the menu: " + ", ".join(self.formats),
                )
            chosen[i] = self.formats.index(name)
        return chosen

    def average_bits(self, choice: np.ndarray) -> float:
        """Average code width over all items' weights."""
        return float(self.bits[np.arange(len(choice)), choice].sum() / self.numel.sum())

    @cached_property
    def experts(self) -> tuple[tuple[int, ...], ...]:
        """Items of each expert that can be dropped whole."""
        if DROP not in self.formats:
            return ()
        drop = self.formats.index(DROP)
        alone = [i for i, item in enumerate(self.items) if len(item) == 1]
        found = whole_experts([self.items[i][0] for i in alone])
        groups = [tuple(alone[i] for i in group) for group in found]
        return tuple(group for group in groups if self.allowed[list(group), drop].all())

    def bundles(self, weighted: np.ndarray, slope: np.ndarray) -> tuple[Bundle, ...]:
        """Experts that can be dropped whole. weighted: loss (N, F) in one unit. slope: of that unit
        by the items' raw losses, (N, L)."""
        drop = self.formats.index(DROP) if self.experts else 0
        found = {
            group: Bundle(
                group, (drop,) * len(group), WHOLE * float(weighted[list(group), drop].max())
            )
            for group in self.experts
        }
        fate = self.formats.index(FATE) if self.gone else 0
        for gone in self.gone:
            items = gone.items
            own = Bundle(items, (fate,) * len(items), float(slope[items[-1]] @ gone.loss))
            if items not in found or own.loss < found[items].loss:
                found[items] = own
        return tuple(found.values())


def build_menu(
    sites: Sequence[Site],
    formats: Sequence[str],
    losses: np.ndarray,
    target: Target,
    *,
    itemsize: int = 2,
    fixed: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    apart: int | None = None,
) -> Menu:
    """Items of `sites` for a target.

    losses: (S, F, L) of `formats`, which do not hold `dense`; it is added. itemsize: bytes of a
    source value. fixed: site name -> the one format it may have, by the recipe's rules, of
    `formats` or dense. extra: those of `formats` that no other site may have. apart: a block whose
    sites are in no item with others'.

    Raises:
        RecipeError: an item left without a format.
    """
    names = (*formats, "dense")
    parsed = [sized(parse_format(name), itemsize) for name in names]
    dense = np.zeros((len(sites), 1, losses.shape[2]))
    raw = np.concatenate([losses, dense], axis=1)
    nbytes, bits = _sizes(sites, parsed)
    reasons: dict[str, str] = {}
    for s, site in enumerate(sites):
        for f, fmt in enumerate(parsed):
            if reason := target.allows(site, fmt):
                raw[s, f] = np.inf
                reasons.setdefault(site.name, reason)
    place = {site.name: i for i, site in enumerate(sites)}
    ruled = fixed or {}
    free = [i for name, i in place.items() if name not in ruled]
    raw[np.ix_(free, [names.index(name) for name in extra])] = np.inf
    for name, wanted in ruled.items():
        raw[place[name], [f for f, other in enumerate(names) if other != wanted]] = np.inf
    groups = [part for group in target.together(sites) for part in _apart(group, apart)]
    rows = [[place[site.name] for site in group] for group in groups]
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    menu = Menu(
        items=tuple(tuple(group) for group in groups),
        formats=names,
        kinds=kinds,
        kind=np.array([kinds.index(group[0].kind) for group in groups]),
        nbytes=_summed(nbytes, rows),
        bits=_summed(bits, rows),
        losses=_summed(raw, rows),
        numel=np.array([sum(site.numel for site in group) for group in groups]),
    )
    empty = np.nonzero(~menu.allowed.any(axis=1))[0]
    if len(empty):
        name = menu.items[int(empty[0])][0].name
        raise RecipeError(
            f"no candidate format is left for {name}: {reasons.get(name, 'rules exclude all')}",
            hint=f"candidates: {', '.join(names)}; target: {target.name}",
        )
    return menu


def with_fates(menu: Menu, offers: Mapping[tuple[int, int], Offer], itemsize: int) -> Menu:
    """The menu on which experts may go. offers: by block and expert. itemsize: bytes of a value
    of a constant. An expert whose matrices are tied to others' stays."""
    alone = [i for i, item in enumerate(menu.items) if len(item) == 1]
    cheapest = np.where(menu.allowed, menu.nbytes, np.iinfo(np.int64).max).min(axis=1)
    nbytes = np.zeros(len(menu.items), dtype=np.int64)
    found = []
    for group in whole_experts([menu.items[i][0] for i in alone]):
        items = tuple(alone[i] for i in group)
        site = menu.items[items[-1]][0]
        offer = offers.get((site.layer, site.expert or 0))
        if offer is None:
            continue
        constant = offer.fate.kind == "constant"
        own = itemsize * min(site.shape[0], menu.items[items[0]][0].shape[1]) if constant else 0
        if own > cheapest[items[-1]]:
            continue
        nbytes[items[-1]] = own
        found.append(Gone(items, offer.fate.name, offer.loss))
    column = np.full((len(menu.items), 1, menu.losses.shape[2]), np.inf)
    return replace(
        menu, formats=(*menu.formats, FATE), gone=tuple(found),
        nbytes=np.concatenate([menu.nbytes, nbytes[:, None]], axis=1),
        bits=np.concatenate([menu.bits, np.zeros_like(menu.bits[:, :1])], axis=1),
        losses=np.concatenate([menu.losses, column], axis=1),
    )  # fmt: skip


def without_block(menu: Menu, block: int, loss: np.ndarray) -> Menu:
    """The menu of the model without a block, which was kept apart. loss: raw, (L,), counted at the
    last of its sites."""
    own = [i for i, item in enumerate(menu.items) if _inside(item[0], block)]
    if FATE not in menu.formats:
        menu = with_fates(menu, {}, 0)
    losses, column = menu.losses.copy(), menu.formats.index(FATE)
    losses[own] = np.inf
    losses[own, column] = 0.0
    losses[own[-1], column] = loss
    return replace(menu, losses=losses, dropped=tuple(own))


def _apart(group: Sequence[Site], block: int | None) -> list[list[Site]]:
    """Those in the block and those outside, where there are any."""
    if block is None:
        return [list(group)]
    parts = [[s for s in group if _inside(s, block) == inside] for inside in (False, True)]
    return [part for part in parts if part]


def _inside(site: Site, block: int) -> bool:
    return site.layer == block and site.kind not in ENDS


def check_suited(sites: Sequence[Site], formats: Sequence[str], target: Target) -> None:
    """Refuse candidates of which the target takes none, at any site: all would stay dense.

    Raises:
        RecipeError: it takes none.
    """
    if not sites or not formats or any(_takes(target, sites, name) for name in formats):
        return
    own = [name for name in target.formats if _takes(target, sites, name)]
    reason = target.allows(sites[0], parse_format(formats[0]))
    raise RecipeError(
        f"{target.name} takes none of the candidates {', '.join(formats)}: {reason}",
        hint=(
            "bitnest analyze MODEL "
            + " ".join(f"--format {name}" for name in own)
            + " -o DIR measures those that it takes, then --statistics DIR"
            if own
            else "plan for another --target"
        ),
    )


def _takes(target: Target, sites: Sequence[Site], name: str) -> bool:
    fmt = parse_format(name)
    return any(not target.allows(site, fmt) for site in sites)


def _sizes(sites: Sequence[Site], formats: Sequence[AnyFormat]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and code bits, (S, F) each; equal shapes are computed once."""
    known: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for site in sites:
        if site.shape not in known:
            known[site.shape] = (
                [fmt.nbytes(site.shape) for fmt in formats],
                [code_bits(fmt, site.shape) for fmt in formats],
            )
    nbytes = np.array([known[site.shape][0] for site in sites], dtype=np.int64)
    bits = np.array([known[site.shape][1] for site in sites], dtype=np.int64)
    return nbytes, bits


def _summed(values: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    if all(len(group) == 1 for group in rows):
        return values[[group[0] for group in rows]]
    return np.stack([values[list(group)].sum(axis=0) for group in rows])
