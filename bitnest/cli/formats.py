"""bitnest formats."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import typer

from bitnest.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table


def command(
    names: list[str] = typer.Argument(None, help="Formats to detail; none lists the catalogue."),
    shape: str = typer.Option(
        "4096,4096", "--shape", help="Out and in features that sizes are stated for."
    ),
    json: bool = Json,
) -> None:
    """List number formats: bits per weight, granularity, which engine and kernel runs them."""
    from bitnest.cli.render import print_json, wide_console
    from bitnest.formats.catalogue import CATALOGUE, describe

    size = parse_shape(shape)
    entries = [describe(name) for name in names] if names else list(CATALOGUE)
    found = [_facts(entry.family, entry.name, entry.description, size) for entry in entries]
    if json:
        print_json({"shape": list(size), "formats": found})
        return
    if names:
        for number, facts in enumerate(found):
            if number:
                typer.echo()
            _print_details(facts, size)
        return
    table = _table(found)
    console = wide_console(table)
    console.print(table)
    console.print(
        f"\nbits/weight: everything stored, for a matrix of {size[0]} x {size[1]} (--shape)\n"
        "kernel: decodes; encoder: rounds to nearest, several times faster in C than in torch\n"
        "any name of the grammar can be detailed: bitnest formats int3-g64-asym@rhad64+lqer16\n"
        "inputs are rounded to others, such as int8-token, int6-g128, fp8-token, mxfp4: "
        "compress --inputs",
        highlight=False,
    )


def parse_shape(text: str) -> tuple[int, int]:
    """Out and in features of `4096,4096`.

    Raises:
        RecipeError: not two whole numbers from 1 on.
    """
    from bitnest.errors import RecipeError

    match = re.fullmatch(r"\s*0*([1-9]\d{0,8})\s*,\s*0*([1-9]\d{0,8})\s*", text)
    if match is None:
        raise RecipeError(
            f"--shape takes out and in features, not '{text}'",
            hint="for example --shape 4096,11008",
        )
    return int(match[1]), int(match[2])


def _facts(family: str, name: str, description: str, shape: tuple[int, int]) -> dict[str, Any]:
    from bitnest.export.support import engines_of, kernel_of
    from bitnest.formats import parse_format
    from bitnest.formats.catalogue import bits_per_weight, granularity, scale_kind
    from bitnest.formats.support import native_encoder

    fmt = parse_format(name)
    return {
        "name": name,
        "family": family,
        "description": description,
        "bits": fmt.bits,
        "bits_per_weight": bits_per_weight(fmt, shape),
        "exact": fmt.fixed_size,
        "granularity": granularity(fmt),
        "scale": scale_kind(fmt),
        "engines": engines_of(fmt),
        "kernel": kernel_of(fmt),
        "encoder": "C" if native_encoder(fmt) else "torch",
        "bytes": fmt.nbytes(shape),
        "parts": [
            {"name": key, "dtype": part.dtype, "shape": list(part.shape), "bytes": part.nbytes}
            for key, part in fmt.parts(shape).items()
        ],
    }


def _table(found: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "family"):
        table.add_column(column, no_wrap=True)
    for column in ("bits", "bits/weight"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("granularity", "scale", "engines", "kernel", "encoder"):
        table.add_column(column, no_wrap=True)
    for facts in found:
        table.add_row(
            facts["name"],
            facts["family"],
            f"{facts['bits']:g}",
            _bits(facts),
            facts["granularity"] or "-",
            facts["scale"] or "-",
            ", ".join(facts["engines"]),
            facts["kernel"],
            facts["encoder"],
        )
    return table


def _bits(facts: dict[str, Any]) -> str:
    return (
        f"{facts['bits_per_weight']:.3f}" if facts["exact"] else f"<={facts['bits_per_weight']:.3f}"
    )


def _print_details(facts: dict[str, Any], shape: tuple[int, int]) -> None:
    from rich.table import Table

    from bitnest.cli.render import wide_console

    text = facts["description"]
    typer.echo(facts["name"] + (f": {text}" if text else ""))
    typer.echo(f"  family       {facts['family']}")
    typer.echo(f"  bits         {facts['bits']:g} a code, {_bits(facts)} a weight")
    typer.echo(f"  granularity  {facts['granularity'] or '-'}, scale {facts['scale'] or '-'}")
    typer.echo(f"  engines      {', '.join(facts['engines'])}")
    typer.echo(f"  kernel       {facts['kernel']}")
    typer.echo(f"  encoder      {facts['encoder']}")
    typer.echo(f"  stored for a matrix of {shape[0]} x {shape[1]}:")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 2))
    for column in ("part", "type", "shape"):
        table.add_column(column, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for part in facts["parts"]:
        dims = " x ".join(map(str, part["shape"]))
        table.add_row(part["name"], part["dtype"], dims, f"{part['bytes']:,}")
    table.add_row("total", "", "", f"{facts['bytes']:,}")
    wide_console(table).print(table)
