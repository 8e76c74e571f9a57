"""crest: crest factors of blocks, and what INT-vs-FP concludes from them.

    kappa = absmax / RMS of a block of n values, 1 .. sqrt(n)

kappa is measured as the values are and after a Hadamard rotation of the block's own size. By
INT-vs-FP (Chen et al., 2025) integers beat floats of the same width where kappa is under a limit.
Blocks differ, so one kappa has to stand for many: an integer whose step is absmax / Q loses

    sum of n step^2 / 12 = sum of e kappa^2 / (12 Q^2)       e = sum w^2

so it is the root of the mean kappa^2 weighted by e, the effective kappa. (The plain mean is smaller
and lets the integer win too often.) The limits were derived for scales that cover the largest value
of a block: always so of inputs, of weights where clipping is not searched.

Blocks without a value other than zero have no kappa.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from bitnest.kernels.hadamard import rotate
from bitnest.quantize.compare.scores import Crest, Verdict

BLOCKS = (16, 32, 128)  # of which crest factors are measured
BINS = 4096  # of the histogram that holds them, from 1 to sqrt(block)
PAIRS = (
    ("mxint8", "mxfp8", 32, 7.55),
    ("mxint6", "mxfp6", 32, 1.96),
    ("mxint4", "mxfp4", 32, 2.04),
    ("nvint4", "nvfp4", 16, 2.39),
)  # integer, float, block, and the kappa under which INT-vs-FP says the integer wins

Figures = Mapping[str, tuple[float | None, float | None]]
"""format -> QSNR, H error"""


def crest_factors(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kappa and sum w^2 of every block of each row of (O, I), the last of which may be short.

    Blocks of zeros are left out. The sums are in units of the largest weight squared.
    """
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -columns % block)).unflatten(1, (-1, block))
    lengths = torch.full((padded.shape[1],), float(block), device=weight.device)
    lengths[-1] = (columns - 1) % block + 1
    peak = padded.abs().amax(2, keepdim=True)
    energy = (padded / peak).square_().sum(2)  # in units of the block's own largest: no underflow
    peak = peak.squeeze(2)
    there = peak > 0
    return (lengths / energy).sqrt()[there], (energy * (peak / peak.max()).square())[there]


class CrestTally:
    """A histogram of kappa over [1, sqrt(block)], from which its statistics are read."""

    def __init__(self, block: int, rotated: bool) -> None:
        self.block, self.rotated = block, rotated
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.total = 0.0
        self.squares, self.numel = 0.0, 0  # kappa^2 weighted by energy, times values; values

    def add(self, weight: torch.Tensor) -> None:
        """Count the blocks of one matrix (O, I)."""
        w = rotate(weight, self.block) if self.rotated else weight
        kappa, energy = crest_factors(w, self.block)
        if not len(kappa):
            return
        place = (kappa - 1) * (BINS / (self.block**0.5 - 1))
        found = place.long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(found, minlength=BINS).cpu()
        self.total += float(kappa.double().sum())
        energy = energy.double()
        self.squares += w.numel() * float((energy * kappa.square()).sum() / energy.sum())
        self.numel += w.numel()

    def result(self) -> Crest | None:
        """Its statistics; None of no block."""
        blocks = int(self.counts.sum())
        if blocks == 0:
            return None
        return Crest(
            block=self.block,
            rotated=self.rotated,
            blocks=blocks,
            mean=self.total / blocks,
            median=self._at(0.5),
            p99=self._at(0.99),
            effective=math.sqrt(self.squares / self.numel),
        )

    def _at(self, share: float) -> float:
        cumulative = self.counts.cumsum(0)
        wanted = share * int(cumulative[-1])
        place = int((cumulative < wanted).sum())
        inside = (wanted - int(cumulative[place] - self.counts[place])) / int(self.counts[place])
        return 1 + (place + inside) * (self.block**0.5 - 1) / BINS


def verdicts(figures: Figures, crests: Sequence[Crest]) -> Iterator[Verdict]:
    """INT-vs-FP's verdict on every pair that was measured, beside the measurement."""
    kappas = {(crest.block, crest.rotated): crest.effective for crest in crests}
    for integer, floating, block, limit in PAIRS:
        for rotated, suffix in ((False, ""), (True, f"@had{block}")):
            qsnr_int, h_int = figures.get(integer + suffix, (None, None))
            qsnr_fp, h_fp = figures.get(floating + suffix, (None, None))
            if qsnr_int is None or qsnr_fp is None:
                continue
            kappa, gain = kappas[block, rotated], qsnr_int - qsnr_fp
            yield Verdict(
                integer=integer + suffix,
                floating=floating + suffix,
                kappa=kappa,
                limit=limit,
                says="int" if kappa < limit else "fp",
                measured="int" if gain > 0 else "fp",
                qsnr_gain=gain,
                h_gain=10 * math.log10(h_fp / h_int) if h_int and h_fp else None,
            )
