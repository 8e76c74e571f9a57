"""select: which formats and which sites a study looks at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bitnest.errors import FormatError, RecipeError
from bitnest.formats import (
    BlockFormat,
    DenseFormat,
    PackedFormat,
    TransformedFormat,
    parse_format,
)
from bitnest.formats.catalogue import UNIFORM
from bitnest.formats.elements import FloatElement, IntElement
from bitnest.patterns import matcher
from bitnest.quantize.solve import needs_statistics
from bitnest.sites import ENDS, UNNAMED_DENSE, Site

GOLDEN = (5**0.5 - 1) / 2
TOKEN_SCALES = frozenset({"half", "e8m0", "m1", "e4m3"})  # that a token needs no other's for


def parse_formats(names: Sequence[str], *, data: bool) -> list[PackedFormat]:
    """The formats spelt `names`, each once; the catalogue's uniform ones if there are none.

    data: whether there will be inputs to fit to.

    Raises:
        FormatError, RecipeError: no such format, or one that needs inputs.
    """
    found: dict[str, PackedFormat] = {}
    for name in names or UNIFORM:
        fmt = parse_format(name)
        if isinstance(fmt, DenseFormat):
            raise FormatError("dense weights have no error to compare", hint="leave it out")
        if not data and needs_statistics(fmt):
            raise RecipeError(
                f"'{fmt.name}' is fitted to inputs, and --no-data has none",
                hint="leave out --no-data, or this format",
            )
        found[fmt.name] = fmt
    return list(found.values())


def on_the_fly(fmt: PackedFormat) -> bool:
    """Whether what a site reads can be rounded to it as it comes: integers or floats with scales
    of one token's channels, as they are or rotated."""
    if isinstance(fmt, TransformedFormat):
        return fmt.kind in {"had", "rhad"} and on_the_fly(fmt.base)
    if not isinstance(fmt, BlockFormat) or fmt.rows != 1 or fmt.scale not in TOKEN_SCALES:
        return False
    return isinstance(fmt.element, IntElement | FloatElement)


def choose_sites(sites: Sequence[Site], pattern: str | None, per_kind: int) -> list[Site]:
    """At most `per_kind` sites of each kind, one of each projection at least, in the model's order.

    pattern: as in a recipe's rules; without one routers stay out; the ends always do. A kind's
    projections (q, k, up, down ...) are sampled alike; see `_spread`.

    Raises:
        RecipeError: no site matches.
    """
    if per_kind < 1:
        raise RecipeError(f"{per_kind} sites of a kind are nothing to measure")
    roles: dict[tuple[str, str], list[Site]] = {}
    for site in matching(sites, pattern):
        roles.setdefault((site.kind, site.name.rpartition(".")[2]), []).append(site)
    totals: Counter[str] = Counter()
    for (kind, _), own in roles.items():
        totals[kind] += len(own)
    chosen: set[str] = set()
    for (kind, _), own in roles.items():
        share = len(own) * min(per_kind, totals[kind]) // totals[kind]
        chosen.update(site.name for site in _spread(own, max(1, share)))
    return [site for site in sites if site.name in chosen]


def matching(sites: Sequence[Site], pattern: str | None) -> list[Site]:
    """The sites `choose_sites` chooses from.

    Raises:
        RecipeError: none.
    """
    if pattern is None:
        found = [site for site in sites if site.kind not in UNNAMED_DENSE]
    else:
        matches = matcher(pattern)
        found = [site for site in sites if site.kind not in ENDS and matches(site)]
    if not found:
        raise RecipeError(
            f"no site matches '{pattern or '*'}'",
            hint="bitnest inspect MODEL lists every site by name",
        )
    return found


def _spread(sites: list[Site], count: int) -> list[Site]:
    """`count` sites, layers at even steps; within them experts by the golden ratio, so that no
    step of one falls in with the number of the other."""
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    order = [layer for layer in sorted(layers) for _ in layers[layer]]
    taken: dict[str, Site] = {}
    for i in range(count):
        members = layers[order[int((i + 0.5) * len(sites) / count)]]
        place = int(len(members) * (i * GOLDEN % 1))
        while members[place % len(members)].name in taken:
            place += 1
        site = members[place % len(members)]
        taken[site.name] = site
    return list(taken.values())
