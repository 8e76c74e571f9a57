"""bitnest slice."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json, Quiet


def command(
    artifact: str = typer.Argument(help="A nested artifact."),
    bits: int = typer.Option(..., "--bits", min=1, max=8, help="The widest width to keep."),
    out: Path = typer.Option(
        None, "-o", "--out", help="Artifact directory (default: by name and bits)."
    ),
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Cut a nested artifact at a width: what loading it there needs, and nothing else."""
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    target = out or Path(f"{Path(artifact).name}-{bits}bit")
    with Bars(quiet) as bars:
        done = api.slice_artifact(artifact, target, bits, progress=bars)
    nbytes = sum(file.stat().st_size for file in done.path.iterdir())
    if json:
        print_json({"path": str(done.path), "bits": bits, "bytes": nbytes})
        return
    typer.echo(f"artifact: {done.path}, {nbytes:,} bytes")
    if not quiet:
        say(f"next: bitnest eval {done.path}")
