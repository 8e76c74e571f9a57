"""Whether plain integers would do better than a sparse format, measured while compressing.

Of the first block that has sparse matrices a few are solved a second time, in the widest integers
that take no more bytes, against the same H, on some of their rows: GPTQ's rows do not depend on
each other, so the errors of these rows are what they would be. What is said is a ratio of measured
errors; nothing is said where sparsity wins, and nothing of this is in the artifact.

Left out: embedding and head; formats with a low-rank residual, whose rows do depend on each other;
blocks that were finished by an earlier run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bitnest.formats import (
    AnyFormat,
    BlockSparseFormat,
    DenseFormat,
    LowRankFormat,
    PackedFormat,
    SparseFormat,
    ZeroFormat,
    core_format,
    parse_format,
)
from bitnest.quantize.solve import Options, solve
from bitnest.sites import Site

MATRICES = 6  # measured of one format
ROWS = 256  # of each, evenly spread
CLEAR = 1.05  # times less error, from which it is worth saying
WIDTHS = range(8, 0, -1)


@dataclass(frozen=True)
class Advice:
    """A format that beats the one asked for.

    error, other_error: relative output error, mean of `matrices` of block `layer`. nbytes,
    other_nbytes: of all sites that have the format.
    """

    asked: str
    other: str
    error: float
    other_error: float
    nbytes: int
    other_nbytes: int
    matrices: int
    layer: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    @property
    def text(self) -> str:
        """One sentence for a person."""
        times = self.error / max(self.other_error, 1e-12)
        return (
            f"{self.other} takes {self.other_nbytes / 1e6:.3g} MB where {self.asked} takes "
            f"{self.nbytes / 1e6:.3g}, and has {times:.2g} times less error (mean of "
            f"{self.matrices} matrices of block {self.layer}): --format {self.other}"
        )


def sparse(fmt: AnyFormat) -> bool:
    """Whether weights are dropped, and others kept."""
    if isinstance(fmt, DenseFormat | ZeroFormat):
        return False
    return isinstance(core_format(fmt), SparseFormat | BlockSparseFormat)


def plain_formats(fmt: PackedFormat) -> list[PackedFormat]:
    """Integers in place of the sparse codes, widest first, in the same groups and wrappers."""
    core = core_format(fmt)  # type: ignore[arg-type]
    assert isinstance(core, SparseFormat | BlockSparseFormat)
    group = None if isinstance(core.base, DenseFormat) else core.base.group
    wrappers = fmt.name.removeprefix(core.name)
    found = [parse_format(f"int{width}-g{group or 128}{wrappers}") for width in WIDTHS]
    return [other for other in found if not isinstance(other, DenseFormat)]


@dataclass
class _Case:
    """One sparse format. errors: (asked, other) of every matrix measured."""

    fmt: PackedFormat
    other: PackedFormat
    layer: int
    nbytes: tuple[int, int]
    wanted: set[str]
    errors: list[tuple[float, float]] = field(default_factory=list)


class Witness:
    """Measures as sites are solved.

    sites, formats: of the whole model.
    """

    def __init__(
        self, sites: Sequence[Site], formats: Mapping[str, AnyFormat], options: Options
    ) -> None:
        self.options = options
        self.cases: dict[str, _Case] = {}
        by_format: dict[str, list[Site]] = {}
        for site in sites:
            if site.kind not in {"embedding", "head"} and sparse(formats[site.name]):
                by_format.setdefault(formats[site.name].name, []).append(site)
        for name, own in by_format.items():
            fmt = formats[own[0].name]
            assert not isinstance(fmt, DenseFormat)
            case = None if isinstance(fmt, LowRankFormat) else _case(fmt, own)
            if case is not None:
                self.cases[name] = case

    @property
    def layer(self) -> int:
        """After which everything is measured; -1: there is nothing to measure."""
        return max((case.layer for case in self.cases.values()), default=-1)

    def see(
        self,
        site: Site,
        fmt: PackedFormat,
        weight: torch.Tensor,
        hessian: torch.Tensor | None,
        error: torch.Tensor,
        energy: torch.Tensor,
    ) -> None:
        """A matrix (O, I) was solved; error, energy: of its rows, (O,). hessian: (I, I) or None."""
        case = self.cases.get(fmt.name)
        if case is None or site.name not in case.wanted:
            return
        case.wanted.discard(site.name)
        rows = torch.linspace(0, len(weight) - 1, min(len(weight), ROWS)).long()
        rows = rows.to(weight.device)
        base = float(energy[rows].double().sum())
        if base <= 0:
            return
        h = None if hessian is None else hessian[None]
        other = solve(weight[rows][None], h, case.other, self.options).error[0]
        errors = (float(part.double().sum()) / base for part in (error[rows], other))
        case.errors.append((next(errors), next(errors)))

    def found(self) -> list[Advice]:
        """What is worth saying."""
        said = []
        for name, case in self.cases.items():
            if not case.errors:
                continue
            own, other = (sum(pair[k] for pair in case.errors) / len(case.errors) for k in (0, 1))
            if own > CLEAR * other:
                counted = (len(case.errors), case.layer)
                said.append(Advice(name, case.other.name, own, other, *case.nbytes, *counted))
        return said


def _case(fmt: PackedFormat, sites: Sequence[Site]) -> _Case | None:
    """The widest integers that take no more bytes, and the matrices to measure: of the first block,
    one of each projection in turn. None where no integers are as small."""
    own = sum(fmt.nbytes(site.shape) for site in sites)
    for other in plain_formats(fmt):
        total = sum(other.nbytes(site.shape) for site in sites)
        if total <= own:
            layer = min(site.layer for site in sites)
            turns: dict[str, list[str]] = {}
            for site in sites:
                if site.layer == layer:
                    kind = site.param if site.expert is not None else site.module
                    turns.setdefault(kind, []).append(site.name)
            longest = max(map(len, turns.values()))
            order = [t[i] for i in range(longest) for t in turns.values() if i < len(t)]
            return _Case(fmt, other, layer, (own, total), set(order[:MATRICES]))
    return None
