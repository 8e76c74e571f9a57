"""Recipes with rounded inputs, and the bars they have to clear.

    python -m benchmarks.recipe_table MODEL --data LABEL=FILE ... --eval LABEL=FILE ... [--work DIR]

Perplexity and mean KL per text, bytes and mean width of inputs of every recipe that rounds inputs,
beside integer weights alone. `+ppl` is the mean rise in perplexity over the model.
Artifacts in --work are made once. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import machine

PLAIN = ("int4-g128", "int6-g128", "int8-channel")  # weights alone
# what `w4ax-fmpq` lies between: all of its inputs in INT4, and all in INT8
ENDS_OF_FMPQ: dict[str, dict[str, Any]] = {
    f"w4a{bits}": {"format": "int4-g128@perm", "inputs": f"int{bits}-g128", "kv": "int4"}
    for bits in (4, 8)
}
# recipe -> most that perplexity may rise over the model's, or over another row's
BARS: dict[str, tuple[float, str]] = {
    "w8a8-int8": (0.005, ""),
    "w8a8-fp8": (0.005, ""),
    "w6a6": (0.05 / 5.68, ""),
    "w4a8-dgq": (0.01, "int4-g128"),
}


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--eval", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    data = args.data or [f"demo={demo.calibration_text()}"]
    held_out = args.eval or [f"demo={demo.evaluation_text()}"]
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-recipes-"))
    work.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, dict[str, Any]]] = [(name, {"format": name}) for name in PLAIN]
    recipes = {**rounding_recipes(), **ENDS_OF_FMPQ}
    wanted += [(n, own) for n, own in recipes.items() if not args.recipe or n in args.recipe]
    made = {name: make(args, work, name, options, data) for name, options in wanted}
    report(rows(args, made, held_out))


def rounding_recipes() -> dict[str, dict[str, Any]]:
    """Options of bitnest's own recipes that round inputs, by name."""
    from bitnest.recipe_file import own_recipes, read_recipe

    found = {name: read_recipe(file) for name, file in own_recipes().items()}
    return {name: own for name, own in found.items() if own.get("inputs")}


def make(
    args: argparse.Namespace, work: Path, name: str, options: dict[str, Any], data: list[str]
) -> Path:
    """The artifact of one recipe, made once."""
    from bitnest import api

    out = work / name
    started = time.monotonic()
    if not out.exists():
        if "input_bits" in options:  # planned by measured losses
            statistics = work / f"{name}-statistics"
            if not statistics.exists():
                api.analyze(args.model, statistics, data=data, formats=[options["format"]],
                            inputs=options["inputs"], samples=args.samples,
                            length=args.length)  # fmt: skip
            options = {**options, "statistics": statistics}
        api.compress(args.model, out, data=data, samples=args.samples, length=args.length,
                     **options)  # fmt: skip
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    return out


def rows(args: argparse.Namespace, made: dict[str, Path], data: list[str]) -> list[dict[str, Any]]:
    """One per model, the base first, with the rise in perplexity over it."""
    from bitnest import api

    found = api.evaluate(
        list(made.values()), against=args.model, data=data, window=args.window, windows=args.windows
    )
    base = [score.nll for score in found.rows[0].scores]
    return [
        {
            "recipe": name,
            "bytes": row.nbytes,
            "inputs": mean_width(path),
            "perplexity": {s.text: s.perplexity for s in row.scores},
            "kl": {s.text: 0.0 if s.kl is None else s.kl.mean for s in row.scores},
            "rise": mean([math.exp(s.nll - b) - 1 for s, b in zip(row.scores, base, strict=True)]),
        }
        for (name, path), row in zip([("", None), *made.items()], found.rows, strict=True)
    ]


def mean_width(path: Path | None) -> float | None:
    """Bits of inputs over the weights of the blocks; None where none is rounded."""
    from bitnest.artifact import Artifact
    from bitnest.formats.inputs import parse_inputs

    if path is None:
        return None
    records = [r for r in Artifact.open(path).packed() if r.site.kind != "embedding"]
    if not any(r.inputs for r in records):
        return None
    bits = [
        r.site.numel * (parse_inputs(r.inputs).mean_bits(r.site.shape[1]) if r.inputs else 16)
        for r in records
    ]
    return sum(bits) / sum(r.site.numel for r in records)


def mean(values: list[float]) -> float:
    """Of them."""
    return sum(values) / len(values)


def report(table: list[dict[str, Any]]) -> None:
    """The table, and as JSON."""
    texts = list(table[0]["kl"])
    by_name = {row["recipe"]: row for row in table}
    heads = "".join(f"{f'ppl {t}':>13}{f'KL {t}':>12}" for t in texts)
    print(f"{'recipe':<18}{'bytes':>12}{'inputs':>8}{heads}{'+ppl':>9}  bar")
    for row in table:
        scores = "".join(f"{row['perplexity'][t]:13.3f}{row['kl'][t]:12.5f}" for t in texts)
        width = "16" if row["inputs"] is None else f"{row['inputs']:.2f}"
        line = f"{row['recipe'] or 'the model':<18}{row['bytes']:>12,}{width:>8}{scores}"
        print(line + f"{row['rise']:9.2%}" + verdict(row, by_name))
    print(f"\n{machine()}")
    print(json.dumps({"rows": table, "machine": machine()}))


def verdict(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> str:
    """Whether a row clears its bar, if it has one."""
    if row["recipe"] not in BARS:
        return ""
    most, other = BARS[row["recipe"]]
    against = by_name[other]["rise"] if other else 0.0
    rise = (1 + row["rise"]) / (1 + against) - 1
    said = f" over {other}" if other else ""
    return f"  {rise:+.2%}{said}, at most {most:.2%}: {'yes' if rise <= most else 'NO'}"


if __name__ == "__main__":
    main()
