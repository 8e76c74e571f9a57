"""Widths at which nested weights are loaded, and changing them in place.

transformers' loader has no argument for a width, so `load_model` says it here for the time of one
call (`at_widths`), and the quantizer asks (`loaded_formats`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import ArtifactError, FormatError, RecipeError
from bitnest.formats import AnyFormat, cut, parse_format, widths
from bitnest.manifest import SiteRecord
from bitnest.packed.modules import PackedWeight
from bitnest.patterns import Names
from bitnest.planes import plane_width

Widths = int | Mapping[str, int]  # of all sites, or by site name or pattern

_wanted: ContextVar[Widths | None] = ContextVar("bitnest_widths", default=None)


@contextmanager
def at_widths(bits: Widths | None) -> Iterator[None]:
    """Artifacts that are loaded meanwhile are read at `bits`; None: whole."""
    token = _wanted.set(bits)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted_widths() -> Widths | None:
    """What `at_widths` said."""
    return _wanted.get()


def nested_widths(artifact: Artifact) -> tuple[int, ...]:
    """At which any of its sites can be read from the files that are there, ascending; none if
    nothing is nested."""
    formats = {record.format for record in artifact.packed()}
    gone = min((plane_width(name) or 9 for name in artifact.absent), default=9)
    return tuple(sorted({w for f in formats for w in widths(parse_format(f)) if w < gone}))


def loaded_formats(artifact: Artifact, bits: Widths | None) -> dict[str, AnyFormat]:
    """Format of every packed site as it is to be read; nested ones cut at `bits`. One width for all
    leaves sites that begin beyond it at their narrowest, where others begin earlier.

    Raises:
        RecipeError: nothing in the artifact is nested, a site that is not, or no number of bits.
        FormatError: narrower than a site's narrowest width, or with one width for all, than that of
            every site, or wider than that of any.
    """
    parsed = {name: parse_format(name) for name in {r.format for r in artifact.packed()}}
    formats = {r.site.name: parsed[r.format] for r in artifact.packed()}
    if bits is None:
        return formats
    check_bits(bits)
    nested = {name for name, fmt in formats.items() if widths(fmt)}
    if not nested:
        raise RecipeError(
            "nothing in this artifact is nested: it has one width",
            where=str(artifact.path),
            hint="leave out --bits, or compress with --nested 2-8",
        )
    if not isinstance(bits, int):
        for name, width in by_site(artifact, nested, bits).items():
            formats[name] = cut(formats[name], width)
        return formats
    own = {name: widths(formats[name]) for name in nested}
    first, last = min(w[0] for w in own.values()), max(w[-1] for w in own.values())
    if not first <= bits <= last:
        raise FormatError(
            f"this artifact is nested from {first} to {last} bits, not at {bits}",
            where=str(artifact.path),
            hint=f"--bits {first if bits < first else last}",
        )
    for name in nested:
        formats[name] = cut(formats[name], max(bits, own[name][0]))
    return formats


def check_bits(bits: Any) -> None:
    """Refuse what is no width, and no mapping to widths.

    Raises:
        RecipeError: it is not.
    """
    for width in bits.values() if isinstance(bits, Mapping) else [bits]:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 8:
            raise RecipeError(
                f"{width!r} is no width", hint="a whole number of bits, 1 to 8, for all or by site"
            )


def by_site(
    artifact: Artifact, nested: Collection[str], bits: Mapping[str, int]
) -> Mapping[str, int]:
    """Widths by site of widths by site or pattern; a later pattern wins.

    Raises:
        RecipeError: one that is and matches no nested site.
    """
    if set(nested) >= bits.keys():
        return bits
    names = Names([record.site for record in artifact.records])
    found: dict[str, int] = {}
    for pattern, width in bits.items():
        hits = [name for name in names.matching(pattern) if name in nested]
        if not hits:
            raise RecipeError(
                f"'{pattern}' is no nested site of this artifact",
                where=str(artifact.path),
                hint="bitnest inspect lists the sites; patterns are those of --rule",
            )
        found.update(dict.fromkeys(hits, width))
    return found


@dataclass
class Source:
    """Where a loaded model's packed weights came from, so that more of them can be read."""

    artifact: Artifact
    weights: list[tuple[SiteRecord, PackedWeight]]

    def set_bits(self, bits: Widths | None) -> int:
        """Read the planes that are missing for `bits`, let go of those beyond; None: all planes.
        Sites that widths by site do not name stay as they are.

        Nothing changes if a file is missing. Gives the bytes that were read.

        Raises:
            RecipeError, FormatError: see `loaded_formats`.
            ArtifactError: planes that are not there, or not whole.
        """
        formats = loaded_formats(self.artifact, bits)
        if isinstance(bits, Mapping):
            nested = [r.site.name for r in self.artifact.packed() if widths(parse_format(r.format))]
            named = by_site(self.artifact, nested, bits)
            kept = {r.site.name: w.fmt for r, w in self.weights if r.site.name not in named}
            formats = {**formats, **kept}
        headers = self.artifact.headers(formats)
        changes: list[tuple[PackedWeight, AnyFormat, dict[str, Any]]] = []
        read = 0
        for record, weight in self.weights:
            fmt = formats[record.site.name]
            if fmt.name == weight.fmt.name:
                continue
            held = weight.parts
            parts = fmt.parts(record.site.shape)
            own = {f"{record.site.name}.{p}" for p in parts if p not in held}
            missing = {name: info for name, info in headers.items() if name in own}
            fresh = site_tensors(record, missing, only=set(parts) - set(held), fmt=fmt)
            read += sum(tensor.nbytes for tensor in fresh.values())
            changes.append((weight, fmt, fresh))
        for weight, fmt, fresh in changes:
            weight.change(fmt, fresh)
        return read


def attach(model: nn.Module, source: Source) -> None:
    """Give a loaded model `set_bits`."""
    held: Any = model
    held.bitnest_source = source
    held.set_bits = source.set_bits


def set_bits(model: nn.Module, bits: Widths | None) -> int:
    """Raise or lower a loaded model's nested weights in place; see `Source.set_bits`.

    Raises:
        ArtifactError: the model was not loaded from an artifact, and what `Source.set_bits` raises.
    """
    source: Any = getattr(model, "bitnest_source", None)
    if source is None:
        raise ArtifactError(
            "this model was not loaded from an artifact",
            hint="bitnest.load(ARTIFACT, bits=3)",
        )
    return int(source.set_bits(bits))
