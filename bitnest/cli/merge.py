"""bitnest merge."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json, Quiet, Remote


def command(
    model: str = typer.Argument(help="Model directory, hub id, or demo."),
    lora: list[str] = typer.Option(
        ..., "--lora", help="Adapter directory, or DIRECTORY:scale; repeat it to add several up."
    ),
    out: Path = typer.Option(..., "-o", "--out", help="Directory to write."),
    weights_from: str = typer.Option(
        None,
        "--weights-from",
        help="The adapters are checkpoints of one run: average them by 1/loss (loss) or by step, "
        "as trainer_state.json records them.",
    ),
    penalty: float = typer.Option(
        1.0, "--penalty", help="With --weights-from: exponent of the metric; 0 is the plain mean."
    ),
    combine: str = typer.Option(
        "linear",
        "--combine",
        help="How several become one: linear (their sum), ties, dare_linear or dare_ties.",
    ),
    density: float = typer.Option(
        None, "--density", help="With ties and dare: share of each change kept (default: 0.5)."
    ),
    seed: int = typer.Option(
        None, "--seed", min=0, help="With dare: what is kept by chance (default: 0)."
    ),
    residual_base: bool = typer.Option(
        False,
        "--residual-base",
        help="The model is the base that the adapter's init (PiSSA and its like) left behind.",
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Discard an unfinished run, do not resume."),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Merge LoRA adapters into a checkpoint, in float32, and write it as a normal checkpoint."""
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    with Bars(quiet) as bars:
        result = api.merge(
            model, lora, out, weights_from=weights_from, penalty=penalty, combine=combine,
            density=density, seed=seed, residual_base=residual_base, fresh=fresh,
            trust_remote_code=trust_remote_code, progress=bars,
        )  # fmt: skip
    if json:
        print_json(result.to_json())
        return
    typer.echo(f"checkpoint: {result.path}, {result.nbytes:,} bytes")
    for adapter in result.adapters:
        typer.echo(f"merged: {adapter['adapter']} x {adapter['scale']:g}, "
                   f"{adapter['tensors']} of {result.tensors} tensors changed")  # fmt: skip
    if not quiet:
        say(f"next: bitnest compress {result.path}")
