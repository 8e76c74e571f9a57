"""bitnest analyze: what a person reads of it on the terminal; the rest is in the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitnest.cli.dials import Prune, remark_nested
from bitnest.cli.options import Device, Json, Lora, Quiet, Remote, parse_size

if TYPE_CHECKING:
    from rich.table import Table

DOMAINS = 6  # experts named
NAMED = 8  # starved experts named


# What --reuse leaves open; all the rest was settled when the statistics were measured.
OPEN_IN_REUSE = {
    "model", "lora", "out", "format", "reuse", "memory", "device", "compute", "fresh",
    "trust_remote_code", "json", "quiet",
}  # fmt: skip


def command(
    context: typer.Context,
    model: str = typer.Argument(help="Checkpoint: directory, hub id, or 'demo'."),
    out: Path = typer.Option(
        None, "-o", "--out", help="Directory of statistics and report (default: MODEL-statistics)."
    ),
    lora: list[str] = Lora,
    data: list[str] = typer.Option(
        [],
        "--data",
        help="Text: [label[:weight]=]file, directory or hub:name; may be repeated "
        "(default: embedded text).",
    ),
    samples: int = typer.Option(64, "--samples", min=1, help="Windows in all."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens per window."),
    pack: str = typer.Option("join", "--pack", help="join, or documents: none is cut by a window."),
    format: list[str] = typer.Option(
        [],
        "--format",
        help="A candidate format; may be repeated (default: int2-g128 to int8-g128).",
    ),
    inputs: list[str] = typer.Option(
        [],
        "--inputs",
        help="A candidate format of what matrices read: int6-g128, int8-token; may be repeated "
        "(default: none).",
    ),
    method: str = typer.Option("gptq", "--method", help="How candidates are fitted: gptq or rtn."),
    prune: str = Prune,
    importance: str = typer.Option(
        "kl", "--importance", help="kl or loss (gradients), probes (none needed), or none."
    ),
    fisher_windows: int = typer.Option(
        24, "--fisher-windows", min=1, help="Windows, of all labels, that gradients are taken on."
    ),
    probes: int = typer.Option(
        16, "--probes", min=0, help="Random mixed plans whose KL is measured, to calibrate on."
    ),
    probe_windows: int = typer.Option(
        16, "--probe-windows", min=1, help="Windows, of all labels, that probes are measured on."
    ),
    hessian: str = typer.Option(
        "auto", "--hessian", help="full, diagonal, or auto: diagonal only if memory asks for it."
    ),
    keep_hessians: bool = typer.Option(
        False, "--keep-hessians", help="Store full Hessians too, per label."
    ),
    weighting: str = typer.Option(
        "gate",
        "--expert-weighting",
        help="Token weights in an expert's Hessian: none, gate, gate2.",
    ),
    min_tokens: int = typer.Option(
        None,
        "--min-tokens",
        min=1,
        help="Tokens every expert should see (default: its input channels).",
    ),
    cover: str = typer.Option(
        None,
        "--cover",
        help="Add windows until experts are covered: data (the same sources) or self (generated).",
    ),
    cover_limit: int = typer.Option(64, "--cover-limit", min=1, help="Windows --cover looks at."),
    reuse: Path = typer.Option(
        None,
        "--reuse",
        help="Statistics with --keep-hessians: only add each --format; the model is not run.",
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Choice of windows and probes."),
    memory: str = typer.Option(None, "--memory", help="Bound on the process, such as 3GiB."),
    device: str = Device,
    compute: str = typer.Option("auto", "--compute", help="float32 or bfloat16."),
    fresh: bool = typer.Option(False, "--fresh", help="Discard an unfinished run, do not resume."),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Measure how every expert is used and how sensitive every site is: statistics and a report.

    A killed run resumes when the same command is given again.
    """
    from bitnest.cli.render import Bars, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api
    from bitnest.lora import name_with

    _check_probes(context, importance, probes)
    target = out or Path(f"{name_with(Path(model).name, lora)}-statistics")
    if reuse is not None:
        _check_reuse(context, reuse, format)
    if not quiet:
        remark_nested(model)
    if reuse is None and not data and not quiet:
        say("analyzing on the embedded text; your own, by --data, says what you will see in use")
    with Bars(quiet) as bars:
        statistics = api.analyze(
            model,
            target,
            lora=lora,
            data=data,
            samples=samples,
            length=length,
            pack=pack,
            formats=format or ([] if importance == "none" else api.CANDIDATES),
            inputs=inputs,
            method=method,
            prune=prune,
            importance=importance,
            fisher_windows=fisher_windows,
            probes=probes,
            probe_windows=probe_windows,
            hessian=hessian,
            keep_hessians=keep_hessians,
            weighting=weighting,
            min_tokens=min_tokens,
            cover=cover,
            cover_limit=cover_limit,
            reuse=reuse,
            seed=seed,
            memory=parse_size(memory),
            device=device,
            compute=compute,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            progress=bars,
        )
    print_analysis(statistics.path, json, model)
    if not quiet:
        say(f"next: open {statistics.path / 'report.html'}")


def _check_reuse(context: typer.Context, reuse: Path, formats: list[str]) -> None:
    from bitnest.errors import RecipeError

    given = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name not in OPEN_IN_REUSE and _was_given(context, option.name)
    ]
    if given or not formats:
        raise RecipeError(
            "--reuse takes everything but formats from earlier statistics"
            + (f", {', '.join(given)} too" if given else ""),
            where=str(reuse),
            hint="give it --format, once or more, and no other option of measuring",
        )


