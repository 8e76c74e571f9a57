"""bitnest report and bitnest merge-statistics: what needs statistics and no model."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json, Quiet


def report(
    statistics: Path = typer.Argument(help="Directory that bitnest analyze wrote."),
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Write the report of existing statistics again; no model is run."""
    from bitnest.cli.analyze import print_analysis
    from bitnest.cli.render import say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    api.write_report(statistics, verify=True)
    print_analysis(statistics, json)
    if not quiet:
        say(f"next: open {statistics / 'report.html'}")


def merge(
    statistics: list[Path] = typer.Argument(help="Directories that bitnest analyze wrote."),
    out: Path = typer.Option(..., "-o", "--out", help="Directory for their sum."),
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Add up statistics of one model, measured on several parts of the data or machines."""
    from bitnest.cli.analyze import print_analysis
    from bitnest.cli.render import say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    merged = api.merge_statistics(statistics, out)
    print_analysis(merged.path, json)
    if not quiet:
        say(f"next: open {merged.path / 'report.html'}")
