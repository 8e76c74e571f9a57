"""bitnest compare-formats: the study as tables, as JSON, and as a plot.

The plot shows QSNR against bits per weight, one panel per kind of site. Colour is the family, the
marker what a code stands for, a hollow marker a rotated format; every point is labelled. Labels of
one width stand in a column beside it, as near to their points as their height allows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitnest.cli.options import Device, Json, Quiet, Remote, parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from bitnest.quantize.compare import Comparison, FormatScore, KindReport

SUFFIXES = (".png", ".svg")
COLOURS = {
    "integer": "#0072B2", "float": "#D55E00", "mx": "#009E73", "nv": "#CC79A7",
    "table": "#8A6D00", "ternary": "#56B4E9", "dual-grain": "#000000",
}  # fmt: skip
PANEL = (8.0, 6.2)  # inches
LABEL = 7.5  # points
COLUMN_GAP = 0.8  # bits between points whose labels stand in different columns
CREST = ("mean", "median", "p99", "effective")  # fields of `Crest`, in the table's order


def command(
    model: str = typer.Argument(help="Checkpoint: directory, hub id, or 'demo'."),
    format: list[str] = typer.Option(
        [], "--format", help="A format to compare; may be repeated. [the uniform ones]"
    ),
    sites: str = typer.Option(
        None, "--sites", help="Sites to measure: a glob, re:REGEX or kind:KIND."
    ),
    per_kind: int = typer.Option(
        64, "--per-kind", min=1, help="Sites measured of each kind, spread evenly."
    ),
    data: list[str] = typer.Option(
        [], "--data", help="Text for H: [label=]file, directory or hub:name. [embedded]"
    ),
    samples: int = typer.Option(32, "--samples", min=1, help="Windows of text."),
    length: int = typer.Option(256, "--length", min=2, help="Tokens per window."),
    no_data: bool = typer.Option(False, "--no-data", help="Look at weights only: no H error."),
    clip: bool = typer.Option(True, "--clip/--no-clip", help="Search the clipping of every scale."),
    seed: int = typer.Option(0, "--seed", help="Choice of windows."),
    plot: Path = typer.Option(None, "--plot", help="Write QSNR against bits as .png or .svg."),
    memory: str = typer.Option(None, "--memory", help="Bound on the process, such as 3GiB."),
    device: str = Device,
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Compare number formats on a model's own weights: QSNR, H-weighted error, crest factors."""
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process
    from bitnest.errors import RecipeError

    prepare_process()
    if no_data and data:
        raise RecipeError("--no-data looks at no text, --data names one", hint="leave one out")
    if plot is not None:
        check_plot(plot)
    from bitnest import api

    with Bars(quiet) as bars:
        result = api.compare_formats(
            model,
            formats=format,
            sites=sites,
            per_kind=per_kind,
            calibrate=not no_data,
            data=data,
            samples=samples,
            length=length,
            clip=clip,
            seed=seed,
            memory=parse_size(memory),
            device=device,
            trust_remote_code=trust_remote_code,
            progress=bars,
        )
    if json:
        print_json(result.to_json())
    else:
        print_tables(result)
    if plot is not None:
        write_plot(result, plot)
        if not quiet:
            say(f"plot: {plot}")


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


def print_tables(result: Comparison) -> None:
    """Formats by kind, crest factors, and INT-vs-FP's verdicts beside the measurements."""
    from bitnest.cli.render import wide_console

    tables = [_scores(result), _crests(result)]
    if any(kind.verdicts for kind in result.kinds):
        tables.append(_verdicts(result))
    console = wide_console(*tables)
    for table in tables:
        console.print(table)
        console.print()
    console.print("\n".join(protocol(result)), highlight=False)


def protocol(result: Comparison) -> list[str]:
    """How the figures were measured, in sentences."""
    lines = [_measured(kind) for kind in result.kinds]
    clip = "clipping searched" if result.clip else "scales cover the largest weight"
    lines.append(f"round to nearest, {clip}; means over sites weighted by parameters")
    lines.append("QSNR: sum w^2 over sum (w - w_hat)^2, in dB; kappa: absmax / RMS of a block")
    if result.calibration is not None:
        texts = ", ".join(f"{label} {count}" for label, count in result.calibration.items())
        lines.append(
            "H error: share of a site's output energy lost, in the uncompressed model, on windows "
            f"of {result.length} tokens ({texts})"
        )
    if any(kind.verdicts for kind in result.kinds):
        lines.append("limit: INT-vs-FP says the integer wins where the effective kappa is under it")
    lines.append(f"{result.model}, {result.architecture} ({result.seconds:.1f} s)")
    return lines


def _measured(kind: KindReport) -> str:
    which = "all" if kind.sites == kind.total else f"{kind.sites} of"
    text = f"{kind.kind}: {which} {kind.total:,} sites, {kind.parameters:,} weights"
    if kind.sites < kind.total:
        text += ", spread evenly (--per-kind)"
    if kind.starved:
        text += f"; {kind.starved} of experts with few tokens lean on their layer's inputs"
    if kind.silent:
        text += f"; {kind.silent} without input or output are left out of the H error"
    return text


