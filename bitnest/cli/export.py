"""bitnest export."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json


def command(
    artifact: Path = typer.Argument(help="Artifact directory."),
    out: Path = typer.Option(..., "-o", "--out", help="Directory to write."),
    engine: str = typer.Option(
        None, "--for", help="Refuse what it cannot run: vllm-cuda, vllm-cpu or transformers."
    ),
    verify: bool = typer.Option(
        True,
        "--verify/--no-verify",
        help="Reopen with an independent reader, compare every weight.",
    ),
    json: bool = Json,
) -> None:
    """Write an artifact as compressed-tensors, for vLLM and transformers, and verify it."""
    from bitnest.cli.render import print_json
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    result = api.export(artifact, out, engine=engine, verify=verify)
    if json:
        print_json(result.to_json())
    else:
        typer.echo(str(result))
