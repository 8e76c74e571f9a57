"""bitnest eval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bitnest.cli.options import Device, Json, Quiet, Remote, parse_size

if TYPE_CHECKING:
    from bitnest.eval.report import EvalReport


def command(
    models: list[str] = typer.Argument(help="Artifacts or checkpoints to measure."),
    against: str = typer.Option(None, "--against", help="The base they are compared with."),
    lora: list[str] = typer.Option(
        [],
        "--lora",
        help="LoRA adapter put on every measured model: DIRECTORY, or DIRECTORY:scale; beside "
        "packed weights it stays apart.",
    ),
    against_lora: list[str] = typer.Option([], "--against-lora", help="The same, put on the base."),
    data: list[str] = typer.Option(
        [], "--data", help="Text: [label=]file, directory or hub:name (default: embedded text)."
    ),
    without: list[str] = typer.Option(
        [],
        "--without",
        help="LAYER:EXPERT[,EXPERT...]: one more row per model, with these experts switched off: "
        "their gates become 0 and the token's other gates are scaled up to the same sum; no other "
        "expert is picked instead. May be repeated. One model alone is its own base.",
    ),
    bits: str = typer.Option(
        None,
        "--bits",
        help="Widths to read nested artifacts at, a row for each they have: 2-8 or 2,3,4.",
    ),
    size: str = typer.Option(
        None,
        "--size",
        help="Memory for the weights of nested artifacts, a row for each: 2GiB or 9MB,12MB. Every "
        "weight gets the width that loses least.",
    ),
    kv: list[str] = typer.Option(
        [],
        "--kv",
        help="KV cache that the text goes through: fp8, int8, int4-g128-w128 ... or none, a row "
        "for each (default: what the artifact asks for). One model alone is its own base.",
    ),
    split: bool = typer.Option(
        False,
        "--split",
        help="Further rows for what weights, rounded inputs and KV cache lose by themselves.",
    ),
    window: int = typer.Option(256, "--window", min=2, help="Tokens per window."),
    windows: int = typer.Option(64, "--windows", min=1, help="Windows per text, evenly spread."),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Windows per forward pass."),
    dtype: str = typer.Option("float32", "--dtype", help="Compute type."),
    device: str = Device,
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Measure perplexity, KL divergence against a base, agreement and size, side by side."""
    from bitnest.cli.render import Bars, print_json
    from bitnest.cli.setup import prepare_process, quiet_transformers

    prepare_process()
    from bitnest import api
    from bitnest.formats.names import parse_widths

    quiet_transformers()
    with Bars(quiet) as bars:
        report = api.evaluate(
            models,
            against=against,
            lora=lora,
            against_lora=against_lora,
            data=data,
            without=without,
            bits=() if bits is None else parse_widths(bits),
            sizes=() if size is None else [parse_size(one) for one in size.split(",")],
            kv=kv,
            split=split,
            window=window,
            windows=windows,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=bars,
        )
    if json:
        print_json(report.to_json())
        return
    _print(report)


def _print(report: EvalReport) -> None:
    from rich.console import Console

    from bitnest.eval.render import table

    shown, console = table(report), Console(soft_wrap=True)
    # on a narrower terminal rich would drop the models' names before it lets lines wrap
    needed = shown.__rich_measure__(console, console.options.update(max_width=1000)).minimum
    console.width = max(console.width, needed)
    console.print(shown)
