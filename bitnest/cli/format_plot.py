"""The plot of a study of formats: QSNR against bits per value.

One panel per kind of site, under it one of what these sites read. Colour is the family, the marker
what a code stands for, a hollow marker a rotated format; every point is labelled. Labels of one
width stand in a column beside it, as near to their points as their height allows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnest.quantize.compare import Comparison, InputReport, KindReport

SUFFIXES = (".png", ".svg")
COLOURS = {
    "integer": "#0072B2", "float": "#D55E00", "mx": "#009E73", "nv": "#CC79A7",
    "table": "#8A6D00", "ternary": "#56B4E9", "dual-grain": "#000000",
}  # fmt: skip
PANEL = (8.0, 6.2)  # inches
LABEL = 7.5  # points
COLUMN_GAP = 0.8  # bits between points whose labels stand in different columns


@dataclass(frozen=True)
class Point:
    """One format in one panel."""

    format: str
    family: str
    bits: float
    qsnr: float


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written.

    Raises:
        RecipeError, MissingExtra: another kind of file, no place for it, no matplotlib.
    """
    from bitnest.errors import RecipeError, require

    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"--plot writes {' or '.join(SUFFIXES)}, not '{path.name}'",
            hint="for example --plot formats.png",
        )
    require("matplotlib", "plots")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RecipeError("no such directory", where=str(folder), hint="make it, or name another")
    target = path if path.exists() else folder
    if path.is_dir() or not os.access(target, os.W_OK) or not os.access(folder, os.X_OK):
        raise RecipeError("cannot write the plot there", where=str(path), hint="name another file")


def write_plot(result: Comparison, path: Path) -> None:
    """QSNR against bits per value, two panels per kind.

    Raises:
        RecipeError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bitnest.errors import RecipeError

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    columns, places = arrange(result.kinds)
    rows = 1 + max(row for row, _, _, _ in places)
    figure.set_size_inches(columns * PANEL[0], rows * PANEL[1])
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flatten():
        axis.set_axis_off()
    for row, column, kind, inputs in places:
        axes[row, column].set_axis_on()
        if inputs is None:
            _weights_panel(axes[row, column], kind)
        else:
            _inputs_panel(axes[row, column], kind, inputs)
    _legend(figure, result)
    figure.suptitle(f"{Path(result.model).name}: rounding error of number formats", fontsize=12)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise RecipeError(f"cannot write the plot: {error.strerror}", where=str(path)) from error


def arrange(
    kinds: Sequence[KindReport],
) -> tuple[int, list[tuple[int, int, KindReport, InputReport | None]]]:
    """Columns, and panels as (row, column, kind, its inputs, None for its weights).

    Kinds stand two abreast, inputs right under their weights.
    """
    columns = min(2, len(kinds))
    places: list[tuple[int, int, KindReport, InputReport | None]] = []
    row = 0
    for start in range(0, len(kinds), columns):
        abreast = kinds[start : start + columns]
        places += [(row, column, kind, None) for column, kind in enumerate(abreast)]
        below = [
            (row + 1, column, kind, kind.inputs)
            for column, kind in enumerate(abreast)
            if kind.inputs is not None and kind.inputs.scores
        ]
        places += below
        row += 2 if below else 1
    return columns, places


def _weights_panel(axis: Any, kind: KindReport) -> None:
    axis.set_title(f"{kind.kind} weights ({kind.sites} of {kind.total} sites)", fontsize=10)
    axis.set_xlabel("bits per weight, everything stored")
    points = [
        Point(score.format, score.family, score.bits_per_weight, score.qsnr)
        for score in kind.scores
        if score.qsnr is not None
    ]
    _panel(axis, points)


def _inputs_panel(axis: Any, kind: KindReport, inputs: InputReport) -> None:
    title = f"{kind.kind} inputs ({inputs.inputs} inputs, {inputs.tokens:,} tokens)"
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("bits per value, scales included")
    points = [
        Point(score.format, score.family, score.bits_per_value, score.qsnr)
        for score in inputs.scores
        if score.qsnr is not None
    ]
    _panel(axis, points)


def _panel(axis: Any, points: list[Point]) -> None:
    points.sort(key=lambda point: point.bits)
    for point in points:
        colour, marker = COLOURS[point.family], _marker(point.format)
        # a hollow one is the larger, so that it does not hide the format it was made from
        look = {"mfc": "none", "ms": 8.5} if "@" in point.format else {"ms": 4.5}
        axis.plot(point.bits, point.qsnr, marker, color=colour, zorder=3, **look)
    axis.set_ylabel("QSNR in dB, more is better")
    axis.grid(color="#dddddd", linewidth=0.6)
    if not points:
        return
    heights = [point.qsnr for point in points]
    low, high = min(heights), max(heights)
    margin = 0.06 * (high - low) + 1
    axis.set_ylim(low - margin, high + margin)
    axis.set_xlim(points[0].bits - 0.4, points[-1].bits + 2.2)
    step = LABEL * 1.25 / (PANEL[1] * 72 * 0.8) * (high - low + 2 * margin)
    for column in _columns(points):
        x = max(point.bits for point in column) + 0.3
        column.sort(key=lambda point: point.qsnr)
        places = apart([point.qsnr for point in column], step)
        for point, y in zip(column, places, strict=True):
            axis.annotate(
                point.format,
                (point.bits, point.qsnr),
                (x, y),
                fontsize=LABEL,
                color=COLOURS[point.family],
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkB": 3},
            )


def _columns(points: Sequence[Point]) -> list[list[Point]]:
    """Points by ascending bits, cut where there is room for labels between."""
    columns: list[list[Point]] = []
    for point in points:
        if columns and point.bits - columns[-1][-1].bits < COLUMN_GAP:
            columns[-1].append(point)
        else:
            columns.append([point])
    return columns


def apart(heights: Sequence[float], step: float) -> list[float]:
    """Places at least `step` apart, as near to the ascending `heights` as can be (least squares).

    Pool adjacent violators: less their rank times step, places must not fall.
    """
    pools: list[tuple[float, int]] = []  # sum, count
    for rank, height in enumerate(heights):
        pools.append((height - rank * step, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + count)
    flat = [total / count for total, count in pools for _ in range(count)]
    return [place + rank * step for rank, place in enumerate(flat)]


def _marker(name: str) -> str:
    return "s" if "int" in name or name.startswith("dgq") else "o" if "fp" in name else "^"


def _legend(figure: Any, result: Comparison) -> None:
    from matplotlib.lines import Line2D

    scores = result.kinds[0].scores
    families = [name for name in COLOURS if any(score.family == name for score in scores)]
    handles = [
        Line2D([], [], color=COLOURS[name], marker="o", ls="", label=name) for name in families
    ]
    kinds = {_marker(score.format) for score in scores}
    for marker, label in (("s", "integer codes"), ("o", "float codes"), ("^", "table, ternary")):
        if marker in kinds:
            handles.append(Line2D([], [], color="#555555", marker=marker, ls="", label=label))
    if any("@" in score.format for score in scores):
        handles.append(
            Line2D(
                [], [], color="#555555", mfc="white", marker="D", ls="", label="hollow: transformed"
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
