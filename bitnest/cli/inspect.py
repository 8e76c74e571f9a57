"""bitnest inspect."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer

from bitnest.cli.options import Json, Remote


def command(
    model: str = typer.Argument(
        help="Checkpoint, artifact or statistics: directory, hub id, demo."
    ),
    sites: bool = typer.Option(False, "--sites", help="List every site."),
    verify: bool = typer.Option(
        False, "--verify", help="Read every file of an artifact and compare it with its checksum."
    ),
    json: bool = Json,
    trust_remote_code: bool = Remote,
) -> None:
    """Show a model's sites, kinds and formats; its weights are read only to --verify them."""
    from bitnest.cli.render import print_json
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    found = api.inspect(model, verify=verify, trust_remote_code=trust_remote_code)
    if json:
        print_json(found)
        return
    _print(found, sites)


def _print_statistics(found: dict[str, Any]) -> None:
    typer.echo(f"model: {found['model']}, {found['source']['parameters']:,} parameters")
    for item in found["data"]:
        typer.echo(f"  {item['label']}: {item['samples']} windows, {item['tokens']:,} tokens")
    importance = found["importance"]
    kind = "not measured" if importance is None else importance["kind"]
    typer.echo(f"importance: {kind}; Hessians: {found['hessian']}; probes: {found['probes']}")
    typer.echo("candidates: " + (", ".join(found["formats"]) or "none"))
    if rounded := found.get("inputs"):
        typer.echo("inputs: " + ", ".join(rounded["formats"]))


def _reduced(said: dict[str, Any] | None) -> list[str]:
    """What became of experts and blocks, numbered as in the source."""
    lines = []
    for block, layer in (said or {}).get("experts", {}).items():
        merged = sum(len(slot) > 1 for slot in layer["slots"])
        parts = [
            f"{len(layer['slots'])} experts" + (f", {merged} of them merged" if merged else "")
        ]
        kinds = Counter(row.partition(":")[0] for row in layer["rows"] if isinstance(row, str))
        parts += [f"{count} replaced by {kind}" for kind, count in sorted(kinds.items())]
        lines.append(f"  block {block} of the source: {', '.join(parts)}")
    if said and said["dropped"]:
        lines.append(f"  blocks left out: {', '.join(map(str, said['dropped']))}")
    return lines


def _format(site: dict[str, Any]) -> str:
    """Of weights, and of inputs if they are rounded."""
    inputs = f"/{site['inputs']}" if site.get("inputs") else ""
    return site.get("format", "") + inputs


def _print(found: dict[str, Any], every: bool) -> None:
    typer.echo(f"{found['kind']}: {found['path']}")
    typer.echo(f"architecture: {found['architecture']}")
    for adapter in found.get("source", {}).get("merged", []):
        typer.echo(f"merged: {adapter['adapter']} x {adapter['scale']:g}")
    if folded := found.get("source", {}).get("folded"):
        from bitnest.folds import describe

        for line in describe(folded):
            typer.echo(line)
    for line in _reduced(found.get("source", {}).get("reduced")):
        typer.echo(line)
    expected = (found.get("plan") or {}).get("expected", {})
    if "input_bits" in expected:
        from bitnest.cli.plan_tables import input_line

        typer.echo(input_line(expected))
    if found.get("kv"):
        typer.echo(f"KV cache: {found['kv']}")
    if "verified" in found:
        typer.echo(f"checksums: {found['verified']} files match")
    if found["kind"] == "statistics":
        _print_statistics(found)
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for site in found["sites"]:
        counts[(site["kind"], _format(site), tuple(site["shape"]))] += 1
    for (kind, fmt, shape), count in sorted(counts.items()):
        typer.echo(f"  {count:6,} x {kind:14} {shape[0]}x{shape[1]}  {fmt}")
    if "other_tensors" in found:
        typer.echo(f"  {len(found['other_tensors']):6,} other tensors (stay dense)")
        if found["unused_tensors"]:
            typer.echo(
                f"  {len(found['unused_tensors']):6,} tensors the model does not use (copied)"
            )
    if every:
        for site in found["sites"]:
            typer.echo(f"{site['name']}  {site['shape'][0]}x{site['shape'][1]}  {_format(site)}")
