"""nesting: base and top width of every weight, under one budget for disk and one for memory [ours].

A nested weight is stored up to its top width and can be read at any of its widths from its base
on. Its top is what the artifact's budget pays for (disk); its base is what is loaded when memory
is least. What lies below the base would be planes, tables and compromises for widths nobody loads.
So

    base   the plan of least predicted KL whose weights fit `base_size` bytes, each at one width;
           without such a size the narrowest width everywhere
    top    the plan of least predicted KL within the artifact's budget, each weight nested from
           its base to its top: nest<base ... top>

Both are plans over a menu as any other (`planner`); the second's formats begin at the first's
widths. A nested weight at width w counts as integers of w bits did when they were measured
(`Predictor.column`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitnest.errors import RecipeError
from bitnest.formats import AnyFormat, widths
from bitnest.formats.names import nested_name, parse_widths
from bitnest.sites import Site
from bitnest.targets import Target


@dataclass(frozen=True)
class Nesting:
    """widths: at which weights may be read, ascending. group: input channels per scale, None for
    the default. base_size: bytes that all weights take at their narrowest; None: no bound, every
    base is the narrowest width.

    Raises:
        RecipeError: a base size that is none.
    """

    widths: tuple[int, ...]
    group: int | None = None
    base_size: int | None = None

    def __post_init__(self) -> None:
        if self.base_size is not None and self.base_size < 1:
            raise RecipeError(
                f"a base size of {self.base_size} bytes", hint="for example --base-size 2GiB"
            )

    @classmethod
    def parse(cls, text: str, group: int | None = None, base_size: int | None = None) -> Nesting:
        """From `2-8` or `2,3,4,6,8`.

        Raises:
            FormatError: no widths. RecipeError: see the class.
        """
        return cls(parse_widths(text), group, base_size)

    def to_json(self) -> dict[str, Any]:
        """As the command line spells it."""
        found: dict[str, Any] = {"nested": ",".join(map(str, self.widths))}
        return found if self.base_size is None else {**found, "base_size": self.base_size}

    def format(self, base: int, top: int) -> str:
        """The format with all widths from base to top."""
        return nested_name(",".join(str(w) for w in self.widths if base <= w <= top), self.group)

    @property
    def uniform(self) -> str:
        """The format with every width."""
        return self.format(self.widths[0], self.widths[-1])

    @property
    def single(self) -> tuple[str, ...]:
        """Formats of one width each."""
        return tuple(self.format(w, w) for w in self.widths)

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format from some base to some top, the narrowest top first."""
        return tuple(
            self.format(base, top) for top in self.widths for base in self.widths if base <= top
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """Candidates that statistics need for it."""
        return tuple(f"int{w}-g{self.group or 128}" for w in self.widths)

    def target(
        self, goal: Target, ruled: Mapping[str, str], base: Mapping[str, int] | None
    ) -> Target:
        """The target, with formats kept to those that begin at a site's base; None: to those of one
        width. ruled: sites whose format a rule says, which are let through."""

        def allows(site: Site, fmt: AnyFormat) -> str:
            if site.name in ruled:
                return goal.allows(site, fmt)
            own = widths(fmt)
            if not own:
                return "weights are nested here"
            if base is None and len(own) > 1:
                return "a base has one width"
            if base is not None and own[0] != base[site.name]:
                return f"its base has {base[site.name]} bits"
            return goal.allows(site, fmt)

        return replace(goal, allows=allows)
