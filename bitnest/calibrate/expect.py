"""expect: what statistics say a recipe will cost, before it is carried out, kept beside the result.

The prediction goes into the artifact's manifest, so that whoever measures the KL later can hold the
two against each other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.calibrate.predict import Predictor
from bitnest.calibrate.slopes import Sensitivity, sensitivity
from bitnest.calibrate.sources import DataSource
from bitnest.errors import StatisticsError
from bitnest.formats import AnyFormat, DenseFormat, widths
from bitnest.formats.inputs import InputFormat
from bitnest.recipe import PRUNERS
from bitnest.statistics import Statistics
from bitnest.statistics.header import HEADER
from bitnest.workdir import sha256_file

if TYPE_CHECKING:
    from bitnest.calibrate.data import CalibrationSet

log = logging.getLogger(__name__)

DIGITS = 6  # of a predicted KL in the manifest


@dataclass(frozen=True)
class Expected:
    """KL(original || compressed), nats per token. kl: per label of the statistics. mean: over
    labels; low, high: one standard error of its logarithm less and more, None if no probe was
    measured. source: sha256 of the model the statistics are of. statistics: sha256 of their
    header. windows: hashes of the windows they are of. sensitivity: what other widths of a nested
    format will cost; None where nothing is nested."""

    kl: dict[str, float]
    mean: float
    low: float | None
    high: float | None
    source: str
    statistics: str
    windows: frozenset[str]
    sensitivity: Sensitivity | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {"source", "windows", "sensitivity"}
        kept = {k: v for k, v in vars(self).items() if k not in own}
        for key in ("mean", "low", "high"):
            kept[key] = None if kept[key] is None else float(f"{kept[key]:.{DIGITS}g}")
        return {**kept, "kl": {k: float(f"{v:.{DIGITS}g}") for k, v in self.kl.items()}}

    def check_text(self, calibration: CalibrationSet) -> None:
        """Say so if the text is another: what is fitted to it costs more on the statistics' text
        than they predict."""
        hashes = calibration.hashes()
        shared = sum(h in self.windows for h in hashes)
        if 2 * shared < len(hashes):
            log.warning(
                "%d of %d calibration windows are those of the statistics; the KL they predict "
                "is that of calibrating on their text", shared, len(hashes),
            )  # fmt: skip


def expect(
    path: str | Path,
    formats: Mapping[str, AnyFormat],
    method: str,
    prune: str = PRUNERS[0],
    inputs: Mapping[str, InputFormat] | None = None,
) -> Expected:
    """What the statistics in `path` predict for formats by site name, fitted with `method` and,
    where they are sparse, `prune`. inputs: of sites whose inputs are rounded; what that loses is
    predicted if it was measured, and else said not to be.

    Raises:
        StatisticsError: not statistics, damaged, of another method, or without a format or site
            asked for.
    """
    statistics = Statistics.open(path)
    statistics.verify()
    predictor = Predictor(statistics)
    measured = statistics.header["method"]
    if measured != method:
        raise StatisticsError(
            f"the statistics were measured with --method {measured}, not {method}",
            where=str(path),
            hint=f"bitnest analyze with --method {method}, or leave out --statistics",
        )
    statistics.check_prune(prune, [fmt.name for fmt in formats.values()])
    plan = {n: fmt.name for n, fmt in formats.items() if not isinstance(fmt, DenseFormat)}
    found = predictor.predict(plan, _known_inputs(predictor, plan, inputs or {}))
    low, high = found.interval
    known = predictor.fit.probes > 0
    nested = any(widths(fmt) for fmt in formats.values())
    return Expected(
        kl=found.kl,
        mean=found.mean,
        low=low if known else None,
        high=high if known else None,
        source=statistics.header["source"]["sha256"],
        statistics=sha256_file(statistics.path / HEADER),
        windows=frozenset(item["sha256"] for item in statistics.header["samples"]),
        sensitivity=sensitivity(predictor) if nested else None,
    )


def _known_inputs(
    predictor: Predictor, plan: Mapping[str, str], inputs: Mapping[str, InputFormat]
) -> dict[str, str]:
    names = {name: fmt.name for name, fmt in inputs.items()}
    try:
        predictor.inputs.chosen(plan, names)
    except StatisticsError as error:
        log.warning("the KL predicted is that of weights alone: %s", error.what)
        return {}
    return names


def texts(path: str | Path) -> list[DataSource]:
    """The sources that statistics were measured on, each with its number of windows for a weight.

    Raises:
        StatisticsError: not statistics, or of texts that are not where they were.
    """
    sources = Statistics.open(path).header["data"]
    for item in sources:
        if not item["source"].startswith("hub:") and not Path(item["source"]).exists():
            raise StatisticsError(
                f"text of the statistics is not there: {item['source']}",
                where=str(path),
                hint="name the calibration text by --data",
            )
    return [DataSource(i["label"], i["source"], i["samples"]) for i in sources if i["samples"]]
