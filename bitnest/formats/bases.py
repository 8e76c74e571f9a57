"""Bases that weights are stored in, and inputs rounded in (`kernels/basis`), as names.

A format's transforms in their order, innermost first: "" for none, `@had`, `@had64@perm`. A basis
is known before any weight is solved if it is made of data-free rotations and of an order by the
energy of channels that nothing has mixed or scaled before: @awq is not, nor @perm@had.
"""

from __future__ import annotations

from bitnest.formats.names import parse_format
from bitnest.formats.wrappers import AnyFormat, LowRankFormat, TransformedFormat

CARRIER = "int8-channel"  # any format that has no transform of its own


def basis_of(fmt: AnyFormat) -> str:
    """The basis that weights of that format are stored in."""
    if isinstance(fmt, LowRankFormat):
        return basis_of(fmt.base)
    if not isinstance(fmt, TransformedFormat):
        return ""
    return f"{basis_of(fmt.base)}@{fmt.kind}{fmt.block or ''}"


def basis_format(basis: str) -> AnyFormat:
    """A format with that basis."""
    return parse_format(CARRIER + basis)


def known_before(basis: str) -> bool:
    """Whether the energies of what is read are enough to be in that basis."""
    kinds = [kind.rstrip("0123456789") for kind in basis.split("@")[1:]]
    return "awq" not in kinds and ("perm" not in kinds or kinds[-1] == "perm")
