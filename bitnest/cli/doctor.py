"""bitnest doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bitnest.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table


def command(json: bool = Json) -> None:
    """Show what this machine has, and which kernels run every format here."""
    from bitnest.cli.render import print_json, say, wide_console
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest.api.doctoring import doctor

    if not json:
        say("looking at this machine; kernels that are not there yet are compiled")
    found = doctor()
    if json:
        print_json(found)
        return
    for line in _machine(found):
        typer.echo(line)
    for device, rows in found["paths"].items():
        table = _table(device, rows)
        typer.echo()
        wide_console(table).print(table)
    typer.echo("\nreference: torch decodes the weight and multiplies with the dense matrix")
    for hint in found["hints"]:
        typer.echo(f"hint: {hint}")


def _machine(found: dict[str, Any]) -> list[str]:
    from bitnest.cli.render import size

    cpu, memory = found["cpu"], found["memory"]
    known = {name: version or "not installed" for name, version in found["versions"].items()}
    lines = [f"system: {found['system']}"]
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in known.items()))
    lines.append(
        f"cpu: {cpu['model']}, {cpu['cores']} of {cpu['cores_of_machine']} cores granted, "
        f"level {cpu['level']}"
    )
    lines.append("  features: " + (" ".join(cpu["simd"]) or "not known"))
    caches = ", ".join(f"{name} {nbytes}" for name, nbytes in cpu["caches"].items())
    lines.append("  caches: " + (caches or "not known"))
    free = [size(nbytes) for nbytes in (memory["available"], memory["total"]) if nbytes is not None]
    lines.append("memory: " + (" free of ".join(free) or "not known"))
    compiler = found["compiler"]
    lines.append(
        "compiler: "
        + (f"none: {compiler['missing']}" if "missing" in compiler else
           f"{compiler['command']}, {compiler['version']}")
    )  # fmt: skip
    for library in found["libraries"]:
        how = f"built for {library['level']} with the package, " if library["level"] else ""
        where = how + library["file"] if library["file"] else f"not built: {library['why']}"
        lines.append(f"  kernels/{library['name']}: {where}")
    driver = f", driver {found['driver']}" if found["driver"] else ""
    lines.append(f"gpus: {len(found['gpus']) or 'none'}{driver}")
    for number, gpu in enumerate(found["gpus"]):
        lines.append(
            f"  cuda:{number}: {gpu['name']}, capability {gpu['capability']}, "
            f"{size(gpu['free'])} free of {size(gpu['memory'])}, "
            f"{gpu['multiprocessors']} multiprocessors, runtime {gpu['runtime']}"
        )
    return lines


def _table(device: str, rows: list[dict[str, str]]) -> Table:
    """One line per family and path; formats that go another way have a line of their own."""
    from rich.table import Table

    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row["family"], row["path"], row["reason"]), []).append(row["format"])
    whole = {family for family, _, _ in grouped}
    ways = {family: sum(key[0] == family for key in grouped) for family in whole}
    table = Table(title=f"on {device}", title_justify="left", box=None, pad_edge=False)
    for column in ("family", "formats", "path", "reason"):
        table.add_column(column, no_wrap=True)
    for (family, path, reason), names in grouped.items():
        table.add_row(family, "all" if ways[family] == 1 else " ".join(names), path, reason)
    return table
