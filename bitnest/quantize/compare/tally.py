"""tally: sums over the matrices of a kind, and the means they end as.

Relative noise |M - M_hat|^2 / |M|^2 and H errors are means over matrices weighted by their number
of values, matrices of zeros left out; QSNR is the mean noise in dB. For inputs a matrix holds the
sampled tokens of one of them, (tokens, channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitnest.formats import PackedFormat
from bitnest.formats.catalogue import base_family
from bitnest.quantize.compare.crest import BLOCKS, CrestTally, verdicts
from bitnest.quantize.compare.scores import Crest, FormatScore, InputReport, InputScore, KindReport


@dataclass
class Sums:
    """One format's: noise, H errors with and without GPTQ all times values."""

    nbytes: int = 0
    noise: float = 0.0
    loss: float = 0.0
    gptq_loss: float = 0.0
    gptq_worse: int = 0


class Tally:
    """Matrices of one sort in every format. numel: their values. sounding: of those not all 0."""

    def __init__(self, formats: Sequence[PackedFormat]) -> None:
        self.formats = tuple(formats)
        self.sums = {fmt.name: Sums() for fmt in formats}
        self.matrices = self.numel = self.sounding = 0
        self._crests = [CrestTally(b, r) for b in BLOCKS for r in (False, True)]

    def look(self, matrix: torch.Tensor) -> float:
        """Count one matrix (O, I) and its crest factors; gives |M|^2."""
        for crest in self._crests:
            crest.add(matrix)
        energy = float(matrix.square().sum(dtype=torch.float64))
        self.matrices += 1
        self.numel += matrix.numel()
        self.sounding += matrix.numel() if energy > 0 else 0
        return energy

    def rounded(self, fmt: PackedFormat, miss: torch.Tensor, energy: float, nbytes: int) -> Sums:
        """Add what one format missed of a matrix looked at, and what it would store."""
        own = self.sums[fmt.name]
        own.nbytes += nbytes
        if energy > 0:
            own.noise += miss.numel() * float(miss.square().sum(dtype=torch.float64)) / energy
        return own

    def bits(self, fmt: PackedFormat) -> float:
        """Bits per value."""
        return 8 * self.sums[fmt.name].nbytes / self.numel

    def qsnr(self, fmt: PackedFormat) -> float | None:
        """dB; None if nothing was lost."""
        noise = self.sums[fmt.name].noise / self.sounding if self.sounding else 0.0
        return -10 * math.log10(noise) if noise > 0 else None

    def crests(self) -> tuple[Crest, ...]:
        """Statistics of the crest factors, none of no block."""
        return tuple(found for tally in self._crests if (found := tally.result()) is not None)


class InputTally(Tally):
    """What the sites of one kind read. tokens: sampled."""

    tokens = 0

    def report(self) -> InputReport:
        """Means of the sums."""
        scores = tuple(
            InputScore(fmt.name, base_family(fmt), self.bits(fmt), self.qsnr(fmt))
            for fmt in self.formats
        )
        crests = self.crests()
        figures = {score.format: (score.qsnr, None) for score in scores}
        return InputReport(
            self.matrices, self.tokens, scores, crests, tuple(verdicts(figures, crests))
        )


class SiteTally(Tally):
    """The sites of one kind.

    heard: weights of those with input and output. starved, silent: see `KindReport`. inputs: what
    they read.
    """

    def __init__(self, formats: Sequence[PackedFormat], inputs: Sequence[PackedFormat]) -> None:
        super().__init__(formats)
        self.heard = self.starved = self.silent = 0
        self.inputs = InputTally(inputs)

    def report(self, kind: str, total: int, gptq: bool) -> KindReport:
        """Means of the sums."""
        scores = tuple(self._score(fmt, gptq) for fmt in self.formats)
        crests = self.crests()
        figures = {score.format: (score.qsnr, score.h_error) for score in scores}
        return KindReport(
            kind=kind,
            sites=self.matrices,
            total=total,
            parameters=self.numel,
            starved=self.starved,
            silent=self.silent,
            scores=scores,
            crests=crests,
            verdicts=tuple(verdicts(figures, crests)),
            inputs=self.inputs.report() if self.inputs.matrices else None,
        )

    def _score(self, fmt: PackedFormat, gptq: bool) -> FormatScore:
        own = self.sums[fmt.name]
        return FormatScore(
            format=fmt.name,
            family=base_family(fmt),
            bits_per_weight=self.bits(fmt),
            qsnr=self.qsnr(fmt),
            h_error=own.loss / self.heard if self.heard else None,
            gptq_error=own.gptq_loss / self.heard if gptq and self.heard else None,
            gptq_worse=own.gptq_worse if gptq and self.heard else None,
        )
