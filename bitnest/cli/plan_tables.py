"""What a person reads of a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnest.cli.render import size, wide_console
from bitnest.errors import RecipeError
from bitnest.formats.names import brief_name
from bitnest.patterns import matcher
from bitnest.quantize.allocation.explain import Explanation
from bitnest.quantize.allocation.explain import explain as explanations
from bitnest.quantize.allocation.explain_inputs import InputExplanation, explain_inputs
from bitnest.quantize.allocation.frontier import Frontier
from bitnest.quantize.allocation.planned import Planned
from bitnest.quantize.preflight import MACHINES, Preflight

PICTURES = (".svg", ".png", ".pdf")
EXPLAINED = 20  # items in full, when a pattern names many

STATES = {
    "solved": "the plan is as it was made",
    "edited": "the plan was edited since it was made: its rules are not those of its digest",
    "unknown": "whether the plan was edited is not known: it has no digest",
}


def check_place(option: str, path: Path | None) -> None:
    """Refuse before work a file that cannot be written after it.

    Raises:
        RecipeError: a directory is there, or where it would go nothing can be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise RecipeError(
            f"{option}: a directory is in the way", where=str(path), hint="name a file in it"
        )
    folder = path.absolute().parent
    while not os.path.exists(folder):  # False, not an error, below a file
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "may not be written to" if folder.is_dir() else "is no directory"
        raise RecipeError(
            f"{option} cannot be written: {folder} {why}",
            where=str(path),
            hint=f"choose another {option}",
        )


def check_early(patterns: Sequence[str], plot: Path | None, machine: str | None) -> None:
    """Refuse before work what is needed after it.

    Raises:
        RecipeError: a broken pattern, a kind of picture that cannot be drawn, an unknown machine.
    """
    for pattern in patterns:
        matcher(pattern)
    if plot is not None and plot.suffix not in PICTURES:
        raise RecipeError(f"no picture of kind '{plot.suffix}'", hint="--plot frontier.svg or .png")
    if machine is not None and machine not in MACHINES:
        raise RecipeError(f"unknown machine '{machine}'", hint="one of " + ", ".join(MACHINES))


def row(planned: Planned) -> dict[str, Any]:
    """One plan as plain values."""
    return {
        "policy": planned.plan.policy, "bits": planned.bits,
        "bits_per_weight": planned.bits_per_weight, "sizes": vars(planned.sizes),
        "artifact_bytes": planned.sizes.artifact, "kl": planned.mean, "low": planned.low,
        "high": planned.high, "kl_by_text": planned.kl, "gap": planned.gap,
        **({} if planned.inputs is None else planned.inputs.figures()),
    }  # fmt: skip


def as_json(
    planned: Planned, before: Preflight, cost: dict[str, Any] | None, explained: Sequence[str]
) -> dict[str, Any]:
    """The plan with everything said about it.

    Raises:
        RecipeError: a pattern of `explained` that matches no planned site.
    """
    rules = [{rule.pattern: rule.format} for rule in planned.plan.rules]
    found = {
        **row(planned), "target": planned.plan.target, "asked": planned.plan.asked,
        "rules": rules, "preflight": before.to_json(), "constraint": cost,
    }  # fmt: skip
    if explained:
        found["explain"] = [item.to_json() for item in explained_items(planned, explained)]
        if planned.inputs is not None:
            own = [item for text in explained for item in explain_inputs(planned, text)]
            found["explain_inputs"] = [item.to_json() for item in own]
    return found


def summary(
    planned: Planned, before: Preflight, cost: dict[str, Any] | None, state: str | None = None
) -> None:
    """Widths by kind, bytes, prediction, and what it takes. state: of a plan file that is checked,
    see `Plan.state`: this is the result then and goes to stdout; otherwise the plan is."""
    table = _by_kind(planned)
    console = wide_console(table, stderr=state is None)
    console.print(table)
    if state is not None:
        console.print(STATES[state], highlight=False, markup=False)
    for line in lines(planned, before, cost):
        console.print(line, highlight=False, markup=False)