def _check_probes(context: typer.Context, importance: str, probes: int) -> None:
    from bitnest.errors import RecipeError

    if importance == "none" and probes and _was_given(context, "probes"):
        raise RecipeError(
            "probes calibrate predictions, and without importance there is nothing to predict from",
            where=f"--importance none --probes {probes}",
            hint="leave out one of the two",
        )


def _was_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


def print_analysis(path: Path, json: bool, model: str | None = None) -> None:
    """What report.json in `path` says, as JSON or in short. model: as the user names it; None if
    only statistics were named, which do not know where it lies."""
    import json as parser

    from bitnest.cli.render import print_json

    analysis = parser.loads((path / "report.json").read_text(encoding="utf-8"))
    if json:
        print_json({"path": str(path), **analysis})
        return
    from bitnest.cli.render import wide_console

    tables = [table for table in (_data(analysis), _experts(analysis), _losses(analysis)) if table]
    console = wide_console(*tables)
    for table in tables:
        console.print(table)
        console.print()
    for line in _sentences(analysis, model or "MODEL"):
        console.print(line, highlight=False)
    console.print(
        f"statistics and report: {path}, measured in {analysis['seconds']:.1f} s", highlight=False
    )


def _new_table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _data(analysis: dict[str, Any]) -> Table:
    table = _new_table("data", "documents", "duplicates", "windows", "tokens", "available")
    for item in analysis["data"]:
        table.add_row(
            item["label"],
            *(f"{item[key]:,}" for key in ("documents", "duplicates", "samples", "tokens")),
            f"{item['available']:,}",
        )
    return table


def _experts(analysis: dict[str, Any]) -> Table | None:
    if not analysis["layers"]:
        return None
    table = _new_table("layer", "experts", "used", "half of tokens in", "balance", "next layer")
    for layer in analysis["layers"]:
        labels = len(layer["share"])
        share = sorted((sum(s) / labels for s in zip(*layer["share"], strict=True)), reverse=True)
        used = sum(any(t) for t in zip(*layer["tokens"], strict=True))
        entropy = layer["transition_entropy"]
        table.add_row(
            str(layer["layer"]),
            str(layer["experts"]),
            str(used),
            str(_half(share)),
            f"{sum(layer['balance']) / labels:.2f}",
            "-" if entropy is None else f"{entropy:.2f} bits",
        )
    return table


def _half(share: list[float]) -> int:
    """How many of the most used experts take half."""
    taken = 0.0
    for count, value in enumerate(share, 1):
        taken += value
        if taken >= 0.5:
            return count
    return len(share)


def _losses(analysis: dict[str, Any]) -> Table | None:
    found = analysis["sensitivity"]
    if found is None or not found["by_layer"]:
        return None
    kinds: dict[str, list[float]] = {}
    for item in found["by_layer"]:
        total = kinds.setdefault(item["kind"], [0.0] * len(item["loss"]))
        kinds[item["kind"]] = [a + b for a, b in zip(total, item["loss"], strict=True)]
    table = _new_table("loss alone", *(fmt["name"] for fmt in found["formats"]))
    for kind, loss in kinds.items():
        table.add_row(kind, *(f"{value:.1e}" for value in loss))
    return table


def _sentences(analysis: dict[str, Any], model: str) -> list[str]:
    lines = []
    for item in analysis["domains"][:DOMAINS]:
        most, least = item["label"], item["other"]
        lines.append(
            f"layer {item['layer']} expert {item['expert']}: {100 * item['share'][most]:.0f} % of "
            f"{most}, {100 * item['share'][least]:.0f} % of {least} "
            f"(bitnest eval {model} --without {item['layer']}:{item['expert']})"
        )
    lines.extend(_coverage(analysis["coverage"]))
    prediction = analysis["prediction"]
    if prediction is not None:
        lines.append(_error_bar(prediction))
    offloading = analysis["offloading"]
    if offloading is not None and offloading["top_k"]:
        lines.append(_caches(offloading))
    return lines


def _error_bar(prediction: dict[str, Any]) -> str:
    if prediction["error"] is None:
        return "predicted KL: it rests on one probe, so its error is unknown (--probes 2 or more)"
    return (
        f"predicted KL: one standard error is a factor of {math.exp(prediction['error']):.2f} "
        f"(each of {prediction['probes']} probes predicted by the others)"
    )


def _coverage(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    from bitnest.calibrate.report.common import asked, unheld

    text = f"coverage: {found['covered']} of {found['experts']} experts saw {asked(found)}"
    text += unheld(found)
    if found["drawn"]["windows"]:
        text += f", with {found['drawn']['windows']} windows added for it"
    worst = sorted(found["starved"], key=lambda item: item["fitted"])[:NAMED]
    if worst:
        names = ", ".join(f"{i['layer']}:{i['expert']} {i['fitted']}" for i in worst)
        text += f"; fewest: {names}. Their Hessians lean on the layer's inputs"
        text += "" if found["drawn"]["windows"] else " (--cover data helps)"
    return [text]


def _caches(found: dict[str, Any]) -> str:
    rates, size = found["hit_rates"], 2 * found["top_k"]
    if size not in rates["sizes"]:
        return f"offloading: fewer than {size} experts, nothing to cache"
    at = rates["sizes"].index(size)
    shares = ", ".join(f"{name} {100 * rates[key][at]:.0f} %" for name, key in
                       (("LRU", "lru"), ("LFU", "lfu"), ("Belady", "belady")))  # fmt: skip
    return f"offloading: a cache of {size} experts per layer hits {shares}"
