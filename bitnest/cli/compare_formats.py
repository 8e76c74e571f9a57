"""bitnest compare-formats: the study as tables, as JSON, and as a plot (`format_plot`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bitnest.cli.options import Device, Json, Quiet, Remote, parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from bitnest.quantize.compare import Comparison, FormatScore, InputReport, KindReport

CREST = ("mean", "median", "p99", "effective")  # fields of `Crest`, in the table's order


def command(
    model: str = typer.Argument(help="Checkpoint: directory, hub id, or 'demo'."),
    format: list[str] = typer.Option(
        [], "--format", help="A format to compare; may be repeated (default: the uniform ones)."
    ),
    sites: str = typer.Option(
        None, "--sites", help="Sites to measure: a glob, re:REGEX or kind:KIND."
    ),
    per_kind: int = typer.Option(
        64, "--per-kind", min=1, help="Sites measured of each kind, spread evenly."
    ),
    data: list[str] = typer.Option(
        [],
        "--data",
        help="Text for H and inputs: [label=]file, directory or hub:name (default: embedded text).",
    ),
    samples: int = typer.Option(32, "--samples", min=1, help="Windows of text."),
    length: int = typer.Option(256, "--length", min=2, help="Tokens per window."),
    no_data: bool = typer.Option(False, "--no-data", help="Look at weights only: no H error."),
    clip: bool = typer.Option(True, "--clip/--no-clip", help="Search the clipping of every scale."),
    gptq: bool = typer.Option(
        False, "--gptq", help="Give the H error of GPTQ too: three to five times the work."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Choice of windows."),
    plot: Path = typer.Option(None, "--plot", help="Write QSNR against bits as .png or .svg."),
    memory: str = typer.Option(None, "--memory", help="Bound on the process, such as 3GiB."),
    device: str = Device,
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Compare number formats on a model's weights and what they read: QSNR, H-weighted error,
    crest factors."""
    from bitnest.cli.format_plot import check_plot, write_plot
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
            gptq=gptq,
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


def print_tables(result: Comparison) -> None:
    """Formats by kind, crest factors, and INT-vs-FP's verdicts beside the measurements."""
    from bitnest.cli.render import wide_console

    tables = [_scores(result)]
    if any(kind.inputs is not None for kind in result.kinds):
        tables.append(_inputs(result))
    tables.append(_crests(result))
    if any(part.verdicts for _, part in _parts(result)):
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
    lines.append(f"weights: round to nearest, {clip}; means over sites weighted by parameters")
    lines.append("QSNR: sum w^2 over sum (w - w_hat)^2, in dB; kappa: absmax / RMS of a block")
    if result.calibration is not None:
        texts = ", ".join(f"{label} {count}" for label, count in result.calibration.items())
        lines.append(
            "H error: share of a site's output energy lost, in the uncompressed model, on windows "
            f"of {result.length} tokens ({texts})"
        )
    if result.gptq:
        lines.append("GPTQ: the H error after GPTQ; worse: sites where that is the larger one")
    if any(kind.inputs is not None for kind in result.kinds):
        lines.append(
            "inputs: a sample of what the sites read, rounded token by token, scales cover the "
            "largest value (nv: one global scale for the sample); means weighted by values"
        )
    if any(part.verdicts for _, part in _parts(result)):
        lines.append("limit: INT-vs-FP says the integer wins where the effective kappa is under it")
    lines.append(f"{result.model}, {result.architecture} ({result.seconds:.1f} s)")
    return lines


def _parts(result: Comparison) -> Iterator[tuple[str, KindReport | InputReport]]:
    """Everything that has crest factors and verdicts, by name."""
    for kind in result.kinds:
        yield kind.kind, kind
        if kind.inputs is not None:
            yield f"{kind.kind} inputs", kind.inputs


def _measured(kind: KindReport) -> str:
    which = "all" if kind.sites == kind.total else f"{kind.sites} of"
    text = f"{kind.kind}: {which} {kind.total:,} sites, {kind.parameters:,} weights"
    if kind.sites < kind.total:
        text += ", spread evenly (--per-kind)"
    if kind.starved:
        text += f"; {kind.starved} of experts that saw few tokens lean on their layer's inputs"
    if kind.silent:
        text += f"; {kind.silent} without input or output are left out of the H error"
    if kind.inputs is not None:
        text += f"; {kind.inputs.inputs} inputs, {kind.inputs.tokens:,} tokens"
    return text


def _new_table(columns: Sequence[str], left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _scores(result: Comparison) -> Table:
    columns = ["weights"]
    for kind in result.kinds:
        columns += [f"{kind.kind}\nbits", "\nQSNR dB"]
        if result.calibration is not None:
            columns += ["\nH error", *(["\nGPTQ", "\nworse"] if result.gptq else [])]
    table = _new_table(columns, 1)
    for row in zip(*(kind.scores for kind in result.kinds), strict=True):
        cells = [row[0].format]
        for score in row:
            cells += [f"{score.bits_per_weight:.3f}", _decibel(score.qsnr)]
            if result.calibration is not None:
                cells += _losses(score, result.gptq)
        table.add_row(*cells)
    return table


def _losses(score: FormatScore, gptq: bool) -> list[str]:
    cells = [_share(score.h_error)]
    if gptq:
        worse = "-" if score.gptq_worse is None else str(score.gptq_worse)
        cells += [_share(score.gptq_error), worse]
    return cells


def _inputs(result: Comparison) -> Table:
    """Formats that inputs cannot be rounded to as they come have no figures."""
    columns = ["inputs"]
    for kind in result.kinds:
        columns += [f"{kind.kind}\nbits", "\nQSNR dB"]
    table = _new_table(columns, 1)
    found = [
        {score.format: score for score in kind.inputs.scores} if kind.inputs else {}
        for kind in result.kinds
    ]
    for name in (score.format for score in result.kinds[0].scores):
        cells = [name]
        for scores in found:
            score = scores.get(name)
            cells += [f"{score.bits_per_value:.3f}", _decibel(score.qsnr)] if score else ["-", "-"]
        table.add_row(*cells)
    return table


def _crests(result: Comparison) -> Table:
    table = _new_table(
        ["kappa of", "block", *CREST, f"rotated\n{CREST[0]}", *(f"\n{c}" for c in CREST[1:])], 1
    )
    for name, part in _parts(result):
        for plain in (crest for crest in part.crests if not crest.rotated):
            rotated = next(c for c in part.crests if c.rotated and c.block == plain.block)
            values = (getattr(crest, field) for crest in (plain, rotated) for field in CREST)
            table.add_row(name, str(plain.block), *(f"{value:.2f}" for value in values))
    return table


def _verdicts(result: Comparison) -> Table:
    table = _new_table(
        ["INT-vs-FP", "pair", "it says", "measured", "kappa", "limit", "QSNR dB", "by H dB"], 4
    )
    for name, part in _parts(result):
        for found in part.verdicts:
            table.add_row(
                name,
                f"{found.integer} - {found.floating}",
                found.says,
                found.measured + ("" if found.says == found.measured else " (!)"),
                f"{found.kappa:.2f}",
                f"{found.limit:.2f}",
                f"{found.qsnr_gain:+.2f}",
                "-" if found.h_gain is None else f"{found.h_gain:+.2f}",
            )
    return table


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"


def _decibel(qsnr: float | None) -> str:
    return "exact" if qsnr is None else f"{qsnr:.2f}"
