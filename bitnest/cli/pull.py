"""bitnest pull."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json, Quiet


def command(
    source: str = typer.Argument(
        help="An artifact: directory, or hub id org/name or org/name@revision."
    ),
    bits: int = typer.Option(
        None, "--bits", min=1, max=8, help="The widest width to fetch (default: all)."
    ),
    out: Path = typer.Option(
        None, "-o", "--out", help="Directory to fetch into (default: the source's name)."
    ),
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Fetch an artifact, or what a width needs of it; more bits later, and what is damaged."""
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    target = out or Path(_name(source))
    with Bars(quiet) as bars:
        done = api.pull(source, target, bits=bits, progress=bars)
    path = done.artifact.path
    if json:
        print_json(
            {
                "path": str(path), "source": source, "bits": done.bits,
                "fetched_bytes": done.fetched, "present_bytes": done.present,
                "fetched_files": list(done.files), "present_files": done.kept,
            }
        )  # fmt: skip
        return
    at = "" if done.bits is None else f", to be read at up to {done.bits} bits"
    typer.echo(f"artifact: {path}{at}")
    typer.echo(f"fetched: {done.fetched:,} bytes, {len(done.files)} files")
    typer.echo(f"there already: {done.present:,} bytes, {done.kept} files")
    if not quiet:
        say(f"next: bitnest eval {path}" + (f" --bits {done.bits}" if done.artifact.absent else ""))


def _name(source: str) -> str:
    """Of a directory its own, of a hub id that without organisation and revision."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source.partition("@")[0].rpartition("/")[2]
