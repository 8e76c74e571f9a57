"""Moments: what is kept of the rows that some matrix reads, channel by channel.

    tokens          rows
    absmax          max_t |x_tc|
    abs, square     sum_t |x_tc|, sum_t x_tc^2       (square / tokens is the diagonal of H)
    over_six        values with |x| >= 6, which LLM.int8() calls outliers
    peaks           per block size b: sum over rows and blocks of (max |x|)^2 times the length
    ranked, ranks   rows of a sample, and in how many of them a channel is among the largest 1 %

From peaks comes the effective crest factor of blocks of b channels (`quantize/compare/crest.py`):

    kappa^2 = sum of length * max^2 / sum of x^2

All are sums or maxima, so two halves of the data merge to the whole. Leading dimensions (dataset
labels, experts) are the caller's; rows are added to one place at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from bitnest.kernels.moments import BLOCKS, add_rows, rank_rows

SAMPLED_ROWS = 16  # at most, of every batch of rows, whose channels are ranked
TOP_SHARE = 0.01


@dataclass
class Moments:
    """Running sums for `lead` places of `width` channels.

    tokens, over_six, ranked: (*lead) int64. absmax: (*lead, width) float32. abs, square:
    (*lead, width) float64. peaks: (*lead, len(BLOCKS)) float64. ranks: (*lead, width) int64.
    """

    tokens: torch.Tensor
    absmax: torch.Tensor
    abs: torch.Tensor
    square: torch.Tensor
    over_six: torch.Tensor
    peaks: torch.Tensor
    ranked: torch.Tensor
    ranks: torch.Tensor

    def __post_init__(self) -> None:
        self._views: dict[tuple[int, ...], Moments] = {}

    @classmethod
    def zeros(cls, lead: tuple[int, ...], width: int) -> Moments:
        """No rows yet."""
        count, wide = torch.int64, (*lead, width)
        return cls(
            tokens=torch.zeros(lead, dtype=count),
            absmax=torch.zeros(wide),
            abs=torch.zeros(wide, dtype=torch.float64),
            square=torch.zeros(wide, dtype=torch.float64),
            over_six=torch.zeros(lead, dtype=count),
            peaks=torch.zeros((*lead, len(BLOCKS)), dtype=torch.float64),
            ranked=torch.zeros(lead, dtype=count),
            ranks=torch.zeros(wide, dtype=count),
        )

    @property
    def width(self) -> int:
        """Channels."""
        return self.absmax.shape[-1]

    def add(self, place: tuple[int, ...], x: torch.Tensor) -> None:
        """Add rows x (n, width) float32 at one place."""
        if not len(x):
            return
        own = self._views.get(place)
        if own is None:  # made once: taking views costs more than adding a few rows
            own = self._views[place] = self.at(place)
        own.tokens += len(x)
        own.over_six += add_rows(x, own.absmax, own.abs, own.square, own.peaks)
        rows = x[:: -(-len(x) // SAMPLED_ROWS)]
        own.ranked += len(rows)
        rank_rows(rows, top_count(self.width), own.ranks)

    def at(self, place: tuple[int, ...]) -> Moments:
        """Of one place alone: views, not copies."""
        return Moments(**{f.name: getattr(self, f.name)[place] for f in fields(self)})

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both."""
        values = {
            f.name: torch.maximum(a, b) if f.name == "absmax" else a + b
            for f in fields(self)
            for a, b in [(getattr(self, f.name), getattr(other, f.name))]
        }
        return Moments(**values)

    def pooled(self) -> Moments:
        """Over the first leading dimension."""
        values = {
            f.name: t.amax(0) if f.name == "absmax" else t.sum(0)
            for f in fields(self)
            for t in [getattr(self, f.name)]
        }
        return Moments(**values)

    def mean_square(self) -> torch.Tensor:
        """Mean of x^2, the diagonal of H; 0 without rows. Shape of `square`."""
        return self.square / self.tokens.clamp_min(1)[..., None]

    def mean_abs(self) -> torch.Tensor:
        """Mean of |x|; 0 without rows."""
        return self.abs / self.tokens.clamp_min(1)[..., None]

    def kappa(self) -> torch.Tensor:
        """Effective crest factor of blocks of BLOCKS channels, (*lead, len(BLOCKS)); NaN-free: 1 of
        zeros. A short last block counts as one of its own length."""
        energy = self.square.sum(-1, keepdim=True)
        return torch.where(energy > 0, self.peaks / energy.clamp_min(1e-300), 1.0).sqrt()


def top_count(width: int) -> int:
    """Channels that are the largest 1 %."""
    return max(1, math.ceil(TOP_SHARE * width))