def _new_table(columns: Sequence[str], left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _scores(result: Comparison) -> Table:
    heard = result.calibration is not None
    columns = ["format"]
    for kind in result.kinds:
        columns += [f"{kind.kind}\nbits", "\nQSNR dB", *(["\nH error"] if heard else [])]
    table = _new_table(columns, 1)
    for row in zip(*(kind.scores for kind in result.kinds), strict=True):
        cells = [row[0].format]
        for score in row:
            cells += [f"{score.bits_per_weight:.3f}", _decibel(score.qsnr)]
            if heard:
                cells.append("-" if score.h_error is None else f"{score.h_error:.2e}")
        table.add_row(*cells)
    return table


def _crests(result: Comparison) -> Table:
    table = _new_table(
        ["kappa of", "block", *CREST, f"rotated\n{CREST[0]}", *(f"\n{c}" for c in CREST[1:])], 1
    )
    for kind in result.kinds:
        for plain in (crest for crest in kind.crests if not crest.rotated):
            rotated = next(c for c in kind.crests if c.rotated and c.block == plain.block)
            values = (getattr(crest, name) for crest in (plain, rotated) for name in CREST)
            table.add_row(kind.kind, str(plain.block), *(f"{value:.2f}" for value in values))
    return table


def _verdicts(result: Comparison) -> Table:
    table = _new_table(
        ["INT-vs-FP", "pair", "it says", "measured", "kappa", "limit", "QSNR dB", "by H dB"], 4
    )
    for kind in result.kinds:
        for found in kind.verdicts:
            table.add_row(
                kind.kind,
                f"{found.integer} - {found.floating}",
                found.says,
                found.measured + ("" if found.says == found.measured else " (!)"),
                f"{found.kappa:.2f}",
                f"{found.limit:.2f}",
                f"{found.qsnr_gain:+.2f}",
                "-" if found.h_gain is None else f"{found.h_gain:+.2f}",
            )
    return table


def _decibel(qsnr: float | None) -> str:
    return "exact" if qsnr is None else f"{qsnr:.2f}"


def write_plot(result: Comparison, path: Path) -> None:
    """QSNR against bits per weight, one panel per kind.

    Raises:
        RecipeError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bitnest.errors import RecipeError

    columns = min(2, len(result.kinds))
    rows = -(-len(result.kinds) // columns)
    figure = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, kind in zip(axes, result.kinds, strict=False):
        _panel(axis, kind)
    for axis in axes[len(result.kinds) :]:
        axis.set_axis_off()
    _legend(figure, result)
    figure.suptitle(f"{Path(result.model).name}: rounding error of number formats", fontsize=12)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise RecipeError(f"cannot write the plot: {error.strerror}", where=str(path)) from error


def _panel(axis: Any, kind: KindReport) -> None:
    shown = [score for score in kind.scores if score.qsnr is not None]
    shown.sort(key=lambda score: score.bits_per_weight)
    for score in shown:
        colour, marker = COLOURS[score.family], _marker(score.format)
        # a hollow one is the larger, so that it does not hide the format it was made from
        look = {"mfc": "none", "ms": 8.5} if "@" in score.format else {"ms": 4.5}
        axis.plot(score.bits_per_weight, score.qsnr, marker, color=colour, zorder=3, **look)
    axis.set_title(f"{kind.kind} ({kind.sites} of {kind.total} sites)", fontsize=10)
    axis.set_xlabel("bits per weight, everything stored")
    axis.set_ylabel("QSNR in dB, more is better")
    axis.grid(color="#dddddd", linewidth=0.6)
    if not shown:
        return
    heights = [score.qsnr for score in shown if score.qsnr is not None]
    low, high = min(heights), max(heights)
    margin = 0.06 * (high - low) + 1
    axis.set_ylim(low - margin, high + margin)
    axis.set_xlim(shown[0].bits_per_weight - 0.4, shown[-1].bits_per_weight + 2.2)
    step = LABEL * 1.25 / (PANEL[1] * 72 * 0.8) * (high - low + 2 * margin)
    for column in _columns(shown):
        x = max(score.bits_per_weight for score in column) + 0.3
        column.sort(key=lambda score: score.qsnr or 0.0)
        places = apart([score.qsnr or 0.0 for score in column], step)
        for score, y in zip(column, places, strict=True):
            axis.annotate(
                score.format,
                (score.bits_per_weight, score.qsnr),
                (x, y),
                fontsize=LABEL,
                color=COLOURS[score.family],
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkB": 3},
            )


def _columns(shown: Sequence[FormatScore]) -> list[list[FormatScore]]:
    """Points by ascending bits, cut where there is room for labels between."""
    columns: list[list[FormatScore]] = []
    for score in shown:
        near = columns and score.bits_per_weight - columns[-1][-1].bits_per_weight < COLUMN_GAP
        if near:
            columns[-1].append(score)
        else:
            columns.append([score])
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
