"""An evaluation as a table for people: one row per model, the base first, the protocol below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnest.eval.report import EvalReport, Row, Score

if TYPE_CHECKING:
    from rich.table import Table


VAGUE = 0.2  # of a mean KL that its standard error may be before it is said
LEAST = 5e-7  # nats: less is shown as 0
NAME_WIDTH = 16  # characters of a model's name that stay on one line, however narrow the table


def table(report: EvalReport) -> Table:
    """Model, size and bits per weight, then for each text perplexity, KL and agreement.

    KL columns are nats per token and appear only where there is a base.
    """
    from rich.table import Table

    result = Table(
        box=None, pad_edge=False, header_style="bold", caption=protocol(report),
        caption_justify="left",
    )  # fmt: skip
    longest = max(len(_name(row)) for row in report.rows)
    result.add_column("model", overflow="fold", min_width=min(longest, NAME_WIDTH))
    result.add_column("size", justify="right", no_wrap=True)
    result.add_column("bits/\nweight", justify="right", no_wrap=True)
    for text in report.texts:
        result.add_column(f"{text.label}\nPPL", justify="right", no_wrap=True)
        if report.base is not None:
            for title in ("KL\nmean", "KL\np99", "same\ntop-1"):
                result.add_column(title, justify="right", no_wrap=True)
    for row in report.rows:
        result.add_row(*_cells(report, row))
    return result


def _cells(report: EvalReport, row: Row) -> list[str]:
    cells = [
        _name(row),
        _size(row.nbytes),
        "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
    ]
    for score in row.scores:
        cells.append(f"{score.perplexity:,.2f}")
        if report.base is not None:
            cells.extend(_divergence(score))
    return cells


def _name(row: Row) -> str:
    return f"{row.model} (base)" if row.base else row.model


def _divergence(score: Score) -> list[str]:
    if score.kl is None:
        return ["-", "-", "-"]
    return [_nats(score.kl.mean), _nats(score.kl.p99), f"{100 * score.kl.same_top:.1f} %"]


def _nats(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= LEAST else "0"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def protocol(report: EvalReport) -> str:
    """A few lines that say how the figures were measured."""
    text = report.texts[0]
    lines = [
        f"{text.windows} windows x {text.window} tokens per text, {_SELECTIONS[text.selection]}; "
        f"{text.predictions:,} predictions; {report.dtype}"
    ]
    if report.base is not None:
        lines.append(f"KL({report.base} || model) in nats per token")
        worst = _uncertainty(report)
        if worst > VAGUE:
            lines.append(f"KL: standard error up to {worst:.0%} of the mean; more --windows help")
    lines.append("bits/weight: all weight bytes over all parameters of the base")
    if report.base is None:
        lines[-1] = "bits/weight: all weight bytes over all parameters"
    if any(row.without for row in report.rows):
        lines.append(
            "without LAYER:EXPERT: its gate is 0, its tokens' other gates scaled to the same sum"
        )
    lines += [
        f"kv {name}: windows of {text.window} tokens end before anything reads what it quantised; "
        f"--window {enough} shows its loss" for name, enough in report.unread_caches.items()
    ]  # fmt: skip
    return "\n".join(lines)


def _uncertainty(report: EvalReport) -> float:
    """The largest standard error of a mean KL, relative to it."""
    found = [score.kl for row in report.rows for score in row.scores if score.kl is not None]
    return max((kl.error / kl.mean for kl in found if kl.error and kl.mean > LEAST), default=0.0)


_SELECTIONS = {"spread": "spread evenly without overlap", "random": "drawn at random"}
