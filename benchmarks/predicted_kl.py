"""Predicted against measured KL over random mixed plans.

    python -m benchmarks.predicted_kl MODEL --data books=FILE [--data code=FILE ...] \
        [--plans 40] [--work DIR] [--plot kl.png]

Every text is halved. On the first halves MODEL is analyzed (default candidates, 2 to 8 bits) and
compressed, once for every plan, by `compress` as a user would run it; plans are drawn as the
analysis' own probes are, by another seed. On the second halves KL(MODEL || artifact) is measured.
Predictions come from the statistics alone. DIR keeps what was measured, so that a second call
compares other predictions (--importance) with it. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.format_table import machine

SEED = 1000  # of the plans; the analysis' probes are drawn with 0


def main() -> None:
    """Analyze, predict, compress, measure, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--importance", default="kl")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-kl-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    started = time.monotonic()
    statistics = api.analyze(
        args.model, work / f"statistics-{args.importance}", data=first, samples=args.samples,
        length=args.length, importance=args.importance,
    )  # fmt: skip
    seconds = time.monotonic() - started
    rows = measure(statistics, args, first, second, work)
    report(rows, args, seconds)
    if args.plot is not None:
        plot(rows, args.plot)


def halves(data: list[str], work: Path) -> tuple[list[str], list[str]]:
    """`label=file` of the first and of the second half of every text."""
    from bitnest.calibrate.sources import load_texts, parse_source

    parts: tuple[list[str], list[str]] = ([], [])
    for spec in data:
        source = parse_source(spec)
        text = "\n".join(load_texts(source.source))
        cut = text.rfind("\n", 0, len(text) // 2) + 1
        for number, half in enumerate((text[:cut], text[cut:])):
            file = work / f"{source.label}-{number}.txt"
            file.write_text(half, encoding="utf-8")
            parts[number].append(f"{source.label}={file}")
    return parts


def measure(
    statistics: Any, args: argparse.Namespace, first: list[str], second: list[str], work: Path
) -> list[dict[str, Any]]:
    """One row per plan: bits, predicted and measured KL per label."""
    from bitnest.calibrate.predict import Predictor
    from bitnest.calibrate.probes import draw_plans
    from bitnest.formats import parse_format

    predictor = Predictor(statistics)
    formats = [parse_format(name) for name in statistics.formats]
    plans = [
        {name: statistics.formats[number] for name, number in plan.items()}
        for plan in draw_plans(statistics.sites, formats, args.plans, SEED)
    ]
    known = work / "measured.json"
    if not known.exists():
        known.write_text(json.dumps(_measured(plans, args, first, second, work)))
    measured = json.loads(known.read_text())
    assert [item["plan"] for item in measured] == plans, f"{known} is of other plans: remove it"
    rows = []
    for item in measured:
        found = predictor.predict(item.pop("plan"))
        rows.append({**item, "predicted": found.kl, "mean": found.mean, "error": found.error})
    return rows


def _measured(
    plans: list[dict[str, str]],
    args: argparse.Namespace,
    first: list[str],
    second: list[str],
    work: Path,
) -> list[dict[str, Any]]:
    """Plan, bits and measured KL of every plan."""
    from bitnest import api

    rows: list[dict[str, Any]] = []
    artifacts = [work / f"plan-{number:02d}" for number in range(len(plans))]
    for number, (plan, out) in enumerate(zip(plans, artifacts, strict=True)):
        result = api.compress(
            args.model, out, rules=[f"{name}={fmt}" for name, fmt in plan.items()], data=first,
            samples=args.samples, length=args.length,
        )  # fmt: skip
        rows.append({"plan": plan, "bits": result.bits})
        sys.stderr.write(f"plan {number}: {result.bits:.2f} bits\n")
    found = api.evaluate(artifacts, against=args.model, data=second)
    for row, scores in zip(rows, found.rows[1:], strict=True):
        row["measured"] = {score.text: score.kl.mean for score in scores.scores}
    return rows


def report(rows: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> None:
    """The rows and what they say."""
    from bitnest.calibrate.distribution.rankings import spearman

    labels = list(rows[0]["measured"])
    print(
        f"{'bits':>6}  " + "  ".join(f"{label:>21}" for label in labels) + "   predicted, measured"
    )
    for row in rows:
        cells = [f"{row['predicted'][d]:10.5f} {row['measured'][d]:10.5f}" for d in labels]
        print(f"{row['bits']:6.2f}  " + "  ".join(cells))
    pairs = {d: [(r["predicted"][d], r["measured"][d]) for r in rows] for d in labels}
    pairs["mean"] = [(r["mean"], sum(r["measured"].values()) / len(labels)) for r in rows]
    summary: dict[str, Any] = {}
    for name, values in pairs.items():
        ratios = sorted(measured / predicted for predicted, measured in values)
        inside = sum(abs(math.log(ratio)) <= rows[0]["error"] for ratio in ratios) / len(ratios)
        summary[name] = {
            "spearman": spearman([a for a, _ in values], [b for _, b in values]),
            "median_ratio": median(ratios),
            "p10": ratios[len(ratios) // 10],
            "p90": ratios[-1 - len(ratios) // 10],
            "within_error_bar": inside,
        }
        print(
            f"{name}: Spearman {summary[name]['spearman']:.3f}, measured / predicted: median "
            f"{summary[name]['median_ratio']:.2f}, p10 {summary[name]['p10']:.2f}, "
            f"p90 {summary[name]['p90']:.2f}; {100 * inside:.0f} % within the error bar "
            f"(a factor of {math.exp(rows[0]['error']):.2f})"
        )
    print(f"analysis {seconds:.0f} s; {len(rows)} plans; {machine()}")
    print(json.dumps({"model": args.model, "importance": args.importance, "plans": rows,
                      "summary": summary, "seconds": seconds, "machine": machine()}))  # fmt: skip


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Measured over predicted, logarithmic, with the diagonal and the error bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5.4))
    for label in rows[0]["measured"]:
        x = [row["predicted"][label] for row in rows]
        axes.scatter(x, [row["measured"][label] for row in rows], s=16, label=label)
    values = [v for row in rows for v in (*row["predicted"].values(), *row["measured"].values())]
    ends = [min(values) / 1.3, max(values) * 1.3]
    factor = math.exp(rows[0]["error"])
    axes.plot(ends, ends, color="0.5", linewidth=1, zorder=1)
    low, high = [v / factor for v in ends], [v * factor for v in ends]
    axes.fill_between(ends, low, high, color="0.9", zorder=0)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends,
             xlabel="predicted KL, nats/token", ylabel="measured KL, nats/token")  # fmt: skip
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
