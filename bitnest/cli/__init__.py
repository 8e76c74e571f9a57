"""The command line: one file per verb, each only parsing, calling `bitnest.api` and rendering.

Results go to stdout, progress and remarks to stderr. Errors a user can mend are printed as what,
where and hint, and end with status 2; an interrupt ends with 130. Heavy imports happen inside the
verbs, so `bitnest --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from bitnest import __version__
from bitnest.cli import (
    analyze,
    bench,
    compare_formats,
    compress,
    doctor,
    eval,
    export,
    formats,
    inspect,
    merge,
    plan,
    prune,
    pull,
    recipes,
    serve,
    slice,
    statistics,
)
from bitnest.cli.render import print_error
from bitnest.errors import BitnestError

INTERRUPTED = 130  # typer turns KeyboardInterrupt into an exit of this status

app = typer.Typer(
    name="bitnest",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress large language models, Mixture-of-Experts first; prove what was lost; serve.",
)
app.command("analyze")(analyze.command)
app.command("plan")(plan.command)
app.command("compress")(compress.command)
app.command("eval")(eval.command)
app.command("export")(export.command)
app.command("serve")(serve.command)
app.command("merge")(merge.command)
app.command("prune")(prune.command)
app.command("slice")(slice.command)
app.command("pull")(pull.command)
app.command("inspect")(inspect.command)
app.command("formats")(formats.command)
app.command("doctor")(doctor.command)
app.add_typer(bench.app, name="bench")
app.command("recipes")(recipes.command)
app.command("compare-formats")(compare_formats.command)
app.command("report")(statistics.report)
app.command("merge-statistics")(statistics.merge)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"bitnest {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BitnestError as error:
        print_error(error)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        sys.stderr.write("\ninterrupted; the same command resumes an unfinished run\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
