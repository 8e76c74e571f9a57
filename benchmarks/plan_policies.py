"""Plans of every policy at equal bytes, carried out and measured: KL and perplexity on each text.

    python -m benchmarks.plan_policies MODEL --data LABEL=FILE ... [--bits 2.25,2.5,3,3.5,4,5] \
        [--policies NAME,NAME] [--work DIR] [--plot FILE] [--samples N] [--length N] [--windows N]

Every text is cut in half: the first halves calibrate (`bitnest analyze`, and GPTQ of every plan
with the same settings), the second halves are measured on. Every policy gets the same candidates,
int2 to int8 in groups of 128, and the same budget in code bits, hence in bytes; the artifacts'
bytes are in the table. Embedding, head and routers stay as they are in all plans. `recovered` is
the share of the perplexity lost by uniform that a plan wins back, the mean over texts.

Measured on up to 400 windows of 256 tokens of every text: at 5 bits one token in a thousand, whose
route changed, holds half of an MoE's KL, and on 64 windows the order of plans is chance. The JSON
has the standard error of every KL.

DIR keeps what was measured: a second call only adds what is missing. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import halves, machine

BITS = "2.25,2.5,3,3.5,4,5"


def main() -> None:
    """Plan, compress, evaluate, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--bits", default=BITS)
    parser.add_argument("--policies", default="")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-plans-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    statistics = api.analyze(
        args.model, work / "statistics", data=first, samples=args.samples, length=args.length,
        formats=[f"int{bits}-g{args.group}" for bits in range(2, 9)],
    ).path  # fmt: skip
    rows: list[dict[str, Any]] = []
    for bits in (float(text) for text in args.bits.split(",")):
        rows.extend(measure(args, bits, statistics, first, second, work))
        report([row for row in rows if row["asked"] == bits])
    print(f"\n{machine()}")
    if args.plot is not None:
        plot(rows, args.plot)
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def measure(
    args: argparse.Namespace,
    bits: float,
    statistics: Path,
    first: list[str],
    second: list[str],
    work: Path,
) -> list[dict[str, Any]]:
    """One row per policy at one budget."""
    from bitnest import api

    known_file = work / "measured.json"
    known = json.loads(known_file.read_text()) if known_file.exists() else {}
    plans = api.compare_policies(args.model, bits=bits, statistics=statistics)
    wanted = set(args.policies.split(",")) if args.policies else {p.plan.policy for p in plans}
    plans = [planned for planned in plans if planned.plan.policy in wanted]
    missing: dict[str, Path] = {}
    for planned in plans:
        key = f"{key_of(planned)}-{args.windows}"
        if key in known or key in missing:
            continue
        out = work / f"plan-{key}"
        started = time.monotonic()
        api.compress(
            args.model, out, plan=planned.plan, data=first, samples=args.samples,
            length=args.length, statistics=None,
        )  # fmt: skip
        sys.stderr.write(
            f"{bits:g} bits, {planned.plan.policy}: {time.monotonic() - started:.0f} s\n"
        )
        missing[key] = out
    if missing:
        known.update(evaluate(args, missing, second))
        known_file.write_text(json.dumps(known))
    rows = []
    for planned in plans:
        values = known[f"{key_of(planned)}-{args.windows}"]
        rows.append(
            {
                "asked": bits, "policy": planned.plan.policy, "bits": planned.bits,
                "predicted": planned.kl, "predicted_mean": planned.mean, **values,
                "mean": sum(values["kl"].values()) / len(values["kl"]),
            }
        )  # fmt: skip
    uniform = next((row for row in rows if row["policy"] == "uniform"), None)
    for row in rows:
        row["recovered"] = None if uniform is None else recovered(row, uniform)
    return rows


def evaluate(
    args: argparse.Namespace, outs: dict[str, Path], data: list[str]
) -> dict[str, dict[str, Any]]:
    """What every artifact measures, by key; the artifacts are removed."""
    from bitnest import api

    found = [
        api.evaluate(list(outs.values()), against=args.model, data=[text],
                     windows=available(args, text)) for text in data
    ]  # fmt: skip
    base = {part.texts[0].label: part.rows[0].scores[0].perplexity for part in found}
    measured = {}
    for number, (key, out) in enumerate(outs.items(), 1):
        scores = [part.rows[number].scores[0] for part in found]
        measured[key] = {
            "bytes": sum(file.stat().st_size for file in out.iterdir()),
            "kl": {s.text: s.kl.mean for s in scores if s.kl},
            "error": {s.text: s.kl.error for s in scores if s.kl},
            "agreement": {s.text: s.kl.same_top for s in scores if s.kl},
            "perplexity": {s.text: s.perplexity for s in scores},
            "windows": {part.texts[0].label: part.texts[0].windows for part in found},
            "base": base,
        }
        shutil.rmtree(out)
    return measured


def available(args: argparse.Namespace, spec: str) -> int:
    """Windows of a text, at most as many as asked for."""
    from bitnest.calibrate.data import token_windows
    from bitnest.calibrate.sources import load_texts, parse_source
    from bitnest.checkpoint import resolve_model
    from bitnest.packed.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(args.model))
    found = token_windows(tokenizer, load_texts(parse_source(spec).source), window=256, count=None)
    return min(args.windows, len(found))


def key_of(planned: Any) -> str:
    """Of the formats that were chosen, whatever the rules that say so."""
    formats = json.dumps(planned.menu.plan(planned.choice), sort_keys=True)
    return hashlib.sha256(formats.encode()).hexdigest()[:16]


def recovered(row: dict[str, Any], uniform: dict[str, Any]) -> float:
    """Share of uniform's loss of perplexity that is won back, mean over texts."""
    shares = [
        (uniform["perplexity"][t] - row["perplexity"][t]) / (uniform["perplexity"][t] - base)
        for t, base in row["base"].items()
    ]
    return sum(shares) / len(shares)


def report(rows: list[dict[str, Any]]) -> None:
    """One budget's table, the least KL first; a star where a text's KL is the least."""
    texts = list(rows[0]["kl"])
    least = {t: min(row["kl"][t] for row in rows) for t in texts}
    head = "  ".join(f"{t + ' KL':>12} {'PPL':>8}" for t in texts)
    print(f"\n{rows[0]['asked']:g} bits{'':<4} {'bytes':>11}  {head}  {'mean KL':>9} {'+-':>7} "
          f"{'predicted':>9} {'recovered':>9}")  # fmt: skip
    for row in sorted(rows, key=lambda r: r["mean"]):
        cells = "  ".join(
            f"{row['kl'][t]:11.5f}{'*' if row['kl'][t] == least[t] else ' '} "
            f"{row['perplexity'][t]:8.2f}" for t in texts
        )  # fmt: skip
        share = "-" if row["recovered"] is None else f"{row['recovered']:.0%}"
        error = math.hypot(*(e or 0.0 for e in row["error"].values())) / len(texts)
        print(f"{row['policy']:<10} {row['bytes']:>12,}  {cells}  {row['mean']:9.5f} {error:7.5f} "
              f"{row['predicted_mean']:9.5f} {share:>9}")  # fmt: skip
    sys.stdout.flush()


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean KL over average bits, a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["asked"])
        ours = policy == "bitnest"
        axes.plot([r["asked"] for r in own], [r["mean"] for r in own], marker="o", markersize=3,
                  linewidth=2 if ours else 1, label=policy, zorder=3 if ours else 2)  # fmt: skip
    axes.set(yscale="log", xlabel="average code bits", ylabel="measured KL, nats/token")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
