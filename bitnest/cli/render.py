"""Tables, progress bars and errors: everything a person sees, in one place.

Meaning never hangs on colour. Progress and errors go to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bitnest.errors import BitnestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bitnest.api import CompressResult


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_error(error: BitnestError) -> None:
    """What, where and hint on stderr."""
    sys.stderr.write(f"error: {error}\n")


def say(text: str) -> None:
    """A remark to the person, on stderr."""
    sys.stderr.write(text + "\n")


def size(nbytes: float) -> str:
    """Bytes in binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def wide_console(*tables: Table, stderr: bool = False) -> Console:
    """A console on stdout, wide enough for `tables` whatever the terminal: cells stay whole."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(soft_wrap=True, stderr=stderr)
    room = console.options.update(max_width=1000)
    needed = [Measurement.get(console, room, table).maximum for table in tables]
    console.width = max(console.width, *needed)
    return console


class Bars:
    """Progress bars with time left; on a pipe, one line per finished stage."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._name = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(finished=kind is None)

    def phase(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""
        self._close(finished=True)
        self._name = name
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        counted = [MofNCompleteColumn()] if total < 100_000 else [TaskProgressColumn()]
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *counted,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(name, total=total, note="")

    def step(self, amount: int = 1, note: str = "") -> None:
        """`amount` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note)

    def remark(self, text: str) -> None:
        """Something to read while work goes on, above the bar."""
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def pause(self) -> None:
        """Something else is about to be printed."""
        self._close(finished=True)

    def _close(self, finished: bool) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._name and finished and not self.quiet:
            say(f"{self._name}: done")
        self._name = ""


def summary(result: CompressResult) -> None:
    """The table that ends a compression: every site and byte, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "format"):
        table.add_column(column)
    for column in ("sites", "weights", "bytes", "error"):
        table.add_column(column, justify="right")
    for group in result.groups:
        table.add_row(
            group.kind,
            group.format,
            f"{group.sites:,}",
            f"{group.parameters:,}",
            f"{group.nbytes:,}" if group.format != "dense" else "in the next row",
            f"{group.error:.2e}" if group.format != "dense" else "-",
        )
    table.add_row("everything else", "dense", "-", "-", f"{result.dense_bytes:,}", "-")
    table.add_row("total", "", "", "", f"{result.nbytes:,}", "")
    console = Console(soft_wrap=True)
    console.print(table)
    ratio = result.source_bytes / result.nbytes
    console.print(
        f"\n{size(result.source_bytes)} -> {size(result.nbytes)} ({ratio:.2f}x smaller), "
        f"{result.bits:g} bits, {result.bits_per_weight:.3f} bits per quantised weight with scales",
        highlight=False,
    )
    if result.starved:
        console.print(
            f"{result.starved} of {result.experts} experts saw too few calibration tokens and were "
            "fitted partly to their layer's inputs",
            highlight=False,
        )
    lost = "a site's output energy lost on the calibration text"
    if not result.calibrated:
        lost = "a site's squared weights lost, |dW|^2 / |W|^2"
    console.print(f"error: share of {lost}", highlight=False)
    if result.predicted is not None:
        console.print(_expected(result.predicted), highlight=False)
    if result.measured is not None:
        console.print(_limit_met(result), highlight=False)
    if result.forecast is not None:
        console.print(_kept(result), highlight=False)
    console.print(
        f"artifact: {result.path}, {result.artifact_bytes:,} bytes ({result.seconds:.1f} s)",
        highlight=False,
    )


def _kept(result: CompressResult) -> str:
    """What was estimated beforehand beside what came."""
    assert result.forecast is not None
    parts = [
        f"{result.forecast['disk']:,} bytes, came {result.artifact_bytes:,}",
        f"{result.forecast['seconds']:.0f} s, took {result.seconds:.0f}",
    ]
    if result.peak_memory is not None:
        parts.append(f"{size(result.forecast['memory'])}, held {size(result.peak_memory)}")
    return "estimated: " + "; ".join(parts)


def _limit_met(result: CompressResult) -> str:
    """What a limit was met with."""
    assert result.measured is not None
    texts = ", ".join(
        f"{name} KL {found['kl']:.3g}, same top-1 {found['agreement']:.1%}"
        for name, found in result.measured["texts"].items()
    )
    return f"measured after {result.rounds} tries: {texts}"


def _expected(predicted: dict[str, Any]) -> str:
    """The KL that statistics predict, with its error bar."""
    text = f"predicted KL: {predicted['mean']:.3g} nats per token"
    if predicted["low"] is not None:
        text += f", {predicted['low']:.3g} to {predicted['high']:.3g} within one standard error"
    parts = ", ".join(f"{label} {value:.3g}" for label, value in predicted["kl"].items())
    return f"{text} ({parts})"


def next_commands(result: CompressResult, model: str, lora: Sequence[str] = ()) -> None:
    """What a person would type now."""
    adapters = "".join(f" --against-lora {one}" for one in lora)
    say(f"next: bitnest eval {result.path} --against {model}{adapters}")
    say(f"      bitnest serve {result.path}")
