"""scores: what a study of formats gives, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FormatScore:
    """One format on the weights of one kind of site.

    qsnr: dB, None if nothing was lost at all. h_error: None without inputs. bits_per_weight: of
    these sites, everything stored counted. gptq_error: the H error after GPTQ. gptq_worse: sites
    where that is more than without; both None if GPTQ was not asked for or there were no inputs.
    """

    format: str
    family: str
    bits_per_weight: float
    qsnr: float | None
    h_error: float | None
    gptq_error: float | None = None
    gptq_worse: int | None = None


@dataclass(frozen=True)
class InputScore:
    """One format on what the sites of one kind read. qsnr: as in `FormatScore`."""

    format: str
    family: str
    bits_per_value: float
    qsnr: float | None


@dataclass(frozen=True)
class Crest:
    """kappa over all blocks of a kind. rotated: after a Hadamard rotation of that block size.

    effective: the root of the mean of kappa^2, blocks weighted by their sum w^2, matrices by their
    values.
    """

    block: int
    rotated: bool
    blocks: int
    mean: float
    median: float
    p99: float
    effective: float


@dataclass(frozen=True)
class Verdict:
    """Integer against float at equal width.

    kappa: effective, of the blocks that share a scale. limit: of INT-vs-FP. says: its verdict, int
    or fp. measured: whose QSNR is higher. qsnr_gain: the integer's QSNR less the float's, dB.
    h_gain: the same of the H error, 10 log10(float / integer).
    """

    integer: str
    floating: str
    kappa: float
    limit: float
    says: str
    measured: str
    qsnr_gain: float
    h_gain: float | None


@dataclass(frozen=True)
class InputReport:
    """What the sites of one kind read.

    inputs: distinct ones, so one for q, k and v. tokens: sampled of them all. scores: of formats
    that inputs can be rounded to as they come.
    """

    inputs: int
    tokens: int
    scores: tuple[InputScore, ...]
    crests: tuple[Crest, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class KindReport:
    """All formats on one kind of site.

    sites: measured, of `total`. starved: those whose H leans on the layer's inputs, their expert
    having seen too few. silent: those left out of the H error, because they saw no input or give
    no output. inputs: None if none was seen.
    """

    kind: str
    sites: int
    total: int
    parameters: int
    starved: int
    silent: int
    scores: tuple[FormatScore, ...]
    crests: tuple[Crest, ...]
    verdicts: tuple[Verdict, ...]
    inputs: InputReport | None = None


@dataclass(frozen=True)
class Comparison:
    """A finished study. calibration: labels with their samples, None if no data was used."""

    model: str
    architecture: str
    clip: bool
    gptq: bool
    per_kind: int
    calibration: dict[str, int] | None
    length: int | None
    kinds: tuple[KindReport, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
