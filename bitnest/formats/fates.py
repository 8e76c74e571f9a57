"""Fates of whole experts, spelt as formats: the expert is gone, and something stands in for it.

drop        it and its row of the router are gone; tokens choose among the others
constant    its row stays and gives its mean output (MoE++, Jin et al. 2024)
copy        its row stays and gives the layer's input (MoE++)
merge<k>    its row stays and leads to expert k, which becomes the mean of both, weighted by how
            often each is chosen. As a candidate it is `merge`: who the best partner is, is measured

No codes and no bytes: what is left is a smaller model (`reduction`), whose constants are tensors
like others. A fate is of all matrices of an expert together. Dropping all matrices of a block, its
router's aside, leaves the block out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.zero import ZeroFormat

FATES = ("drop", "constant", "copy", "merge")
_SPELLING = re.compile(r"(drop|constant|copy|merge)(0|[1-9][0-9]{0,4})?")


@dataclass(frozen=True)
class FateFormat(ZeroFormat):
    """See above. kind: of FATES. partner: expert that `merge` leads to, None where any may."""

    kind: str = "drop"
    partner: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """As `parse_fate` reads it."""
        return self.kind if self.partner is None else f"{self.kind}{self.partner}"


def parse_fate(name: str) -> FateFormat | None:
    """The fate spelt `name`, None if it is none.

    Raises:
        FormatError: a partner for what has none.
    """
    match = _SPELLING.fullmatch(name)
    if match is None:
        return None
    if match[2] is not None and match[1] != "merge":
        raise FormatError(f"'{match[1]}' takes no number, not '{name}'", hint=match[1])
    return FateFormat(match[1], None if match[2] is None else int(match[2]))


def fates_apart(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of `names` that are no fates, and kinds of fates among them, each once.

    Raises:
        FormatError: see `parse_fate`.
    """
    fates = {name: parse_fate(name) for name in names}
    kinds = dict.fromkeys(fate.kind for fate in fates.values() if fate is not None)
    return tuple(name for name in names if fates[name] is None), tuple(kinds)
