"""The frontier drawn: size against KL, both logarithmic, error bars, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnest.errors import RecipeError, require
from bitnest.quantize.allocation.frontier import Frontier


def draw(found: Frontier, file: Path, marked: Sequence[Path] = ()) -> None:
    """Write a picture. marked: files of `bitnest eval --json`, whose models are drawn as dots.

    Raises:
        MissingExtra: matplotlib is not installed. RecipeError: an unknown kind of picture, or a
        file that is no evaluation.
    """
    require("matplotlib", "plots")
    if file.suffix not in {".svg", ".png", ".pdf"}:
        raise RecipeError(f"no picture of kind '{file.suffix}'", hint="--plot frontier.svg or .png")
    dots = [dot for path in marked for dot in measured(path)]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.8))
    for policy, points in found.points.items():
        x = [p.sizes.total / 2**20 for p in points]
        axes.plot(x, [p.mean for p in points], marker=".", label=f"{policy}, predicted")
        if policy == "bitnest" and points[0].low is not None:
            axes.fill_between(
                x, [p.low or p.mean for p in points], [p.high or p.mean for p in points], alpha=0.15
            )
    for name, nbytes, kl in dots:
        axes.scatter([nbytes / 2**20], [kl], color="black", zorder=3, s=18)
        axes.annotate(name, (nbytes / 2**20, kl), textcoords="offset points", xytext=(4, 4), size=7)
    axes.set(
        xscale="log", yscale="log", xlabel="size, MiB", ylabel="KL to the original, nats/token"
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise RecipeError(f"cannot write the picture: {error.strerror}", where=str(file)) from error
    finally:
        plt.close(figure)


def measured(path: Path) -> list[tuple[str, int, float]]:
    """Name, bytes and mean KL of the models in a file of `bitnest eval --json`.

    Raises:
        RecipeError: not one.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for row in report["rows"]:
            scores = [s["kl"]["mean"] for s in row["scores"] if s.get("kl")]
            if scores:
                found.append((row["model"], int(row["nbytes"]), sum(scores) / len(scores)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            "not what bitnest eval --json writes",
            where=str(path),
            hint="bitnest eval A B --against MODEL --json > FILE",
        ) from error
    return found