def lines(planned: Planned, before: Preflight, cost: dict[str, Any] | None) -> list[str]:
    """The summary in words."""
    sizes = planned.sizes
    found = [
        f"{planned.bits:.4g} bits on average over the planned weights"
        + (f" ({planned.dense:.1%} of them dense)" if planned.dense else "")
        + f", {planned.bits_per_weight:.3f} with scales; "
        f"artifact {sizes.artifact:,} bytes ({size(sizes.artifact)}): packed {sizes.packed:,}, "
        f"dense {sizes.dense:,}, headers and manifest {sizes.headers + sizes.manifest:,}, "
        f"tokenizer and config {sizes.other:,}"
    ]
    if sizes.cache:
        found.append(f"with {size(sizes.cache)} of key-value cache: {sizes.total:,} bytes")
    text = f"predicted KL: {planned.mean:.3g} nats per token"
    if planned.low is not None and planned.high is not None:
        text += f", {planned.low:.3g} to {planned.high:.3g} within one standard error"
    found.append(text + " (" + ", ".join(f"{k} {v:.3g}" for k, v in planned.kl.items()) + ")")
    if planned.inputs is not None:
        found.append(input_line(planned.inputs.figures()))
    if planned.gap is not None:
        found.append(
            "optimal under this budget, losses taken as linear about the plan"
            if planned.gap == 0
            else f"within {planned.gap:.1e} of the bound under this budget, losses taken as linear "
            "about the plan"
        )
    if cost is not None:
        found.append(
            f"target {planned.plan.target} ({cost['rules']}) costs {cost['kl']:.3g} nats of KL at "
            f"this size: bitnest's own runtime would reach {cost['free']:.3g}"
        )
    return [*found, *estimates(before)]


def input_line(figures: Mapping[str, Any]) -> str:
    """Width and loss of inputs as a plan keeps them, in words."""
    time = figures.get("input_time")
    return (
        f"inputs: {figures['input_bits']:.4g} bits on average over multiply-accumulates"
        + ("" if time is None else f", {time:.1%} of the time at their widest")
        + f"; they add {figures['input_kl']:.3g} nats to the predicted KL"
    )


