"""bitnest prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from bitnest.cli.options import Json, Lora, Quiet, Remote


def command(
    model: str = typer.Argument(help="Model directory, hub id, or demo."),
    out: Path = typer.Option(..., "-o", "--out", help="Directory to write."),
    lora: list[str] = Lora,
    experts: str = typer.Option(
        None, "--experts", help="Experts to keep in every layer: 75%, or how many."
    ),
    blocks: int = typer.Option(
        0, "--blocks", help="Decoder blocks to leave out, the least active."
    ),
    score: str = typer.Option(
        "measured",
        "--score",
        help="Which experts go: relative (error of the layer without them), reap, frequency, gate, "
        "output, fisher, naee (every subset tried, where few), or measured: of the choices by "
        "relative, output and reap the one of lowest KL.",
    ),
    fate: str = typer.Option(
        "drop", "--fate", help="drop them, or merge all into as many (HC-SMoE)."
    ),
    align: bool = typer.Option(
        False, "--align", help="Put neurons in one order before experts are merged."
    ),
    tune: bool = typer.Option(
        None,
        "--tune/--no-tune",
        help="Tune the routers afterwards, where measured to help. (default: if the memory holds "
        "the model)",
    ),
    data: list[str] = typer.Option(
        [], "--data", help="Calibration text, label=source; repeat it. (default: an embedded text)"
    ),
    samples: int = typer.Option(64, "--samples", min=1, help="Calibration windows."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens of a window."),
    seed: int = typer.Option(0, "--seed", min=0, help="Of drawing windows and tuning."),
    statistics: Path = typer.Option(
        None, "--statistics", help="Directory that analyze wrote: gradients for --score fisher."
    ),
    device: str = typer.Option(None, "--device", help="cpu or cuda. (default: cuda if there)"),
    fresh: bool = typer.Option(
        False, "--fresh", help="Discard files of an unfinished run, do not resume."
    ),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Leave out experts or blocks and write what is left as an ordinary checkpoint."""
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    with Bars(quiet) as bars:
        result = api.prune(
            model, out, lora=lora, experts=experts, blocks=blocks, score=score, fate=fate,
            align=align, tune=tune, data=data, samples=samples, length=length, seed=seed,
            statistics=statistics, device=device, fresh=fresh,
            trust_remote_code=trust_remote_code, progress=bars,
        )  # fmt: skip
    if json:
        print_json(result.to_json())
        return
    typer.echo(f"checkpoint: {result.path}, {result.nbytes:,} of {result.before:,} bytes")
    for line in _lines(result):
        typer.echo(line)
    if not quiet:
        say(f"next: bitnest eval {result.path} --against {model}; bitnest compress {result.path}")


def _lines(result: Any) -> list[str]:
    lines = []
    chosen = result.chosen
    if result.experts[0]:
        lines.append(f"experts: {result.experts[1]} of {result.experts[0]} in every layer")
    if chosen.measured:
        tried = ", ".join(f"{name} {kl:.4g}" for name, kl in chosen.measured.items())
        lines.append(f"chosen by {chosen.score}; KL on the calibration text: {tried}")
    elif chosen.score:
        lines.append(f"chosen by {chosen.score}")
    if chosen.errors:
        worst = max(chosen.errors, key=chosen.errors.__getitem__)
        mean = sum(chosen.errors.values()) / len(chosen.errors)
        lines.append(f"error of a layer, relative to the residual stream: mean {mean:.2g}, most "
                     f"{chosen.errors[worst]:.2g} (block {worst})")  # fmt: skip
    if result.blocks[0] != result.blocks[1]:
        gone = ", ".join(f"{b} ({chosen.similar[b]:.2g})" for b in chosen.reduction.dropped)
        lines.append(f"blocks left out (1 - cosine of input and output): {gone}")
    if chosen.tuned is not None:
        tuned = chosen.tuned
        if tuned.tensors:
            lines.append(f"routers tuned: KL on held-out windows {tuned.before:.4g} -> "
                         f"{tuned.after:.4g}")  # fmt: skip
        else:
            lines.append(f"routers left as they were: tuning did not lower the KL of "
                         f"{tuned.before:.4g} on held-out windows")  # fmt: skip
    return lines
