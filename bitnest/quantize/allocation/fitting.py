"""fitting: at which width each weight of a nested artifact is read, so that all fit a size.

The size is that of the weights as they are stored: packed planes up to the chosen widths with
their tables and scales, and every dense tensor. It is what is read from disk and held in memory;
the key-value cache and what a forward pass needs come on top.

No text and no model is needed: the manifest has the error of every site at every width, and what a
unit of error costs (`calibrate/slopes`). An artifact made without statistics lacks the latter;
then errors count by the share of tokens that meet them, and no KL is predicted [ours].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bitnest.artifact import Artifact
from bitnest.calibrate.predict import Fit, depths
from bitnest.calibrate.slopes import read_fit
from bitnest.errors import ArtifactError, RecipeError
from bitnest.formats import AnyFormat, cut, parse_format, widths
from bitnest.manifest import SiteRecord
from bitnest.packed.widths import loaded_formats
from bitnest.planes import plane_width
from bitnest.quantize.allocation.menu import Menu
from bitnest.quantize.allocation.objective import Background, with_weights
from bitnest.safetensors_io import read_header

SETTLED = 1e-4  # see `Objective.minimise`: somebody waits
TEXT = "predicted"  # label of the one loss that stands for all, where nothing was measured


@dataclass(frozen=True)
class Fitted:
    """widths: of every nested site. nbytes: of all weights at these widths. kl: predicted, by text,
    nats per token; None without statistics. low, high: one standard error of the logarithm of their
    mean less and more. bits: average code width of the nested weights."""

    widths: Mapping[str, int]
    nbytes: int
    bits: float
    kl: Mapping[str, float] | None = None
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean of `kl` over texts."""
        return None if self.kl is None else sum(self.kl.values()) / len(self.kl)

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the widths how many sites have each."""
        counts: dict[int, int] = {}
        for width in self.widths.values():
            counts[width] = counts.get(width, 0) + 1
        return {
            "bytes": self.nbytes, "bits": round(self.bits, 4), "kl": self.kl, "kl_mean": self.mean,
            "kl_low": self.low, "kl_high": self.high,
            "sites_by_width": {str(w): counts[w] for w in sorted(counts)},
        }  # fmt: skip


class Fitting:
    """What the widths of one artifact cost and lose; `fit` chooses. Planes that are not there are
    not chosen.

    Raises:
        RecipeError: nothing in the artifact is nested. ArtifactError: a damaged manifest.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        packed = artifact.packed()
        parsed = {name: parse_format(name) for name in {r.format for r in packed}}
        formats = {r.site.name: parsed[r.format] for r in packed}
        nested = [r for r in packed if widths(formats[r.site.name])]
        if not nested:
            loaded_formats(artifact, 1)  # says so
        others = [r for r in packed if not widths(formats[r.site.name])]
        self.steps = tuple(sorted({w for fmt in parsed.values() for w in widths(fmt)}))
        self.resident = dense_bytes(artifact) + sum(record.nbytes for record in others)
        known = artifact.manifest.get("sensitivity")
        self.known = known is not None
        kinds = tuple(dict.fromkeys(r.site.kind for r in nested))
        try:
            self.texts = tuple(known["texts"]) if known is not None else (TEXT,)
            fit = read_fit(known) if known is not None else Fit(kinds, (1.0,) * len(kinds), 0, 0, 0)
            self.menu = self._menu(nested, formats, kinds)
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                "the manifest does not say what widths cost",
                where=str(artifact.path),
                hint="copy the artifact again, or compress again",
            ) from error
        lost = [r for r in others if r.error > 0]
        places = {r.site.name: i for i, r in enumerate([*nested, *others])}
        depth = depths([r.site for r in [*nested, *others]])
        background = Background(
            np.array([self._slopes(r) for r in lost]).reshape(len(lost), len(self.texts))
            * np.array([r.error for r in lost])[:, None],
            tuple(r.site.kind for r in lost),
            depth[[places[r.site.name] for r in lost]],
        )
        self.error = fit.error if fit.probes else None
        self.objective = with_weights(self.menu, fit, None, background)

    @property
    def smallest(self) -> int:
        """Bytes at the narrowest widths."""
        return self.resident + self.menu.least(self.menu.nbytes)

    @property
    def largest(self) -> int:
        """Bytes at the widest widths that are there."""
        return self.resident + int(np.where(self.menu.allowed, self.menu.nbytes, 0).max(1).sum())

    def fit(self, size: int) -> Fitted:
        """Widths of least predicted KL within `size` bytes.

        Raises:
            RecipeError: too small for the narrowest widths.
        """
        if size < self.smallest:
            raise RecipeError(
                f"at the narrowest widths the weights take {self.smallest:,} bytes, "
                f"{size:,} are asked for",
                where=str(self.artifact.path),
                hint=f"--size {self.smallest} or more",
            )
        menu = self.menu
        budget = size - self.resident
        solution = self.objective.minimise(menu.nbytes, budget, settled=SETTLED)
        rows = np.arange(len(menu.items))
        chosen = {
            item[0].name: self.steps[c]
            for item, c in zip(menu.items, solution.choice.tolist(), strict=True)
        }
        nbytes = self.resident + int(menu.nbytes[rows, solution.choice].sum())
        bits = float(menu.bits[rows, solution.choice].sum() / menu.numel.sum())
        if not self.known:
            return Fitted(chosen, nbytes, bits)
        kl = self.objective.kl(solution.choice).tolist()
        mean, error = sum(kl) / len(kl), self.error
        return Fitted(
            chosen, nbytes, bits, dict(zip(self.texts, kl, strict=True)),
            None if error is None else mean * math.exp(-error),
            None if error is None else mean * math.exp(error),
        )  # fmt: skip

    def _menu(
        self,
        records: Sequence[SiteRecord],
        formats: Mapping[str, AnyFormat],
        kinds: tuple[str, ...],
    ) -> Menu:
        count, steps = len(records), self.steps
        nbytes = np.zeros((count, len(steps)), dtype=np.int64)
        bits = np.zeros_like(nbytes)
        losses = np.full((count, len(steps), len(self.texts)), np.inf)
        numel = np.array([r.site.numel for r in records])
        slopes = np.array([self._slopes(r) for r in records]).reshape(count, len(self.texts))
        alike: dict[tuple[str, tuple[int, int], str], list[int]] = {}
        for i, record in enumerate(records):
            alike.setdefault((record.format, record.site.shape, record.file), []).append(i)
        for (_, shape, _), rows in alike.items():
            fmt = formats[records[rows[0]].site.name]
            own = widths(fmt)
            errors = np.array([records[i].errors for i in rows]).reshape(len(rows), len(own))
            missing = self._missing(records[rows[0]], own)
            for k, width in enumerate(w for w in own if w < missing):
                step = steps.index(width)
                nbytes[rows, step] = cut(fmt, width).nbytes(shape)
                bits[rows, step] = width * numel[rows]
                losses[rows, step] = slopes[rows] * errors[:, k, None]
        return Menu(
            items=tuple((r.site,) for r in records),
            formats=tuple(map(str, steps)),
            kinds=kinds,
            kind=np.array([kinds.index(r.site.kind) for r in records]),
            nbytes=nbytes,
            bits=bits,
            losses=losses,
            numel=numel,
        )

    def _missing(self, record: SiteRecord, own: Sequence[int]) -> int:
        """The narrowest width whose planes are not there; those of the first are in the file of
        packed weights, which is."""
        gone = [plane_width(f) or 0 for f in self._absent.get(record.file, ())]
        return min([w for w in own[1:] if w in gone], default=own[-1] + 1)

    @cached_property
    def _absent(self) -> dict[str, list[str]]:
        """Files of planes that are not there, by the packed file they belong to."""
        found: dict[str, list[str]] = {}
        for name in self.artifact.absent:
            base = name.replace(f".w{plane_width(name)}.", ".")
            found.setdefault(base, []).append(name)
        return found

    def _slopes(self, record: SiteRecord) -> tuple[float, ...]:
        """What a unit of its error costs, by text."""
        if self.known:
            return record.sensitivity or (0.0,) * len(self.texts)
        if record.tokens is None:
            return (1.0,)
        return ((record.tokens + 1) / (self._most + 1),)

    @cached_property
    def _most(self) -> int:
        """Tokens that the busiest site saw."""
        return max((r.tokens or 0 for r in self.artifact.packed()), default=0)


def dense_bytes(artifact: Artifact) -> int:
    """Of all tensors that are not packed."""
    shards = [
        n
        for n in artifact.manifest["files"]
        if n.startswith("model-") and n.endswith(".safetensors")
    ]
    return sum(
        info.nbytes for name in shards for info in read_header(artifact.path / name).values()
    )


def fit_widths(artifact: Artifact, size: int) -> Fitted:
    """Widths of least predicted KL at which all weights take at most `size` bytes.

    Raises:
        RecipeError: nothing is nested, or the size is too small for the narrowest widths.
    """
    return Fitting(artifact).fit(size)
