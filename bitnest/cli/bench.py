"""bitnest bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

DISTURBED = 1.15  # a share that no kernel has of memory's bandwidth

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@app.callback()
def _group() -> None:
    """Keeps `kernels` a word of its own."""


@app.command("kernels")
def kernels(
    json: Path = typer.Option(
        None, "--json", help="Write the result to this file as JSON; - ends stdout with it."
    ),
    quick: bool = typer.Option(False, "--quick", help="Fewer shapes and less time."),
    device: str = typer.Option(None, "--device", help="cpu or cuda (default: cuda if it runs)."),
) -> None:
    """Measure kernels: share of the memory's bandwidth, and gain over torch."""
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from json import dumps

    from bitnest.api.benching import bench_kernels
    from bitnest.cli.render import say, wide_console
    from bitnest.workdir import write_text

    to_file = json is not None and str(json) != "-"
    if to_file:
        _check_writable(json)
    say("measuring; leave the machine alone meanwhile, other work takes bandwidth")

    def show(row: dict[str, Any]) -> None:
        table = _cpu_table(row)
        wide_console(table).print(table)
        typer.echo()

    found = bench_kernels(device, quick, show)
    if found["device"] == "cuda":
        table = _gpu_table(found)
        wide_console(table).print(table)
    else:
        typer.echo(f"{found['isa']}, {found['threads']} threads; share: of a streaming read")
        if any(own["share"] > DISTURBED for row in found["rows"] for own in row["table"].values()):
            say("some read faster than memory was found to be: other work ran meanwhile, or caches "
                "hold the weights; these shares say nothing")  # fmt: skip
    if to_file:
        write_text(json, dumps(found) + "\n")
    elif json is not None:
        typer.echo(dumps(found))


def _check_writable(file: Path) -> None:
    from os import W_OK, access

    from bitnest.errors import BitnestError

    if file.is_dir() or not access(file.parent, W_OK):
        what = "is a directory" if file.is_dir() else "lies where nothing can be written"
        raise BitnestError(f"--json {file} {what}", hint="name a file in one that is")


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cpu_table(row: dict[str, Any]) -> Table:
    title = f"{row['N']} x {row['K']}, {row['M']} token{'s' * (row['M'] > 1)}"
    right = ("us", "p20", "p80", "GB/s", "share", "x torch bf16", "x torch int4")
    table = _table(title, ("kernel",), right)
    for name, own in row["table"].items():
        int4 = "-" if own["to_int4"] is None else f"{own['to_int4']:.2f}"
        table.add_row(
            name, *(f"{own[key]:.1f}" for key in ("us", "us_p20", "us_p80", "gb_s")),
            f"{own['share']:.0%}", f"{own['to_bf16']:.2f}", int4,
        )  # fmt: skip
    return table


def _gpu_table(found: dict[str, Any]) -> Table:
    rate = found["copy_bytes_per_s"] / 1e9
    title = f"{found['machine']['device']}; share: of a copy, {rate:.0f} GB/s"
    table = _table(title, ("operation", "format", "size"), ("tokens", "us", "share", "x", "beside"))
    for row in found["rows"]:
        bits = f"@{row['bits']}" if row.get("bits") else ""
        size = next((row[k] for k in ("shape", "heads", "columns") if k in row), "")
        tokens = row.get("m", f"{row.get('batch')}x{row.get('n')}")
        cells = [row["op"], row["format"] + bits, str(size), str(tokens)]
        if row.get("wrong"):
            table.add_row(*cells, "WRONG", f"error {row['error']:.2g}", "", "")
            continue
        gain = f"{row['speedup']:.2f}" if "speedup" in row else "-"
        table.add_row(
            *cells, f"{row['us']:.1f}", f"{row['share']:.0%}", gain, row.get("beside", "")
        )
    return table