def estimates(before: Preflight) -> list[str]:
    """What a run takes and how fast its result may be, in words."""
    found = [
        f"estimates: {before.disk:,} bytes on disk, {size(before.memory)} of memory and "
        f"{_time(before.seconds)} to compress"
        + (f", {size(before.free)} of disk free" if before.free is not None else "")
    ]
    for speed in before.speeds:
        if speed.fits:
            text = f"at most {speed.decode:,.0f} tokens/s for one stream"
        else:
            text = (
                f"does not fit: at most {speed.decode:,.1f} tokens/s over the link, "
                f"{speed.batch or 0:,.0f} in batches (MoE-Lens)"
            )
        found.append(f"  {speed.machine}: {text}; roofline, {speed.source}")
    return found


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _by_kind(planned: Planned) -> Any:
    from rich.table import Table

    menu = planned.menu
    used = [f for f in range(len(menu.formats)) if (planned.choice == f).any()]
    used.sort(key=lambda f: float(menu.widths[f]))
    chosen = np.array([brief_name(name) for name in menu.names(planned.choice)])
    columns = list(dict.fromkeys(n for f in used for n in chosen[planned.choice == f]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weights by kind")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("bits", justify="right")
    for k, kind in enumerate(menu.kinds):
        own = menu.kind == k
        total = menu.numel[own].sum()
        if not total:
            continue
        shares = [menu.numel[own & (chosen == name)].sum() / total for name in columns]
        bits = menu.bits[own, planned.choice[own]].sum() / total
        cells = [f"{share:.1%}" if share else "-" for share in shares]
        table.add_row(kind, *cells, f"{bits:.2f}")
    return table


def explained_items(planned: Planned, patterns: Sequence[str]) -> list[Explanation]:
    """What there is to say of the sites that match any of the patterns.

    Raises:
        RecipeError: a pattern that matches no planned site.
    """
    found = []
    for pattern in patterns:
        own = explanations(planned, pattern)
        if not own:
            raise RecipeError(f"no planned site matches '{pattern}'",
                              hint="bitnest inspect MODEL --sites lists names")  # fmt: skip
        found.extend(own)
    return found


def explain(planned: Planned, patterns: Sequence[str]) -> None:
    """Every choice of the sites that match, and why the chosen one won.

    Raises:
        RecipeError: a pattern that matches no planned site.
    """
    from rich.console import Console
    from rich.table import Table

    found = explained_items(planned, patterns)
    console = Console(soft_wrap=True)
    for item in found[:EXPLAINED]:
        together = f" and {len(item.sites) - 1} with it" if len(item.sites) > 1 else ""
        console.print(
            f"{item.sites[0]}{together}: {item.kind}, read by {item.share:.1%} of tokens; "
            f"by the rule {item.rule}",
            highlight=False, markup=False,
        )  # fmt: skip
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("format", "bits", "bytes", "loss (KL)", "loss + price", ""):
            table.add_column(column, justify="left" if column in {"format", ""} else "right")
        for line in item.lines:
            table.add_row(
                line.format, f"{line.bits:.3g}", f"{line.nbytes:,}", f"{line.loss:.3g}",
                f"+{line.value:.3g}" if line.value > 0 else "least",
                ", ".join(filter(None, (line.mark, "the whole expert" if line.whole else ""))),
            )  # fmt: skip
        console.print(table, markup=False)
        console.print(f"price: {item.price:.3g} nats per {item.unit}\n", highlight=False)
    for rounded in [item for text in patterns for item in explain_inputs(planned, text)][
        :EXPLAINED
    ]:
        _explain_inputs(console, rounded)
    if len(found) > EXPLAINED:
        console.print(f"and {len(found) - EXPLAINED} more; --json gives all", highlight=False)


def _explain_inputs(console: Any, item: InputExplanation) -> None:
    from rich.table import Table

    together = f" and {len(item.sites) - 1} with it" if len(item.sites) > 1 else ""
    console.print(
        f"inputs of {item.sites[0]}{together}: {item.work:.2%} of multiply-accumulates",
        highlight=False, markup=False,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("inputs", "bits", "loss (KL)", "loss + price", ""):
        table.add_column(column, justify="left" if column in {"inputs", ""} else "right")
    for line in item.lines:
        table.add_row(
            line.format, f"{line.bits:.3g}", f"{line.loss:.3g}",
            f"+{line.value:.3g}" if line.value > 0 else "least", "chosen" if line.chosen else "",
        )  # fmt: skip
    console.print(table, markup=False)
    console.print(f"price: {item.price:.3g} nats per {item.unit}\n", highlight=False)


def policies(rows: Sequence[Planned]) -> None:
    """Policies at one budget, least predicted KL first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("policy", "bits", "bytes", "KL", *rows[0].kl):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for planned in sorted(rows, key=lambda p: p.mean):
        table.add_row(
            planned.plan.policy, f"{planned.bits:.4g}", f"{planned.sizes.artifact:,}",
            f"{planned.mean:.3g}", *(f"{v:.3g}" for v in planned.kl.values()),
        )  # fmt: skip
    console = wide_console(table)
    console.print(table)
    console.print("KL: predicted, nats per token", highlight=False)


def frontier(found: Frontier) -> None:
    """Sizes and predicted KL."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    labels = list(next(iter(found.points.values()))[0].kl)
    for column in ("policy", "bytes", "size", "bits", "with scales", "KL", "one s.e.", *labels):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, points in found.points.items():
        for p in points:
            bar = "-" if p.low is None or p.high is None else f"{p.low:.2g} .. {p.high:.2g}"
            table.add_row(
                policy, f"{p.sizes.total:,}", size(p.sizes.total), f"{p.bits:.3f}",
                f"{p.bits_per_weight:.3f}", f"{p.mean:.3g}", bar,
                *(f"{v:.3g}" for v in p.kl.values()),
            )  # fmt: skip
    console = wide_console(table)
    console.print(table)
    console.print("KL: predicted mean, nats per token", highlight=False)
